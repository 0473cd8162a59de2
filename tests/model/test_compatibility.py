"""Checkpoints written by version 0.1 before its reorganization load and give the same outputs."""

import json
from pathlib import Path

import pytest
import torch

from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.checkpoint import load_checkpoint, load_weights
from funnel.model.heads import MODELS, FunnelBaseModel, FunnelForSequenceClassification, FunnelPreTrainedModel

FOLDER = Path(__file__).parent.parent / "fixtures/written_by_0_1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def load_directly(folder: Path) -> FunnelPreTrainedModel:
    checkpoint = load_checkpoint(folder)
    model = MODELS[checkpoint.architecture](checkpoint.config)
    assert load_weights(model, checkpoint.weights, str(folder)) == []
    return model.eval()


@torch.no_grad()
def outputs(model: FunnelPreTrainedModel, tokenizer_folder: Path) -> list[torch.Tensor]:
    """The model's output for each text, one text at a time."""
    tokenizer = FunnelTokenizer.load(tokenizer_folder)
    results = []
    for text in EXPECTED["texts"]:
        ids, token_types, *_ = tokenizer.encode([text])[0]
        results.append(model(torch.tensor([ids]), None, torch.tensor([token_types]))[0])
    return results


def load_run(folder: Path) -> FunnelPreTrainedModel:
    return FunnelForSequenceClassification.from_pretrained(folder.parent)


@pytest.mark.parametrize("load", [load_directly, FunnelForSequenceClassification.from_pretrained, load_run])
def test_a_classifier_trained_by_the_old_code_gives_the_same_logits(load):
    folder = FOLDER / "run/best"
    logits = torch.stack(outputs(load(folder), folder))
    torch.testing.assert_close(logits, torch.tensor(EXPECTED["classifier_logits"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("load", [load_directly, FunnelBaseModel.from_pretrained])
def test_a_bert_converted_by_the_old_code_gives_the_same_cls_states(load):
    folder = FOLDER / "converted"
    states = torch.stack([output[0] for output in outputs(load(folder), folder)])
    torch.testing.assert_close(states, torch.tensor(EXPECTED["converted_cls_states"]), rtol=0, atol=1e-5)


def test_the_config_of_the_old_code_is_read_completely():
    config = load_checkpoint(FOLDER / "run/best").config
    assert config.layout == "1,2x2,1"
    assert (config.d_model, config.n_head, config.d_inner, config.id2label) == (16, 2, 32, {0: "no", 1: "yes"})
