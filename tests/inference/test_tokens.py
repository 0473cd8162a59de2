"""Token classifiers: entities with positions in the original text."""

import numpy as np
import pytest
import torch
from conftest import tiny_config

from funnel import TokenClassifier
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.inference.classifier import Classifier
from funnel.inference.predictor import InputFormat, problem_name
from funnel.inference.tokens import Entity, WordTags, split_words
from funnel.model.heads import FunnelForTokenClassification

ENTITIES = ["O", "B-place", "I-place"]
TEXT = "  In\tNew York,\nI saw (Zürich)…"


def make_classifier(labels: list[str], max_length: int = 64) -> TokenClassifier:
    torch.manual_seed(0)
    tokenizer = FunnelTokenizer.train(["in new york i saw zürich ( ) , …"] * 5)
    config = tiny_config(vocab_size=tokenizer.vocab_size, id2label=dict(enumerate(labels)), num_decoder_layers=1)
    return TokenClassifier(FunnelForTokenClassification(config), tokenizer, InputFormat(max_length))


def words_of(text: str) -> list[str]:
    return [text[start:end] for start, end in split_words(text)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TEXT, ["In", "New", "York", ",", "I", "saw", "(", "Zürich", ")", "…"]),
        ("", []),
        (" \n\t\u3000 ", []),
        ("don't-stop!!", ["don", "'", "t", "-", "stop", "!", "!"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs are combining marks
        ("cafe\u0301s ❤\ufe0fx", ["cafe\u0301s", "❤\ufe0f", "x"]),
        ("$5 + a_b", ["$", "5", "+", "a", "_", "b"]),
        ("\x07a\x00", ["\x07a\x00"]),
    ],
)
def test_words_are_split_at_white_space_and_punctuation(text, words):
    assert words_of(text) == words


def test_entities_have_positions_in_the_original_text_and_the_mean_probability():
    classifier = make_classifier(ENTITIES)
    tags = WordTags(np.array([0, 1, 2, 0, 0, 0, 0, 2, 0, 0]), np.linspace(0.1, 1.0, 10))
    first, second = classifier.find_entities(TEXT, split_words(TEXT), tags)
    assert first == Entity("New York", "place", pytest.approx(0.25), 5, 13)
    assert second == Entity("Zürich", "place", pytest.approx(0.8), 22, 28)
    for entity in (first, second):
        assert TEXT[entity.start : entity.end] == entity.text


def test_plain_tags_give_one_label_per_word():
    found = make_classifier(["DT", "NN"])(TEXT)
    assert [entity.text for entity in found] == words_of(TEXT)
    assert all(TEXT[entity.start : entity.end] == entity.text for entity in found)
    assert {entity.label for entity in found} <= {"DT", "NN"}


def test_labels_and_probabilities_are_those_of_the_model():
    classifier = make_classifier(["DT", "NN", "VB"])
    words = ["new", "york", "saw"]
    batch = classifier.tokenizer([" ".join(words)])
    with torch.no_grad():
        expected = classifier.model(**batch)[0, 1:4].softmax(-1)  # one token per word
    found = classifier([words])[0]
    assert [entity.label for entity in found] == [["DT", "NN", "VB"][i] for i in expected.argmax(-1)]
    assert [entity.probability for entity in found] == pytest.approx(expected.amax(-1).tolist(), abs=1e-6)
    assert [(entity.start, entity.end) for entity in found] == [(0, 3), (4, 8), (9, 12)]


def test_a_list_gives_the_results_of_its_items_whatever_their_form():
    classifier = make_classifier(["DT", "NN"])
    texts = ["new york", "", "\x07", "saw (zürich)"]
    several = classifier(texts)
    for text, found in zip(texts, several, strict=True):
        alone = classifier(text)
        assert [e._replace(probability=0) for e in alone] == [e._replace(probability=0) for e in found]
    assert classifier([]) == []
    assert [[e.text for e in row] for row in classifier([["new york", ","], []])] == [["new york", ","], []]


@pytest.mark.parametrize("max_length", [3, 7, 16])
def test_long_texts_are_labeled_to_the_end(max_length):
    classifier = make_classifier(["DT", "NN"], max_length)
    text = "new york " * 50
    assert len(classifier(text)) == 100
    assert classifier.n_truncated == 0


@pytest.mark.parametrize(
    ("texts", "message"),
    [([["a", ""]], r"texts\[0\]\[1\] is empty"), ([3], r"texts\[0\] has type int"), (["a\ud800"], "not valid UTF-8")],
)
def test_invalid_texts_are_errors(texts, message):
    with pytest.raises(FunnelError, match=message):
        make_classifier(ENTITIES)(texts)


def test_a_saved_token_classifier_is_loaded_by_its_own_class_only(tmp_path):
    classifier = make_classifier(ENTITIES)
    classifier.model.save_pretrained(tmp_path / "model")
    classifier.tokenizer.save(tmp_path / "model")
    assert problem_name(tmp_path / "model") == "token-labels"
    assert problem_name(tmp_path) == ""
    loaded = TokenClassifier.load(tmp_path / "model", "cpu", "fp32")
    assert loaded("new york") == classifier("new york")
    with pytest.raises(FunnelError, match="expected a text classifier, found a token classifier"):
        Classifier.load(tmp_path / "model")
