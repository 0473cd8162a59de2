"""FunnelConfig: sizes, layout and pooling choices of a model; layout strings; the sizes of the released models.

Fields have the names of transformers' FunnelConfig. This file knows nothing of tensors.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from funnel.errors import FunnelError

FORMAT = "funnel-1"  # marks a config.json as ours, and says which version of it
LARGEST = 10_000_000  # of any one size: beyond it a config is damaged, not ambitious
MOST_LAYERS = 2_000  # in all
ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu")
INITS = ("identity", "copy", "random")  # what new layers start as: funnel.layout
KEEPS = ("spread", "first", "last")  # which layers stay where there are too many
PROBLEM_TYPES = ("single_label_classification", "regression")


def parse_blocks(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Reads a layout string: layers a block, with a comma (or, in the original's files, an underscore) between blocks.

    Args:
        text: "4,4,4", or "6,3x2,3x2" for one block of 6 layers and two of 3 layers that run twice each.

    Returns:
        Layers and repeats of each block: (6, 3, 3) and (1, 2, 2).

    Raises:
        FunnelError: if a part is not N or NxR with whole numbers from 1 to 999.
    """
    sizes, repeats = [], []
    for part in re.split("[,_]", text):
        match = re.fullmatch(r"\s*([1-9][0-9]{0,2})(?:x([1-9][0-9]{0,2}))?\s*", part, re.ASCII)
        if match is None:
            raise FunnelError(
                f"--blocks {text!r}: {part.strip()!r} is no block; write layers (1 to 999) with commas between the blocks, "
                "as in 4,4,4, or layers x repeats, as in 6,3x2,3x2"
            )
        sizes.append(int(match[1]))
        repeats.append(int(match[2] or 1))
    return tuple(sizes), tuple(repeats)


def format_blocks(block_sizes: tuple[int, ...], block_repeats: tuple[int, ...]) -> str:
    """The layout string of a config: the inverse of `parse_blocks`."""
    return ",".join(f"{s}x{r}" if r > 1 else str(s) for s, r in zip(block_sizes, block_repeats, strict=True))


@dataclass(frozen=True)
class FunnelConfig:
    """What a Funnel-Transformer looks like. Defaults are those of the released `funnel-transformer/small`.

    Attributes:
        vocab_size: rows of the word embeddings.
        block_sizes: layers in each block; the sequence is halved before each block but the first.
        block_repeats: how often each layer of a block runs in a row with the same weights; None means once.
        num_decoder_layers: layers that run at full length behind the encoder, for tasks that label tokens.
        d_model, n_head, d_head, d_inner: width of the model, heads, width of a head, width inside the feed-forward.
        hidden_act: one of `ACTIVATIONS`; "gelu_new" is the tanh approximation.
        hidden_dropout, attention_dropout, activation_dropout: probabilities, in [0, 1).
        layer_norm_eps: epsilon of every LayerNorm.
        pooling_type: "mean" or "max" over the two positions of a pair.
        attention_type: "relative_shift" or "factorized": the paper's two ways (A.2) to compute the same scores. Both
            load, and one implementation serves both.
        separate_cls: position 0, [cls], is not pooled.
        truncate_seq: pairs that are not wholly real text are dropped.
        pool_q_only: in the layer that halves, only the query is pooled; key and value keep their length.
        id2label: names of a classifier's outputs.
        problem_type: "single_label_classification" or "regression".

    Raises:
        FunnelError: a field has a value that no model can have; the message names field and value.
    """

    vocab_size: int = 30522
    block_sizes: tuple[int, ...] = (4, 4, 4)
    block_repeats: tuple[int, ...] | None = None
    num_decoder_layers: int = 2
    d_model: int = 768
    n_head: int = 12
    d_head: int = 64
    d_inner: int = 3072
    hidden_act: str = "gelu_new"
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    layer_norm_eps: float = 1e-9
    pooling_type: str = "mean"
    attention_type: str = "relative_shift"
    separate_cls: bool = True
    truncate_seq: bool = True
    pool_q_only: bool = True
    id2label: dict[int, str] = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"})
    problem_type: str = "single_label_classification"

    def __post_init__(self) -> None:
        _set = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 (the dataclass is frozen)
        for name in ("block_sizes", "block_repeats"):
            value = getattr(self, name)
            if value is None and name == "block_repeats":
                value = (1,) * len(self.block_sizes)
            if not isinstance(value, (list, tuple)) or not value or not all(_is_int(v) and 1 <= v < 1000 for v in value):
                raise FunnelError(f"config: {name} is {value!r}; it takes a list of whole numbers from 1 to 999")
            _set(name, tuple(value))
        assert self.block_repeats is not None
        if len(self.block_repeats) != len(self.block_sizes):
            raise FunnelError(
                f"config: block_repeats {list(self.block_repeats)} and block_sizes {list(self.block_sizes)} differ in length"
            )
        runs = sum(size * repeat for size, repeat in zip(self.block_sizes, self.block_repeats, strict=True))
        if sum(self.block_sizes) > MOST_LAYERS or runs > 10 * MOST_LAYERS:
            raise FunnelError(
                f"config: {sum(self.block_sizes):,} layers in {runs:,} runs; it takes {MOST_LAYERS:,} layers at most, "
                f"and {10 * MOST_LAYERS:,} runs"
            )
        for name in ("vocab_size", "d_model", "n_head", "d_head", "d_inner"):
            self._check(name, _is_int(getattr(self, name)) and 1 <= getattr(self, name) <= LARGEST, f"1 to {LARGEST:,}")
        self._check("num_decoder_layers", _is_int(self.num_decoder_layers) and 0 <= self.num_decoder_layers < 1000, "0 to 999")
        self._check("d_model", self.d_model % 2 == 0, "an even number (half sines, half cosines)")
        for name in ("hidden_dropout", "attention_dropout", "activation_dropout"):
            self._check(name, _is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        self._check("layer_norm_eps", _is_number(self.layer_norm_eps) and 0 < self.layer_norm_eps < 1, "a number in (0, 1)")
        for name in ("separate_cls", "truncate_seq", "pool_q_only"):
            self._check(name, isinstance(getattr(self, name), bool), "true or false")
        choices = {
            "pooling_type": ("mean", "max"),
            "attention_type": ("relative_shift", "factorized"),
            "hidden_act": ACTIVATIONS,
            "problem_type": PROBLEM_TYPES,
        }
        for name, allowed in choices.items():
            self._check(name, getattr(self, name) in allowed, "one of " + ", ".join(allowed))
        self._check("id2label", isinstance(self.id2label, dict) and len(self.id2label) > 0, "a table of label names")
        try:
            labels = {int(k): str(v) for k, v in self.id2label.items()}
        except ValueError:
            labels = {}
        self._check("id2label", sorted(labels) == list(range(len(self.id2label))), "a name for each of 0, 1, 2, …")
        _set("id2label", dict(sorted(labels.items())))

    def _check(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise FunnelError(f"config: {name} is {getattr(self, name)!r}; it takes {wanted}")

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @property
    def repeats(self) -> tuple[int, ...]:
        """`block_repeats`, which is always filled in after construction."""
        assert self.block_repeats is not None
        return self.block_repeats

    @property
    def layout(self) -> str:
        """The layout string, as `--blocks` takes it."""
        return format_blocks(self.block_sizes, self.repeats)

    def replace(self, **changes: Any) -> "FunnelConfig":
        """A copy with some fields changed."""
        if "block_sizes" in changes and "block_repeats" not in changes:
            changes["block_repeats"] = None
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, as config.json has them."""
        values = dataclasses.asdict(self)
        values["block_sizes"] = list(self.block_sizes)
        values["block_repeats"] = list(self.repeats)
        values["id2label"] = {str(k): v for k, v in self.id2label.items()}
        values["label2id"] = {v: k for k, v in self.id2label.items()}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> "FunnelConfig":
        """Builds a config from the fields that it knows; the others are the caller's business.

        Raises:
            FunnelError: a known field has an impossible value; the message begins with `source`.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        try:
            return cls(**{k: v for k, v in values.items() if k in known})
        except FunnelError as error:
            raise FunnelError(f"{source}: {str(error).removeprefix('config: ')}") from None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# The released models (github.com/laiguokun/Funnel-Transformer, its table of checkpoints). `-base` has no decoder.
_SIZES: dict[str, dict[str, Any]] = {
    "small": {"layout": "4,4,4"},
    "medium": {"layout": "6,3x2,3x2"},
    "intermediate": {"layout": "6,6,6"},
    "large": {"layout": "8,8,8", "d_model": 1024, "n_head": 16, "d_inner": 4096},
    "xlarge": {"layout": "10,10,10", "d_model": 1024, "n_head": 16, "d_inner": 4096},
}


def released_config(name: str) -> FunnelConfig:
    """The config of a released model: small, medium, intermediate, large or xlarge, each also with `-base`.

    Raises:
        FunnelError: there is no such model.
    """
    size = name.removeprefix("funnel-transformer/")
    base = size.endswith("-base")
    if size.removesuffix("-base") not in _SIZES:
        raise FunnelError(f"{name!r}: no such released model; there are {', '.join(_SIZES)}, each also with -base")
    values = dict(_SIZES[size.removesuffix("-base")])
    sizes, repeats = parse_blocks(values.pop("layout"))
    return FunnelConfig(block_sizes=sizes, block_repeats=repeats, num_decoder_layers=0 if base else 2, **values)
