"""Training steps as CUDA graphs, with the CUDA operations replaced by a fake. test_cuda_training.py runs the real ones."""

from types import SimpleNamespace

import pytest
import torch
from conftest import padded_batch

from funnel.data.batches import text_batch
from funnel.errors import FunnelError
from funnel.training import cuda_graphs
from funnel.training.cuda_graphs import StepRunner, step_runner
from funnel.training.distributed import Distributed


class FakeStream:
    """Records the calls. As on a GPU, a capture computes nothing, and a replay reruns the step on the captured buffers."""

    def __init__(self):
        self.calls = []
        self.pool_bytes = 0

    def run(self, work):
        self.calls.append("run")
        return work()

    def capture(self, work):
        self.calls.append("capture")
        self.pool_bytes += 2**20
        result = torch.full((), torch.nan)

        def replay():
            self.calls.append("replay")
            result.copy_(work())

        return replay, result


class Step:
    """A step whose loss is the sum of the token ids; counts its calls by batch."""

    def __init__(self):
        self.losses = []

    def __call__(self, batch):
        loss = (batch.input_ids * batch.attention_mask + batch.token_type_ids).sum() + batch.labels.sum()
        self.losses.append(float(loss))
        return loss.float()


def make_batch(seed, lengths=(5, 7)):
    return text_batch(*padded_batch(list(lengths), seed=seed), torch.tensor([seed + row for row in range(len(lengths))]))


def run(batches):
    step, cuda = Step(), FakeStream()
    runner = StepRunner(step, cuda)
    return [runner(batch) for batch in batches], step, cuda, runner


def test_the_first_batch_of_a_shape_runs_eagerly_the_second_is_captured_the_others_are_replayed():
    _, _, cuda, _ = run([make_batch(0), make_batch(1), make_batch(2)])
    assert cuda.calls == ["run", "capture", "replay", "replay"]


def test_every_batch_is_computed_once_with_its_own_values():
    batches = [
        make_batch(seed, lengths) for seed, lengths in enumerate([(5, 7), (3, 9), (5, 7), (7, 2), (9, 1), (3, 9), (7, 7)])
    ]
    losses, step, _, _ = run(batches)
    expected = [float(Step()(batch)) for batch in batches]
    assert step.losses == expected
    assert [float(loss) for loss in losses] == expected


def test_a_returned_loss_does_not_change_at_the_next_replay():
    losses, step, _, _ = run([make_batch(seed) for seed in range(5)])
    assert [float(loss) for loss in losses] == step.losses
    assert len({loss.data_ptr() for loss in losses}) == 5


def test_the_callers_batch_is_not_used_as_a_buffer():
    batches = [make_batch(seed) for seed in range(4)]
    copies = [batch.map(torch.clone) for batch in batches]
    run(batches)
    for batch, copy in zip(batches, copies, strict=True):
        assert all(torch.equal(tensor, copy.tensors[name]) for name, tensor in batch.tensors.items())


def test_batches_of_another_size_and_length_have_their_own_graphs():
    shapes = [(5, 7), (5, 8), (5, 7, 7)] * 3
    _, _, cuda, runner = run([make_batch(seed, lengths) for seed, lengths in enumerate(shapes)])
    assert cuda.calls.count("run") == cuda.calls.count("capture") == 3
    assert cuda.calls.count("replay") == 6
    assert runner.description == "3 CUDA graphs (3 MiB)"


def test_shapes_beyond_the_largest_number_of_graphs_run_eagerly(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    batches = [make_batch(seed, (length,)) for seed, length in enumerate([3, 4, 5] * 3)]
    losses, step, cuda, _ = run(batches)
    assert cuda.calls.count("capture") == 2
    assert cuda.calls.count("replay") == 4
    assert cuda.calls.count("run") == 5
    assert [float(loss) for loss in losses] == step.losses == [float(Step()(batch)) for batch in batches]


def test_a_failed_capture_is_an_error_that_names_the_parameter():
    class Failing(FakeStream):
        def capture(self, work):
            try:
                raise RuntimeError("operation not permitted")
            finally:
                raise RuntimeError("capture invalidated")  # as torch.cuda.graph does

    runner = StepRunner(Step(), Failing())
    runner(make_batch(0))
    with pytest.raises(FunnelError, match=r"captured .*\(operation not permitted\); .* no_cuda_graphs") as error:
        runner(make_batch(1))
    assert error.value.parameter == "no_cuda_graphs"


def components_on(device, world_size=1, fp16=False):
    return SimpleNamespace(
        dist=Distributed(torch.device(device), 0, world_size), scaler=SimpleNamespace(is_enabled=lambda: fp16)
    )


ARGS = SimpleNamespace(no_cuda_graphs=False, gradient_checkpointing=False)


@pytest.mark.parametrize(
    ("components", "args", "uses_graphs"),
    [
        (components_on("cuda"), ARGS, True),
        (components_on("cpu"), ARGS, False),
        (components_on("mps"), ARGS, False),
        (components_on("cuda", world_size=2), ARGS, False),
        (components_on("cuda", fp16=True), ARGS, False),
        (components_on("cuda"), SimpleNamespace(no_cuda_graphs=True, gradient_checkpointing=False), False),
        (components_on("cuda"), SimpleNamespace(no_cuda_graphs=False, gradient_checkpointing=True), False),
    ],
)
def test_graphs_are_used_where_the_step_can_be_captured(components, args, uses_graphs, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "GraphCapturer", lambda _device: FakeStream())
    runner = step_runner(Step(), components, args)
    assert (runner.cuda is not None) == uses_graphs
    losses = [runner(make_batch(seed)) for seed in range(3)]
    assert [float(loss) for loss in losses] == runner.step.losses
    assert bool(runner.description) == uses_graphs
