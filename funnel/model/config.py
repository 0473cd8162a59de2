"""FunnelConfig: model sizes, block layout and pooling options; layout strings; the released models' configs.

The fields are named as in transformers' FunnelConfig, except `blocks`. Nothing here depends on torch.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from funnel.errors import FunnelError

FORMAT = "funnel-1"  # marks a config.json as this project's, with the version of the format
MAX_SIZE = 10_000_000  # limit for any dimension, to reject corrupt configs
EXPECTED_BLOCKS = "layer counts such as 4,4,4 or 6,3x2,3x2, with numbers from 1 to 999"
MAX_LAYERS = 2_000  # limit for the whole model, to reject corrupt configs
MAX_RUNS = 20_000  # limit for layers times repeats, to reject corrupt configs
ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu")
CLASSIFIER_ACTIVATIONS = ("tanh", *ACTIVATIONS)
MODEL_TYPES = ("funnel", "bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra", "albert", "mpnet")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


class BlockSpec(NamedTuple):
    """One block of the layout.

    Attributes:
        layers: number of layers, each with its own weights.
        repeats: how many times in a row each layer runs, with shared weights.
    """

    layers: int
    repeats: int = 1

    @property
    def runs(self) -> int:
        """Number of layers executed in a forward pass."""
        return self.layers * self.repeats


def parse_blocks(text: str) -> tuple[BlockSpec, ...]:
    """Parses a layout string.

    Args:
        text: layers per block, such as "4,4,4"; "6,3x2,3x2" is a block of 6 layers followed by two blocks of 3 layers
            that run twice each. Underscores may replace the commas, as in the original config files.

    Raises:
        FunnelError: a part is not N or NxR with integers from 1 to 999.
    """
    blocks = []
    for part in re.split("[,_]", text):
        match = re.fullmatch(r"\s*([1-9][0-9]{0,2})(?:x([1-9][0-9]{0,2}))?\s*", part, re.ASCII)
        if match is None:
            raise FunnelError(f"invalid blocks {text!r}: expected {EXPECTED_BLOCKS}", "blocks")
        blocks.append(BlockSpec(int(match[1]), int(match[2] or 1)))
    return tuple(blocks)


def format_blocks(blocks: tuple[BlockSpec, ...]) -> str:
    """Formats blocks as a layout string; the inverse of `parse_blocks`."""
    return ",".join(f"{block.layers}x{block.repeats}" if block.repeats > 1 else str(block.layers) for block in blocks)


@dataclass(frozen=True)
class FunnelConfig:
    """Architecture of a Funnel-Transformer. The defaults are those of `funnel-transformer/small`.

    Attributes:
        vocab_size: number of word embeddings.
        blocks: layers and repeats of each block; the sequence is halved before every block but the first. The
            constructor and `replace` also accept a layout string such as "4,4,4" or "6,3x2,3x2".
        num_decoder_layers: layers at full length after the encoder, for token-level tasks.
        d_model: hidden size; even.
        n_head: attention heads per layer.
        d_head: size of each head.
        d_inner: hidden size of the feed-forward network.
        hidden_act: one of `ACTIVATIONS`; "gelu_new" is the tanh approximation.
        hidden_dropout, attention_dropout, activation_dropout: dropout probabilities, in [0, 1).
        layer_norm_eps: epsilon of every LayerNorm.
        pooling_type: "mean" or "max" over the two positions of a pair.
        attention_type: "relative_shift" or "factorized", the paper's two algorithms (section A.2) for the same scores.
            One implementation serves both.
        separate_cls: exclude position 0 ([CLS]) from pooling.
        truncate_seq: mask pairs that are not entirely real tokens.
        pool_q_only: in the layer that halves the sequence, pool the query only, not key and value.
        relative_attention: add relative position and token-type scores to the attention scores (paper section A.2). Without
            them, the model has no parameters for them, and attention is ordinary multi-head attention.
        distance_buckets: number of distance buckets, each with a learned bias per head that is added to the attention scores,
            shared by all layers (MPNet, T5); 0 for none.
        position_embeddings: rows of the table of absolute position embeddings at the input; 0 for none.
        position_offset: row of the first token's position; earlier rows are unused.
        token_type_embeddings: rows of the table of token-type embeddings at the input; 0 for none. Token type 1 reads row 1
            if there is one; all others, including that of [CLS], read row 0.
        embedding_size: width of the embeddings, which are projected to `d_model`; None for `d_model` without a projection.
        lm_head_transform: the masked-LM head applies a linear layer to the embeddings' width, `hidden_act` and a LayerNorm to
            the hidden states before it multiplies them with the word embeddings, as in BERT and in the original's pretraining
            code (`lm_proj`). Without it, the head only projects to the embeddings' width if that differs from `d_model`.
        classifier_act: activation between the two linear layers of a text classifier, one of `CLASSIFIER_ACTIVATIONS`.
        family: transformers' `model_type` of the source model, one of `MODEL_TYPES`; selects the export format.
        id2label: names of a classifier's outputs.
        problem_type: one of `PROBLEM_TYPES`.
        label_mean, label_std: of a regression's training labels. The head's outputs are multiplied by `label_std` and
            shifted by `label_mean`, so that scores have the labels' units while weights and gradients stay of order 1.
        model_max_length: the number of tokens to which texts were truncated in fine-tuning; None if unknown.
        text_columns: names of the training file's text columns; two for text pairs, none if unknown.
        decision_threshold: found on dev; multi-label: a class is predicted if its probability is higher; None for the default.
            Answer spans: there is no answer if the score of "no answer" exceeds that of the best span by more; None if every
            question has an answer.

    Raises:
        FunnelError: a field has an invalid value; the message names both.
    """

    vocab_size: int = 30522
    blocks: tuple[BlockSpec, ...] = (BlockSpec(4), BlockSpec(4), BlockSpec(4))
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
    relative_attention: bool = True
    distance_buckets: int = 0
    position_embeddings: int = 0
    position_offset: int = 0
    token_type_embeddings: int = 0
    embedding_size: int | None = None
    lm_head_transform: bool = False
    classifier_act: str = "tanh"
    family: str = "funnel"
    id2label: dict[int, str] = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"})
    problem_type: str = "single_label_classification"
    label_mean: float = 0.0
    label_std: float = 1.0
    model_max_length: int | None = None
    text_columns: tuple[str, ...] = ()
    decision_threshold: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", _check_blocks(self.blocks))  # the dataclass is frozen
        object.__setattr__(self, "id2label", _check_labels(self.id2label))
        for name in ("vocab_size", "d_model", "n_head", "d_head", "d_inner"):
            value = getattr(self, name)
            self._check(name, _is_int(value) and 1 <= value <= MAX_SIZE, f"an integer from 1 to {MAX_SIZE:,}")
        decoder_layers = self.num_decoder_layers
        self._check("num_decoder_layers", _is_int(decoder_layers) and 0 <= decoder_layers < 1000, "an integer from 0 to 999")
        is_even = self.d_model % 2 == 0 or not self.relative_attention
        self._check("d_model", is_even, "an even number (half are sines, half cosines)")
        for name in ("distance_buckets", "position_embeddings", "position_offset", "token_type_embeddings"):
            value = getattr(self, name)
            self._check(name, _is_int(value) and 0 <= value <= MAX_SIZE, f"an integer from 0 to {MAX_SIZE:,}")
        buckets = self.distance_buckets
        self._check(
            "distance_buckets", buckets == 0 or (buckets % 2 == 0 and 4 <= buckets < 512), "0, or an even number from 4 to 510"
        )
        is_inside = self.position_offset < max(self.position_embeddings, 1)
        self._check("position_offset", is_inside, f"less than position_embeddings ({self.position_embeddings})")
        width = self.embedding_size
        is_width = width is None or (_is_int(width) and 1 <= width <= MAX_SIZE)
        self._check("embedding_size", is_width, f"an integer from 1 to {MAX_SIZE:,}, or null")
        for name in ("hidden_dropout", "attention_dropout", "activation_dropout"):
            value = getattr(self, name)
            self._check(name, _is_number(value) and 0 <= value < 1, "a number in [0, 1)")
        self._check("label_mean", _is_number(self.label_mean) and math.isfinite(self.label_mean), "a finite number")
        self._check("label_std", _is_number(self.label_std) and 0 < self.label_std < math.inf, "a positive number")
        length = self.model_max_length
        self._check("model_max_length", length is None or (_is_int(length) and length > 0), "a positive integer")
        threshold = self.decision_threshold
        is_number = threshold is None or (_is_number(threshold) and math.isfinite(threshold))
        self._check("decision_threshold", is_number, "a finite number or null")
        columns = self.text_columns
        self._check("text_columns", isinstance(columns, (list, tuple)) and all(isinstance(c, str) for c in columns), "names")
        object.__setattr__(self, "text_columns", tuple(columns))
        self._check("layer_norm_eps", _is_number(self.layer_norm_eps) and 0 < self.layer_norm_eps < 1, "a number in (0, 1)")
        for name in ("separate_cls", "truncate_seq", "pool_q_only", "relative_attention", "lm_head_transform"):
            self._check(name, isinstance(getattr(self, name), bool), "true or false")
        choices = {
            "pooling_type": ("mean", "max"),
            "attention_type": ("relative_shift", "factorized"),
            "hidden_act": ACTIVATIONS,
            "classifier_act": CLASSIFIER_ACTIVATIONS,
            "family": MODEL_TYPES,
            "problem_type": PROBLEM_TYPES,
        }
        for name, allowed in choices.items():
            self._check(name, getattr(self, name) in allowed, "one of " + ", ".join(allowed))

    def _check(self, name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise FunnelError(f"invalid {name} {getattr(self, name)!r}: expected {expected}")

    @property
    def num_labels(self) -> int:
        """Number of classifier outputs."""
        return len(self.id2label)

    @property
    def max_positions(self) -> int | None:
        """The longest input in tokens, given by the table of absolute positions; None without one."""
        return self.position_embeddings - self.position_offset if self.position_embeddings else None

    def limit_length(self, length: int) -> int:
        """A number of tokens, reduced to `max_positions` if necessary."""
        return length if self.max_positions is None else min(length, self.max_positions)

    @property
    def layout(self) -> str:
        """The layout string, such as "4,4,4"."""
        return format_blocks(self.blocks)

    def replace(self, **changes: Any) -> "FunnelConfig":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as config.json stores them; `blocks` becomes `block_sizes` and `block_repeats`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["blocks"]
        return {
            "block_sizes": [block.layers for block in self.blocks],
            "block_repeats": [block.repeats for block in self.blocks],
            **values,
            "id2label": {str(number): label for number, label in self.id2label.items()},
            "label2id": {label: number for number, label in self.id2label.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> "FunnelConfig":
        """Builds a config from the contents of a config.json. Missing fields get their defaults, unknown ones are ignored.

        Args:
            source: where the values come from; prefixed to error messages.

        Raises:
            FunnelError: a field has an invalid value.
        """
        names = {f.name for f in dataclasses.fields(cls)} - {"blocks"}
        fields = {name: value for name, value in values.items() if name in names}
        try:
            if "block_sizes" in values or "block_repeats" in values:
                fields["blocks"] = _zip_blocks(values.get("block_sizes", [4, 4, 4]), values.get("block_repeats"))
            return cls(**fields)
        except FunnelError as error:
            raise FunnelError(f"{source}: {error}") from None


def _check_blocks(blocks: Any) -> tuple[BlockSpec, ...]:
    """Converts layout strings and pairs of integers; checks the limits."""
    if isinstance(blocks, str):
        blocks = parse_blocks(blocks)
    try:
        specs = tuple(BlockSpec(*block) for block in blocks)
    except TypeError:
        specs = ()
    if not specs or not all(_is_int(number) and 1 <= number < 1000 for spec in specs for number in spec):
        raise FunnelError(f"invalid blocks {blocks!r}: expected {EXPECTED_BLOCKS}", "blocks")
    layers, runs = sum(spec.layers for spec in specs), sum(spec.runs for spec in specs)
    if layers > MAX_LAYERS or runs > MAX_RUNS:
        raise FunnelError(
            f"invalid blocks: {layers:,} layers, {runs:,} counting repeats; "
            f"expected at most {MAX_LAYERS:,}, and {MAX_RUNS:,} counting repeats",
            "blocks",
        )
    return specs


def _zip_blocks(sizes: Any, repeats: Any) -> tuple[BlockSpec, ...]:
    """Combines config.json's two lists; without `block_repeats`, every layer runs once."""
    if repeats is None and isinstance(sizes, (list, tuple)):
        repeats = [1] * len(sizes)
    for name, value in (("block_sizes", sizes), ("block_repeats", repeats)):
        if not isinstance(value, (list, tuple)) or not value or not all(_is_int(n) and 1 <= n < 1000 for n in value):
            raise FunnelError(f"invalid {name} {value!r}: expected a list of integers from 1 to 999")
    if len(sizes) != len(repeats):
        raise FunnelError(f"block_sizes {list(sizes)} and block_repeats {list(repeats)} differ in length")
    return tuple(BlockSpec(*pair) for pair in zip(sizes, repeats, strict=True))


def _check_labels(id2label: Any) -> dict[int, str]:
    """Converts config.json's string keys to integers and sorts by number."""
    try:
        labels = {int(number): str(label) for number, label in id2label.items()}
    except (AttributeError, TypeError, ValueError):
        labels = {}
    if not labels or sorted(labels) != list(range(len(id2label))):
        raise FunnelError(f"invalid id2label {id2label!r}: expected a name for each of 0, 1, 2, …")
    return dict(sorted(labels.items()))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# The released models (table of checkpoints in github.com/laiguokun/Funnel-Transformer).
_RELEASED: dict[str, dict[str, Any]] = {
    "small": {"blocks": "4,4,4"},
    "medium": {"blocks": "6,3x2,3x2"},
    "intermediate": {"blocks": "6,6,6"},
    "large": {"blocks": "8,8,8", "d_model": 1024, "n_head": 16, "d_inner": 4096},
    "xlarge": {"blocks": "10,10,10", "d_model": 1024, "n_head": 16, "d_inner": 4096},
}


def released_config(name: str) -> FunnelConfig:
    """The config of a released model: small, medium, intermediate, large or xlarge, or one of these with `-base`.

    The `-base` models have no decoder.

    Raises:
        FunnelError: there is no such model.
    """
    size = name.removeprefix("funnel-transformer/")
    fields = _RELEASED.get(size.removesuffix("-base"))
    if fields is None:
        raise FunnelError(f"unknown model {name!r}; choose from {', '.join(_RELEASED)}, optionally with -base")
    return FunnelConfig(num_decoder_layers=0 if size.endswith("-base") else 2, **fields)
