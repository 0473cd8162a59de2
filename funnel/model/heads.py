"""The models that a user loads: the bare body, and one small class a task.

Every class is called as `model(input_ids, attention_mask=None, token_type_ids=None)` and returns a tensor. Parameters
of the body have the same names in all of them, so any checkpoint's body fits any class. Losses are the training loop's
business.

Shapes: b texts, l tokens, p positions of the last block, d = d_model.
"""

import math
import shutil
import warnings
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnel.errors import FunnelError
from funnel.model import checkpoint, pooling
from funnel.model.attention import RelativeMultiHeadAttention
from funnel.model.config import FunnelConfig
from funnel.model.dropout import Dropout
from funnel.model.encoder import FunnelDecoder, FunnelEmbeddings, FunnelEncoder, FunnelLayer, activation

AnyFunnel = TypeVar("AnyFunnel", bound="Funnel")


class Funnel(nn.Module):
    """What all models share: the body, the initialisation, loading and saving.

    Args of forward:
        input_ids: [b, l], [cls] first.
        attention_mask: [b, l], nonzero where a token is real; None means everywhere. Position 0 always counts.
        token_type_ids: [b, l]: 2 for [cls], 0 for the first text, 1 for the second; None means 0 everywhere.

    Raises:
        FunnelError: `input_ids` is not [b, l] with l >= 1, or the others differ from it in shape.
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
        """Adds what a task needs beside the body; nothing for the bare models."""

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cls_only: bool = False,
    ) -> tuple[list[Tensor], Tensor]:
        """Runs embeddings and encoder.

        Args:
            cls_only: leave out what [cls] of the last block does not need: the last state is [b, 1, d].

        Returns:
            The states after the embeddings and after every run of a layer, the last of them [b, p, d]; and the last
            block's mask, [b, p].
        """
        mask, types = self._prepare(input_ids, attention_mask, token_type_ids)
        return self.encoder(self.embeddings(input_ids), mask, types, cls_only)

    def encode_and_decode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> list[Tensor]:
        """Runs the whole body: the encoder's states, then the decoder's, the last of them [b, l, d].

        The decoder's input is the upsampled last state plus the first block's output (paper section 2.3, equation 4).
        """
        config = self.config
        mask, types = self._prepare(input_ids, attention_mask, token_type_ids)
        states, last_mask = self.encoder(self.embeddings(input_ids), mask, types)
        first_block = states[config.block_sizes[0] * config.repeats[0]]
        upsampled = pooling.upsample(states[-1], last_mask, input_ids.shape[1], config)
        return states + self.decoder(upsampled + first_block, mask, types)

    def _prepare(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Checks shapes and fills in defaults: the mask as booleans and the token types, [b, l] each."""
        if input_ids.dim() != 2 or input_ids.shape[1] < 1:
            raise FunnelError(f"input_ids has shape {tuple(input_ids.shape)}; it takes [texts, tokens], one token at least")
        for name, tensor in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise FunnelError(f"{name} has shape {tuple(tensor.shape)}, but input_ids {tuple(input_ids.shape)}")
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], dim=1)
        return mask, torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Has every layer keep its input only and run again for its gradient: less memory, a third more time."""
        for module in self.modules():
            if isinstance(module, FunnelLayer):
                module.gradient_checkpointing = enabled

    def initialize(self) -> None:
        """Draws every weight as the authors' PyTorch code does (github.com/laiguokun/Funnel-Transformer, ops.py).

        Linear weights are normal with variance 1 / (inputs + outputs), word embeddings standard normal, the parameters
        of relative attention uniform in [0, 0.1); biases are 0.
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
            elif isinstance(module, RelativeMultiHeadAttention):
                for weight in (module.r_w_bias, module.r_r_bias, module.r_s_bias, module.r_kernel, module.seg_embed):
                    nn.init.uniform_(weight, 0, 0.1)

    @classmethod
    def from_pretrained(cls: type[AnyFunnel], folder: str | Path) -> AnyFunnel:
        """Loads a checkpoint folder of ours. A head that the folder does not have is drawn anew, with a warning.

        Raises:
            FunnelError: the folder is no such checkpoint, or its weights do not fit its config.
        """
        saved = checkpoint.load(folder)
        model = cls(saved.config)
        if fresh := checkpoint.load_weights(model, saved.weights, str(folder)):
            warnings.warn(f"{folder} has no {fresh[0]} for {cls.__name__}: the head is new and untrained", stacklevel=2)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors; `folder` has its former content until the new one is whole.

        A tokenizer.json that is there stays.

        Raises:
            FunnelError: the folder has other files, which would be lost, or cannot be written.
        """
        folder = Path(folder)
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if other := sorted(there - {checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.TOKENIZER}):
            raise FunnelError(f"{folder}: has other files ({other[0]}); name a new folder")

        def keep_tokenizer(new: Path) -> None:
            if checkpoint.TOKENIZER in there:
                shutil.copy(folder / checkpoint.TOKENIZER, new)

        checkpoint.save(folder, self.config, self.state_dict(), type(self).__name__, keep_tokenizer)


class FunnelBaseModel(Funnel):
    """Embeddings and encoder. Returns the last block's states, [b, p, d]."""

    has_decoder = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        states, _ = self.encode(input_ids, attention_mask, token_type_ids)
        return states[-1]


class FunnelModel(Funnel):
    """Embeddings, encoder and decoder. Returns a state for every token, [b, l, d]."""

    has_decoder = True

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        return self.encode_and_decode(input_ids, attention_mask, token_type_ids)[-1]


class ClassificationHead(nn.Module):
    """Linear, tanh, dropout, linear, on one state a text. [b, d] -> [b, outputs]."""

    def __init__(self, config: FunnelConfig, outputs: int) -> None:
        super().__init__()
        self.linear_hidden = nn.Linear(config.d_model, config.d_model)
        self.dropout = Dropout(config.hidden_dropout)
        self.linear_out = nn.Linear(config.d_model, outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear_out(self.dropout(torch.tanh(self.linear_hidden(hidden))))


class FunnelForSequenceClassification(Funnel):
    """Reads [cls] of the last block. Returns logits [b, num_labels]; for regression (one label), the score."""

    has_decoder = False

    def build_head(self, config: FunnelConfig) -> None:
        self.classifier = ClassificationHead(config, config.num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        states, _ = self.encode(input_ids, attention_mask, token_type_ids, cls_only=True)
        return self.classifier(states[-1][:, 0])


class FunnelForMultipleChoice(Funnel):
    """Scores c choices a question. Every argument of the call is [b, c, l]; returns logits [b, c]."""

    has_decoder = False

    def build_head(self, config: FunnelConfig) -> None:
        self.classifier = ClassificationHead(config, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        types = None if token_type_ids is None else token_type_ids.flatten(0, 1)
        states, _ = self.encode(input_ids.flatten(0, 1), mask, types, cls_only=True)
        return self.classifier(states[-1][:, 0]).view(input_ids.shape[:2])


class FunnelForMaskedLM(Funnel):
    """Predicts tokens, with the word embeddings as output weights. Returns logits [b, l, vocab_size]."""

    has_decoder = True

    def build_head(self, config: FunnelConfig) -> None:
        self.lm_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        hidden = self.encode_and_decode(input_ids, attention_mask, token_type_ids)[-1]
        return F.linear(hidden, self.embeddings.word_embeddings.weight, self.lm_bias)


class FunnelForPreTraining(Funnel):
    """ELECTRA's discriminator: was this token replaced? Returns logits [b, l], above 0 for yes."""

    has_decoder = True

    def build_head(self, config: FunnelConfig) -> None:
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.dense_prediction = nn.Linear(config.d_model, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        hidden = self.encode_and_decode(input_ids, attention_mask, token_type_ids)[-1]
        return self.dense_prediction(activation(self.config.hidden_act, self.dense(hidden))).squeeze(-1)


class FunnelForTokenClassification(Funnel):
    """Labels tokens. Returns logits [b, l, num_labels]."""

    has_decoder = True

    def build_head(self, config: FunnelConfig) -> None:
        self.dropout = Dropout(config.hidden_dropout)
        self.classifier = nn.Linear(config.d_model, config.num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        return self.classifier(self.dropout(self.encode_and_decode(input_ids, attention_mask, token_type_ids)[-1]))


class FunnelForQuestionAnswering(Funnel):
    """Marks the span that answers. Returns logits [b, l, 2]: of the span's first token, and of its last."""

    has_decoder = True

    def build_head(self, config: FunnelConfig) -> None:
        self.qa_outputs = nn.Linear(config.d_model, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        return self.qa_outputs(self.encode_and_decode(input_ids, attention_mask, token_type_ids)[-1])


MODELS: dict[str, type[Funnel]] = {
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
