"""The models: the bare body, and one class per task.

Every class is called as `model(input_ids, attention_mask=None, token_type_ids=None)` and returns a tensor. The body's
parameters have the same names in all classes, so any checkpoint's body fits any class. The training loop computes losses.

Shapes: b examples, l tokens, p positions of the last block, d = d_model.
"""

import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnel.errors import FunnelError, format_list
from funnel.io import existing_folder
from funnel.model import pooling
from funnel.model.attention import FunnelAttention
from funnel.model.checkpoint import CONFIG, TOKENIZER, WEIGHTS, Checkpoint, best_checkpoint, load_weights, save_checkpoint
from funnel.model.compilation import Region
from funnel.model.config import FunnelConfig
from funnel.model.dropout import Dropout
from funnel.model.encoder import FunnelDecoder, FunnelEmbeddings, FunnelEncoder, FunnelLayer, activation

Model = TypeVar("Model", bound="FunnelPreTrainedModel")


class FunnelPreTrainedModel(nn.Module):
    """Base class of all models: the body, initialization, loading and saving.

    Args of forward:
        input_ids: [b, l], [CLS] first.
        attention_mask: [b, l], nonzero where a token is real; default: everywhere. Position 0 is never masked.
        token_type_ids: [b, l], 2 for [CLS], 0 for the first text, 1 for the second; default: 0 everywhere.

    Raises:
        FunnelError: `input_ids` is not [b, l] with l >= 1, or another argument differs from it in shape; on a CPU also if
            an id is outside the vocabulary.
    """

    has_decoder: ClassVar[bool]

    def __init__(self, config: FunnelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = FunnelEmbeddings(config)
        self.encoder = FunnelEncoder(config)
        if self.has_decoder:
            self.decoder = FunnelDecoder(config)
        self.build_head(config)
        self.initialize()

    def build_head(self, config: FunnelConfig) -> None:
        """Adds the task's head to the body. The bare models have none."""

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cls_only: bool = False,
    ) -> tuple[list[Tensor], Tensor]:
        """Runs embeddings and encoder.

        Args:
            cls_only: compute only what [CLS] of the last block needs; the last state is then [b, 1, d].

        Returns:
            The states after the embeddings and after every run of a layer, the last one [b, p, d]; and the last block's
            mask, [b, p].
        """
        mask, token_types = self._prepare_inputs(input_ids, attention_mask, token_type_ids)
        return self.encoder(self._embed(input_ids, mask, token_types), mask, token_types, cls_only)

    def encode_and_decode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> list[Tensor]:
        """Runs the whole body. Returns the encoder's states, then the decoder's, the last one [b, l, d].

        The decoder's input is the upsampled output of the encoder plus the output of block 0 (paper section 2.3,
        equation 4). A BERT-like model of one block has nothing to upsample, so that the decoder's input is its output.
        """
        config = self.config
        mask, token_types = self._prepare_inputs(input_ids, attention_mask, token_type_ids)
        states, last_mask = self.encoder(self._embed(input_ids, mask, token_types), mask, token_types)
        hidden = states[config.blocks[0].runs]  # [b, l, d], output of block 0
        if len(config.blocks) > 1 or config.relative_attention:  # a Funnel of one block adds its output to itself
            hidden = pooling.upsample(states[-1], last_mask, input_ids.shape[1], config) + hidden
        return states + self.decoder(hidden, mask, token_types, self.encoder.bias_table())

    def _prepare_inputs(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Checks shapes and fills in defaults. Returns a boolean mask and token types, [b, l] each."""
        if input_ids.dim() != 2 or input_ids.shape[1] < 1:
            raise FunnelError(
                f"input_ids has shape {tuple(input_ids.shape)}; expected [examples, tokens] with at least one token"
            )
        # Not when compiling: the check would limit the graph's length, and exported graphs pad beyond the table.
        limit = None if torch.compiler.is_compiling() else self.config.max_positions
        if limit is not None and input_ids.shape[1] > limit:
            raise FunnelError(
                f"input_ids has {input_ids.shape[1]} tokens per example, but the model has {limit} position embeddings; "
                f"truncate texts to {limit} tokens"
            )
        for name, tensor in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise FunnelError(f"{name} has shape {tuple(tensor.shape)}, input_ids has {tuple(input_ids.shape)}")
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], dim=1)
        return mask, torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids

    def _embed(self, input_ids: Tensor, mask: Tensor, token_type_ids: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.embeddings(input_ids, mask, token_type_ids)
        try:
            return self.embeddings(input_ids, mask, token_type_ids)
        except IndexError:  # raised on a CPU; checking on a GPU would have to wait for it
            size = self.config.vocab_size
            unknown = int(input_ids[(input_ids < 0) | (input_ids >= size)][0])
            raise FunnelError(
                f"input_ids contains {unknown}, but the model has {size} embeddings; use the tokenizer it was trained with"
            ) from None

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Makes every layer save only its inputs and recompute the rest in the backward pass: less memory, more time."""
        for module in self.modules():
            if isinstance(module, FunnelLayer):
                module.gradient_checkpointing = enabled

    def initialize(self) -> None:
        """Initializes all weights randomly, like the original PyTorch code (ops.py).

        Linear weights are normal with variance 1 / (inputs + outputs), embeddings standard normal except the distance bias,
        which is 0, and the parameters of relative attention uniform in [0, 0.1); biases are 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=math.sqrt(1 / (module.in_features + module.out_features)))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, FunnelAttention) and self.config.relative_attention:
                for weight in (module.r_w_bias, module.r_r_bias, module.r_s_bias, module.r_kernel, module.seg_embed):
                    nn.init.uniform_(weight, 0, 0.1)
        if self.encoder.distance_bias is not None:
            nn.init.zeros_(self.encoder.distance_bias.weight)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_hub_id: str | Path,
        *,
        blocks: str | None = None,
        num_labels: int | None = None,
        id2label: dict[int, str] | None = None,
        init: str = "identity",
        keep: str = "spread",
    ) -> Model:
        """Loads pretrained weights, optionally into another layout and with another classifier head.

        A classifier's outputs are matched by name: those that the weights have are kept, in any order. Warns if weights of
        the head are newly initialized.

        Args:
            path_or_hub_id: a checkpoint folder in any supported format, a training run's folder (its best checkpoint is
                loaded), or a hub id such as "funnel-transformer/small".
            blocks: the new layout, such as "2,2,2,2,2,2,2"; default: that of the weights.
            num_labels: number of classifier outputs; 1 means regression. Default: that of `id2label` or of the weights.
            id2label: names of the outputs; default: those of the weights, or LABEL_0, LABEL_1, … for a new head.
            init: initialization of layers that the weights do not have, one of `surgery.INITS`. The LayerNorms of identity
                layers are estimated; `surgery.calibrate_layer_norms` measures them on texts.
            keep: which layers to keep if the weights have more than `blocks`, one of `surgery.KEEPS`.

        Returns:
            The model, on the CPU and in evaluation mode.

        Raises:
            FunnelError: the weights do not exist or are damaged, or an argument is invalid.
        """
        from funnel.weights import surgery  # imported here because funnel.weights imports this module
        from funnel.weights.load import read_source, resolve

        if not isinstance(path_or_hub_id, str | os.PathLike):
            raise FunnelError(f"invalid path_or_hub_id {path_or_hub_id!r}: expected a string or a path", "path_or_hub_id")
        try:
            folder = best_checkpoint(existing_folder(path_or_hub_id))
        except FunnelError:  # not a folder
            folder = resolve(str(path_or_hub_id))
        source = read_source(folder)
        config = source.config if blocks is None else source.config.replace(blocks=blocks)
        plan = surgery.make_plan(source.config, config, init, keep)
        names = _label_names(config, num_labels, id2label)
        if names != config.id2label:
            config = surgery.relabel(config, names, _problem_type(config, len(names)))
        model = cls(config)
        weights, has_new_outputs, head = surgery.match_labels(source, model)
        if blocks is not None:
            weights = surgery.apply_plan(weights, plan, model.state_dict())
        new = load_weights(model, weights, str(folder))
        if new or has_new_outputs:
            what = head or f"newly initialized {format_list(new, 4)}"
            warnings.warn(f"{path_or_hub_id}: {what}; train the head before use", stacklevel=2)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors atomically; keeps the folder's tokenizer.json.

        Raises:
            FunnelError: the folder contains other files, which would be lost, or cannot be written.
        """
        folder = Path(folder)
        existing = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if other := sorted(existing - {CONFIG, WEIGHTS, TOKENIZER}):
            raise FunnelError(f"{folder} contains other files ({other[0]}); choose a new folder")

        def copy_tokenizer(temporary: Path) -> None:
            if TOKENIZER in existing:
                shutil.copy(folder / TOKENIZER, temporary)

        save_checkpoint(folder, Checkpoint(self.config, self.state_dict(), type(self).__name__), copy_tokenizer)


def _label_names(config: FunnelConfig, num_labels: Any, id2label: Any) -> dict[int, str]:
    """The names of a classifier's outputs, from the arguments of `from_pretrained`."""
    if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
        raise FunnelError(f"invalid num_labels {num_labels!r}: expected an integer of at least 1", "num_labels")
    if id2label is None:
        if num_labels is None or num_labels == config.num_labels:
            return config.id2label
        return {number: f"LABEL_{number}" for number in range(num_labels)}
    names = config.replace(id2label=id2label).id2label  # checked and sorted
    if num_labels is not None and num_labels != len(names):
        raise FunnelError(f"num_labels is {num_labels}, but id2label has {len(names)} names", "num_labels")
    if len(set(names.values())) < len(names):
        raise FunnelError(f"invalid id2label {id2label!r}: expected different names", "id2label")
    return names


def _problem_type(config: FunnelConfig, num_labels: int) -> str:
    """The problem type with another number of labels: one label means regression."""
    if num_labels == config.num_labels:
        return config.problem_type
    if num_labels == 1:
        return "regression"
    return "single_label_classification" if config.problem_type == "regression" else config.problem_type


class FunnelBaseModel(FunnelPreTrainedModel):
    """Embeddings and encoder. Returns the last block's output, [b, p, d]."""

    has_decoder = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        states, _ = self.encode(input_ids, attention_mask, token_type_ids)
        return states[-1]


class FunnelModel(FunnelPreTrainedModel):
    """Embeddings, encoder and decoder. Returns one hidden state per token, [b, l, d]."""

    has_decoder = True

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        return self.encode_and_decode(input_ids, attention_mask, token_type_ids)[-1]


class ClassificationHead(Region):
    """Linear, activation, dropout, linear, applied to one hidden state per example. [b, d] -> [b, outputs]."""

    def __init__(self, config: FunnelConfig, outputs: int) -> None:
        super().__init__()
        self.classifier_act = config.classifier_act
        self.linear_hidden = nn.Linear(config.d_model, config.d_model)
        self.dropout = Dropout(config.hidden_dropout)
        self.linear_out = nn.Linear(config.d_model, outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.run(hidden)

    def compute(self, hidden: Tensor) -> Tensor:
        return self.linear_out(self.dropout(activation(self.classifier_act, self.linear_hidden(hidden))))


class FunnelForSequenceClassification(FunnelPreTrainedModel):
    """Classifies or scores texts from the last [CLS] state.

    Returns logits [b, num_labels]; for regression, scores [b, 1] in the labels' units, in float32. With `output_cls`, also the
    [CLS] states that the classifier reads, [b, d].
    """

    has_decoder = False

    def build_head(self, config: FunnelConfig) -> None:
        self.classifier = ClassificationHead(config, config.num_labels)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_cls: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        states, _ = self.encode(input_ids, attention_mask, token_type_ids, cls_only=True)
        cls = states[-1][:, 0]
        logits = self.classifier(cls)
        if self.config.problem_type == "regression":
            logits = logits.float() * self.config.label_std + self.config.label_mean
        return (logits, cls) if output_cls else logits


class FunnelForMultipleChoice(FunnelPreTrainedModel):
    """Scores the c choices of each question. All inputs are [b, c, l]. Returns logits [b, c]."""

    has_decoder = False

    def build_head(self, config: FunnelConfig) -> None:
        self.classifier = ClassificationHead(config, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        types = None if token_type_ids is None else token_type_ids.flatten(0, 1)
        states, _ = self.encode(input_ids.flatten(0, 1), mask, types, cls_only=True)
        return self.classifier(states[-1][:, 0]).view(input_ids.shape[:2])


class FunnelForMaskedLM(FunnelPreTrainedModel):
    """Predicts masked tokens; the output weights are the word embeddings. Returns logits [b, l, vocab_size]."""

    has_decoder = True

    def build_head(self, config: FunnelConfig) -> None:
        width = config.embedding_size or config.d_model
        if config.embedding_size is not None or config.lm_head_transform:
            self.lm_projection = nn.Linear(config.d_model, width)
        if config.lm_head_transform:
            self.lm_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.lm_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Applies the head to the last hidden states of any tokens. [..., d] -> [..., vocab_size]."""
        if self.config.embedding_size is not None or self.config.lm_head_transform:
            hidden = self.lm_projection(hidden)
        if self.config.lm_head_transform:
            hidden = self.lm_layer_norm(activation(self.config.hidden_act, hidden))
        return F.linear(hidden, self.embeddings.word_embeddings.weight, self.lm_bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        return self.token_logits(self.encode_and_decode(input_ids, attention_mask, token_type_ids)[-1])


class FunnelForPreTraining(FunnelPreTrainedModel):
    """ELECTRA's discriminator: detects replaced tokens. Returns logits [b, l], positive for "replaced"."""

    has_decoder = True

    def build_head(self, config: FunnelConfig) -> None:
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.dense_prediction = nn.Linear(config.d_model, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        hidden = self.encode_and_decode(input_ids, attention_mask, token_type_ids)[-1]
        return self.dense_prediction(activation(self.config.hidden_act, self.dense(hidden))).squeeze(-1)


class FunnelForTokenClassification(FunnelPreTrainedModel):
    """Classifies tokens. Returns logits [b, l, num_labels]."""

    has_decoder = True

    def build_head(self, config: FunnelConfig) -> None:
        self.dropout = Dropout(config.hidden_dropout)
        self.classifier = nn.Linear(config.d_model, config.num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        return self.classifier(self.dropout(self.encode_and_decode(input_ids, attention_mask, token_type_ids)[-1]))


class FunnelForQuestionAnswering(FunnelPreTrainedModel):
    """Extracts answer spans. Returns logits [b, l, 2] for the first and the last token of the answer."""

    has_decoder = True

    def build_head(self, config: FunnelConfig) -> None:
        self.qa_outputs = nn.Linear(config.d_model, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        return self.qa_outputs(self.encode_and_decode(input_ids, attention_mask, token_type_ids)[-1])


MODELS: dict[str, type[FunnelPreTrainedModel]] = {
    cls.__name__: cls
    for cls in (
        FunnelBaseModel,
        FunnelModel,
        FunnelForSequenceClassification,
        FunnelForMultipleChoice,
        FunnelForMaskedLM,
        FunnelForPreTraining,
        FunnelForTokenClassification,
        FunnelForQuestionAnswering,
    )
}
