"""Checkpoint folders: config.json, model.safetensors, tokenizer.json. Saving, loading, validation.

Weights are dictionaries of tensors; nothing here depends on the model classes. They are read from safetensors files, and from
pickles that contain only tensors.
"""

import hashlib
import math
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from funnel.errors import FunnelError, error_reason, format_list
from funnel.io import RUN_FILE, atomic_folder, existing_folder, read_json, verify_checksums, write_json
from funnel.model.config import FORMAT, FunnelConfig
from funnel.model.quantization import dequantize

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
BODY = ("embeddings.", "encoder.", "decoder.")  # prefixes of the body's weights; all others belong to a task head
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Checkpoint(NamedTuple):
    """The contents of a checkpoint folder.

    Attributes:
        config: the model's config.
        weights: its state dict.
        architecture: name of its class, a key of `heads.MODELS`.
    """

    config: FunnelConfig
    weights: dict[str, Tensor]
    architecture: str


def is_funnel_checkpoint(folder: str | Path) -> bool:
    """Whether a folder has this project's format, intact or not."""
    try:
        return "format" in read_json(existing_folder(folder) / CONFIG)
    except FunnelError:
        return False


def best_checkpoint(folder: Path) -> Path:
    """The best checkpoint of a training run, or the last one of a pretraining run; other folders are returned as they are.

    Raises:
        FunnelError: the run has no such checkpoint yet.
    """
    if not (folder / RUN_FILE).is_file():
        return folder
    arguments = read_json(folder / RUN_FILE).get("arguments")
    name = "last" if isinstance(arguments, dict) and "objective" in arguments else "best"
    try:
        return existing_folder(folder / name)
    except FunnelError:
        raise FunnelError(f"{folder}: the run has no {name} checkpoint yet; wait for its first evaluation") from None


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Loads a checkpoint folder.

    Raises:
        FunnelError: a file is missing or damaged, the folder has a different format, or a weight is not finite.
    """
    folder = existing_folder(folder)
    values = read_json(folder / CONFIG)
    config = parse_config(values, folder / CONFIG)
    verify_checksums(folder, [WEIGHTS])
    weights = read_weight_file(folder / WEIGHTS)
    _check_size(config, weights, folder)
    return Checkpoint(config, weights, read_architecture(values))


def load_config(folder: str | Path) -> FunnelConfig:
    """Loads a checkpoint folder's config, without its weights.

    Raises:
        FunnelError: the file is missing or damaged, or the folder has a different format.
    """
    path = existing_folder(folder) / CONFIG
    return parse_config(read_json(path), path)


def parse_config(values: Mapping[str, Any], path: Path) -> FunnelConfig:
    """Converts the contents of a config.json in this project's format.

    Args:
        path: the file's path, for error messages.

    Raises:
        FunnelError: the format is not this project's, or a field is unknown or invalid.
    """
    if (path.parent / "model.onnx").is_file():
        raise FunnelError(f"{path.parent}: an ONNX export, which only onnxruntime reads; use the checkpoint it was made from")
    if "format" not in values:
        raise FunnelError(f"{path}: not in this project's format; convert it first: funnel convert {path.parent} OUT")
    if values["format"] != FORMAT:
        raise FunnelError(f"{path}: unknown format {values['format']!r}, expected {FORMAT!r}; use the version that wrote it")
    known = {*FunnelConfig().to_dict(), "format", "model_type", "architectures"}
    if unknown := sorted(set(values) - known):
        raise FunnelError(f"{path}: unknown field {unknown[0]!r}; remove it or correct its name")
    return FunnelConfig.from_dict(values, str(path))


def read_architecture(values: Mapping[str, Any]) -> str:
    """The first of a config.json's `architectures`, or "" if there are none."""
    names = values.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _check_size(config: FunnelConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Rejects a corrupt config before a huge model is built from it. Smaller mismatches are found name by name."""
    width, layers = config.n_head * config.d_head, sum(block.layers for block in config.blocks)
    matrices = 5 if config.relative_attention else 4  # of attention, [d_model, width] each
    rows = config.vocab_size + config.position_embeddings + config.token_type_embeddings
    embeddings = rows * (config.embedding_size or config.d_model)
    expected = embeddings + layers * config.d_model * (matrices * width + 2 * config.d_inner)
    actual = sum(tensor.numel() for tensor in weights.values())
    if expected > 2 * actual + 10**6:
        raise FunnelError(
            f"{folder}: weights and config do not match: {CONFIG} implies at least {expected:,} parameters, "
            f"{WEIGHTS} has {actual:,}"
        )


def save_checkpoint(
    folder: str | Path, checkpoint: Checkpoint, extra: Callable[[Path], None] | None = None, keep: int = 1
) -> None:
    """Writes a checkpoint folder atomically.

    Args:
        folder: replaced if it exists.
        extra: called with the temporary folder, to write further files (tokenizer, training state).
        keep: number of versions to keep, as in `io.atomic_folder`.

    Raises:
        FunnelError: the folder cannot be written; the previous version is intact.
    """
    values = {"format": FORMAT, "model_type": "funnel", "architectures": [checkpoint.architecture]}
    with atomic_folder(folder, keep) as temporary:
        write_json(temporary / CONFIG, {**values, **checkpoint.config.to_dict()})
        save_weights(temporary / WEIGHTS, checkpoint.weights)
        if extra is not None:
            extra(temporary)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> list[str]:
    """Copies weights into a model.

    The body must match exactly, except that decoder weights are ignored if the model has no decoder. Head weights that are
    missing or have another shape (another task's) keep the model's initialization.

    Args:
        source: where the weights come from; prefixed to error messages.

    Returns:
        Names of the head weights that were not loaded.

    Raises:
        FunnelError: a weight of the body is missing, unexpected or has the wrong shape.
    """
    state = model.state_dict()
    ignored = BODY if any(name.startswith("decoder.") for name in state) else BODY[:2]
    missing = [name for name in state if name.startswith(BODY) and name not in weights]
    unexpected = [name for name in weights if name.startswith(ignored) and name not in state]
    check_names(missing, unexpected, source)
    new = []
    for name, tensor in state.items():
        if name.startswith(BODY):
            check_shape(name, weights[name], tensor, source)
        elif name not in weights or weights[name].shape != tensor.shape:
            new.append(name)
            continue
        with torch.no_grad():
            tensor.copy_(weights[name])
    return new


def weights_digest(model: nn.Module) -> str:
    """A checksum of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_names(missing: list[str], unexpected: list[str], source: str | Path) -> None:
    """Raises FunnelError if there are missing or unexpected weights."""
    problems = {"missing": missing, "unexpected": unexpected}
    lists = [f"{problem} {format_list(names, 3)}" for problem, names in problems.items() if names]
    if lists:
        raise FunnelError(f"{source}: weights and config do not match: {'; '.join(lists)}")


def check_shape(name: str, tensor: Tensor, expected: Tensor, source: str | Path) -> None:
    """Raises FunnelError if a weight does not have the shape that the config implies."""
    if tensor.shape != expected.shape:
        raise FunnelError(f"{source}: weight {name} has shape {list(tensor.shape)}, the config implies {list(expected.shape)}")


# --- weight files -----------------------------------------------------------------------------------------------------


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file, a pickle of tensors, or the shards listed in an `.index.json` file.

    Raises:
        FunnelError: the file is missing or damaged, a pickle contains more than tensors, or a weight is not a dense
            floating-point tensor or is not finite.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if not os.path.isfile(path):  # Path.is_file raises for a name too long for the file system
        raise FunnelError(f"{path}: no such file; the checkpoint's weights are missing")
    weights = dequantize(_read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path))
    check_finite(weights, str(path))
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise FunnelError(f"{path}: damaged safetensors file ({error_reason(error)}); copy or download it again") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything, from EOFError to a zip reader's RuntimeError
        if isinstance(error, pickle.UnpicklingError) and (
            "Unsupported global" in str(error) or "Unsupported class" in str(error)
        ):
            raise FunnelError(
                f"{path}: this pickle contains more than tensors and could run code, so it is not loaded; "
                "ask its author for a safetensors file"
            ) from None
        raise FunnelError(f"{path}: damaged torch file ({error_reason(error)}); copy or download it again") from None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise FunnelError(f"{path}: not a dictionary of tensors; expected a file with the state dict only")
    return {str(name): tensor for name, tensor in weights.items()}


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FunnelError(f"{index}: no weight_map from weight names to file names")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise FunnelError(f"{index}: shard {name!r} is not in the same folder")
        weights.update(read_weight_file(index.parent / name))
    check_names(sorted(set(weight_map) - set(weights)), [], index)
    return weights


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()}
    path.touch()
    mode = path.stat().st_mode  # set by the umask; safetensors would make the file unreadable for other users
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # not an OSError, even if the disk is full
        raise FunnelError(f"cannot write {path} ({error_reason(error)})") from None
    path.chmod(mode)


def check_finite(weights: Mapping[str, Tensor], source: str) -> None:
    """Raises FunnelError for the first weight that is not a dense floating-point tensor or is not finite."""
    for name, tensor in weights.items():
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            if name.endswith("position_ids"):  # an integer buffer in old BERT files
                continue
            raise FunnelError(
                f"{source}: weight {name} is {tensor.dtype} ({tensor.layout}); "
                "expected a dense tensor of float32, float16, bfloat16 or float64"
            )
        if not math.isfinite(tensor.sum().item()) and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise FunnelError(
                f"{source}: weight {name} is not finite in {bad} of {tensor.numel()} elements; "
                "the run that saved it probably diverged: use an earlier checkpoint"
            )
