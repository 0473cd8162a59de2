"""Training on a GPU: CUDA graphs against eager steps, resuming, and no synchronization in the loop. Skipped without a GPU."""

import itertools
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from torch.profiler import ProfilerActivity, profile

import train
from funnel.data import device_batches
from funnel.data.dataset import Dataset, Rows, Truncation
from funnel.data.device_batches import DeviceDataset, TrainingBatches
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model.attention_backends import BACKENDS, attention_backend
from funnel.model.checkpoint import load_checkpoint
from funnel.model.heads import FunnelForSequenceClassification
from funnel.problems.classification import Classification
from funnel.training.cuda_graphs import step_runner
from funnel.training.device import seed_step
from funnel.training.distributed import Distributed
from funnel.training.divergence import NonFiniteGuard
from funnel.training.evaluate import predict
from funnel.training.freezing import FreezeArgs, freeze
from funnel.training.loss import TaskLoss
from funnel.training.optim import LinearWarmupDecay, build_adamw, param_groups
from funnel.training.state import TrainComponents, TrainState
from funnel.training.teacher import DistillationLoss, Teacher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = torch.device("cuda")
PROBLEM = Classification(tiny_config())
BATCH_SIZE = 8


def make_dataset(n=403, longest=40, seed=0):
    """Random texts of 2 to `longest` tokens. By default, the last batch of an epoch is smaller."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, longest + 1, n).astype(np.int32)
    starts = np.concatenate([[0], lengths[:-1].cumsum(dtype=np.int64)])
    ids = random.integers(5, 99, int(lengths.sum())).astype(np.uint16)
    labels = random.integers(0, 2, n).astype(np.int32)
    return Dataset(ids, Rows(starts, lengths, lengths // 2 + 1, labels, np.zeros(n, np.uint64)), 0, Truncation())


class Run:
    """The parts of `train.train` that take steps, without its files."""

    def __init__(self, dtype="fp32", dropout=0.0, texts=403, **changes):
        defaults = {"no_cuda_graphs": False, "gradient_checkpointing": False, "grad_accum": 1, "seed": 0}
        args = SimpleNamespace(**{**defaults, "layer_decay": 1.0, "has_teacher": False, "freeze_layers": None, **changes})
        dist = Distributed(DEVICE)
        torch.manual_seed(0)
        config = tiny_config(hidden_dropout=dropout, attention_dropout=dropout, blocks="2x2,1,2")
        model = FunnelForSequenceClassification(config).to(DEVICE).train()
        model.set_gradient_checkpointing(args.gradient_checkpointing)
        freeze(model, FreezeArgs(freeze_layers=args.freeze_layers))
        optimizer = build_adamw(param_groups(model, 0.01, args.layer_decay), 1e-3, dist.graph_device)
        scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype == "fp16")
        loss: Any = TaskLoss(PROBLEM)
        if args.has_teacher:
            teacher = FunnelForSequenceClassification(tiny_config(blocks="2"))
            loss = DistillationLoss(PROBLEM, Teacher(teacher, torch.arange(99).flip(0)).to(DEVICE), 0.5)
        tokenizer = FunnelTokenizer.train(["a"])
        self.components = TrainComponents(dist, model, model, tokenizer, optimizer, scaler, dtype, loss)
        self.schedule = LinearWarmupDecay(optimizer, 1e-3, range(400), 0.1)
        self.data = partial(TrainingBatches(make_dataset(texts), DEVICE), BATCH_SIZE, args.seed)
        self.guard = NonFiniteGuard(self.components, self.data, self.schedule, args)
        step = partial(train.train_step, args=args, components=self.components, guard=self.guard)
        self.take_step = step_runner(step, self.components, args)
        self.state, self.args, self.losses = TrainState(), args, []
        self.batches = self.data(start=0)

    def take_steps(self, count):
        """Takes steps as the loop of train.py does; returns their losses, which are still on the device."""
        for _ in range(count):
            self.schedule.set(self.state.step)
            seed_step(self.args.seed, self.state.step)
            loss = self.take_step(next(self.batches))
            self.state.record_step(loss)
            self.losses.append(loss)
        return self

    @property
    def loss_curve(self):
        return torch.stack(self.losses).double().cpu()

    @property
    def weights(self):
        return {name: tensor.cpu() for name, tensor in self.components.model.state_dict().items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.1},
        {"dropout": 0.1, "dtype": "bf16"},
        {"grad_accum": 3, "dropout": 0.1},
        {"layer_decay": 0.8, "dropout": 0.1},
        {"has_teacher": True, "dropout": 0.1},
        {"freeze_layers": 4, "dropout": 0.1},
    ],
)
def test_graphs_compute_the_same_losses_as_eager_steps(changes):
    graphed = Run(**changes).take_steps(120)
    eager = Run(no_cuda_graphs=True, **changes).take_steps(120)
    assert "CUDA graph" in graphed.take_step.description
    assert eager.take_step.description == ""
    tolerance = 2e-2 if changes.get("dtype") == "bf16" else 2e-3
    torch.testing.assert_close(graphed.loss_curve, eager.loss_curve, rtol=tolerance, atol=tolerance)
    assert graphed.loss_curve.std() > 1e-3  # the losses differ between steps
    expected = float(eager.state.mean_loss)
    assert float(graphed.state.mean_loss) == pytest.approx(expected, rel=tolerance)


def test_replayed_steps_draw_different_dropout_masks():
    run = Run(dropout=0.5)
    batch = next(run.batches)
    for group in run.components.optimizer.param_groups:
        group["lr"].fill_(0.0)  # the same weights in every step
    losses = []
    for step in (0, 1, 2, 3, 4, 2):
        seed_step(0, step)
        losses.append(float(run.take_step(batch)))
    assert len(set(losses[:5])) == 5
    assert losses[5] == pytest.approx(losses[2], abs=1e-6)


# The backward pass of PyTorch's memory-efficient kernel uses atomics.
DETERMINISTIC = pytest.mark.parametrize("backend", [name for name in ("eager", "fused") if name in BACKENDS])


@DETERMINISTIC
def test_a_run_with_dropout_repeats_bit_for_bit(backend):
    with attention_backend(backend):
        first, second = (Run(dropout=0.1).take_steps(80) for _ in range(2))
    assert torch.equal(first.loss_curve, second.loss_curve)
    assert all(torch.equal(tensor, second.weights[name]) for name, tensor in first.weights.items())


@DETERMINISTIC
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_continues_bit_for_bit(dtype, backend):
    """The steps that the first process replays are warm-up steps of the second one, and the other way round."""
    with attention_backend(backend):
        whole = Run(dtype, dropout=0.1).take_steps(61)
        first = Run(dtype, dropout=0.1).take_steps(37)
        dist = first.components.dist
        saved = dist.optimizer_state(first.components.model, first.components.optimizer)
        second = Run(dtype, dropout=0.1)
        second.components.model.load_state_dict(first.weights)
        dist.load_optimizer_state(second.components.model, second.components.optimizer, saved)
        second.state.step, second.batches = 37, second.data(start=37)
        second.take_steps(24)
    assert torch.equal(second.loss_curve, whole.loss_curve[37:])
    assert all(torch.equal(tensor, whole.weights[name]) for name, tensor in second.weights.items())


def test_evaluations_and_new_shapes_between_replays_change_nothing():
    dataset = make_dataset(100, seed=1)
    whole, interrupted = Run().take_steps(60), Run()
    for _ in range(12):
        interrupted.take_steps(5)
        predict(interrupted.components.model, PROBLEM, dataset)
    torch.testing.assert_close(interrupted.loss_curve, whole.loss_curve, rtol=1e-5, atol=1e-5)


def test_a_non_finite_step_inside_a_graph_is_found_and_changes_no_weight():
    run = Run().take_steps(60)
    with torch.no_grad():
        run.components.model.classifier.linear_out.weight[0, 0] = math.inf
    before = run.weights
    run.take_steps(7)
    assert all(torch.equal(tensor, run.weights[name]) for name, tensor in before.items())
    with pytest.raises(FunnelError, match="training diverged at step 61 "):
        run.guard.check(67)


@pytest.mark.parametrize("changes", [{}, {"no_cuda_graphs": True}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("is_resident", [True, False])
def test_steps_do_not_wait_for_the_device(changes, is_resident, monkeypatch):
    if not is_resident:
        monkeypatch.setattr(device_batches, "MAX_MEMORY_SHARE", 0)
    run = Run("bf16", dropout=0.1, texts=400, **changes).take_steps(150)  # all shapes are captured
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.take_steps(50)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.guard.check(200)


def test_the_profile_of_50_steps_shows_no_stream_synchronization():
    run = Run("bf16", dropout=0.1, texts=400).take_steps(150)  # all shapes are captured
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run.take_steps(50)
    counts = {event.key: event.count for event in profiler.key_averages()}
    waits = {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "aten::item", "aten::_local_scalar_dense"}
    assert waits & counts.keys() == set()
    assert counts.get("cudaGraphLaunch", 0) == 50


def test_evaluation_waits_for_the_device_once():
    run, dataset = Run(), make_dataset(500)
    predict(run.components.model, PROBLEM, dataset)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        predict(run.components.model, PROBLEM, dataset)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts.get("cudaStreamSynchronize", 0) <= 1
    assert counts.get("aten::item", 0) == 0


def test_logits_equal_those_of_the_cpu():
    run, dataset = Run(), make_dataset(150)
    actual = predict(run.components.model, PROBLEM, dataset)
    expected = predict(run.components.model.cpu(), PROBLEM, dataset)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_batches_equal_those_of_the_cpu(monkeypatch):
    dataset = make_dataset()
    gathered = TrainingBatches(dataset, DEVICE)
    monkeypatch.setattr(device_batches, "MAX_MEMORY_SHARE", 0)
    assembled = TrainingBatches(dataset, DEVICE)
    assert isinstance(gathered._on_device, DeviceDataset)
    assert assembled._on_device is None
    sources = (batches(BATCH_SIZE, 1, start=5) for batches in (gathered, assembled, dataset.batches))
    for on_device, copied, reference in itertools.islice(zip(*sources, strict=True), 60):
        longest = reference.input_ids.shape[1]
        for name, expected in reference.tensors.items():
            assert on_device.tensors[name].device.type == "cuda"
            assert torch.equal(on_device.tensors[name], copied.tensors[name])
            actual = on_device.tensors[name].cpu()
            assert torch.equal(actual if name == "labels" else actual[:, :longest], expected)
        assert not on_device.attention_mask[:, longest:].any()


def test_fp16_steps_run_eagerly():
    run = Run("fp16").take_steps(120)
    assert run.take_step.description == ""
    assert run.loss_curve.isfinite().all()


# --- train.py ---------------------------------------------------------------------------------------------------------


def write_task(folder: Path) -> list[str]:
    """Writes a small task; returns the arguments of a run on it."""
    random = np.random.default_rng(0)
    words = [f"word{i}" for i in range(50)]
    lines = ["text,label"]
    for _ in range(600):
        chosen = random.choice(words, int(random.integers(2, 40)))
        lines.append(f"{' '.join(chosen)},{'yes' if 'word1' in chosen or 'word2' in chosen else 'no'}")
    (folder / "task.csv").write_text("\n".join(lines) + "\n")
    flags = "--weights none --blocks 1,1 --batch-size 16 --epochs 3 --eval-every 20 --device cuda --log-every 5"
    return ["--data", str(folder / "task.csv"), *flags.split()]


def curve(folder: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line["step"], line["loss"]] for line in lines]


def test_train_py_uses_graphs_by_default_and_gives_the_same_curve_without(tmp_path, capsys):
    arguments = write_task(tmp_path)
    outputs = []
    for flags in ([], ["--no-cuda-graphs"]):
        assert train.main([*arguments, *flags, "--out", str(tmp_path / f"run{len(flags)}")]) == 0
        outputs.append(capsys.readouterr().out)
    assert "CUDA graphs (" in outputs[0]
    assert "CUDA graph" not in outputs[1]
    graphed, eager = curve(tmp_path / "run0"), curve(tmp_path / "run1")
    torch.testing.assert_close(torch.tensor(graphed), torch.tensor(eager), rtol=5e-2, atol=5e-2)


def test_train_py_resumes_on_a_gpu_bit_for_bit(tmp_path, monkeypatch):
    arguments = [*write_task(tmp_path), "--save-every", "7", "--keep-checkpoints", "20"]
    with attention_backend("eager"):
        assert train.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
        original = train.seed_step

        def interrupt(seed, step, rank):
            if step == 44:
                raise KeyboardInterrupt
            original(seed, step, rank)

        monkeypatch.setattr(train, "seed_step", interrupt)
        assert train.main([*arguments, "--out", str(tmp_path / "stopped")]) == 130
        monkeypatch.undo()
        assert train.main(["--out", str(tmp_path / "stopped"), "--resume"]) == 0
    expected, actual = (load_checkpoint(tmp_path / name / "last").weights for name in ("whole", "stopped"))
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_train_py_runs_in_fp16(tmp_path):
    assert train.main([*write_task(tmp_path), "--dtype", "fp16", "--out", str(tmp_path / "run")]) == 0
