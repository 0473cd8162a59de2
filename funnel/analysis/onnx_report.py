"""Accuracy and latency of ONNX exports, side by side.

The accuracy is that on the dev set of the run that was exported, read again from the run's files.
"""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from funnel.data.dataset import Dataset
from funnel.errors import FunnelError, error_reason, plural, requires_extra
from funnel.inference.predictor import run_folder, run_record
from funnel.problems.base import Problem
from funnel.problems.registry import encode_split, problem_of
from funnel.problems.task_args import TaskArgs, load_task, split_off_dev
from funnel.training.evaluate import BATCH_SIZE, pad_tokens
from funnel.training.progress import format_scores
from funnel.training.run_dir import read_arguments
from funnel.weights.export import INPUTS, max_length
from funnel.weights.load import Source

NUM_TIMED = 100  # texts
NUM_WARMUP = 10
RANDOM_LENGTH = 16  # tokens of the text that is timed if there is no dev set

Feed = dict[str, np.ndarray]  # the graph's inputs, [b, l] or [b, c, l] each


class DevSet(NamedTuple):
    """A run's dev set, and the metrics of its task.

    Attributes:
        problem: with the classifier's labels.
    """

    dataset: Dataset
    metrics: tuple[str, ...]
    problem: Problem


def load_dev_set(source: Source) -> DevSet:
    """Reads and encodes the dev set of the run that a classifier comes from.

    Raises:
        FunnelError: the classifier is not from a run, or the run's files are missing or have changed.
    """
    run = run_folder(source.folder)
    if run is None:
        raise FunnelError(f"{source.folder} is not part of a run")
    args = TaskArgs(**read_arguments(run, TaskArgs))
    task, settings = load_task(args), run_record(run)
    split = "dev" if "dev" in task.files else "train"
    tokenizer, problem = source.require_tokenizer(), problem_of(source.architecture, source.config)
    dataset = encode_split(task, split, tokenizer, max_length(source.config))
    if split == "train":
        _, dataset = split_off_dev(dataset, args, run_record(run, "arguments").get("seed", 0))
    if dataset.digest != settings.get("digests", {}).get("dev"):
        raise FunnelError(f"the run's {split} file has changed since training")
    return DevSet(dataset, task.metrics, problem)


def compare_graphs(files: Mapping[str, Path], dev: DevSet | None) -> str:
    """Runs ONNX files of one classifier with onnxruntime and returns a line for each, and one that says what was measured.

    The threads are as many as PyTorch's. The latency is the median over texts that are passed one at a time: the first ones
    of the dev set, or a text of `RANDOM_LENGTH` tokens.

    Args:
        files: by name.
        dev: None measures only the latency.
    """
    if dev is None:
        texts = []
        note = f"latency: one text of {RANDOM_LENGTH} tokens, median of {NUM_TIMED} calls"
    else:
        texts = [_feed(dev.dataset, np.array([row % len(dev.dataset)])) for row in range(NUM_TIMED)]
        note = f"dev: {plural(len(dev.dataset), 'example')}; latency: one text at a time, median of {NUM_TIMED}"
    lines = []
    for name, path in files.items():
        session = open_session(path)  # one at a time: waiting threads of a second one would spin
        measured = [
            f"{_median_milliseconds(session, texts or [_random_feed(session)] * NUM_TIMED):.1f} ms per text",
            f"{path.stat().st_size / 1e6:.1f} MB",
        ]
        if dev is not None:
            results = run_graph(session, dev.problem, dev.dataset)
            measured.insert(0, format_scores(dev.problem.score(results, dev.dataset, dev.metrics)))
        lines.append(f"{name:<9} {', '.join(measured)}")
        del session
    return "\n".join([*lines, f"{'':<9} {note}, {plural(torch.get_num_threads(), 'thread')}"])


def open_session(path: Path, spin: bool = True) -> Any:
    """An onnxruntime session on the CPU with as many threads as PyTorch.

    Args:
        spin: whether its threads keep a core busy for a while after each call, which makes the next one faster.

    Raises:
        FunnelError: the extra "onnx" is not installed, or the file cannot be loaded.
    """
    with requires_extra("onnx", str(path)):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base class
        raise FunnelError(f"{path}: onnxruntime cannot load it ({error_reason(error)})") from None


def run_graph(session: Any, problem: Problem, dataset: Dataset) -> Tensor:
    """What the problem keeps of a graph's outputs for all rows, as in `funnel.training.evaluate.predict`."""
    batches = list(dataset.evaluation_batches(BATCH_SIZE))
    outputs = []
    for rows in batches:
        batch = dataset.batch(rows)
        logits = torch.from_numpy(session.run(None, {name: batch.inputs[name].numpy() for name in INPUTS})[0])
        outputs.append(pad_tokens(problem.collect(logits, batch.labels), batch.inputs[INPUTS[0]].shape[1], dataset.longest))
    return torch.cat(outputs)[np.argsort(np.concatenate(batches))]


def _feed(dataset: Dataset, rows: np.ndarray) -> Feed:
    batch = dataset.batch(rows)
    return {name: batch.inputs[name].numpy() for name in INPUTS}


def _random_feed(session: Any) -> Feed:
    rank = len(session.get_inputs()[0].shape)  # 3 for multiple choice
    ones = np.ones((*[1] * (rank - 1), RANDOM_LENGTH), dtype=np.int64)  # the token does not matter
    return dict(zip(INPUTS, (ones, ones, 0 * ones), strict=True))


def _median_milliseconds(session: Any, texts: list[Feed]) -> float:
    times = []
    for text in texts[:NUM_WARMUP] + texts:
        started = time.perf_counter()
        session.run(None, text)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[NUM_WARMUP:])
