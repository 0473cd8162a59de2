"""Distillation: a student of any layout learns to reproduce the hidden states of a teacher.

The loss is the cosine distance of the states, averaged over tokens, plus `CLS_WEIGHT` times that of [CLS]. Three options for
which states are compared:

    decoder   the decoder's states with the teacher's last states, at full length
    pooled    the last block's states with the teacher's last states, pooled as often as the student pools: what a classifier
              reads; the decoder is not trained
    blocks    every block's last states with those of the teacher's layer at the same relative depth, pooled; likewise

docs/pretraining.md compares them, and with two other losses that were worse.

Shapes: b examples, l tokens, p positions of a block, d = d_model.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnel.errors import FunnelError
from funnel.model import pooling
from funnel.model.checkpoint import check_names, check_shape, read_weight_file, save_weights, weights_digest
from funnel.model.config import FunnelConfig
from funnel.model.heads import FunnelModel, FunnelPreTrainedModel
from funnel.pretraining.objective import Objective
from funnel.training.teacher import FrozenModel

STATES = ("decoder", "pooled", "blocks")
CLS_WEIGHT = 5.0
PROJECTIONS = "projections.safetensors"


class Match(NamedTuple):
    """A state of the student and the one of the teacher that it is compared with.

    Attributes:
        student, teacher: indices into the lists of states; the states after the embeddings have index 0, the last ones -1.
        block: the student's block at whose resolution they are compared.
        teacher_block: the block that gives the resolution of the teacher's state.
    """

    student: int
    teacher: int
    block: int
    teacher_block: int


class FrozenTeacher(FrozenModel):
    """Computes the teacher's states."""

    @torch.no_grad()
    def forward(self, inputs: tuple[Tensor, Tensor, Tensor], with_decoder: bool) -> list[Tensor]:
        input_ids, mask, token_type_ids = inputs
        return hidden_states(self.model, (self.map_ids(input_ids), mask, token_type_ids), with_decoder)


class Distillation(Objective):
    """Makes a student reproduce a teacher's states.

    The teacher is not a submodule: it is excluded from parameters, state dicts and checkpoints, but follows the objective to a
    device. Unless the states are those of the decoder, the student's decoder is frozen.

    Args:
        student: encoder and decoder, in any layout.
        teacher: any model; evaluated under the same autocast. If the widths differ, a learned linear layer projects the
            student's states to the teacher's width.
        token_map: from `funnel.data.token_map.token_map`, if the tokenizers differ.
        states: which states are compared, one of `STATES`.

    Raises:
        FunnelError: unknown states, or the teacher does not have them.
    """

    names = ("loss", "states", "cls")

    def __init__(
        self,
        student: FunnelModel,
        teacher: FunnelPreTrainedModel,
        token_map: Tensor | None = None,
        states: str = STATES[0],
    ) -> None:
        super().__init__(student)
        if states not in STATES:
            raise FunnelError(f"unknown states {states!r}; choose from {', '.join(STATES)}", "states")
        self.with_decoder = states == "decoder"
        self.matches = find_matches(student.config, teacher, states)
        if not self.with_decoder:
            student.decoder.requires_grad_(False)
        widths = student.config.d_model, teacher.config.d_model
        count = len(self.matches) if widths[0] != widths[1] else 0
        self.projections = nn.ModuleList(nn.Linear(*widths) for _ in range(count))
        self.pooling_config = student.config.replace(pooling_type="mean")
        self._teacher = (FrozenTeacher(teacher, token_map),)  # in a tuple, so that it is not a submodule

    @property
    def teacher(self) -> FrozenTeacher:
        """The teacher."""
        return self._teacher[0]

    def settings(self) -> dict[str, Any]:
        return {"teacher_digest": weights_digest(self.teacher.model)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distillation":
        """Applies `to` and the like to the teacher as well."""
        self.teacher._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, token_weights: Tensor, **_unused: Tensor
    ) -> Tensor:
        inputs, mask = (input_ids, attention_mask, token_type_ids), attention_mask != 0
        student, teacher = hidden_states(self.model, inputs, self.with_decoder), self.teacher(inputs, self.with_decoder)
        states, cls = self._compare_states(student, teacher, mask, token_weights)
        return torch.stack([states + CLS_WEIGHT * cls, states, cls])

    def _compare_states(
        self, student: list[Tensor], teacher: list[Tensor], mask: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The distances over tokens without [CLS], weighted by 1 / number of tokens, and those at [CLS], weighted by the
        example's share of the tokens."""
        share = weights.sum(1)  # [b], of the global batch's tokens
        levels = self._pool_weights(mask, weights)
        states = cls = torch.zeros((), device=mask.device)
        for index, match in enumerate(self.matches):
            target = teacher[match.teacher]
            for block in range(match.teacher_block, match.block):
                target = pooling.pool_hidden(target, levels[block][0], self.pooling_config)  # [b, p, d]
            state = student[match.student]
            if self.projections:
                state = self.projections[index](state)
            distances = 1 - F.cosine_similarity(state.float(), target.float(), dim=-1)  # [b, p]
            states = states + (distances[:, 1:] * levels[match.block][1][:, 1:]).sum() / len(self.matches)
            cls = cls + (distances[:, 0] * share).sum() / len(self.matches)
        return states, cls

    def _pool_weights(self, mask: Tensor, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each block, the mask and the weights of its positions, [b, p] each: the sums of their tokens' weights."""
        levels = [(mask, weights)]
        for _ in self.model.config.blocks[1:]:
            counts = 2 * self._pool(mask.to(weights.dtype), torch.ones_like(mask))  # number of real positions
            weights = counts * self._pool(weights, mask)
            mask = pooling.pool_mask(mask, self.pooling_config)
            weights = weights * mask
            levels.append((mask, weights))
        return levels

    def _pool(self, values: Tensor, mask: Tensor) -> Tensor:
        """Averages of pairs of values, [b, p] -> [b, ceil(p / 2)]."""
        return pooling.pool_hidden(values.unsqueeze(2), mask, self.pooling_config).squeeze(2)

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes the projections, if there are any."""
        if self.projections:
            save_weights(folder / PROJECTIONS, self.own_weights(weights, "projections"))

    def load(self, folder: Path) -> None:
        state = self.projections.state_dict()
        if not state:
            return
        path = folder / PROJECTIONS
        weights = read_weight_file(path)
        check_names([name for name in state if name not in weights], [name for name in weights if name not in state], path)
        for name, tensor in weights.items():
            check_shape(name, tensor, state[name], path)
        self.projections.load_state_dict(weights)


def hidden_states(model: FunnelPreTrainedModel, inputs: tuple[Tensor, Tensor, Tensor], with_decoder: bool) -> list[Tensor]:
    """The states after the embeddings and every run of a layer, then the decoder's, if there is one and `with_decoder` is true.

    Args:
        inputs: input_ids, attention_mask and token_type_ids, [b, l].
    """
    return model.encode_and_decode(*inputs) if with_decoder and model.has_decoder else model.encode(*inputs)[0]


def find_matches(student: FunnelConfig, teacher: FunnelPreTrainedModel, states: str) -> list[Match]:
    """Pairs the student's states with the teacher's.

    Raises:
        FunnelError: the teacher has no states at the resolution of the student's, or pools differently.
    """
    config = teacher.config
    n_blocks, n_teacher_blocks = len(student.blocks), len(config.blocks)
    if states == "decoder":
        if n_teacher_blocks > 1 and not (teacher.has_decoder and config.num_decoder_layers):
            raise FunnelError(
                f"states {states!r}: the teacher (blocks {config.layout}) pools and has no decoder; choose pooled", "states"
            )
        return [Match(-1, -1, 0, 0)]
    if n_teacher_blocks > 1:
        for name in ("separate_cls", "truncate_seq"):
            if getattr(student, name) != getattr(config, name):
                raise FunnelError(
                    f"states {states!r}: the teacher's {name} differs from the student's; choose decoder", "states"
                )
    if states == "pooled":
        matches = [Match(-1, -1, n_blocks - 1, n_teacher_blocks - 1)]
    else:
        ends, teacher_ends = ([*itertools.accumulate(block.runs for block in c.blocks)] for c in (student, config))
        matches = []
        for block, end in enumerate(ends):
            run = max(1, round(end * teacher_ends[-1] / ends[-1]))
            matches.append(Match(end, run, block, next(i for i, last in enumerate(teacher_ends) if run <= last)))
    for match in matches:
        if match.teacher_block > match.block:
            raise FunnelError(
                f"states {states!r}: the teacher (blocks {config.layout}) pools earlier than the student (blocks "
                f"{student.layout}); choose decoder",
                "states",
            )
    return matches
