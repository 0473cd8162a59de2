"""Pooling: sequence lengths, pairs, masks, token types, positions, upsampling, independence of padding.

`windows` below is an independent definition of pooling, on lists of token numbers; the tests compare tensors with it.
"""

import itertools
import math

import pytest
import torch
from conftest import padded_batch, tiny_config

from funnel.model import pooling
from funnel.model.heads import FunnelForSequenceClassification, FunnelModel

# All combinations of the two options that determine lengths.
OPTIONS = [{"separate_cls": c, "truncate_seq": t} for c, t in itertools.product((True, False), repeat=2)]
EDGE_LENGTHS = [*range(1, 20), 63, 64, 65, 66, 127, 128, 129, 130]  # around powers of two, to catch off-by-one errors


def windows(length: int, block: int, separate_cls: bool) -> list[list[int]]:
    """The tokens that each position of a block is pooled from. Incomplete windows at the end are included."""
    groups = [[token] for token in range(length)]
    for _ in range(block):
        kept, rest = (groups[:1], groups[1:]) if separate_cls else ([], groups)
        groups = kept + [[token for group in rest[i : i + 2] for token in group] for i in range(0, len(rest), 2)]
    return groups


# --- lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("input_length", "lengths"),
    [
        # block:  0    1    2   3   4   5   6
        (1, [1, 1, 1, 1, 1, 1, 1]),
        (2, [2, 1, 1, 1, 1, 1, 1]),
        (3, [3, 2, 1, 1, 1, 1, 1]),
        (4, [4, 2, 1, 1, 1, 1, 1]),
        (5, [5, 3, 2, 1, 1, 1, 1]),
        (16, [16, 8, 4, 2, 1, 1, 1]),
        (17, [17, 9, 5, 3, 2, 1, 1]),
        (64, [64, 32, 16, 8, 4, 2, 1]),
        (65, [65, 33, 17, 9, 5, 3, 2]),
        (128, [128, 64, 32, 16, 8, 4, 2]),
        (512, [512, 256, 128, 64, 32, 16, 8]),
    ],
)
def test_each_block_halves_the_length_rounding_up(input_length, lengths):
    """With the default options, and also without `separate_cls`."""
    for separate_cls in (True, False):
        config = tiny_config(blocks="1,1,1,1,1,1,1", separate_cls=separate_cls)
        assert pooling.block_lengths(input_length, config) == lengths


@pytest.mark.parametrize(
    ("input_length", "lengths"),
    [
        (1, [1, 1, 1, 1]),
        (2, [2, 2, 2, 2]),  # [CLS], and a token that never has a partner
        (3, [3, 2, 2, 2]),
        (4, [4, 3, 2, 2]),
        (5, [5, 3, 2, 2]),
        (16, [16, 9, 5, 3]),
        (17, [17, 9, 5, 3]),
        (128, [128, 65, 33, 17]),
    ],
)
def test_without_truncation_a_token_without_partner_keeps_a_position(input_length, lengths):
    config = tiny_config(blocks="1,1,1,1", separate_cls=True, truncate_seq=False)
    assert pooling.block_lengths(input_length, config) == lengths


@pytest.mark.parametrize("blocks", ["2,2,2", "4,4,4", "2,2,2,2,2,2,2"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lengths_count_the_windows_for_all_inputs_up_to_130_tokens(blocks, options):
    config = tiny_config(blocks=blocks, **options)
    for length in range(1, 131):
        lengths = pooling.block_lengths(length, config)
        assert len(lengths) == len(config.blocks)
        for block, pooled_length in enumerate(lengths):
            groups = windows(length, block, config.separate_cls)
            if config.truncate_seq and config.separate_cls:  # incomplete windows are dropped
                assert pooled_length == 1 + sum(len(group) == 2**block for group in groups[1:])
                assert pooled_length == math.ceil(length / 2**block)
            else:
                assert pooled_length == len(groups)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_hidden_states_and_mask_have_the_predicted_lengths(options):
    config = tiny_config(blocks="1,1,1,1,1,1,1", **options)
    model = FunnelForSequenceClassification(config).eval()
    for length in EDGE_LENGTHS:
        states, mask = model.encode(torch.full((2, length), 7))
        expected = pooling.block_lengths(length, config)
        assert [tuple(state.shape) for state in states] == [(2, n, config.d_model) for n in [length, *expected]]
        assert mask.shape == (2, expected[-1])


def test_repeated_layers_pool_once():
    model = FunnelForSequenceClassification(tiny_config(blocks="1,2x3,1x2")).eval()
    states, _ = model.encode(torch.full((1, 16), 7))
    assert [state.shape[1] for state in states] == [16, 16, 8, 8, 8, 8, 8, 8, 4, 4]


# --- hidden states, masks, token types --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pooling_type", ["mean", "max"])
def test_pooled_states_are_the_mean_or_maximum_of_their_window(options, pooling_type):
    config = tiny_config(pooling_type=pooling_type, **options)
    for length in range(1, 34):
        mask = torch.ones(1, length, dtype=torch.bool)
        hidden = torch.randn(1, length, 16, dtype=torch.float64)
        pooled, pooled_mask = pooling.pool_hidden(hidden, mask, config), pooling.pool_mask(mask, config)
        assert pooled.shape[1] == pooled_mask.shape[1] == pooling.pooled_length(length, config)
        groups = windows(length, 1, config.separate_cls)
        for position in pooled_mask[0].nonzero()[:, 0].tolist():
            members = hidden[0, groups[position]]
            expected = members.mean(0) if pooling_type == "mean" else members.amax(0)
            torch.testing.assert_close(pooled[0, position], expected)


@pytest.mark.parametrize("length", range(1, 20))
@pytest.mark.parametrize("separate_cls", [True, False])
def test_with_truncation_a_pair_is_unmasked_only_if_both_tokens_are_real(length, separate_cls):
    config = tiny_config(separate_cls=separate_cls)
    width = 24
    mask = torch.arange(width).unsqueeze(0) < length
    for block in range(1, 4):
        mask = pooling.pool_mask(mask, config)
        groups = windows(width, block, separate_cls)
        for position in range(mask.shape[1]):
            is_cls = position == 0
            if len(groups[position]) == (1 if separate_cls and is_cls else 2**block):  # complete
                expected = is_cls or all(token < length for token in groups[position])
                assert mask[0, position] == expected, (block, position)


@pytest.mark.parametrize("length", range(1, 20))
@pytest.mark.parametrize("separate_cls", [True, False])
def test_without_truncation_a_pair_is_unmasked_if_either_token_is_real(length, separate_cls):
    config = tiny_config(separate_cls=separate_cls, truncate_seq=False)
    width = 24
    mask = torch.arange(width).unsqueeze(0) < length
    for block in range(1, 4):
        mask = pooling.pool_mask(mask, config)
        expected = [any(token < length for token in group) for group in windows(width, block, separate_cls)]
        assert mask[0].tolist() == expected


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_position_0_is_never_masked(options):
    mask = torch.zeros(1, 8, dtype=torch.bool)
    assert pooling.pool_mask(mask, tiny_config(**options))[0, 0]


@pytest.mark.parametrize(
    ("options", "mask", "pooled_types"),
    [
        ({}, [1, 1, 1, 1, 1, 1], [2, 0, 0]),  # pairs (0, 0), (0, 1); the last token has no partner
        ({"separate_cls": False}, [1, 1, 1, 1, 1, 1], [2, 0, 1]),  # pairs (2, 0), (0, 0), (1, 1)
        ({"truncate_seq": False}, [1, 1, 1, 0, 1, 1], [2, 0, 1, 1]),  # the second pair's first token is padding
    ],
)
def test_a_pair_has_the_token_type_of_its_first_real_token(options, mask, pooled_types):
    types = torch.tensor([[2, 0, 0, 0, 1, 1]])
    pooled = pooling.pool_token_types(types, torch.tensor([mask]).bool(), tiny_config(**options))
    assert pooled[0].tolist()[: len(pooled_types)] == pooled_types
    if "separate_cls" not in options:
        assert pooled.shape[1] == len(pooled_types)


# --- positions and upsampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("separate_cls", [True, False])
def test_positions_are_measured_in_input_tokens(separate_cls):
    config = tiny_config(blocks="1,1,1,1,1", separate_cls=separate_cls)
    for block in range(5):
        first_tokens = [group[0] for group in windows(65, block, separate_cls)]
        start, spacing = pooling.first_position(block, config), pooling.spacing(block)
        positions = [start + spacing * i for i in range(len(first_tokens))]
        assert spacing == 2**block
        assert positions[1:] == first_tokens[1:]
        assert positions[0] == (1 - spacing if separate_cls else 0)  # a separate [CLS] is one spacing before token 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_upsampling_copies_each_window_to_its_tokens_and_zeros_to_dropped_tokens(options):
    config = tiny_config(blocks="1,1,1", **options)
    for length in range(1, 20):
        mask = torch.ones(1, length, dtype=torch.bool)
        for _ in range(2):
            mask = pooling.pool_mask(mask, config)
        pooled = torch.arange(1.0, mask.shape[1] + 1).view(1, -1, 1)
        upsampled = pooling.upsample(pooled, mask, length, config)[0, :, 0]
        for position, group in enumerate(windows(length, 2, config.separate_cls)):
            is_kept = position == 0 or len(group) == 4 or not config.truncate_seq
            for token in group:
                assert upsampled[token] == (position + 1 if is_kept else 0), (length, token)


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pooling_type", ["mean", "max"])
@pytest.mark.parametrize("pool_q_only", [True, False])
@torch.no_grad()
def test_output_does_not_depend_on_padding(options, pooling_type, pool_q_only):
    torch.manual_seed(0)
    config = tiny_config(blocks="1,1,1,1", pooling_type=pooling_type, pool_q_only=pool_q_only, **options)
    model = FunnelModel(config).eval().double()
    for length in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24):
        ids, mask, types = padded_batch([length], seed=length)
        expected = model(ids, mask, types)
        for width in (length + 1, length + 2, length + 3, 32):
            padded = model(*(torch.nn.functional.pad(x, (0, width - length)) for x in (ids, mask, types)))
            torch.testing.assert_close(padded[:, :length], expected, rtol=0, atol=1e-12)


def test_output_does_not_depend_on_the_ids_of_padding():
    torch.manual_seed(0)
    model = FunnelModel(tiny_config()).eval().double()
    ids, mask, types = padded_batch([5, 9, 12], width=20)
    random_padding = torch.where(mask == 1, ids, torch.randint_like(ids, 99))
    expected, actual = model(ids, mask, types), model(random_padding, mask, types)
    torch.testing.assert_close(actual[mask == 1], expected[mask == 1], rtol=0, atol=1e-12)


def test_output_does_not_depend_on_the_other_examples_in_the_batch():
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config(blocks="1,1,1,1,1")).eval().double()
    lengths = [1, 2, 3, 4, 7, 8, 16, 17, 31, 40]
    batch = padded_batch(lengths)
    logits = model(*batch)
    for row, length in enumerate(lengths):
        alone = model(*(x[row : row + 1, :length] for x in batch))
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=0, atol=1e-12)


# --- edge cases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_short_text_is_pooled_down_to_cls_in_a_deep_model(length):
    model = FunnelForSequenceClassification(tiny_config(blocks=",".join("1" * 9))).eval()
    states, _ = model.encode(*padded_batch([length]))
    assert states[-1].shape[1] == 1
    assert states[-1].isfinite().all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_a_hundred_blocks_work(options):
    model = FunnelModel(tiny_config(blocks=",".join("1" * 100), d_model=4, n_head=1, d_head=4, d_inner=4, **options)).eval()
    for length in (1, 2, 9):
        assert model(*padded_batch([length])).isfinite().all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_all_padding_example_gives_finite_outputs_and_gradients(options):
    model = FunnelModel(tiny_config(**options))
    output = model(torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9))
    output.sum().backward()
    assert output.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
