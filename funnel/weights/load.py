"""Reading a checkpoint of any format: resolve the folder, detect the format, read the config, then read the weights.

    folder = resolve("funnel-transformer/small")    # a folder, "tiny" or a hub id -> Path
    opened = open_source(folder)                    # format and config, no weights yet
    source = opened.load()                          # config, weights, tokenizer

`read_source` combines the last two steps. Callers that change the layout make the plan, and check that the model fits in
memory, between them.
"""

import fnmatch
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from funnel.data.tokenizer import TOKENIZER_FILES, FunnelTokenizer
from funnel.errors import FunnelError, error_reason
from funnel.io import existing_folder, read_json, verify_checksums
from funnel.model import checkpoint
from funnel.model.config import FunnelConfig
from funnel.model.heads import MODELS
from funnel.options import TINY
from funnel.weights import bert_family, from_original, huggingface
from funnel.weights.key_map import (
    ConvertedWeights,
    Format,
    RawCheckpoint,
    check_exact_match,
    expected_weights,
)

TINY_FOLDER = Path(__file__).parents[1] / "tiny"  # the small pretrained model in the package
HUB_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
HUB_WEIGHTS = (
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
# Weight files that cannot be read: pattern -> (framework, argument of transformers' from_pretrained that reads them).
OTHER_FRAMEWORKS = {
    "*.ckpt*.index": ("TensorFlow", "from_tf"),
    "tf_model*.h5": ("TensorFlow", "from_tf"),
    "flax_model*.msgpack": ("Flax", "from_flax"),
}
WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")  # prefixes of all names in a wrapped model's state dict


@dataclass(frozen=True)
class Source:
    """A checkpoint converted from any format; its weights are the complete state dict of `architecture`,
    and for a BERT or ALBERT also the pooler, if the files have it.

    Attributes:
        format: name of the format, for messages.
        folder: where it was read from.
        config, weights, architecture: as in our own checkpoints.
        tokenizer: None if the folder has none.
        unused: unused weights of the files; values are the reasons.
    """

    format: str
    folder: Path
    config: FunnelConfig
    weights: dict[str, Tensor]
    architecture: str
    tokenizer: FunnelTokenizer | None = None
    unused: Mapping[str, str] = field(default_factory=dict)

    def require_tokenizer(self) -> FunnelTokenizer:
        """The tokenizer; FunnelError if there is none."""
        if self.tokenizer is None:
            raise FunnelError(
                f"{self.folder}: no tokenizer found; copy the model's tokenizer.json or vocab.txt into the folder, or create "
                "them with transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"
            )
        return self.tokenizer


@dataclass(frozen=True)
class OpenedSource:
    """A checkpoint whose config has been read, but not its weights."""

    folder: Path
    format: Format
    config_values: Mapping[str, Any]
    config: FunnelConfig

    def load(self) -> Source:
        """Reads weights and tokenizer, and converts the weights.

        Raises:
            FunnelError: a file is missing or damaged, or weights, config and tokenizer do not match.
        """
        tokenizer = _load_tokenizer(self.folder, self.config.vocab_size)
        weight_file = next((name for name in self.format.weight_files if (self.folder / name).is_file()), None)
        if weight_file is None:
            expected = " or ".join(self.format.weight_files)
            names = [path.name for path in self.folder.iterdir()]
            raise FunnelError(f"{self.folder}: no weights found; expected {expected}{_other_framework_hint(names)}")
        if self.format is NATIVE:
            verify_checksums(self.folder, [weight_file])
        tensors = _without_wrappers(checkpoint.read_weight_file(self.folder / weight_file))
        converted = self.format.convert(RawCheckpoint(self.folder, self.config_values, self.config, tensors, tokenizer))
        return Source(self.format.name, self.folder, *converted[:3], tokenizer, converted.unused)


def resolve(source: str) -> Path:
    """Returns the folder of a checkpoint; downloads a hub repository, or finds it in the hub's cache.

    Args:
        source: a checkpoint folder, a run folder (for its best checkpoint), "tiny" for the small pretrained model in the
            package, or a hub id such as "funnel-transformer/small".

    Raises:
        FunnelError: there is no such folder or repository, the hub cannot be reached, or the package was installed without
            its weights.
    """
    try:
        exists = Path(source).exists()
    except OSError as error:  # the name is too long for the file system
        raise FunnelError(f"invalid weights {source[:80]!r}: not a folder name ({error_reason(error)})", "weights") from None
    if exists:
        return checkpoint.best_checkpoint(existing_folder(source))
    if source == TINY:
        if not (TINY_FOLDER / checkpoint.WEIGHTS).is_file():
            raise FunnelError(f"weights {source!r}: {TINY_FOLDER} has no weights; reinstall funnel-transformer", "weights")
        return TINY_FOLDER
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source, re.ASCII):
        raise FunnelError(
            f"invalid weights {source!r}: no such folder, and neither {TINY} nor a hub id (owner/name) such as "
            "funnel-transformer/small",
            "weights",
        )
    return _download(source)


def _download(hub_id: str) -> Path:
    import huggingface_hub  # slow to import, and most runs do not need it
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    huggingface_hub.logging.set_verbosity_error()  # errors are reported below, on one line
    try:
        files = [file.rfilename for file in huggingface_hub.HfApi().model_info(hub_id, timeout=20).siblings or []]
        available = next((patterns for patterns in HUB_WEIGHTS if fnmatch.filter(files, patterns[0])), None)
        if available is None:
            problem = f"the repository has no PyTorch weights{_other_framework_hint(files)}"
            raise FunnelError(f"invalid weights {hub_id!r}: {problem}", "weights")
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=[*HUB_FILES, *available]))
    except FunnelError:
        raise
    except (RepositoryNotFoundError, HFValidationError):
        raise FunnelError(f"invalid weights {hub_id!r}: no such folder, and no such public hub repository", "weights") from None
    except Exception as error:  # no network, or an interrupted download; the hub's client raises many exceptions
        try:
            return Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True))
        except LocalEntryNotFoundError:
            raise FunnelError(
                f"cannot download weights {hub_id!r} ({error_reason(error)[:80]}); put {', '.join(HUB_FILES)} and "
                "model.safetensors into a folder and pass the folder instead",
                "weights",
            ) from None


def read_source(folder: str | Path) -> Source:
    """Reads a checkpoint folder of any format.

    Raises:
        FunnelError: the format is unknown, a file is missing or damaged, or weights, config and tokenizer do not match.
    """
    return open_source(folder).load()


def read_source_config(folder: str | Path) -> FunnelConfig:
    """Reads the config of a checkpoint folder of any format, without the weights."""
    return open_source(folder).config


def open_source(folder: str | Path) -> OpenedSource:
    """Detects a checkpoint folder's format and reads its config.

    Raises:
        FunnelError: the format is unknown, or the config is missing or invalid.
    """
    folder = existing_folder(folder)
    source_format, values = detect_format(folder)
    return OpenedSource(folder, source_format, values, source_format.parse_config(values, folder / source_format.config_file))


def detect_format(folder: Path) -> tuple[Format, dict[str, Any]]:
    """Returns a folder's format and the values in its config file.

    Raises:
        FunnelError: the format is unknown, or the model is not supported.
    """
    path = folder / checkpoint.CONFIG
    if path.is_file():
        values = read_json(path)
        if "format" in values:
            return NATIVE, values
        model_type = values.get("model_type")
        if model_type == "funnel":
            return huggingface.FORMAT, values
        if isinstance(model_type, str):
            return bert_family.find_format(model_type, path), values
    if (folder / from_original.CONFIG).is_file() or (folder / from_original.WEIGHTS).is_file():
        return from_original.FORMAT, read_json(folder / from_original.CONFIG)
    raise FunnelError(
        f"{folder}: unknown checkpoint format; expected config.json (with a model_type) and model.safetensors or "
        f"pytorch_model.bin, or the original {from_original.CONFIG} and {from_original.WEIGHTS}"
        + _other_framework_hint(path.name for path in folder.iterdir())
    )


def _other_framework_hint(files: Iterable[str]) -> str:
    """The end of an error message that names a file with another framework's weights; "" if there is none."""
    for file, (pattern, (framework, argument)) in itertools.product(sorted(files), OTHER_FRAMEWORKS.items()):
        if fnmatch.fnmatch(file, pattern):
            advice = f"use the model's PyTorch weights, or load it with transformers 4 ({argument}=True) and save it"
            return f"; {file} is a {framework} checkpoint: {advice}"
    return ""


def _without_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the prefix that DataParallel or torch.compile put before all names."""
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _load_tokenizer(folder: Path, vocab_size: int) -> FunnelTokenizer | None:
    """The folder's tokenizer, checked against the model's vocabulary size; None if there is none."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    tokenizer = FunnelTokenizer.load(folder).drop_added_tokens(vocab_size)
    tokenizer.check_vocab_size(vocab_size, folder)
    return tokenizer


# --- our own format ---------------------------------------------------------------------------------------------------


def _convert_native(raw: RawCheckpoint) -> ConvertedWeights:
    architecture = checkpoint.read_architecture(raw.config_values)
    if architecture not in MODELS:
        raise FunnelError(
            f"{raw.folder / checkpoint.CONFIG}: unknown architecture {architecture!r}; expected one of {', '.join(MODELS)}"
        )
    check_exact_match(raw.tensors, expected_weights(architecture, raw.config, raw.tensors), raw.folder)
    return ConvertedWeights(raw.config, raw.tensors, architecture)


NATIVE = Format("funnel", checkpoint.CONFIG, (checkpoint.WEIGHTS,), checkpoint.parse_config, _convert_native)
