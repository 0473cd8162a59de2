"""Exported classifiers against the model that they were exported from."""

import json

import pytest
import torch
from conftest import padded_batch, tiny_config

import convert_weights
from funnel.weights import export
from funnel.errors import FunnelError
from funnel.model.heads import FunnelForSequenceClassification, FunnelForTokenClassification
from funnel.data.tokenizer import FunnelTokenizer

BATCHES = [([1], 1), ([2], 2), ([5, 3], 5), ([8, 2, 8], 8), ([16, 9], 16), ([17], 17), ([30, 64, 1, 50], 65), ([130], 130)]
CONFIGS = [
    {},
    {"pooling_type": "max", "truncate_seq": False},
    {"separate_cls": False, "pool_q_only": False, "block_sizes": (1, 1), "block_repeats": (1, 2)},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_exported_models_give_the_same_logits_for_any_batch_and_length(changes, tmp_path):
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config(num_decoder_layers=0, **{"block_sizes": (1, 1, 1), **changes})).eval()
    exported = export.export_torch(model)
    program = exported.module()
    for lengths, width in BATCHES:
        batch = padded_batch(lengths, width)
        with torch.no_grad():
            torch.testing.assert_close(program(*batch), model(*batch), rtol=0, atol=1e-5)

    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    export.export_onnx(exported, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    assert [i.name for i in session.get_inputs()] == list(export.INPUTS)
    for lengths, width in BATCHES:
        batch = padded_batch(lengths, width)
        (found,) = session.run(None, {name: x.numpy() for name, x in zip(export.INPUTS, batch, strict=True)})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(*batch), rtol=0, atol=1e-5)


def test_the_command_writes_a_folder_that_is_all_one_needs(tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    tokenizer = FunnelTokenizer.train(["a good film", "a bad film"])
    torch.manual_seed(0)
    config = tiny_config(num_decoder_layers=0, vocab_size=tokenizer.vocab_size, id2label={0: "bad", 1: "good"})
    model = FunnelForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "mine")
    tokenizer.save(tmp_path / "mine")
    assert convert_weights.main([str(tmp_path / "mine"), str(tmp_path / "out"), "--to", "onnx"]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.onnx", "tokenizer.json"]
    assert json.loads((tmp_path / "out/config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}
    encoding = FunnelTokenizer.load(tmp_path / "out").encode(["a good film"])[0]
    ids, types = torch.tensor([encoding.input_ids]), torch.tensor([encoding.token_type_ids])
    session = runtime.InferenceSession(tmp_path / "out/model.onnx")
    inputs = zip(export.INPUTS, (ids, torch.ones_like(ids), types), strict=True)
    (found,) = session.run(None, {name: x.numpy() for name, x in inputs})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(ids, None, types), rtol=0, atol=1e-5)


def test_other_heads_are_refused():
    with pytest.raises(FunnelError, match="a FunnelForTokenClassification cannot be exported"):
        export.export_torch(FunnelForTokenClassification(tiny_config()))
