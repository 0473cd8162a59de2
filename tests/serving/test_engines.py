"""Served models predict the same as `Classifier`, with PyTorch and with onnxruntime."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from served_models import TEXTS, save_classifier, save_regression

from funnel.analysis.rollout import explain
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model.heads import FunnelForTokenClassification
from funnel.serving.engines import Input, ServedModel, load_models
from funnel.weights.export import INPUTS


@pytest.fixture
def served(tmp_path) -> ServedModel:
    return load_models([save_classifier(tmp_path / "run")], "cpu")[0]


def test_batches_of_mixed_lengths_and_pairs_give_the_classifiers_logits(served):
    inputs = [Input(text, pair) for text in TEXTS for pair in (None, *TEXTS[:3])]
    logits = served.logits(served.encode(inputs))
    classifier = served.classifier
    expected = [classifier.logits([text], None if pair is None else [pair])[0] for text, pair in inputs]
    torch.testing.assert_close(logits, torch.stack(expected), rtol=0, atol=1e-5)


def test_predictions_in_json_are_the_classifiers(served):
    (encoding,) = served.encode([Input(TEXTS[2])])
    prediction = served.classifier(TEXTS[2])
    values = served.to_json(prediction, encoding)
    assert values == {**prediction._asdict(), "n_tokens": 64, "truncated": True, "lengths": [64, 32, 16]}


def test_description_says_what_a_client_needs(tmp_path):
    model = ServedModel.load(save_regression(tmp_path / "run"), "scores")
    described = model.describe()
    assert described.pop("parameters") == sum(p.numel() for p in model.classifier.model.parameters())
    assert described == {
        "name": "scores", "problem": "regression", "labels": [], "pairs": True, "columns": ["first", "second"],
        "max_length": 64, "blocks": "1,2,1", "d_model": 16, "engine": "pytorch", "can_explain": True,
    }  # fmt: skip
    with pytest.raises(FunnelError, match=r"trained on text pairs \(first, second\)"):
        model.encode([Input("a"), Input("a", "b")][:1])


def test_folders_of_the_same_name_get_different_names(tmp_path):
    folders = [save_classifier(tmp_path / place / "run") for place in "abc"]
    assert [model.name for model in load_models(folders, "cpu")] == ["run", "run-2", "run-3"]


def test_other_kinds_of_problem_are_not_served(tmp_path):
    tokenizer = FunnelTokenizer.train(["a good film"] * 5)
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_decoder_layers=1, id2label={0: "O", 1: "B-x", 2: "I-x"})
    FunnelForTokenClassification(config).save_pretrained(tmp_path / "run")
    tokenizer.save(tmp_path / "run")
    with pytest.raises(FunnelError, match=r"expected a model for one of classification, regression, multi-label; a .* cannot"):
        load_models([tmp_path / "run"])


# --- explanations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item", [Input("a GOOD film"), Input("the very bad  film", "not dull"), Input("good " * 90, "bad " * 90)]
)
def test_explained_tokens_name_their_characters(served, item):
    values = served.explain(item)
    for token in values["tokens"]:
        source = (item.text, item.pair)[token["segment"]]
        expected = "" if token["start"] is None else source[token["start"] : token["end"]].lower()
        assert expected == (token["text"].strip() if not token["text"].startswith(" <") else "")
    segments = [token["segment"] for token in values["tokens"]]
    assert segments == sorted(segments)
    assert max(segments) == (item.pair is not None)


def test_explanation_is_that_of_the_library(served):
    values, expected = served.explain(Input("a good film", "not dull")), explain(served.classifier, "a good film", "not dull")
    assert [token["contribution"] for token in values["tokens"]] == pytest.approx(expected.contributions)
    assert [[position["tokens"] for position in block] for block in values["blocks"]] == [
        [position.tokens for position in block] for block in expected.blocks
    ]
    assert values["prediction"]["label"] == expected.prediction.label


# --- onnxruntime ------------------------------------------------------------------------------------------------------


SUM_OF_TOKENS = """
    rows = Gather (weights, input_ids)
    types = Cast <to = 1> (token_type_ids)
    mask = Cast <to = 1> (attention_mask)
    factors = Add (types, one)
    masked = Mul (factors, mask)
    column = Unsqueeze (masked, last)
    tokens = Mul (rows, column)
"""


def write_graph(folder: Path, nodes: str, output: str, weights: np.ndarray) -> None:
    """Writes an ONNX graph in the place of a checkpoint's weights."""
    onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    inputs = ", ".join(f"int64[b, l] {name}" for name in INPUTS)
    header = '<ir_version: 8, opset_import: ["" : 18]>'
    model = onnx.parser.parse_model(f"{header} graph ({inputs}) => (float{output} logits) {{ {SUM_OF_TOKENS} {nodes} }}")
    constants = {"weights": weights, "one": np.float32([1]), "last": np.int64([2]), "length": np.int64([1])}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    onnx.save(model, folder / "model.onnx")


def test_onnx_graph_gets_every_texts_tokens_and_types(tmp_path):
    tokenizer = FunnelTokenizer.load(save_classifier(tmp_path / "onnx"))
    weights = np.random.default_rng(0).normal(size=(tokenizer.vocab_size, 3)).astype(np.float32)
    write_graph(tmp_path / "onnx", "logits = ReduceSum <keepdims = 0> (tokens, length)", "[b, k]", weights)
    config = tmp_path / "onnx/config.json"
    values = json.loads(config.read_text())  # without what an export does not have
    config.write_text(
        json.dumps({k: v for k, v in values.items() if k not in ("format", "architectures")} | {"inputs": INPUTS})
    )
    (model,) = load_models([tmp_path / "onnx"])
    inputs = [Input(text, pair) for text in TEXTS for pair in (None, *TEXTS[:3])]
    expected = []
    for text, pair in inputs:
        (encoding,) = tokenizer.encode([text], None if pair is None else [pair], 64)
        expected.append((weights[encoding.input_ids] * (1 + np.array(encoding.token_type_ids)[:, None])).sum(0))
    logits = model.logits(model.encode(inputs))
    np.testing.assert_allclose(logits.numpy(), np.stack(expected), rtol=1e-5, atol=1e-4)
    assert model.classifier.n_truncated == sum(e.full_length > 64 for e in model.encode(inputs))
    assert (model.describe()["engine"], model.can_explain) == ("onnx", False)


def test_onnx_export_of_another_kind_is_not_served(tmp_path):
    tokenizer = FunnelTokenizer.load(save_classifier(tmp_path))
    weights = np.zeros((tokenizer.vocab_size, 3), np.float32)
    write_graph(tmp_path, "logits = Identity (tokens)", "[b, l, k]", weights)
    with pytest.raises(FunnelError, match="a model of another kind cannot be served"):
        load_models([tmp_path])


def test_damaged_onnx_file_is_an_error(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    (tmp_path / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(FunnelError, match=r"model\.onnx: onnxruntime cannot load it"):
        load_models([tmp_path])


def test_missing_onnxruntime_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "model.onnx").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(FunnelError, match=r"needs the extra onnx \(.*onnxruntime.*'funnel-transformer\[onnx\]'"):
        load_models([tmp_path])
