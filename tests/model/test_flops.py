"""Costs against PyTorch's own counters."""

import pytest
import torch
from conftest import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from funnel.model import attention_backends
from funnel.model.config import FunnelConfig
from funnel.model.flops import module_costs
from funnel.model.heads import FunnelForSequenceClassification

CONFIGS = [
    {},
    {"pool_q_only": False},
    {"separate_cls": False, "truncate_seq": False},
    {"block_sizes": (6, 3, 3), "block_repeats": (1, 2, 2)},
    {"block_sizes": (2,) * 7, "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 256},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_parameters_are_exact(changes):
    config = tiny_config(num_decoder_layers=0, **changes)
    model = FunnelForSequenceClassification(config)
    parts = {part.name: part.parameters for part in module_costs(config, 10)}
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    for block in range(len(config.block_sizes)):
        assert parts[f"block {block}"] == sum(p.numel() for p in model.encoder.blocks[block].parameters())


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize(("texts", "length"), [(1, 512), (3, 128), (2, 13), (1, 1)])
def test_flops_are_those_that_pytorch_counts(changes, texts, length):
    config = tiny_config(num_decoder_layers=0, **changes)
    with torch.device("meta"):
        model = FunnelForSequenceClassification(config).eval()
        ids = torch.ones(texts, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), attention_backends.way("plain"):
        model(ids)
    assert texts * sum(part.flops for part in module_costs(config, length, texts)) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


@pytest.mark.parametrize("length", [64, 512])
@pytest.mark.parametrize("layout", [(3, 3), (2, 2, 2, 2)])
def test_activations_are_about_what_autograd_keeps(length, layout):
    config = FunnelConfig(vocab_size=99, block_sizes=layout, num_decoder_layers=0, d_model=128, n_head=2, d_inner=512)
    model = FunnelForSequenceClassification(config).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape[0] % 8 == 0:  # by text: not a table of distances
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.ones(8, length, dtype=torch.int64))
    found = sum(kept.values()) / 8
    assert sum(part.activations for part in module_costs(config, length)) == pytest.approx(found, rel=0.1)
