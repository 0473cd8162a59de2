"""Other people's checkpoints: one file a format, each with its table of names.

A format's module has `is_format(folder)`, `read_config(folder)` and `read(folder) -> Source`; huggingface.py also has
`write`. `read_config` and `read_weights_from` find out which format a folder is in, and `resolve` brings a folder from the hub.
"""

import fnmatch
import re
from pathlib import Path
from types import ModuleType

from funnel.io import existing_folder
from funnel.model import checkpoint
from funnel.model.config import FunnelConfig
from funnel.weights import from_bert
from funnel.weights import huggingface
from funnel.weights import from_original
from funnel.weights.key_map import Source, model_state, check_exact_match
from funnel.errors import FunnelError
from funnel.model.heads import MODELS

FORMATS = (huggingface, from_original, from_bert)
HUB_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
HUB_WEIGHTS = (
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)


def resolve(source: str) -> Path:
    """The folder that a name stands for: itself, if it is one, else the hub's repository, downloaded and cached.

    Args:
        source: a folder (of a run: its best checkpoint's), or a hub id such as "funnel-transformer/small".

    Raises:
        FunnelError: it is neither, or the hub has no such repository or cannot be reached.
    """
    try:
        if Path(source).exists():
            return checkpoint.of_run(existing_folder(source))
    except OSError as error:  # a name too long for the file system
        raise FunnelError(f"{source[:80]!r}: no folder can have this name ({error.strerror})") from None
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source, re.ASCII):
        raise FunnelError(f"{source!r}: no such folder, and no hub id of the form owner/name, as in funnel-transformer/small")
    import huggingface_hub  # here, because most runs need no hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    huggingface_hub.logging.set_verbosity_error()  # what goes wrong is told below, in one line
    by_hand = (
        f"put {', '.join(HUB_FILES)} and model.safetensors into a folder and name that folder instead (train.py: --weights DIR)"
    )
    try:
        files = [f.rfilename for f in huggingface_hub.HfApi().model_info(source, timeout=20).siblings or []]
        weights = next((p for p in HUB_WEIGHTS if any(fnmatch.fnmatch(f, p[0]) for f in files)), HUB_WEIGHTS[0])
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=[*HUB_FILES, *weights]))
    except (RepositoryNotFoundError, HFValidationError):
        raise FunnelError(f"{source}: no such folder here, and no such public repository on the hub") from None
    except Exception as error:  # no network, or it broke off: whatever the hub library's HTTP client raises
        try:
            return Path(huggingface_hub.snapshot_download(source, local_files_only=True))
        except LocalEntryNotFoundError:
            reason = " ".join(str(error).split())[:80] or type(error).__name__
            raise FunnelError(f"{source}: config.json and weights cannot be downloaded ({reason}); {by_hand}") from None


def read_weights_from(folder: str | Path) -> Source:
    """Reads a folder in any format that we know, ours included.

    Raises:
        FunnelError: no format's files are there, or they are damaged or do not fit main_process_first.
    """
    folder = existing_folder(folder)
    if checkpoint.is_checkpoint(folder):
        saved = checkpoint.load(folder)
        if saved.architecture not in MODELS:
            raise FunnelError(
                f"{folder / checkpoint.CONFIG}: architectures names {saved.architecture!r}, none of {', '.join(MODELS)}"
            )
        check_exact_match(saved.weights, model_state(saved.architecture, saved.config), folder)
        return Source("funnel", folder, saved.config, saved.weights, saved.architecture)
    source: Source = _format_of(folder).read(folder)
    return source


def read_config(folder: str | Path) -> FunnelConfig:
    """The config of a folder in any format, without its weights.

    Raises:
        FunnelError: no format's files are there, or the config is damaged.
    """
    folder = existing_folder(folder)
    if checkpoint.is_checkpoint(folder):
        return checkpoint.load_config(folder)
    config: FunnelConfig = _format_of(folder).read_config(folder)
    return config


def _format_of(folder: Path) -> ModuleType:
    for format_module in FORMATS:
        if format_module.is_format(folder):
            return format_module
    raise FunnelError(
        f"{folder}: no checkpoint that we know; it takes config.json with model_type funnel or bert beside "
        "model.safetensors or pytorch_model.bin (transformers), or net_config.pytorch.json beside model.pt (original)"
    )
