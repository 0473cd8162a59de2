"""The pooling contract: lengths, pairs, masks, token types, positions, upsampling."""

import itertools
import math

import pytest
import torch
from conftest import padded_batch, tiny_config

from funnel.model import pooling
from funnel.model.heads import FunnelForSequenceClassification, FunnelModel

LAYOUTS = [(2, 2, 2), (4, 4, 4), (2,) * 7]
CHOICES = [
    {"separate_cls": separate, "truncate_seq": truncate} for separate, truncate in itertools.product((True, False), repeat=2)
]


def windows(length: int, block: int, separate_cls: bool) -> list[list[int]]:
    """The tokens behind each pooled position, told one by one: an independent statement of what pairing means."""
    groups = [[i] for i in range(length)]
    for _ in range(block):
        head, rest = (groups[:1], groups[1:]) if separate_cls else ([], groups)
        groups = head + [[token for group in rest[i : i + 2] for token in group] for i in range(0, len(rest), 2)]
    return groups


@pytest.mark.parametrize("sizes", LAYOUTS)
@pytest.mark.parametrize("choice", CHOICES)
def test_pooled_lengths_of_every_length(sizes, choice):
    config = tiny_config(block_sizes=sizes, **choice)
    for length in range(1, 131):
        found = pooling.lengths(length, config)
        assert len(found) == len(sizes)
        for block, pooled in enumerate(found):
            groups = windows(length, block, config.separate_cls)
            if config.truncate_seq and config.separate_cls:
                assert pooled == 1 + sum(len(g) == 2**block for g in groups[1:])
                assert pooled == math.ceil(length / 2**block)
            else:
                assert pooled == len(groups)


@pytest.mark.parametrize("choice", CHOICES)
def test_hidden_states_have_the_promised_lengths(choice):
    config = tiny_config(block_sizes=(1,) * 7, **choice)
    model = FunnelForSequenceClassification(config).eval()
    for length in [*range(1, 20), 63, 64, 65, 66, 127, 128, 129, 130]:
        states, mask = model.encode(torch.full((2, length), 7))
        promised = pooling.lengths(length, config)
        assert [s.shape[1] for s in states] == [length, *promised]
        assert mask.shape[1] == promised[-1]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", ["mean", "max"])
def test_pairs_pool_what_they_hold(choice, kind):
    config = tiny_config(pooling_type=kind, **choice)
    for length in range(1, 34):
        mask = torch.ones(1, length, dtype=torch.bool)
        hidden = torch.randn(1, length, 16, dtype=torch.float64)
        pooled, pooled_mask = pooling.pool_hidden(hidden, mask, config), pooling.pool_mask(mask, config)
        assert pooled.shape[1] == pooled_mask.shape[1] == pooling.pooled_length(length, config)
        for i, group in enumerate(windows(length, 1, config.separate_cls)[: pooled.shape[1]]):
            if pooled_mask[0, i]:
                members = hidden[0, group]
                expected = members.mean(0) if kind == "mean" else members.amax(0)
                torch.testing.assert_close(pooled[0, i], expected)


@pytest.mark.parametrize("length", range(1, 20))
@pytest.mark.parametrize("separate", [True, False])
def test_truncation_drops_every_pair_that_is_not_wholly_real(length, separate):
    config = tiny_config(separate_cls=separate)
    mask = torch.arange(24).unsqueeze(0) < length
    for block in range(1, 4):
        mask = pooling.pool_mask(mask, config)
        groups = windows(24, block, separate)
        expected = [i == 0 or all(token < length for token in g) for i, g in enumerate(groups)]
        complete = [len(g) == (1 if separate and i == 0 else 2**block) for i, g in enumerate(groups)]
        for i in range(mask.shape[1]):
            if complete[i]:
                assert mask[0, i] == expected[i], (block, i)


@pytest.mark.parametrize("length", range(1, 20))
@pytest.mark.parametrize("separate", [True, False])
def test_without_truncation_a_pair_counts_if_any_token_is_real(length, separate):
    config = tiny_config(separate_cls=separate, truncate_seq=False)
    mask = torch.arange(24).unsqueeze(0) < length
    for block in range(1, 4):
        mask = pooling.pool_mask(mask, config)
        expected = [any(token < length for token in g) for g in windows(24, block, separate)]
        assert mask[0].tolist() == expected


def test_the_first_position_always_counts():
    for choice in CHOICES:
        mask = torch.zeros(1, 8, dtype=torch.bool)
        assert pooling.pool_mask(mask, tiny_config(**choice))[0, 0]


def test_a_pair_has_the_type_of_its_first_real_token():
    types = torch.tensor([[2, 0, 0, 0, 1, 1]])
    real = torch.ones(1, 6, dtype=torch.bool)
    assert pooling.pool_token_types(types, real, tiny_config()).tolist() == [[2, 0, 0]]
    assert pooling.pool_token_types(types, real, tiny_config(separate_cls=False)).tolist()[0][:3] == [2, 0, 1]
    no_third = torch.tensor([[True, True, True, False, True, True]])
    assert pooling.pool_token_types(types, no_third, tiny_config(truncate_seq=False)).tolist() == [[2, 0, 1, 1]]


@pytest.mark.parametrize("separate", [True, False])
def test_positions_are_counted_in_tokens_of_the_input(separate):
    config = tiny_config(block_sizes=(1,) * 5, separate_cls=separate)
    for block in range(5):
        first_tokens = [g[0] for g in windows(65, block, separate)]
        start, step = pooling.first_position(block, config), pooling.spacing(block)
        ours = [start + step * i for i in range(len(first_tokens))]
        assert step == 2**block
        # A separate [cls] stands one step before token 1, wherever that is.
        assert ours[1:] == first_tokens[1:]
        assert ours[0] == (1 - step if separate else 0)


@pytest.mark.parametrize("choice", CHOICES)
def test_upsampling_gives_each_token_its_window_and_zeros_where_that_was_dropped(choice):
    config = tiny_config(block_sizes=(1, 1, 1), **choice)
    for length in range(1, 20):
        mask = torch.ones(1, length, dtype=torch.bool)
        for _ in range(2):
            mask = pooling.pool_mask(mask, config)
        pooled = torch.arange(1.0, mask.shape[1] + 1).view(1, -1, 1)
        up = pooling.upsample(pooled, mask, length, config)[0, :, 0]
        groups = windows(length, 2, config.separate_cls)
        for i, group in enumerate(groups):
            whole = i == 0 or len(group) == 4 or not config.truncate_seq
            for token in group:
                assert up[token] == (i + 1 if whole else 0), (length, token)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", ["mean", "max"])
@pytest.mark.parametrize("pool_q_only", [True, False])
def test_output_does_not_depend_on_padding(choice, kind, pool_q_only):
    torch.manual_seed(0)
    config = tiny_config(block_sizes=(1, 1, 1, 1), pooling_type=kind, pool_q_only=pool_q_only, **choice)
    model = FunnelModel(config).eval().double()
    for length in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24):
        ids, mask, types = padded_batch([length], seed=length)
        alone = model(ids, mask, types)
        for width in (length + 1, length + 2, length + 3, 32):
            pad = (0, width - length)
            padded = model(*(torch.nn.functional.pad(x, pad) for x in (ids, mask, types)))
            torch.testing.assert_close(padded[:, :length], alone, rtol=0, atol=1e-12)


def test_output_does_not_depend_on_what_the_padding_is():
    torch.manual_seed(0)
    model = FunnelModel(tiny_config()).eval().double()
    ids, mask, types = padded_batch([5, 9, 12], width=20)
    noise = torch.where(mask == 1, ids, torch.randint_like(ids, 99))
    expected, found = model(ids, mask, types), model(noise, mask, types)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=0, atol=1e-12)


def test_output_does_not_depend_on_the_other_texts_of_the_batch():
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config(block_sizes=(1,) * 5)).eval().double()
    lengths = [1, 2, 3, 4, 7, 8, 16, 17, 31, 40]
    batch = padded_batch(lengths)
    main_process_first = model(*batch)
    for row, length in enumerate(lengths):
        alone = model(*(x[row : row + 1, :length] for x in batch))
        torch.testing.assert_close(main_process_first[row : row + 1], alone, rtol=0, atol=1e-12)


def test_a_short_text_in_a_deep_pyramid_ends_as_cls_alone():
    model = FunnelForSequenceClassification(tiny_config(block_sizes=(1,) * 9)).eval()
    for length in (1, 2, 3, 5):
        states, _ = model.encode(*padded_batch([length]))
        assert states[-1].shape[1] == 1
        assert states[-1].isfinite().all()


@pytest.mark.parametrize("choice", CHOICES)
def test_a_hundred_blocks_work(choice):
    model = FunnelModel(tiny_config(block_sizes=(1,) * 100, d_model=4, n_head=1, d_head=4, d_inner=4, **choice)).eval()
    for length in (1, 2, 9):
        assert model(*padded_batch([length])).isfinite().all()


def test_a_text_of_padding_alone_gives_finite_numbers_and_gradients():
    for choice in CHOICES:
        model = FunnelModel(tiny_config(**choice))
        out = model(torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9))
        out.sum().backward()
        assert out.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
