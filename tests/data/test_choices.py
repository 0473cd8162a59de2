"""Multiple-choice questions: readers, encoder, batches."""

import json
import re

import numpy as np
import pytest
import torch

from funnel.data.choices import ChoiceEncoder, ChoiceFile, join_choice
from funnel.data.device_batches import DeviceDataset
from funnel.data.encoding import encode_examples, encode_in_memory
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError

ARTICLE = "the car is red and the house is blue and old"
ROWS = [
    {"context": ARTICLE, "question": "which color has the car ?", "choices": ["red", "dark blue", "old"], "label": 0},
    {"question": "the house is _ .", "choices": ["red", "blue", "new and old"], "label": "B"},
    {"context": "the car is old", "question": "the car is", "choices": ["old", "blue", "red"], "label": "A"},
]
ITEM = {
    "article": ARTICLE,
    "questions": ["the house is _ .", "which color has the car ?"],
    "options": [["red", "blue", "old", "new"], ["old", "new", "blue", "red"]],
    "answers": ["B", "D"],
    "id": "high1.txt",
}


@pytest.fixture(scope="module")
def tokenizer():
    texts = [ARTICLE, "which color has the ? . dark new"] * 5
    return FunnelTokenizer.train(texts)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ChoiceFile(path)


def write_item(folder, **changes):
    (folder / "high").mkdir(exist_ok=True)
    values = {name: value for name, value in {**ITEM, **changes}.items() if value is not None}
    (folder / "high/1.txt").write_text(json.dumps(values))
    return ChoiceFile(folder)


def test_a_jsonl_file_has_labels_as_index_or_letter_and_optional_contexts(tmp_path):
    rows = list(write_lines(tmp_path / "a.jsonl", ROWS).rows())
    assert [row.label for row in rows] == [0, 1, 0]
    assert [row.context for row in rows] == [ARTICLE, "", "the car is old"]
    assert rows[1].choices == ("red", "blue", "new and old")
    assert [row.line for row in rows] == [1, 2, 3]


def test_a_parquet_file_gives_the_rows_of_the_jsonl_file(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{**row, "label": "ABC".index(row["label"]) if isinstance(row["label"], str) else row["label"]} for row in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist([{**row, "n": 1} for row in rows]), tmp_path / "a.parquet")
    expected = list(write_lines(tmp_path / "a.jsonl", ROWS).rows())
    assert list(ChoiceFile(tmp_path / "a.parquet").rows()) == expected


def test_races_folders_are_read_in_the_order_of_their_paths(tmp_path):
    write_item(tmp_path)
    (tmp_path / "middle").mkdir()
    (tmp_path / "middle/2.txt").write_text("\ufeff" + json.dumps({**ITEM, "answers": ["A", "C"]}, indent=1))
    rows = list(ChoiceFile(tmp_path).rows())
    assert [row.label for row in rows] == [1, 3, 0, 2]
    assert rows[1].line == f"{tmp_path}/high/1.txt, question 2"
    assert [row.label for row in ChoiceFile(tmp_path / "middle").rows()] == [0, 2]


def test_unlabeled_questions_can_be_read_for_prediction(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "label"} for row in ROWS]
    path = write_lines(tmp_path / "a.jsonl", rows).path
    assert [row.label for row in ChoiceFile(path, labeled=False).rows()] == [None] * 3
    (tmp_path / "race").mkdir()
    write_item(tmp_path / "race", answers=None)
    assert [row.label for row in ChoiceFile(tmp_path / "race", labeled=False).rows()] == [None] * 2


BAD_ROWS = [
    ({"question": None}, "line 2: question is null; expected a string"),
    ({"context": 3}, "line 2: context is 3; expected a string"),
    ({"choices": "abc"}, 'line 2: choices are "abc"; expected a list of 2 to 26 strings'),
    ({"choices": ["a"]}, 'line 2: choices are ["a"]; expected a list of 2 to 26 strings'),
    ({"choices": ["a", "b", 3]}, "line 2: choice is 3; expected a string"),
    ({"choices": ["a", "b"]}, "line 2: 2 choices, but the first question has 3; all questions need the same number"),
    ({"label": 3}, "line 2: label 3; expected a letter from A to C, or an index from 0 to 2"),
    ({"label": -1}, "line 2: label -1; expected"),
    ({"label": True}, "line 2: label true; expected"),
    ({"label": "D"}, 'line 2: label "D"; expected'),
    ({"label": ""}, 'line 2: label ""; expected'),
    ({"label": None}, "line 2: label null; expected"),
    ({"label": 1.0}, "line 2: label 1.0; expected"),
    ({"question": "\ud800"}, "line 2: question contains a lone surrogate"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ROWS)
def test_an_invalid_row_is_an_error_with_its_line(tmp_path, changes, message):
    source = write_lines(tmp_path / "a.jsonl", [ROWS[0], {**ROWS[0], **changes}])
    with pytest.raises(FunnelError, match=re.escape(f"{source.path}, {message}")):
        list(source.rows())


@pytest.mark.parametrize("name", ["question", "choices", "label"])
def test_a_missing_field_is_an_error(tmp_path, name):
    source = write_lines(tmp_path / "a.jsonl", [{k: v for k, v in ROWS[0].items() if k != name}])
    with pytest.raises(FunnelError, match=f"a.jsonl, line 1: no field '{name}'; the fields are "):
        list(source.rows())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.jsonl: empty"),
        (b"\n\n", "a.jsonl: empty"),
        (b"{nonsense", "line 1: invalid JSON"),
        (b"[1]\n", "line 1: expected a JSON object, found list"),
        (b'{"question": "\xff"}', "line 1: not UTF-8 text"),
    ],
)
def test_a_broken_file_is_an_error(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(FunnelError, match=message):
        list(ChoiceFile(tmp_path / "a.jsonl").rows())


BAD_ITEMS = [
    ({"article": None}, "no field 'article'; the fields are questions, options, answers, id"),
    ({"answers": None}, "no field 'answers'"),
    ({"questions": "why"}, "'questions' is not a list; expected one item per question"),
    ({"options": [["a", "b"]]}, "2 questions, but 1 options"),
    ({"answers": ["A", "B", "C"]}, "2 questions, but 3 answers"),
    ({"questions": [], "options": [], "answers": []}, "no questions; remove the file"),
    ({"answers": ["B", "E"]}, 'question 2: label "E"; expected a letter from A to D'),
    ({"options": [["a", "b", "c"], ["a", "b", "c", "d"]]}, "question 2: 4 choices, but the first question has 3"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ITEMS)
def test_an_invalid_race_file_is_an_error_with_its_name(tmp_path, changes, message):
    source = write_item(tmp_path, **changes)
    with pytest.raises(FunnelError, match=re.escape(f"{tmp_path}/high/1.txt") + ".*" + re.escape(message)):
        list(source.rows())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; expected a JSON object"),
        (b"\xff", "line 1: not UTF-8"),
        (b"{\n\n]", "line 3: invalid JSON"),
        (b"[]", "found list"),
    ],
)
def test_a_broken_race_file_is_an_error(tmp_path, content, message):
    (tmp_path / "1.txt").write_bytes(content)
    with pytest.raises(FunnelError, match=f"1.txt.*{message}"):
        list(ChoiceFile(tmp_path).rows())


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(FunnelError, match=r"no \.txt files; expected RACE's layout"):
        list(ChoiceFile(tmp_path).rows())


def test_csv_cannot_hold_choices(tmp_path):
    (tmp_path / "a.csv").write_text("question,choices,label\nx,y,0\n")
    with pytest.raises(FunnelError, match="choices are lists, which a csv file cannot contain; use jsonl"):
        list(ChoiceFile(tmp_path / "a.csv").rows())


@pytest.mark.parametrize(
    ("question", "joined"),
    [
        ("why ?", "why ? X"),
        ("it is _ .", "it is X ."),
        ("we can tell that_.", "we can tell thatX."),
        ("_ and ____", "X and X"),
        ("what does snake_case mean ?", "what does snake_case mean ? X"),
        ("_", "X"),
        ("", " X"),
    ],
)
def test_the_choice_replaces_a_blank_or_follows_the_question(question, joined):
    assert join_choice(question, "X") == joined


def test_backslashes_in_choices_are_literal():
    assert join_choice("it is _", r"\1\n") == r"it is \1\n"


def test_rows_are_what_the_tokenizer_makes_of_article_and_question_with_choice(tmp_path, tokenizer):
    source = write_lines(tmp_path / "a.jsonl", ROWS)
    dataset = encode_examples(source, ChoiceEncoder(), tokenizer, 64)
    assert dataset.rows.lengths.shape == (3, 3)
    assert dataset.labels.tolist() == [0, 1, 0]
    assert dataset.labels.dtype == np.int32
    for row, example in enumerate(source.rows()):
        for choice, text in enumerate(example.choices):
            joined = join_choice(example.question, text)
            texts = ([example.context], [joined]) if example.context else ([joined], None)
            expected = tokenizer.encode(*texts, max_length=64)[0]
            assert dataset.input_ids(row, choice) == expected.input_ids
            types = dataset.batch(np.array([row])).token_type_ids[0, choice]
            assert types[: len(expected.token_type_ids)].tolist() == expected.token_type_ids
    assert dataset.truncation.texts == 0


def test_the_article_is_truncated_and_not_the_question(tmp_path, tokenizer):
    source = write_lines(tmp_path / "a.jsonl", ROWS[:1])
    full = encode_examples(source, ChoiceEncoder(), tokenizer, 64)
    short = encode_examples(source, ChoiceEncoder(), tokenizer, 13)
    assert short.rows.lengths.max() == 13
    for choice in range(3):
        assert (
            tokenizer.decode(short.input_ids(0, choice)).split(" | ")[1:]
            == (tokenizer.decode(full.input_ids(0, choice)).split(" | ")[1:])
        )
    lost = full.rows.lengths.sum() - short.rows.lengths.sum()
    assert short.truncation == (1, lost, full.rows.lengths.sum(), full.rows.lengths.max())


@pytest.mark.parametrize("context", ["", ARTICLE])
def test_the_last_128_tokens_of_question_and_choice_are_kept(tmp_path, tokenizer, context):
    row = {"context": context, "question": "the " * 200, "choices": ["red", "blue"], "label": 0}
    dataset = encode_examples(write_lines(tmp_path / "a.jsonl", [row]), ChoiceEncoder(), tokenizer, 512)
    words = tokenizer.decode(dataset.input_ids(0, 1)).rpartition(" | ")[2].split()
    assert words == ["the"] * 127 + ["blue"]
    assert dataset.truncation.texts == 1
    assert dataset.truncation.tokens_lost == 2 * 73


@pytest.mark.parametrize("max_length", [4, 5, 9])
def test_tiny_lengths_keep_the_end_of_the_choice(tmp_path, tokenizer, max_length):
    dataset = encode_examples(write_lines(tmp_path / "a.jsonl", ROWS[:1]), ChoiceEncoder(), tokenizer, max_length)
    assert (dataset.rows.lengths <= max_length).all()
    assert tokenizer.decode(dataset.input_ids(0, 1)).split()[-1] == "blue"
    with pytest.raises(FunnelError, match="invalid max_length 3"):
        encode_examples(write_lines(tmp_path / "a.jsonl", ROWS[:1]), ChoiceEncoder(), tokenizer, 3)


def test_device_batches_and_micro_batches_equal_those_of_the_dataset(tmp_path, tokenizer):
    dataset = encode_in_memory(write_lines(tmp_path / "a.jsonl", ROWS), ChoiceEncoder(), tokenizer, 64)
    rows = np.array([2, 0, 1])
    batch = dataset.batch(rows)
    assert batch.input_ids.shape == (3, 3, dataset.longest)
    on_device = DeviceDataset(dataset, torch.device("cpu")).batch(rows, dataset.longest)
    for name, tensor in batch.tensors.items():
        assert torch.equal(tensor, on_device.tensors[name]), name
    parts = batch.split(2)
    assert [part.input_ids.shape[0] for part in parts] == [2, 1]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), batch.input_ids)


def test_a_split_keeps_the_questions_about_a_context_together(tmp_path, tokenizer):
    rows = [{**ROWS[0], "context": f"the car {'is ' * (i // 4)} red"} for i in range(80)]
    dataset = encode_in_memory(write_lines(tmp_path / "a.jsonl", rows), ChoiceEncoder(), tokenizer, 64)
    train, dev = dataset.split(0.2, seed=0)
    assert (len(train), len(dev)) == (64, 16)
    assert not set(train.hashes) & set(dev.hashes)
