"""What the loop in train.py needs and its reader need not see: device and dtype, parameter groups, schedule,
evaluation, the run's folder.
"""

import ctypes
import json
import math
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnel import checkpoint
from funnel.config import FunnelConfig, write_json
from funnel.data import Dataset
from funnel.errors import FunnelError, one_line
from funnel.metrics import METRICS
from funnel.tokenizer import FunnelTokenizer

# What a training state has, beside the random generators' state.
STATE = {"step", "best", "last", "running", "optimizer", "schedule", "scaler", "random"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the fastest one that is there.

    Raises:
        FunnelError: the machine does not have it.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        name = next(device for device, is_there in there.items() if is_there)
    if not there[name]:
        raise FunnelError(f"--device {name}: PyTorch finds none here; there is {', '.join(d for d in there if there[d])}")
    return torch.device(name)


def choose_dtype(name: str | None, device: torch.device, width: int) -> str:
    """The number format of that name, or bf16 where that is the faster one and fp32 elsewhere.

    Args:
        width: of the model. On a CPU, matrices narrower than 256 take longer to cast to bf16 than bf16 saves.
    """
    if name is not None:
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        has_bf16 = any(capabilities.get(n) for n in ("amx_bf16", "avx512_bf16", "bf16"))
        return "bf16" if has_bf16 and width >= 256 else "fp32"
    return "fp32"


def reuse_memory(reuse: bool = True) -> None:
    """Has the C library keep freed memory for the next step, where it is glibc.

    By default it hands every large block back to the system, which must clear its pages anew at each use: a sum of two
    tensors of 50 MB then takes 14 ms instead of 2.4. `reuse_memory(False)` puts glibc's own setting back.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    mallopt(m_mmap_max, 0 if reuse else 65536)  # blocks of their own, which are always handed back
    mallopt(m_trim_threshold, 2**31 - 1 if reuse else 2**26)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """A context in which matrix products run in `dtype`; weights stay in float32."""
    return nullcontext() if dtype == "fp32" else torch.autocast(device.type, DTYPES[dtype])


def set_seed(seed: int) -> None:
    """Seeds every random number generator that training draws from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices with weight decay; biases, r_*_bias and LayerNorms without."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (plain if name.endswith("bias") or "layer_norm" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def linear_schedule(total: int, warmup: float) -> Callable[[int], float]:
    """The learning rate's factor by step: from 0 up to 1 over the share `warmup` of all steps, then down to 0."""
    rise = max(1, math.ceil(total * warmup))

    def factor(step: int) -> float:
        return min((step + 1) / rise, (total - step) / max(1, total - rise))

    return factor


def loss_function(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy for label ids, the squared error for scores; the mean over a batch. logits [b, outputs], labels [b]."""
    if labels.is_floating_point():
        return F.mse_loss(logits.float().squeeze(1), labels)
    return F.cross_entropy(logits.float(), labels)


@torch.no_grad()
def predict(model: nn.Module, dataset: Dataset, device: torch.device, dtype: str, batch_size: int = 64) -> Tensor:
    """Logits of every example, in the dataset's order, [examples, num_labels], float32 on the CPU."""
    was_training = model.training
    model.eval()
    logits: Tensor | None = None
    with autocast(device, dtype):  # around all batches: weights are cast once
        for index in dataset.evaluation_batches(batch_size):
            batch = dataset.batch(index).to(device)
            out = model(batch.input_ids, batch.attention_mask, batch.token_type_ids).float().cpu()
            logits = out.new_empty(len(dataset), out.shape[1]) if logits is None else logits
            logits[torch.from_numpy(index)] = out
    model.train(was_training)
    assert logits is not None, "a dataset has one example at least"
    return logits


def evaluate(
    model: nn.Module, dataset: Dataset, metrics: tuple[str, ...], device: torch.device, dtype: str
) -> tuple[dict[str, float], np.ndarray]:
    """Loss and metrics over a dataset by name, and the predicted label ids or scores."""
    logits = predict(model, dataset, device, dtype)
    is_score = dataset.labels.dtype == np.float32
    predictions = logits[:, 0].numpy() if is_score else logits.argmax(1).numpy()
    labels = torch.from_numpy(dataset.labels)
    scores = {"loss": float(loss_function(logits, labels if is_score else labels.long()))}
    return scores | {name: METRICS[name](predictions, dataset.labels) for name in metrics}, predictions


def is_better(score: float, best: float | None) -> bool:
    """Whether a metric's value beats the best one so far. A measure without meaning (nan) beats nothing but no value."""
    return best is None or score > best or (math.isnan(best) and not math.isnan(score))


def one_class_warning(predictions: np.ndarray, labels: np.ndarray, config: FunnelConfig) -> str | None:
    """A sentence for a classifier that has collapsed to one class while the data has several; None for any other."""
    if config.problem_type == "regression" or len(np.unique(predictions)) > 1 or len(np.unique(labels)) == 1:
        return None
    share = float((labels == predictions[0]).mean())
    return (
        f"The model predicts one class only, {config.id2label[int(predictions[0])]!r}, for all {len(labels)} texts; "
        f"its accuracy is that class's share, {share:.1%}. It has learned nothing: try a lower --lr, more --epochs, "
        "or --init identity."
    )


def check_loss(loss: float, step: int, lr: float) -> float:
    """Hands a loss on.

    Raises:
        FunnelError: it is not finite.
    """
    if not math.isfinite(loss):
        raise FunnelError(f"training diverged: the loss at step {step} is {loss}; lower --lr (it was {lr:g})")
    return loss


def random_state() -> dict[str, Any]:
    """The state of the generators that dropout draws from; they are the only ones used once training has begun."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    torch.set_rng_state(state["cpu"].cpu())
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def free_folder(folder: Path) -> Path:
    """The folder itself, or its name with the first number from 2 up that is not taken."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


class Run:
    """A run's folder: run.json (the command and settings), metrics.jsonl, best/ and last/.

    Args:
        folder: must be empty or not there, unless the run is resumed.
        settings: what the run was asked for; a resumed run must be asked for the same.
        command: the exact command, for people.

    Raises:
        FunnelError: the folder holds another run, cannot be written, or (resuming) holds no run or one of other
            settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], command: str, resume: bool) -> None:
        self.folder = folder
        record = folder / "run.json"
        if resume:
            found = checkpoint.read_json(record).get("settings") if record.exists() else None
            if not isinstance(found, dict):
                raise FunnelError(f"--resume: {folder} holds no run; name its folder with --out")
            if changed := [k for k, v in settings.items() if found.get(k) != v]:
                raise FunnelError(
                    f"--resume: {folder} was started with {changed[0]} {found.get(changed[0])!r}, "
                    f"not {settings[changed[0]]!r}; give the same arguments, or another --out"
                )
            return
        try:
            if folder.exists() and not folder.is_dir():
                raise FunnelError(f"--out {folder}: is a file; name a folder")
            if folder.exists() and any(folder.iterdir()):
                raise FunnelError(f"--out {folder}: holds another run or other files; name another folder, or --resume it")
            folder.mkdir(parents=True, exist_ok=True)
            write_json(record, {"command": command, "settings": dict(settings)})
        except OSError as error:
            raise FunnelError(f"--out {folder}: cannot be written ({error.strerror})") from None

    def load_state(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """Puts the last checkpoint's weights into the model and returns its training state.

        Raises:
            FunnelError: the run stopped before its first checkpoint, or the checkpoint is damaged or another run's.
        """
        try:
            folder = checkpoint.existing(self.folder / "last")
        except FunnelError:
            raise FunnelError(
                f"--resume: {self.folder} stopped before its first checkpoint, so there is nothing to go on from; "
                "remove it and start it again"
            ) from None
        weights = checkpoint.load(folder).weights
        if unfit := checkpoint.load_weights(model, weights, str(folder)):
            raise FunnelError(f"--resume: {folder} has no {unfit[0]} for this task; is it another run's? start the run again")
        path = folder / "training_state.pt"
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # a damaged file can raise anything
            raise FunnelError(f"{path}: damaged ({one_line(error)}); start the run again") from None
        if not isinstance(state, dict) or not state.keys() >= STATE:
            raise FunnelError(f"{path}: lacks {', '.join(sorted(STATE - set(state)))}; start the run again")
        return state

    def forget_after(self, step: int) -> None:
        """Drops the lines of metrics.jsonl that lie after a step: the resumed run writes them again."""
        log = self.folder / "metrics.jsonl"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        part = log.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step), encoding="utf-8")
        part.replace(log)

    def log(self, **values: Any) -> None:
        """Appends a line to metrics.jsonl. A measure without meaning (nan) becomes null there."""
        values = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
        try:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise FunnelError(f"{self.folder}/metrics.jsonl: cannot be written ({error.strerror})") from None

    def save(self, name: str, model: Any, tokenizer: FunnelTokenizer, state: Mapping[str, Any] | None = None) -> None:
        """Writes a checkpoint folder, with the training state where one is given."""

        def extra(folder: Path) -> None:
            tokenizer.save(folder)
            if state is not None:
                torch.save(dict(state), folder / "training_state.pt")

        checkpoint.save(self.folder / name, model.config, model.state_dict(), type(model).__name__, extra)


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for a line that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
