"""Exported classifiers compute the same as the model."""

import json

import pytest
import torch
from conftest import padded_batch, tiny_config

import convert_weights
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model.heads import FunnelForSequenceClassification, FunnelForTokenClassification
from funnel.weights.export import INPUTS, export_onnx, export_torch

BATCHES = [([1], 1), ([2], 2), ([5, 3], 5), ([8, 2, 8], 8), ([16, 9], 16), ([17], 17), ([30, 64, 1, 50], 65), ([130], 130)]
CONFIGS = [
    {},
    {"pooling_type": "max", "truncate_seq": False},
    {"separate_cls": False, "pool_q_only": False, "blocks": "1,1x2"},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_exported_models_give_the_same_logits_for_any_batch_and_length(changes, tmp_path):
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config(num_decoder_layers=0, **{"blocks": "1,1,1", **changes})).eval()
    exported = export_torch(model)
    program = exported.module()
    for lengths, width in BATCHES:
        batch = padded_batch(lengths, width)
        with torch.no_grad():
            torch.testing.assert_close(program(*batch), model(*batch), rtol=0, atol=1e-5)

    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    export_onnx(exported, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    assert [model_input.name for model_input in session.get_inputs()] == list(INPUTS)
    for lengths, width in BATCHES:
        batch = padded_batch(lengths, width)
        (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(INPUTS, batch, strict=True)})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(*batch), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_converted_folder_is_sufficient_for_inference(tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    tokenizer = FunnelTokenizer.train(["a good film", "a bad film"])
    torch.manual_seed(0)
    config = tiny_config(num_decoder_layers=0, vocab_size=tokenizer.vocab_size, id2label={0: "bad", 1: "good"})
    model = FunnelForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    assert convert_weights.main([str(tmp_path / "model"), str(tmp_path / "out"), "--to", "onnx"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.onnx", "tokenizer.json"]
    assert json.loads((tmp_path / "out/config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}
    encoding = FunnelTokenizer.load(tmp_path / "out").encode(["a good film"])[0]
    ids, types = torch.tensor([encoding.input_ids]), torch.tensor([encoding.token_type_ids])
    session = runtime.InferenceSession(tmp_path / "out/model.onnx")
    inputs = zip(INPUTS, (ids, torch.ones_like(ids), types), strict=True)
    (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(ids, None, types), rtol=0, atol=1e-5)


def test_only_sequence_classifiers_can_be_exported():
    with pytest.raises(FunnelError, match="cannot export a FunnelForTokenClassification"):
        export_torch(FunnelForTokenClassification(tiny_config()))
