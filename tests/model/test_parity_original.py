"""Parity with the original authors' implementation: hidden states and logits for seeded weights."""

import json

import pytest
import torch
from conftest import SHARED, shared
from safetensors.torch import load_file

from funnel.model.checkpoint import load_weights
from funnel.model.heads import FunnelForSequenceClassification
from funnel.weights.load import read_source

FOLDER = "golden/original"
CASES = sorted(path.name for path in (SHARED / FOLDER).glob("*/")) if (SHARED / FOLDER).is_dir() else ["none"]


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_logits_agree_with_the_original(case):
    folder = shared(f"{FOLDER}/{case}")
    source = read_source(folder)
    flags = json.loads((folder / "run_flags.json").read_text())
    attention_type = flags["attn_type"].replace("rel_shift", "relative_shift")
    config = source.config.replace(truncate_seq=flags["truncate_seq"], attention_type=attention_type)
    model = FunnelForSequenceClassification(config).eval()
    assert load_weights(model, source.weights, str(folder)) == []
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        states, _ = model.encode(expected["input_ids"], None, expected["token_type_ids"])
        logits = model(expected["input_ids"], None, expected["token_type_ids"])
    assert len(states) == sum(name.startswith("hidden_") for name in expected)
    for index, state in enumerate(states):
        torch.testing.assert_close(state, expected[f"hidden_{index}"], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5)
