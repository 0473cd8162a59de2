"""The comparison with transformers' Trainer: the rows that its data collators receive, and the table."""

import json
from pathlib import Path

from squad_files import squad, write

from benchmarks.studies.problems import Result, hf_row, table
from funnel.data.dataset import IGNORED, Dataset
from funnel.data.tokenizer import FunnelTokenizer
from funnel.problems.registry import encode_split
from funnel.problems.task_args import TaskArgs, load_task


def encode(path: Path) -> tuple[Dataset, FunnelTokenizer]:
    task = load_task(TaskArgs(data=path))
    tokenizer = FunnelTokenizer.train(task.files["train"].iter_texts())
    return encode_split(task, "train", tokenizer, 128), tokenizer


def test_tagged_words_have_labels_and_berts_token_types(tmp_path: Path) -> None:
    path = tmp_path / "train.conll"
    path.write_text("Anna B-PER\nsleeps O\n\nRome B-LOC\n")
    row = hf_row(encode(path)[0], 0, "ForTokenClassification")
    assert row["labels"][0] == row["labels"][-1] == IGNORED
    assert len([label for label in row["labels"] if label != IGNORED]) == 2
    assert row["token_type_ids"] == [0] * len(row["input_ids"])


def test_answers_are_the_positions_of_their_first_and_last_token(tmp_path: Path) -> None:
    dataset, tokenizer = encode(write(tmp_path / "train.json", squad(4)))
    row = hf_row(dataset, 0, "ForQuestionAnswering")
    answer = row["input_ids"][row["start_positions"] : row["end_positions"] + 1]
    assert tokenizer.decode(answer).lower().replace(" ", "") == "rome"
    assert row["token_type_ids"][0] == 0
    assert row["token_type_ids"][row["start_positions"]] == 1


def test_choices_are_separate_lists_without_padding(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    items = [{"context": "Anna lives in Rome .", "question": "where ?", "choices": ["Rome", "in the old city"], "label": 1}] * 2
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    row = hf_row(encode(path)[0], 0, "ForMultipleChoice")
    assert len(row["input_ids"][0]) < len(row["input_ids"][1])
    assert [sum(mask) for mask in row["attention_mask"]] == [len(ids) for ids in row["input_ids"]]
    assert row["label"] == 1


def test_the_table_has_means_over_seeds() -> None:
    results = [Result("minilm", "race", "BERT", seed, 2.0, {"loss": 1.0, "accuracy": a}, 2.0, 10.0, 900.0)
               for seed, a in ((0, 0.5), (1, 0.7))]  # fmt: skip
    other = results[0]._replace(weights="mpnet")
    assert table([*results, other]).splitlines()[2:] == [
        "| minilm | race | 2 | BERT | 2 | accuracy 60.0 ± 10.0 | 2.0 | 10 | 900 |",
        "| mpnet | race | 2 | BERT | 1 | accuracy 50.0 | 2.0 | 10 | 900 |",
    ]
