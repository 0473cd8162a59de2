"""The demo task: published sentences, balanced, with a fixed dev set that shares no sentence with the training set."""

import hashlib
import json
import re

import pytest
from conftest import shared

from funnel.data import demo
from funnel.errors import FunnelError


@pytest.fixture(scope="module")
def sets():
    return demo.examples()


def test_sets_are_balanced_and_alternate_between_the_labels(sets):
    train, dev = sets
    assert (len(train.texts), len(dev.texts)) == (9594, 1068)
    for examples in sets:
        assert examples.pairs is None
        assert examples.labels == ["0", "1"] * (len(examples.texts) // 2)


def test_train_and_dev_share_no_sentence_even_without_punctuation(sets):
    train, dev = ([re.sub(r"[^a-z0-9]", "", text) for text in examples.texts] for examples in sets)
    assert not set(train) & set(dev)
    assert all(train + dev)
    assert len({*sets[0].texts, *sets[1].texts}) == 9594 + 1068


def test_sentences_and_split_are_those_of_published_results(sets):
    digest = hashlib.sha256(json.dumps(sets).encode()).hexdigest()
    assert digest == "7ed52b6f82be1d0f5f66e70de41785f63959e90d048e1a7a5a36badb0ed8007d"


@pytest.mark.parametrize(("label", "name"), [("0", "neg"), ("1", "pos")])
def test_sentences_are_the_published_ones(label, name, sets):
    published = shared(f"data/mr/rt-polarity.{name}").read_text(encoding="utf-8")
    ours = [text for examples in sets for text, own in zip(examples.texts, examples.labels, strict=True) if own == label]
    assert sorted(ours) == sorted(published.translate(demo.WINDOWS_1252).splitlines())


def test_dashes_and_quotation_marks_are_decoded(sets):
    texts = "\n".join(sets[0].texts + sets[1].texts)
    assert "since simone is not real\N{EM DASH}she can't provide any conflict" in texts
    assert "better than a \N{LEFT SINGLE QUOTATION MARK}direct-to-video' release" in texts
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", texts)


def test_attribution_is_beside_the_sentences():
    text = (demo.FOLDER / "LICENSE.txt").read_text(encoding="utf-8")
    for words in ("Bo Pang and Lillian Lee", "https://creativecommons.org/licenses/by/4.0/", "Changes:"):
        assert words in text


def test_a_package_without_the_sentences_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    with pytest.raises(FunnelError, match=r"cannot read .*rt-polarity\.neg\.gz .*; reinstall funnel-transformer"):
        demo.examples()
