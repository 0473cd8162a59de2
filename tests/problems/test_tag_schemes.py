"""Entities, their scores, and detected schemes: compared with seqeval, also on random and degenerate tags."""

import functools
import itertools
import random
import warnings

import numpy as np
import pytest
from conftest import shared

from funnel.data.tagged import TaggedFile
from funnel.data.tasks import get_task, locate_files
from funnel.errors import FunnelError
from funnel.problems.tag_schemes import TagSequence, TagTable, count_spans, infer_tags, mark_entities

pytest.importorskip("seqeval", reason="needs the extra test: pip install -e '.[test]'")
default = pytest.importorskip("seqeval.metrics.sequence_labeling").precision_recall_fscore_support
strict_mode = pytest.importorskip("seqeval.metrics.v1").precision_recall_fscore_support
scheme = pytest.importorskip("seqeval.scheme")

IOB = ["O", "B-a", "I-a", "B-b-c", "I-b-c"]
BIOES = ["O", *(f"{prefix}-{kind}" for kind in ("a", "b-c") for prefix in "BIES")]
BARE = ["O", "B", "I"]
SCHEMES = {"IOB": (IOB, scheme.IOB2), "BIOES": (BIOES, scheme.IOBES), "bare": (BARE, scheme.IOB2)}


def to_sequence(sentences: list[list[str]], labels: list[str]) -> TagSequence:
    ids = [labels.index(tag) for sentence in sentences for tag in sentence]
    return TagSequence(np.array(ids, int), np.repeat(np.arange(len(sentences)), list(map(len, sentences))))


def random_sentences(labels: list[str], seed: int) -> tuple[list[list[str]], list[list[str]]]:
    """Targets and predictions of equal lengths; every second seed, predictions are mostly right."""
    generator = random.Random(seed)
    targets = [[generator.choice(labels) for _ in range(generator.randrange(9))] for _ in range(generator.randrange(1, 9))]
    share = 0.8 if seed % 2 else 0.0
    return targets, [[t if generator.random() < share else generator.choice(labels) for t in row] for row in targets]


def assert_equals_seqeval(labels, kind, targets, predictions):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for strict in (False, True):
            reference = functools.partial(strict_mode, scheme=kind) if strict else default
            counts = count_spans(labels, to_sequence(predictions, labels), to_sequence(targets, labels), strict)
            expected = reference(targets, predictions, average="micro")
            assert (counts.precision, counts.recall, counts.f1) == pytest.approx(expected[:3], abs=1e-12), (
                targets,
                predictions,
            )
            present = [i for i, n in enumerate(counts.actual + counts.predicted) if n]
            by_type = reference(targets, predictions, average=None)
            if present:
                assert counts.actual[present].tolist() == by_type[3].tolist()
                recall = counts.correct[present] / np.maximum(counts.actual[present], 1)
                np.testing.assert_allclose(recall, by_type[1], atol=1e-12)


@pytest.mark.parametrize("name", SCHEMES)
def test_scores_equal_those_of_seqeval_in_both_modes_for_random_tags(name):
    for seed in range(300):
        assert_equals_seqeval(*SCHEMES[name], *random_sentences(SCHEMES[name][0], seed))


@pytest.mark.parametrize("name", ["IOB", "bare"])
def test_scores_equal_those_of_seqeval_for_all_short_sentences(name):
    labels, kind = SCHEMES[name]
    sentences = [list(tags) for n in range(4) for tags in itertools.product(labels, repeat=n)]
    assert_equals_seqeval(labels, kind, sentences, sentences)
    assert_equals_seqeval(labels, kind, sentences, [sentence[::-1] for sentence in sentences])


@pytest.mark.parametrize(
    ("targets", "predictions"),
    [
        ([["O", "O"]], [["O", "O"]]),
        ([["O"]], [["B-a"]]),
        ([["B-a"]], [["O"]]),
        ([[], ["B-a"], []], [[], ["B-a"], []]),
        ([["B-a"], ["I-a"]], [["B-a"], ["I-a"]]),  # an entity does not continue in the next sentence
        ([["I-a", "I-b-c"]], [["B-a", "B-b-c"]]),
    ],
)
def test_degenerate_tags_have_the_scores_of_seqeval(targets, predictions):
    assert_equals_seqeval(IOB, scheme.IOB2, targets, predictions)


def test_iob1_entities_are_those_of_seqeval_in_strict_mode():
    sentences = [["I-a", "I-a", "B-a", "I-b-c", "O", "I-a", "B-a", "I-a"], ["I-b-c", "B-b-c", "I-a"]]
    spans = TagTable(IOB).find_spans(to_sequence(sentences, IOB))
    expected = scheme.Entities(sentences, scheme.IOB1).entities
    offsets = [0, len(sentences[0])]
    assert [(int(s), int(e) + 1) for s, e in zip(spans.starts, spans.ends, strict=True)] == [
        (entity.start + offset, entity.end + offset) for offset, row in zip(offsets, expected, strict=True) for entity in row
    ]


# --- detection --------------------------------------------------------------------------------------------------------


def infer(tmp_path, *sentences: str):
    (tmp_path / "x.conll").write_text(
        "\n\n".join(sentence.replace(" ", "\n") for sentence in sentences).replace("=", "\t") + "\n"
    )
    return infer_tags(TaggedFile(tmp_path / "x.conll"))


@pytest.mark.parametrize(
    ("sentences", "expected", "names"),
    [
        (["a=B-x b=I-x c=O", "d=B-x e=B-x"], "IOB2", ["O", "B-x", "I-x"]),
        (["a=I-x b=I-x c=O", "d=I-x e=B-x"], "IOB1", ["O", "B-x", "I-x"]),
        (["a=S-x b=O", "d=B-y e=E-y"], "BIOES", ["O", *(f"{p}-{t}" for t in "xy" for p in "BIES")]),
        (["a=S-x b=O"], "BIOES", ["O", "B-x", "I-x", "E-x", "S-x"]),
        (["a=B b=I c=O"], "IOB2", ["O", "B", "I"]),
        (["a=DT b=NN", "c=O"], "plain", ["DT", "NN", "O"]),
        (["a=X b=S-adj"], "plain", ["S-adj", "X"]),
    ],
)
def test_the_scheme_is_detected_and_labels_have_all_its_prefixes(sentences, expected, names, tmp_path):
    tags = infer(tmp_path, *sentences)
    assert (tags.scheme, tags.names, tags.warnings) == (expected, names, ())
    assert mark_entities(tags.names) == (expected != "plain")


def test_tags_that_are_not_valid_in_the_scheme_are_a_warning_with_the_line(tmp_path):
    tags = infer(tmp_path, "a=B-x b=O c=B-x", "d=I-x", "e=O f=I-y")
    assert tags.scheme == "IOB2"
    assert tags.warnings == (
        "x.conll: 2 tags with I- at the beginning of an entity, which IOB2 does not allow there; the first one is in line 5; "
        "read as entities",
    )


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        (["a=B-x b=O", "c=PER"], "x.conll, line 4: tag 'PER' is outside the scheme: others mark entities, so it must be O or"),
        (["a=B-x b=L-x"], "line 2: tag 'L-x' is outside the scheme: .*; write BILOU's L- and U- as E- and S-"),
        (["a=B-x b=b-x"], "line 2: tag 'b-x' is outside the scheme"),
        (["a=O b=O"], "x.conll: every tag is 'O'; is column -1 that of the tags"),
        ([" ".join(f"w=t{i}" for i in range(30))], "30 different tags for 30 words; choose another label_column"),
    ],
)
def test_tags_outside_the_scheme_are_errors(sentences, message, tmp_path):
    with pytest.raises(FunnelError, match=message):
        infer(tmp_path, *sentences)


def test_wnut17_is_iob2_with_the_labels_of_the_task():
    task = locate_files(get_task("wnut17"), shared("data/wnut17"))
    for file in task.files.values():
        tags = infer_tags(file)
        assert (tags.scheme, tags.names, tags.warnings) == ("IOB2", task.label_names, ())
    assert "location (548)" in infer_tags(task.files["train"]).description
