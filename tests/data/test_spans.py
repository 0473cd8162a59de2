"""Encoding questions and contexts in windows."""

import itertools

import numpy as np
import pytest
from conftest import shared
from squad_files import squad, write

from funnel.data import encoding
from funnel.data.dataset import IGNORED, Dataset
from funnel.data.encoding import encode_examples, encode_in_memory
from funnel.data.spans import END, MOST_CONTEXT, START, SpanEncoder, most_context
from funnel.data.squad import GoldAnswer, InMemoryQuestions, Question, SquadFile
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError

transformers = pytest.importorskip("transformers", reason="needs the extra test: pip install -e '.[test]'")

CORPUS = ["the king was born in 1900 in the old city , where is the home of king ?"] * 5
WORDS = CORPUS[0].split()


@pytest.fixture(scope="module")
def wordpiece() -> FunnelTokenizer:
    return FunnelTokenizer.train(CORPUS)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> FunnelTokenizer:
    folder = tmp_path_factory.mktemp("roberta")
    transformers.RobertaTokenizer().train_new_from_iterator(CORPUS, vocab_size=400).save_pretrained(folder)
    return FunnelTokenizer.load(folder)


@pytest.fixture(params=["wordpiece", "roberta"])
def tokenizer(request) -> FunnelTokenizer:
    return request.getfixturevalue(request.param)


def encode(tokenizer, *questions: Question, length: int = 512, **settings: int) -> Dataset:
    return encode_in_memory(InMemoryQuestions(questions), SpanEncoder(**settings), tokenizer, length)


def answered(text: str, context: str, question: str = "where is king ?", name: str = "q") -> Question:
    return Question(name, question, context, (GoldAnswer(text, context.index(text)),))


def row_of(dataset: Dataset, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, labels and offsets."""
    tokens = slice(int(dataset.rows.starts[row]), int(dataset.rows.starts[row] + dataset.rows.lengths[row]))
    return dataset.token_ids[tokens], dataset.token_labels[tokens], dataset.offsets[tokens]


def labeled_text(dataset: Dataset, row: int, context: str) -> str:
    first, last = dataset.labels[row]
    offsets = row_of(dataset, row)[2]
    return context[offsets[first, 0] : offsets[last, 1]].strip()


def long_text(n_words: int) -> str:
    return " ".join(itertools.islice(itertools.cycle(WORDS), n_words))


def test_a_row_is_the_tokenizers_pair_of_question_and_context(tokenizer):
    context = "The king was born in 1900."
    dataset = encode(tokenizer, answered("1900", context))
    expected = tokenizer.encode(["where is king ?"], [context])[0]
    batch = dataset.batch(np.array([0]))
    assert batch.input_ids[0].tolist() == expected.input_ids
    assert batch.token_type_ids[0].tolist() == expected.token_type_ids


def test_windows_ids_and_offsets_are_those_of_transformers(tokenizer, tmp_path):
    tokenizer.save_for_transformers(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    question, context = "where is the home ?", long_text(150) + " é😀 cafés"
    n_question = len(tokenizer.encode_plain([question])[0])
    for length, stride in ((40, 10), (40, 33 - n_question), (60, 1), (1000, 128)):
        dataset = encode(tokenizer, Question("q", question, context), length=length, max_query_length=20, doc_stride=stride)
        size = length - 2 - tokenizer.separators - n_question
        expected = peer(
            question, context, max_length=length, truncation="only_second", stride=max(0, size - stride),
            return_overflowing_tokens=True, return_offsets_mapping=True, padding=False,
        )  # fmt: skip
        assert len(dataset) == len(expected["input_ids"])
        for row in range(len(dataset)):
            ids, _, offsets = row_of(dataset, row)
            assert ids.tolist() == expected["input_ids"][row]
            is_context = np.array([part == 1 for part in expected.sequence_ids(row)])
            assert (offsets[~is_context] == -1).all()
            assert offsets[is_context].tolist() == [list(o) for o in np.array(expected["offset_mapping"][row])[is_context]]


def test_the_labeled_tokens_are_those_of_the_answer(tokenizer):
    context = "The king was born in 1900, in the old city."
    for answer in ("The king", "1900", "in 1900", "city.", "born in 1900, in the old city."):
        dataset = encode(tokenizer, answered(answer, context))
        assert labeled_text(dataset, 0, context) == answer
        first, last = dataset.labels[0]
        labels = row_of(dataset, 0)[1]
        assert np.flatnonzero((labels != IGNORED) & (labels & START != 0)).tolist() == [first]
        assert np.flatnonzero((labels != IGNORED) & (labels & END != 0)).tolist() == [last]


def test_an_answer_that_cuts_through_words_is_labeled_with_all_tokens_that_it_overlaps(wordpiece):
    context = "the king was born in the old city"
    question = Question("q", "where ?", context, (GoldAnswer("ing was bo", 5),))
    assert labeled_text(encode(wordpiece, question), 0, context) in ("ing was bo", "king was born")
    assert labeled_text(encode(wordpiece, question._replace(answers=(GoldAnswer(" was ", 8),))), 0, context) == "was"


def test_the_first_of_several_answers_is_the_label(wordpiece):
    context = "born in 1900 in the city"
    question = Question("q", "where ?", context, (GoldAnswer("the city", 16), GoldAnswer("1900", 8)))
    assert labeled_text(encode(wordpiece, question), 0, context) == "the city"


def test_offsets_refer_to_the_original_characters(tokenizer):
    context = "  Café\u0301 👑\n\tthe 東京 KING was 1900"
    dataset = encode(tokenizer, answered("KING was 1900", context))
    assert labeled_text(dataset, 0, context) == "KING was 1900"


def test_an_answer_outside_or_across_the_end_of_a_window_is_labeled_with_cls(wordpiece):
    context = long_text(60)
    start = len(long_text(20)) + 1
    answer = context[start : len(long_text(24))]  # tokens 20 to 23
    question = Question("q", "where ?", context, (GoldAnswer(answer, start),))
    dataset = encode(wordpiece, question, length=25, max_query_length=5, doc_stride=1)  # windows of 20 tokens
    starts = np.arange(len(dataset))
    inside = (starts <= 20) & (starts + 20 >= 24)
    assert inside.sum() == 17
    assert [labeled_text(dataset, row, context) for row in np.flatnonzero(inside)] == [answer] * 17
    assert (dataset.labels[~inside] == 0).all()
    assert all(row_of(dataset, row)[1][0] == START | END for row in np.flatnonzero(~inside))
    assert all(row_of(dataset, row)[1][0] == 0 for row in np.flatnonzero(inside))


def test_no_answer_is_labeled_with_cls_and_an_unknown_one_not_at_all(wordpiece):
    dataset = encode(wordpiece, Question("q", "where ?", "the city", ()))
    assert (dataset.labels.tolist(), row_of(dataset, 0)[1][0]) == ([[0, 0]], START | END)
    dataset = encode(wordpiece, Question("q", "where ?", "the city"))
    assert (dataset.labels.tolist(), row_of(dataset, 0)[1][0]) == ([[-1, -1]], 0)


def test_question_and_special_tokens_other_than_cls_are_ignored(tokenizer):
    labels = row_of(encode(tokenizer, answered("city", "the city", question="where is the king")), 0)[1]
    n_question = len(tokenizer.encode_plain(["where is the king"])[0])
    assert labels[0] != IGNORED
    assert (labels[1 : 1 + n_question + tokenizer.separators] == IGNORED).all()
    assert labels[-1] == IGNORED
    assert (labels[1 + n_question + tokenizer.separators : -1] != IGNORED).all()


def test_a_context_of_10000_tokens_is_covered_by_windows(wordpiece):
    context = long_text(10_000)
    dataset = encode(wordpiece, answered("king", context))
    assert dataset.longest == 512
    assert len(dataset) == 1 + -(-(10_000 - (512 - 4 - 3)) // 128)
    covered = {int(start) for row in range(len(dataset)) for start, _ in row_of(dataset, row)[2] if start >= 0}
    assert len(covered) == 10_000
    assert (dataset.rows.examples == 0).all()


def test_every_token_has_one_window_with_the_most_context(wordpiece):
    dataset = encode(wordpiece, answered("king", long_text(300)), length=50, max_query_length=8, doc_stride=13)
    chosen = [
        int(offset[0])
        for row in range(len(dataset))
        for label, offset in zip(*row_of(dataset, row)[1:], strict=True)
        if label != IGNORED and label & MOST_CONTEXT
    ]
    assert len(chosen) == len(set(chosen)) == 300


def test_most_context_is_the_definition():
    bounds = [(0, 10), (5, 15), (8, 18), (12, 20), (16, 20)]  # the first two show as much text around token 7
    for token in range(20):
        scores = [min(token - a, b - 1 - token) + 0.01 * (b - a) if a <= token < b else -1.0 for a, b in bounds]
        assert most_context(20, bounds)[token] == scores.index(max(scores)), token


@pytest.mark.parametrize("context", ["", " \n"])
def test_an_empty_context_is_a_row_without_candidates(tokenizer, context):
    dataset = encode(tokenizer, Question("q", "where ?", context, ()))
    assert len(dataset) == 1
    assert dataset.labels.tolist() == [[0, 0]]


def test_long_questions_are_truncated_and_counted(wordpiece):
    questions = [answered("city", "the city", question=long_text(n), name=str(n)) for n in (3, 64, 65, 70)]
    dataset = encode(wordpiece, *questions)
    assert (dataset.truncation.texts, dataset.truncation.tokens_lost, dataset.truncation.longest) == (2, 7, 70)
    assert dataset.lengths.tolist() == [3 + 5, 64 + 5, 64 + 5, 64 + 5]


def test_a_maximum_length_without_room_for_the_context_is_an_error(wordpiece):
    with pytest.raises(FunnelError, match=r"max_length 67: expected more than max_query_length \(64\) and 3 special"):
        encode(wordpiece, answered("city", "the city"), length=67)
    assert len(encode(wordpiece, answered("city", long_text(9) + " city", question=long_text(80)), length=68)) == 10


def test_windows_overlap_or_touch_if_the_stride_is_longer_than_a_window(wordpiece):
    dataset = encode(wordpiece, answered("king", long_text(100)), length=25, max_query_length=4, doc_stride=128)
    assert [len(row_of(dataset, row)[0]) for row in range(len(dataset))] == [25] * 5 + [17]  # 18 tokens of the context each


def test_examples_and_groups_are_numbered_across_chunks(tmp_path, wordpiece, monkeypatch):
    file = SquadFile(write(tmp_path / "x.json", squad(12)))
    whole = encode_in_memory(file, SpanEncoder(), wordpiece, 512)
    monkeypatch.setattr(encoding, "CHUNK_SIZE", 7)
    for dataset in (encode_in_memory(file, SpanEncoder(), wordpiece, 512), *(
        encode_examples(file, SpanEncoder(), wordpiece, 512) for _ in range(2)  # written to the cache, read from it
    )):  # fmt: skip
        for name in ("token_ids", "token_labels", "offsets"):
            assert np.array_equal(getattr(dataset, name), getattr(whole, name))
        for ours, expected in zip(dataset.rows, whole.rows, strict=True):
            assert np.array_equal(ours, expected)
    assert whole.rows.examples.tolist() == list(range(48))
    assert whole.rows.groups.tolist() == [number for number in range(12) for _ in range(4)]


def test_split_keeps_articles_and_windows_together(tmp_path, wordpiece):
    file = SquadFile(write(tmp_path / "x.json", squad(20)))
    dataset = encode_in_memory(file, SpanEncoder(max_query_length=4, doc_stride=2), wordpiece, 10)
    assert len(dataset) > 80
    train, dev = dataset.split(0.1, seed=0)
    assert len(set(dev.rows.groups)) == 2
    assert not set(dev.rows.groups) & set(train.rows.groups)
    assert len(train) + len(dev) == len(dataset)


def test_a_single_group_cannot_be_split(tmp_path, wordpiece):
    dataset = encode(wordpiece, *(answered("city", "the city", name=str(i)) for i in range(20)))
    with pytest.raises(FunnelError, match=r"dev_share 0\.1 of 20 examples leaves train or dev empty"):
        dataset.split(0.1, seed=0)


def test_answers_of_real_questions_are_found_in_the_original_text(minilm):
    file = SquadFile(shared("data/squad/dev-v1.1.json.xz"))
    questions = list(file.rows())[::20]
    dataset = encode(FunnelTokenizer.load(minilm), *questions, length=384)
    found = {}
    for row, number in enumerate(dataset.rows.examples):
        if dataset.labels[row, 0] > 0:
            found[number] = labeled_text(dataset, row, questions[number].context)
    assert found.keys() == set(range(len(questions)))
    answers = [question.answers[0].text.strip() for question in questions]
    assert all(answer in found[number] for number, answer in enumerate(answers))
    assert np.mean([answer == found[number] for number, answer in enumerate(answers)]) > 0.98
