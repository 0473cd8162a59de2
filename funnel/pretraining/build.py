"""Building the model to pretrain and its objective: from scratch, from other weights, or from a teacher."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from funnel.data.token_map import token_map
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, plural
from funnel.io import existing_folder
from funnel.model.checkpoint import best_checkpoint, load_config, load_weights
from funnel.model.config import FunnelConfig, parse_blocks
from funnel.model.flops import check_memory
from funnel.model.heads import FunnelForMaskedLM, FunnelForPreTraining, FunnelModel, FunnelPreTrainedModel
from funnel.options import RANDOM, option
from funnel.pretraining.batches import SequenceFormat
from funnel.pretraining.distill import STATES, Distillation
from funnel.pretraining.electra import GENERATOR, Electra
from funnel.pretraining.mlm import MaskedLanguageModel
from funnel.pretraining.objective import Objective
from funnel.training.run_dir import RunDir
from funnel.weights import surgery
from funnel.weights.build import WeightsArgs
from funnel.weights.load import OpenedSource, Source, open_source, resolve
from funnel.weights.surgery import NEW_DECODER_LAYERS, LayerPlan

# What each objective trains.
MODELS: dict[str, type[FunnelPreTrainedModel]] = {
    "electra": FunnelForPreTraining,
    "mlm": FunnelForMaskedLM,
    "distill": FunnelModel,
}
HEAD_SIZE = 64  # of the released models
DEFAULT_VOCAB = 30522  # BERT's size
# BERT's. Word embeddings are tied to the output layer; with a deviation of 1, the first predictions are confidently wrong.
EMBEDDING_STD = 0.02
BYTES_PER_WEIGHT = 16  # with gradient and AdamW's moments


@dataclass(frozen=True)
class ModelArgs(WeightsArgs):
    """Options for the model to pretrain: `weights` to continue from, or the sizes of a new model.

    Raises:
        FunnelError: an option is invalid, or has no effect in combination with another one.
    """

    objective: str = option("electra", "training objective", choices=tuple(MODELS))
    weights: str | None = option(
        None,
        "continue from a checkpoint folder in any supported format, a run folder or a hub id; none for a new model "
        "(default: a new model; for distill, the teacher)",
        metavar="SOURCE",
    )
    teacher: str | None = option(None, "distill: the model to learn from, in any supported format", metavar="SOURCE")
    states: str = option(STATES[0], "distill: the hidden states that are compared", choices=STATES)
    tokenizer: Path | None = option(None, "new model: folder with the tokenizer to use (default: train one on the corpus)")
    vocab: int | None = option(None, f"new tokenizer: size of its vocabulary (default: {DEFAULT_VOCAB})", bounds="[100, 1e7]")
    d_model: int | None = option(None, "new model: hidden size (default: 768)", bounds="[2, 1e6]")
    n_head: int | None = option(None, f"new model: attention heads (default: one per {HEAD_SIZE} features)", bounds="[1, 1e6]")
    d_inner: int | None = option(None, "new model: feed-forward size (default: 4 times the hidden size)", bounds="[1, 1e7]")

    @property
    def source(self) -> str | None:
        """Where the initial weights come from; None for a new model."""
        if self.weights == RANDOM:
            return None
        has_sizes = any(value is not None for value in (self.d_model, self.n_head, self.d_inner))
        return self.weights or (self.teacher if not has_sizes else None)

    def check_model(self) -> None:
        """Checks the combination of options."""
        if (self.objective == "distill") != (self.teacher is not None):
            missing = "missing; the objective distill needs a model to learn from"
            problem = missing if self.teacher is None else "only used by the objective distill"
            raise FunnelError(f"teacher: {problem}", "teacher")
        if self.source is not None:
            self.reject(("tokenizer", "vocab", "d_model", "n_head", "d_inner"), f"with the weights of {self.source}")
        else:
            self.reject(("init", "keep", "layout_plan"), "on a new model")
        if self.tokenizer is not None or self.teacher is not None:
            self.reject(("vocab",), "with an existing tokenizer")
        if self.d_model is not None and self.d_model % 2:
            raise FunnelError(f"d_model {self.d_model}: expected an even number", "d_model")
        if self.objective != "distill":
            self.reject(("states",), f"with the objective {self.objective}")

    def reject(self, names: tuple[str, ...], where: str) -> None:
        """Raises FunnelError if one of the options is set."""
        for option_field in dataclasses.fields(self):
            if option_field.name in names and getattr(self, option_field.name) != option_field.default:
                raise FunnelError(f"{option_field.name} has no effect {where}; omit it", option_field.name)


class PretrainModel(NamedTuple):
    """A model to pretrain.

    Attributes:
        model: on the CPU.
        tokenizer: the tokenizer of the weights, or a new one.
        plan: the origin of every layer of the encoder.
        origin: one-line description of the initial weights.
        folder: of the weights; None for a new model or a resumed run.
    """

    model: FunnelPreTrainedModel
    tokenizer: FunnelTokenizer
    plan: list[LayerPlan]
    origin: str
    folder: Path | None = None

    def write_plan(self, folder: Path) -> None:
        """Writes the plan into a run folder."""
        surgery.write_plan(folder / "layout_plan.json", self.plan)

    def calibrate(self, inputs: dict[str, Tensor]) -> None:
        """Calibrates the LayerNorms of identity layers on a batch of texts."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        surgery.calibrate_layer_norms(self.model, self.plan, *(inputs[name] for name in names))


def build_model(args: ModelArgs, train_tokenizer: Callable[[int], FunnelTokenizer]) -> PretrainModel:
    """Builds the model that an objective trains.

    Args:
        train_tokenizer: trains a vocabulary of a given size on the corpus.

    Raises:
        FunnelError: weights or tokenizer cannot be read, the layout is invalid, or the model does not fit into memory.
    """
    if args.source is None:
        return _new_model(args, train_tokenizer)
    return _from_weights(args, open_source(resolve(args.source)))


def _new_model(args: ModelArgs, train_tokenizer: Callable[[int], FunnelTokenizer]) -> PretrainModel:
    """A randomly initialized model."""
    teacher = None
    if args.tokenizer is not None:
        tokenizer = FunnelTokenizer.load(best_checkpoint(existing_folder(args.tokenizer)))
    elif args.teacher is not None:
        teacher = load_teacher(args.teacher)
        tokenizer = teacher.require_tokenizer()
    else:
        tokenizer = train_tokenizer(args.vocab or DEFAULT_VOCAB)
    if args.escape_special_tokens:
        tokenizer = tokenizer.escape_special_tokens()
    if "mask" not in tokenizer.ids and args.objective != "distill":
        raise FunnelError(f"tokenizer {tokenizer.source}: no mask token, which {args.objective} needs", "tokenizer")
    d_model = args.d_model or FunnelConfig.d_model
    n_head = args.n_head or max(1, d_model // HEAD_SIZE)
    config = FunnelConfig(
        vocab_size=tokenizer.vocab_size,
        blocks=parse_blocks(args.blocks or "4,4,4"),
        num_decoder_layers=NEW_DECODER_LAYERS if args.decoder_layers is None else args.decoder_layers,
        d_model=d_model,
        n_head=n_head,
        d_head=max(1, d_model // n_head),
        d_inner=args.d_inner or 4 * d_model,
        lm_head_transform=args.objective == "mlm",
    )
    check_memory(config, BYTES_PER_WEIGHT)
    model = MODELS[args.objective](config)
    embeddings = model.embeddings.word_embeddings.weight
    nn.init.normal_(embeddings, std=EMBEDDING_STD)
    origin = f"random weights ({plural(tokenizer.vocab_size, 'token')})"
    if teacher is not None:
        table = teacher.weights["embeddings.word_embeddings.weight"]
        with torch.no_grad():
            embeddings.copy_(principal_components(table[: len(embeddings)].float(), d_model))
        origin = "random weights, the teacher's word embeddings"
    plan = [LayerPlan(b, n, "random", None) for b, spec in enumerate(config.blocks) for n in range(spec.layers)]
    return PretrainModel(model, tokenizer, plan, origin)


def principal_components(table: Tensor, width: int) -> Tensor:
    """The coordinates of the rows of a table along its first principal components. [n, d] -> [n, width]

    Columns beyond the table's width are 0.
    """
    centered = table - table.mean(0)
    _, _, directions = torch.linalg.svd(centered, full_matrices=False)  # [d, d], by descending variance
    return nn.functional.pad(centered @ directions[:width].T, (0, max(0, width - table.shape[1])))


def _from_weights(args: ModelArgs, opened: OpenedSource) -> PretrainModel:
    """A model with the weights of a source, possibly in another layout."""
    config = opened.config if args.blocks is None else opened.config.replace(blocks=args.blocks)
    config = surgery.relabel(config, {0: "LABEL_0", 1: "LABEL_1"}, "single_label_classification")
    config = config.replace(num_decoder_layers=surgery.decoder_layers(config, args.decoder_layers))
    plan = args.plan_layers(opened.config, config)
    check_memory(config, BYTES_PER_WEIGHT)
    source = opened.load()
    tokenizer = source.require_tokenizer()
    if args.escape_special_tokens:
        tokenizer = tokenizer.escape_special_tokens()
    cls = MODELS[args.objective]
    model = cls(config)
    weights = surgery.apply_plan(source.weights, plan, model.state_dict())
    weights, has_new_decoder = surgery.add_decoder(source, weights, model)
    new_head = load_weights(model, weights, str(args.source))
    new = sum(row.start != "keep" for row in plan)
    parts = [f"blocks {source.config.layout}", f"{plural(new, 'new layer')}: {args.init}" if new else "all layers kept"]
    parts += ["new decoder"] * has_new_decoder + ["new head"] * bool(new_head)
    return PretrainModel(model, tokenizer, plan, f"{args.source} ({', '.join(parts)})", opened.folder)


def build_objective(args: ModelArgs, built: PretrainModel, format: SequenceFormat) -> Objective:
    """Builds the objective around the model.

    ELECTRA continues with the generator of the weights, if its config fits, and otherwise starts with a new one.

    Raises:
        FunnelError: sequences are longer than a position table; the teacher cannot be read, or tokenizes texts differently.
    """
    _check_length(built.model.config, format.max_length, "the model")
    if args.objective == "mlm":
        return MaskedLanguageModel(cast(FunnelForMaskedLM, built.model))
    if args.objective == "electra":
        electra = Electra(cast(FunnelForPreTraining, built.model))
        if built.folder is not None:
            folder = built.folder / GENERATOR
            if folder.is_dir() and load_config(folder) == electra.generator.config:
                electra.load(built.folder)
            else:
                print("note: the weights have no generator for this model; a new one is trained")
        return electra
    source = load_teacher(cast(str, args.teacher))
    tokenizer = source.require_tokenizer()
    _check_length(source.config, format.max_length, "the teacher")
    if format.pairs and tokenizer.separators != built.tokenizer.separators:
        raise FunnelError("pairs: the teacher uses a different number of separators between the texts of a pair", "pairs")
    ids = token_map(built.tokenizer, tokenizer)
    teacher = FunnelModel(source.config)
    load_weights(teacher, source.weights, str(args.teacher))
    return Distillation(cast(FunnelModel, built.model), teacher, ids, args.states)


def load_teacher(name: str) -> Source:
    """Reads the teacher.

    Raises:
        FunnelError: as `weights.load`, about the parameter `teacher`.
    """
    try:
        return open_source(resolve(name)).load()
    except FunnelError as error:
        raise FunnelError(f"teacher: {error}", "teacher") from None


def _check_length(config: FunnelConfig, max_length: int, what: str) -> None:
    """Raises FunnelError if sequences can be longer than a model's position table."""
    if config.limit_length(max_length) < max_length:
        limit = f"{what} has position embeddings for only {config.max_positions} tokens"
        raise FunnelError(f"max_length {max_length}: {limit}; use at most {config.max_positions}", "max_length")


def restore_objective(objective: Objective, run: RunDir) -> None:
    """Loads the objective's own weights from the checkpoint of a resumed run; all ranks must call it."""
    checkpoint = run.checkpoint
    if checkpoint is None:
        return

    def load_on_main() -> dict[str, Tensor]:  # another machine may not have the folder
        objective.load(checkpoint.folder)
        return objective.state_dict()

    objective.load_state_dict(run.dist.run_on_main_and_broadcast(load_on_main))
