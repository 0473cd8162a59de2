"""Pooling, which halves a sequence, and upsampling: lengths, positions, hidden states, masks, token types.

Paper section 2.2. Pure functions of tensors and the config, without weights. Two guarantees:

- Any length >= 1 works with any number of blocks (up to the table of absolute positions, if there is one).
- The result for a sequence does not depend on how its batch is padded. With `truncate_seq`, a pair that is not entirely
  real tokens is masked, and so is an unpaired last token. Without `truncate_seq`, a pair is valid if either token is
  real, and pools only the real ones.

With `separate_cls`, position 0 ([CLS]) is kept and the others are paired (1, 2), (3, 4), …; without it, the pairs are
(0, 1), (2, 3), …. Position 0 is always treated as real, and so is the pair that contains it.

Shapes: b examples, l positions before and p after halving, d = d_model.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from funnel.model.config import FunnelConfig


class Positions(NamedTuple):
    """The positions of a sequence at one block's resolution.

    Attributes:
        block: the block's index, which is the number of halvings so far.
        mask: [b, l], true where a position is valid.
        token_type_ids: [b, l].
    """

    block: int
    mask: Tensor
    token_type_ids: Tensor

    def cls_only(self) -> "Positions":
        """Keeps position 0 only."""
        return Positions(self.block, self.mask[:, :1], self.token_type_ids[:, :1])


def pooled_length(length: int, config: FunnelConfig) -> int:
    """The length of a sequence after one halving."""
    if config.separate_cls and not config.truncate_seq:
        return 1 + length // 2
    return (length + 1) // 2


def block_lengths(length: int, config: FunnelConfig) -> list[int]:
    """The sequence length in each block, for an input of `length` tokens."""
    lengths = [length]
    for _ in config.blocks[1:]:
        lengths.append(pooled_length(lengths[-1], config))
    return lengths


def spacing(block: int) -> int:
    """The distance between neighboring positions in a block, in input tokens: 2**block, capped so that it fits in an int64."""
    return 2 ** min(block, 40)


def first_position(block: int, config: FunnelConfig) -> int:
    """The position of a block's first element, in input tokens.

    A pair has the position of its first token. A separate [CLS] is one spacing before the next element, at 1 - spacing,
    so that positions stay evenly spaced.
    """
    return 1 - spacing(block) if config.separate_cls else 0


def _split_pairs(x: Tensor, config: FunnelConfig) -> tuple[Tensor, Tensor]:
    """The first and the second elements of all pairs: two tensors [b, n, …].

    A last position without a partner is dropped or paired with zeros.
    """
    if config.separate_cls:
        x = x[:, 1:]
    if not (config.separate_cls and config.truncate_seq):
        x = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    n = x.shape[1] // 2
    return x[:, 0 : 2 * n : 2], x[:, 1 : 2 * n : 2]


def pool_mask(mask: Tensor, config: FunnelConfig) -> Tensor:
    """Pools a mask, true where a position is valid: [b, l] -> [b, p]."""
    first, second = _split_pairs(mask, config)  # [b, n]
    pooled = first & second if config.truncate_seq else first | second
    cls = torch.ones_like(mask[:, :1])
    return torch.cat([cls, pooled if config.separate_cls else pooled[:, 1:]], dim=1)


def pool_hidden(hidden: Tensor, mask: Tensor, config: FunnelConfig) -> Tensor:
    """Pools hidden states by mean or max (paper section 2.2, equation 2).

    Args:
        hidden: [b, l, d].
        mask: [b, l], true where a position is valid.

    Returns:
        [b, p, d]. Values at positions that `pool_mask` masks are finite but meaningless.
    """
    first, second = _split_pairs(hidden, config)  # [b, n, d]
    if config.separate_cls and config.truncate_seq:  # valid pairs are entirely real, so the mask is not needed
        pooled = (first + second) / 2 if config.pooling_type == "mean" else torch.maximum(first, second)
    else:
        first_mask, second_mask = (part.unsqueeze(2) for part in _split_pairs(mask, config))  # [b, n, 1]
        # Padding is excluded only beside a real token; a pair of two padding tokens pools both, to stay finite.
        use_first, use_second = first_mask | ~second_mask, second_mask | ~first_mask
        if config.pooling_type == "mean":
            pooled = (first * use_first + second * use_second) / (use_first.to(first) + use_second)
        else:
            lowest = torch.finfo(hidden.dtype).min
            pooled = torch.maximum(first.masked_fill(~use_first, lowest), second.masked_fill(~use_second, lowest))
    return torch.cat([hidden[:, :1], pooled], dim=1) if config.separate_cls else pooled


def pool_token_types(token_type_ids: Tensor, mask: Tensor, config: FunnelConfig) -> Tensor:
    """Pools token types: a pair gets the type of its first real token. [b, l] -> [b, p]."""
    first, second = _split_pairs(token_type_ids, config)
    pooled = torch.where(_split_pairs(mask, config)[0], first, second)
    return torch.cat([token_type_ids[:, :1], pooled], dim=1) if config.separate_cls else pooled


def pool_positions(positions: Positions, config: FunnelConfig) -> Positions:
    """Pools mask and token types: the positions of the next block."""
    return Positions(
        positions.block + 1,
        pool_mask(positions.mask, config),
        pool_token_types(positions.token_type_ids, positions.mask, config),
    )


def upsample(hidden: Tensor, mask: Tensor, length: int, config: FunnelConfig) -> Tensor:
    """Gives each input token the state of the pooled position that contains it (paper section 2.3, equation 3).

    A token whose pooled position was dropped or masked (with `truncate_seq`, trailing tokens that do not fill a window)
    gets zeros, so that the result does not depend on padding.

    Args:
        hidden: [b, p, d], the last block's output.
        mask: [b, p], true where a pooled position is valid.
        length: l, the number of input tokens.

    Returns:
        [b, l, d].
    """
    window = spacing(len(config.blocks) - 1)
    if config.truncate_seq:
        hidden = hidden * mask.unsqueeze(-1)
    token = torch.arange(length, device=hidden.device)
    index = (token - 1 + window) // window if config.separate_cls else token // window  # [l], pooled position of each token
    index = index.clamp(max=hidden.shape[1])
    hidden = torch.cat([hidden, torch.zeros_like(hidden[:, :1])], dim=1)  # the last row is for tokens that were dropped
    return hidden[:, index]
