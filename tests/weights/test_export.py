"""Exported classifiers compute the same as the model."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, padded_batch, tiny_config
from weight_sources import make_bert_folder

import convert_weights
from funnel.cli.convert import convert
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.inference.classifier import Classifier
from funnel.inference.predictor import InputFormat
from funnel.model.heads import (
    FunnelForMaskedLM,
    FunnelForQuestionAnswering,
    FunnelForSequenceClassification,
    FunnelForTokenClassification,
)
from funnel.serving.engines import OnnxClassifier
from funnel.weights.export import INPUTS, export_onnx, export_torch, max_length

BATCHES = [([1], 1), ([2], 2), ([5, 3], 5), ([8, 2, 8], 8), ([16, 9], 16), ([17], 17), ([30, 64, 1, 50], 65), ([130], 130)]
ABSOLUTE = {"relative_attention": False, "position_embeddings": 65}
CONFIGS = [
    {},
    {"pooling_type": "max", "truncate_seq": False, "separate_cls": False, "pool_q_only": False, "blocks": "1,1x2"},
    {**ABSOLUTE, "blocks": "2", "token_type_embeddings": 2},  # BERT
    {**ABSOLUTE, "position_offset": 1, "distance_buckets": 32, "token_type_embeddings": 2, "embedding_size": 8},
    {"relative_attention": False, "distance_buckets": 32, "blocks": "2"},  # no limit: all buckets are used
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_exported_models_give_the_same_logits_for_any_batch_and_length(changes, tmp_path):
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config(num_decoder_layers=0, **{"blocks": "1,1,1", **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # also those that are initialized with 0
            parameter.add_(torch.randn_like(parameter) * 0.3)
    exported = export_torch(model)
    program = exported.module()
    limit = model.config.max_positions
    batches = BATCHES if limit is None else [*(batch for batch in BATCHES if batch[1] <= limit), ([5, limit], limit)]
    too_long = padded_batch([3, (limit or 0) + 1])
    for lengths, width in batches:
        batch = padded_batch(lengths, width)
        with torch.no_grad():
            torch.testing.assert_close(program(*batch), model(*batch), rtol=0, atol=1e-5)
    if limit is not None:
        with pytest.raises(IndexError):
            program(*too_long)

    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    export_onnx(exported, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    assert [model_input.name for model_input in session.get_inputs()] == list(INPUTS)
    for lengths, width in batches:
        batch = padded_batch(lengths, width)
        (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(INPUTS, batch, strict=True)})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(*batch), rtol=0, atol=1e-5)
    if limit is not None:
        with pytest.raises(Exception, match="out of data bounds"):
            session.run(None, {name: tensor.numpy() for name, tensor in zip(INPUTS, too_long, strict=True)})


@pytest.mark.slow
def test_exported_question_answerers_give_the_same_logits_for_all_tokens(tmp_path):
    torch.manual_seed(0)
    model = FunnelForQuestionAnswering(tiny_config(blocks="1,1,1", num_decoder_layers=1)).eval()
    exported = export_torch(model)
    export_onnx(exported, tmp_path / "model.onnx")
    session = pytest.importorskip("onnxruntime", reason="needs the extra onnx").InferenceSession(tmp_path / "model.onnx")
    for lengths, width in BATCHES[:-1]:
        batch = padded_batch(lengths, width)
        (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(INPUTS, batch, strict=True)})
        with torch.no_grad():
            expected, is_token = model(*batch), batch[1] == 1
            for found in (exported.module()(*batch), torch.from_numpy(logits)):
                assert found.shape == expected.shape
                torch.testing.assert_close(found[is_token], expected[is_token], rtol=0, atol=1e-5)


def test_exported_token_classifiers_have_logits_for_every_token_and_none_for_padding(tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    torch.manual_seed(0)
    model = FunnelForTokenClassification(tiny_config(num_decoder_layers=1, **CONFIGS[2])).eval()
    exported = export_torch(model)
    export_onnx(exported, tmp_path / "model.onnx")
    session, program = runtime.InferenceSession(tmp_path / "model.onnx"), exported.module()
    for lengths, width in BATCHES[:-1]:
        batch = padded_batch(lengths, width)
        is_token = batch[1] == 1
        with torch.no_grad():
            expected, logits = model(*batch), program(*batch)
        (onnx,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(INPUTS, batch, strict=True)})
        assert onnx.shape == logits.shape == expected.shape
        for actual in (logits, torch.from_numpy(onnx)):
            torch.testing.assert_close(actual[is_token], expected[is_token], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("trained", "limit", "expected"), [(None, 40, 40), (9, 40, 9), (60, 40, 40), (None, 0, 512), (9, 0, 9)]
)
def test_maximum_length_of_an_export_is_not_above_the_position_table(trained, limit, expected):
    assert max_length(tiny_config(model_max_length=trained, position_embeddings=limit)) == expected


def run_documented_code(marker: str, monkeypatch, folder: Path) -> Callable[..., Any]:
    """Runs the code block of docs/runs.md that contains the marker; returns its `predict_logits`."""
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs/runs.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(next(block for block in blocks if marker in block), names)
    return names["predict_logits"]


@pytest.fixture(params=["single_label_classification", "regression"])
def classifier(request, tmp_path) -> Classifier:
    """A classifier of texts of at most nine tokens, saved in tmp_path/model."""
    tokenizer = FunnelTokenizer.train(["a good film", "a bad film"] * 5).escape_special_tokens()
    torch.manual_seed(0)
    config = tiny_config(num_decoder_layers=0, vocab_size=tokenizer.vocab_size, id2label={0: "bad", 1: "good"})
    config = config.replace(model_max_length=9, text_columns=("first", "second"))
    if request.param == "regression":
        config = config.replace(id2label={0: "score"}, problem_type="regression", label_mean=50_000.0, label_std=20_000.0)
    model = FunnelForSequenceClassification(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return Classifier(model, tokenizer, InputFormat(config.model_max_length))


TEXTS = ["a good film", "a good , good film " * 3, "<sep>"]  # the second one is truncated


@pytest.mark.slow
@pytest.mark.parametrize("classifier", ["regression"], indirect=True)
def test_documented_code_for_onnx_reproduces_our_logits(classifier, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    assert convert_weights.main([str(tmp_path / "model"), str(tmp_path / "out/onnx"), "--to", "onnx"]) == 0
    assert sorted(path.name for path in (tmp_path / "out/onnx").iterdir()) == ["config.json", "model.onnx", "tokenizer.json"]
    config = json.loads((tmp_path / "out/onnx/config.json").read_text())
    assert (config["inputs"], config["model_max_length"], config["text_columns"]) == (list(INPUTS), 9, ["first", "second"])
    assert not {"label_mean", "label_std"} & config.keys()
    predict_logits = run_documented_code("import onnxruntime", monkeypatch, tmp_path)
    served = OnnxClassifier(tmp_path / "out/onnx")
    torch.testing.assert_close(served.logits(TEXTS, TEXTS[::-1]), classifier.logits(TEXTS, TEXTS[::-1]), rtol=1e-6, atol=1e-4)
    for texts, pairs in ((TEXTS, None), (TEXTS, TEXTS[::-1])):
        logits = torch.from_numpy(predict_logits(texts if pairs is None else list(zip(texts, pairs, strict=True))))
        torch.testing.assert_close(logits, classifier.logits(texts, pairs), rtol=1e-6, atol=1e-5)


def test_documented_code_for_transformers_reproduces_our_logits(classifier, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    assert convert_weights.main([str(tmp_path / "model"), str(tmp_path / "out/hf"), "--to", "huggingface"]) == 0
    predict_logits = run_documented_code("import AutoModel", monkeypatch, tmp_path)
    for texts, pairs in ((TEXTS, None), (TEXTS, TEXTS[::-1])):
        expected = classifier.logits(texts, pairs)
        torch.testing.assert_close(predict_logits(texts, pairs), expected, rtol=1e-6, atol=1e-5)


def test_weights_without_a_tokenizer_are_exported_with_a_warning(tmp_path):
    FunnelForSequenceClassification(tiny_config(num_decoder_layers=0)).save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="no tokenizer found"):
        convert(str(tmp_path / "model"), tmp_path / "out", "huggingface")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_a_bare_model_with_a_pooler_cannot_be_exported_to_onnx(tmp_path):
    make_bert_folder(tmp_path / "bert")
    with pytest.raises(FunnelError, match="cannot export a FunnelBaseModel, only FunnelForSequenceClassification, "):
        convert(str(tmp_path / "bert"), tmp_path / "onnx", "onnx")
    assert not (tmp_path / "onnx").exists()


def test_only_classifiers_can_be_exported():
    with pytest.raises(FunnelError, match="cannot export a FunnelForMaskedLM"):
        export_torch(FunnelForMaskedLM(tiny_config()))
