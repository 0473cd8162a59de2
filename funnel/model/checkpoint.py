"""A checkpoint folder: config.json, model.safetensors, tokenizer.json. Saving, loading, checking; reading weight files.

Nothing here knows a model's inside: weights are tables of names and tensors. Only safetensors files and pickles that
hold nothing but tensors are read.
"""

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
from funnel.io import atomic_folder, existing_folder, read_json, verify_checksums, write_json
from funnel.model.config import FORMAT, FunnelConfig
from funnel.model.flops import count_encoder_parameters

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER = "tokenizer.json"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FLOATS_TEXT = "float32, float16, bfloat16 or float64"
BODY = ("embeddings.", "encoder.", "decoder.")  # every other name belongs to a task's head


class Checkpoint(NamedTuple):
    """What a folder holds: the config, the weights by name, and the name of the class that wrote them."""

    config: FunnelConfig
    weights: dict[str, Tensor]
    architecture: str


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder is in our format, whole or not."""
    try:
        return "format" in read_json(existing_folder(folder) / CONFIG)
    except FunnelError:
        return False


def load(folder: str | Path) -> Checkpoint:
    """Reads a checkpoint folder of ours.

    Raises:
        FunnelError: a file is missing or damaged, the format is another one, or a weight is not finite.
    """
    folder = existing_folder(folder)
    values = _own_config(folder)
    config = FunnelConfig.from_dict(values, str(folder / CONFIG))
    verify_checksums(folder, [WEIGHTS])
    weights = read_weights(folder / WEIGHTS)
    there, asked = sum(tensor.numel() for tensor in weights.values()), count_encoder_parameters(config)
    if asked > 2 * there + 10**6:  # before a model of that size is built; what is nearer is told by names and shapes
        raise FunnelError(f"{folder}: weights and config do not fit: config.json asks for {asked:,}, the file has {there:,}")
    return Checkpoint(config, weights, architecture(values))


def load_config(folder: str | Path) -> FunnelConfig:
    """Reads the config of a checkpoint folder of ours, without its weights.

    Raises:
        FunnelError: the file is missing or damaged, or the format is another one.
    """
    folder = existing_folder(folder)
    return FunnelConfig.from_dict(_own_config(folder), str(folder / CONFIG))


def _own_config(folder: Path) -> dict[str, Any]:
    """The values of a folder's config.json, once it is certain that they are in our format."""
    values = read_json(folder / CONFIG)
    if values.get("format") != FORMAT:
        raise FunnelError(
            f"{folder / CONFIG}: no checkpoint of this project (format {values.get('format')!r}, not {FORMAT!r}); "
            f"bring it in with: python convert_weights.py {folder} OUT"
        )
    known = {*FunnelConfig().to_dict(), "format", "model_type", "architectures"}
    if unknown := sorted(set(values) - known):
        raise FunnelError(f"{folder / CONFIG}: unknown field {unknown[0]!r}; remove it or correct its name")
    return values


def architecture(values: Mapping[str, Any]) -> str:
    """The first of a config's `architectures`, or nothing."""
    names = values.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def save(
    folder: str | Path,
    config: FunnelConfig,
    weights: Mapping[str, Tensor],
    architecture: str,
    extra: Callable[[Path], None] | None = None,
    kept: int = 1,
) -> None:
    """Writes a checkpoint folder, whole or not at all.

    Args:
        folder: is replaced if it exists.
        architecture: name of the model's class.
        extra: called with the folder being written, for further files (tokenizer, training state).
        kept: as in `write_folder`.
    """
    values = {"format": FORMAT, "model_type": "funnel", "architectures": [architecture], **config.to_dict()}

    with atomic_folder(folder, kept) as target:
        write_json(target / CONFIG, values)
        save_weights(target / WEIGHTS, weights)
        if extra is not None:
            extra(target)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> list[str]:
    """Copies weights into a model.

    The body must be there and fit; a decoder that the model does not have is left out. A head may be missing or made
    for another task (other names or shapes): the model's own head then stays as it was drawn.

    Args:
        source: where the weights come from, for messages.

    Returns:
        Names of the model's head weights that were not in `weights`, for the caller to mention.

    Raises:
        FunnelError: a name of the body is missing or left over, or a shape does not fit.
    """
    own = model.state_dict()
    has_decoder = any(name.startswith("decoder.") for name in own)
    missing = [n for n in own if n.startswith(BODY) and n not in weights]
    left_over = [n for n in weights if n.startswith(BODY) and n not in own and (has_decoder or not n.startswith("decoder."))]
    if missing or left_over:
        raise FunnelError(f"{source}: weights and config do not fit: {names_text(missing, left_over)}")
    fresh = []
    for name, tensor in own.items():
        if name.startswith(BODY):
            check_shape(name, weights[name], tensor, source)
        elif name not in weights or weights[name].shape != tensor.shape:
            fresh.append(name)
            continue
        with torch.no_grad():
            tensor.copy_(weights[name])
    return fresh


def check_shape(name: str, given: Tensor, expected: Tensor, source: str | Path) -> None:
    """Raises FunnelError if a weight has not the shape that the config asks for."""
    if given.shape != expected.shape:
        raise FunnelError(
            f"{source}: weight {name} has shape {list(given.shape)}, but the config asks for {list(expected.shape)}"
        )


def names_text(missing: list[str], left_over: list[str], most: int = 3) -> str:
    """ "missing a, b, c and 5 more; left over d", for an error's line."""
    found = {"missing": missing, "left over": left_over}
    return "; ".join(f"{word} {format_list(names, most)}" for word, names in found.items() if names)


# --- weight files -----------------------------------------------------------------------------------------------------


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file, a pickle of tensors, or the shards that an `.index.json` file names.

    Raises:
        FunnelError: the file is missing, damaged, or a pickle that holds more than tensors; or a weight is no plain
            floating-point tensor or not finite.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if not os.path.isfile(path):  # pathlib's raises an error for a name that is too long
        raise FunnelError(f"{path}: no such file; a checkpoint needs its weights")
    weights = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    check_finite(weights, str(path))
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise FunnelError(
            f"{path}: damaged or cut-off safetensors file ({error_reason(error)}); copy or download it again"
        ) from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise FunnelError(
                f"{path}: this pickle holds more than tensors and could run code, so it is not loaded; "
                "ask its author for a safetensors file"
            ) from None
        raise FunnelError(f"{path}: damaged torch file ({error_reason(error)}); copy or download it again") from None
    except Exception as error:  # a damaged file can raise anything, from EOFError to a zip reader's RuntimeError
        raise FunnelError(f"{path}: damaged torch file ({error_reason(error)}); copy or download it again") from None
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise FunnelError(f"{path}: holds no table of tensors by name; give a file with the state dict alone")
    return {str(name): tensor for name, tensor in values.items()}


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise FunnelError(f"{index}: has no weight_map, a table from weight names to files")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise FunnelError(f"{index}: names the file {name!r}, which is not in its own folder")
        weights.update(read_weights(index.parent / name))
    if missing := sorted(set(weight_map) - set(weights)):
        raise FunnelError(f"{index}: promises weights that its files do not have: {names_text(missing, [])}")
    return weights


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file."""
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()}
    path.touch()
    mode = path.stat().st_mode  # as the user's umask has it; safetensors lets nobody else read
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def check_finite(weights: Mapping[str, Tensor], source: str) -> None:
    """Raises FunnelError if a weight is no plain floating-point tensor, or NaN or infinite somewhere, naming the first."""
    for name, tensor in weights.items():
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
            if name.endswith("position_ids"):  # a count that old BERT files carry along
                continue
            raise FunnelError(f"{source}: weight {name} is {tensor.dtype} ({tensor.layout}); weights are dense {FLOATS_TEXT}")
        if not math.isfinite(tensor.sum().item()) and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise FunnelError(
                f"{source}: weight {name} is not finite in {bad} of {tensor.numel()} places; "
                "the run that wrote it had diverged: take an earlier checkpoint"
            )


def of_run(folder: Path) -> Path:
    """A run's best checkpoint where the folder is a run's; any other folder as it is.

    Raises:
        FunnelError: the run has none yet.
    """
    if not (folder / "run.json").is_file():
        return folder
    try:
        return existing_folder(folder / "best")
    except FunnelError:
        raise FunnelError(f"{folder}: the run has no best checkpoint yet; let it get to its first evaluation") from None
