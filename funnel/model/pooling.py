"""How a sequence is halved, and un-halved: lengths, positions, hidden states, masks, token types.

Paper section 2.2. Everything here is a pure function of tensors and the config; no weights. What it promises:

- Any length from 1 up works with any number of blocks.
- A text's result does not depend on how its batch was padded. With `truncate_seq`, a pair that is not wholly real text
  is masked out (so is a last token without a partner). Without it, a pair counts if any of its tokens is real, and
  pools those only.

With `separate_cls`, position 0 stays as it is and the others pair up (1, 2), (3, 4), …; without, (0, 1), (2, 3), ….
Position 0 ([cls]) always counts as real, and so does the pair that holds it.

Shapes: b texts, l positions before and p after the halving, d = d_model.
"""

import torch
from torch import Tensor

from funnel.model.config import FunnelConfig


def pooled_length(length: int, config: FunnelConfig) -> int:
    """How many positions are left of `length` after one halving."""
    if config.separate_cls and not config.truncate_seq:
        return 1 + length // 2
    return (length + 1) // 2


def lengths(length: int, config: FunnelConfig) -> list[int]:
    """The length that each block runs at, for an input of `length` tokens."""
    result = [length]
    for _ in config.block_sizes[1:]:
        result.append(pooled_length(result[-1], config))
    return result


def spacing(block: int) -> int:
    """The distance between neighbours in a block, in tokens of the input: 2**block, as far as that fits an integer."""
    return 2 ** min(block, 40)


def first_position(block: int, config: FunnelConfig) -> int:
    """Where position 0 of a block lies, in tokens of the input.

    A pair stands where its first token stood. [cls], when it is separate, keeps its distance of one step to the next
    position: it is at 1 - spacing, so that positions stay evenly spaced.
    """
    return 1 - spacing(block) if config.separate_cls else 0


def _pairs(x: Tensor, config: FunnelConfig) -> tuple[Tensor, Tensor]:
    """The first and the second of all positions that pair up, [b, n, …] each.

    A last position without a partner is dropped or gets one of zeros.
    """
    if config.separate_cls:
        x = x[:, 1:]
    if not (config.separate_cls and config.truncate_seq):
        x = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    n = x.shape[1] // 2
    return x[:, 0 : 2 * n : 2], x[:, 1 : 2 * n : 2]


def pool_mask(mask: Tensor, config: FunnelConfig) -> Tensor:
    """Which pooled positions count.

    Args:
        mask: [b, l], true where a position counts.

    Returns:
        [b, p], true where a pooled position counts.
    """
    first, second = _pairs(mask, config)
    pooled = first & second if config.truncate_seq else first | second
    cls = torch.ones_like(mask[:, :1])
    return torch.cat([cls, pooled if config.separate_cls else pooled[:, 1:]], dim=1)


def pool_hidden(hidden: Tensor, mask: Tensor, config: FunnelConfig) -> Tensor:
    """Pools hidden states, by mean or max (paper section 2.2, equation 2).

    Args:
        hidden: [b, l, d].
        mask: [b, l], true where a position counts.

    Returns:
        [b, p, d]. Positions that `pool_mask` masks out hold finite values that mean nothing.
    """
    first, second = _pairs(hidden, config)  # [b, n, d]
    if config.separate_cls and config.truncate_seq:  # pairs that count are wholly real: no need to look at the mask
        pooled = (first + second) / 2 if config.pooling_type == "mean" else torch.maximum(first, second)
    else:
        real = [r.unsqueeze(2) for r in _pairs(mask, config)]  # [b, n, 1]
        # Padding may only stand in for a whole pair that does not count, never beside a real token.
        use_first, use_second = real[0] | ~real[1], real[1] | ~real[0]
        if config.pooling_type == "mean":
            pooled = (first * use_first + second * use_second) / (use_first.to(first) + use_second)
        else:
            lowest = torch.finfo(hidden.dtype).min
            pooled = torch.maximum(first.masked_fill(~use_first, lowest), second.masked_fill(~use_second, lowest))
    return torch.cat([hidden[:, :1], pooled], dim=1) if config.separate_cls else pooled


def pool_token_types(token_type_ids: Tensor, mask: Tensor, config: FunnelConfig) -> Tensor:
    """Token types of the pooled positions: a pair has the type of its first real token. [b, l] -> [b, p]."""
    first, second = _pairs(token_type_ids, config)
    pooled = torch.where(_pairs(mask, config)[0], first, second)
    return torch.cat([token_type_ids[:, :1], pooled], dim=1) if config.separate_cls else pooled


def upsample(hidden: Tensor, mask: Tensor, length: int, config: FunnelConfig) -> Tensor:
    """Gives every input position the state of the pooled position that it went into (paper section 2.3, equation 3).

    A token whose pooled position was dropped (`truncate_seq`: the tail that fills no whole window) gets zeros, whether
    it was cut off or masked out, so that padding makes no difference here either.

    Args:
        hidden: [b, p, d], the last block's output.
        mask: [b, p], true where a pooled position counts.
        length: positions of the input, l.

    Returns:
        [b, l, d].
    """
    window = spacing(len(config.block_sizes) - 1)
    if config.truncate_seq:
        hidden = hidden * mask.unsqueeze(-1)
    token = torch.arange(length, device=hidden.device)
    # The pooled position of each token; [cls] keeps its own, position 0.
    index = (token - 1 + window) // window if config.separate_cls else token // window
    index = index.clamp(max=hidden.shape[1])
    hidden = torch.cat([hidden, torch.zeros_like(hidden[:, :1])], dim=1)  # what was cut off reads the row of zeros
    return hidden[:, index]
