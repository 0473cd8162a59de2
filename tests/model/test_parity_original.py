"""Parity with the original authors' implementation: its own outputs on seeded weights."""

import json

import pytest
import torch
from conftest import SHARED, shared
from safetensors.torch import load_file

from funnel.model.checkpoint import load_weights
from funnel.model.heads import FunnelForSequenceClassification
from funnel.weights.load import read_weights_from

FOLDER = "golden/original"
CASES = sorted(p.name for p in (SHARED / FOLDER).glob("*/")) if (SHARED / FOLDER).is_dir() else ["none"]


@pytest.mark.parametrize("case", CASES)
def test_every_hidden_state_and_the_logits_agree(case):
    folder = shared(f"{FOLDER}/{case}")
    source = read_weights_from(folder)
    flags = json.loads((folder / "run_flags.json").read_text())
    config = source.config.replace(
        truncate_seq=flags["truncate_seq"], attention_type=flags["attn_type"].replace("rel_shift", "relative_shift"),
        block_repeats=source.config.block_repeats, block_sizes=source.config.block_sizes,
    )  # fmt: skip
    model = FunnelForSequenceClassification(config).eval()
    assert load_weights(model, source.weights, str(folder)) == []
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        states, _ = model.encode(expected["input_ids"], None, expected["token_type_ids"])
        logits = model(expected["input_ids"], None, expected["token_type_ids"])
    assert len(states) == sum(name.startswith("hidden_") for name in expected)
    for i, state in enumerate(states):
        torch.testing.assert_close(state, expected[f"hidden_{i}"], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5)
