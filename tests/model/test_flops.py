"""Cost estimates: parameters and FLOPs compared with the model, activation memory; counting computes nothing."""

import pytest
import torch
from conftest import ABSOLUTE, BOTH, BUCKETS, NONE, POSITIONS, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from funnel.errors import FunnelError
from funnel.model import flops, pooling
from funnel.model.attention_backends import attention_backend
from funnel.model.config import FunnelConfig, parse_blocks
from funnel.model.flops import check_memory, count_parameters, module_costs, total_flops
from funnel.model.heads import FunnelForSequenceClassification, FunnelForTokenClassification

CONFIGS = [
    {},
    {"pool_q_only": False},
    {"separate_cls": False, "truncate_seq": False},
    {"blocks": "6,3x2,3x2"},
    {"blocks": "2,2,2,2,2,2,2", "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 256},
    ABSOLUTE,
    {**BUCKETS, "blocks": "2,2x2"},
    {**BOTH, "pool_q_only": False},
    {**NONE, "embedding_size": 6},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize("decoder_layers", [0, 2])
def test_parameter_counts_match_the_model(changes, decoder_layers):
    config = tiny_config(num_decoder_layers=decoder_layers, **changes)
    model = (FunnelForTokenClassification if decoder_layers else FunnelForSequenceClassification)(config)
    costs = {cost.name: cost for cost in module_costs(config, 10)}

    def parameters(module):
        return sum(parameter.numel() for parameter in module.parameters())

    bias_table = config.distance_buckets * config.n_head
    assert costs["embeddings"].parameters == parameters(model.embeddings) + bias_table
    assert costs["head"].parameters == parameters(model.classifier)
    for index, block in enumerate(config.blocks):
        cost = costs[f"block {index}"]
        assert (cost.layers, cost.runs) == (block.layers, block.runs)
        assert cost.parameters == parameters(model.encoder.blocks[index])
    if decoder_layers:
        assert costs["decoder"].parameters == parameters(model.decoder)
    assert sum(cost.parameters for cost in costs.values()) == count_parameters(config) == parameters(model)


def layer_flops(config, queries: int, keys: int, step: int, batch_size: int) -> float:
    """FLOPs of one run of a layer per example, from the equations."""
    d, width, inner = config.d_model, config.n_head * config.d_head, config.d_inner
    projections = 2 * queries * d * width + 2 * keys * d * width  # q, post; k, v
    scores = 2 * queries * keys * width  # content and weighted sum
    if config.relative_attention:
        distances, segment_channels = keys + step * queries, 4
        projections += distances * d * width / batch_size
        scores += queries * distances * width  # position
        scores += (queries + 1 / batch_size) * width * 2  # token type: of the queries, and of their bias
        scores += config.n_head * queries * keys * segment_channels
    return 2 * (projections + scores + 2 * queries * d * inner)


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize(("batch_size", "length"), [(1, 512), (3, 128), (2, 13)])
def test_flops_of_each_block_follow_from_the_equations(changes, batch_size, length):
    config = tiny_config(num_decoder_layers=0, **changes)
    costs = {cost.name: cost for cost in module_costs(config, length, batch_size)}
    lengths = pooling.block_lengths(length, config)
    for index, block in enumerate(config.blocks):
        expected = 0.0
        for run in range(block.runs):
            is_last = index == len(config.blocks) - 1 and run == block.runs - 1
            queries = 1 if is_last else lengths[index]  # a classifier's last layer computes [CLS] only
            reads_unpooled = index > 0 and run == 0 and config.pool_q_only
            keys, step = (lengths[index - 1], 2) if reads_unpooled else (lengths[index], 1)
            expected += layer_flops(config, queries, keys, step, batch_size)
        # PyTorch does not count a product of vectors of length 1 as a matrix product.
        assert costs[f"block {index}"].length == lengths[index]
        assert costs[f"block {index}"].flops == pytest.approx(expected, rel=0.01)
    d = config.d_model
    assert costs["head"].flops == 2 * (d * d + d * config.num_labels)
    assert costs["embeddings"].flops == 2 * length * (config.embedding_size or 0) * d


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize(("batch_size", "length"), [(1, 512), (3, 128), (2, 13), (1, 1)])
def test_flops_match_a_forward_pass(changes, batch_size, length):
    config = tiny_config(num_decoder_layers=0, **changes)
    model = FunnelForSequenceClassification(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), attention_backend("eager"):
        model(torch.ones(batch_size, length, dtype=torch.int64))
    assert total_flops(config, length, batch_size) == counter.get_total_flops() // batch_size
    costs = module_costs(config, length, batch_size)
    assert batch_size * sum(cost.flops for cost in costs) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_costs_of_a_model_with_decoder_match_a_token_classifier():
    config = tiny_config(num_decoder_layers=2)
    costs = {cost.name: cost for cost in module_costs(config, 64)}
    assert costs["decoder"].flops == pytest.approx(2 * layer_flops(config, 64, 64, 1, 1))
    assert costs["head"].flops == 2 * 64 * config.d_model * config.num_labels
    without = {cost.name: cost for cost in module_costs(config.replace(num_decoder_layers=0), 64)}
    assert costs["block 2"].flops > without["block 2"].flops  # not [CLS] only


LENGTH = 4096


class NoComputation(TorchDispatchMode):
    """Forbids to compute tensors larger than a sequence of ids, meta tensors aside."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **kwargs or {})
        tensors = [value for value in tree_leaves(outputs) if isinstance(value, torch.Tensor)]
        assert all(tensor.is_meta or tensor.numel() <= LENGTH for tensor in tensors), func
        return outputs


@pytest.mark.parametrize("blocks", ["28", "4,4,4,4,4,4,4"])
def test_counting_computes_nothing(blocks):
    """So 28 layers at 4,096 tokens are counted as fast as at 64."""
    config = FunnelConfig(blocks=parse_blocks(blocks), num_decoder_layers=0)
    with NoComputation():
        assert module_costs(config, LENGTH)


@pytest.mark.parametrize("length", [64, 512])
@pytest.mark.parametrize("blocks", ["3,3", "2,2,2,2"])
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_activation_estimate_is_close_to_what_autograd_saves(length, blocks, positions):
    sizes = {"num_decoder_layers": 0, "d_model": 128, "d_head": 64, "d_inner": 512}
    config = tiny_config(blocks=blocks, hidden_dropout=0.1, attention_dropout=0.1, **sizes, **positions)
    model = FunnelForSequenceClassification(config).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}  # elements by address
    batch_size = 8

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape[0] % batch_size == 0:  # not the distances, which have no batch
            saved[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.ones(batch_size, length, dtype=torch.int64))
    actual = sum(saved.values()) / batch_size
    assert sum(cost.activations for cost in module_costs(config, length)) == pytest.approx(actual, rel=0.05)


def test_a_model_larger_than_the_memory_is_an_error(monkeypatch):
    config = tiny_config()
    monkeypatch.setattr(flops, "available_memory", lambda: 4 * count_parameters(config))
    check_memory(config, bytes_per_weight=4)
    with pytest.raises(FunnelError, match=r"blocks 1,2,1 with d_model 16: [\d,]+ parameters need .* GiB, but only"):
        check_memory(config, bytes_per_weight=16)
    monkeypatch.setattr(flops, "available_memory", lambda: None)
    check_memory(config, bytes_per_weight=16)
