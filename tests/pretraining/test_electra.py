"""ELECTRA: the generator's config and embeddings, sampling, labels, losses, gradients, several processes, saving."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ABSOLUTE, BOTH, BUCKETS, POSITIONS, ROOT, tiny_config
from objective_inputs import LENGTHS, MASKED, gradients, make_inputs, randomize
from scipy import stats
from scipy.special import expit, log_softmax, softmax
from torch._subclasses.fake_tensor import FakeTensorMode

from funnel.errors import FunnelError
from funnel.model.config import FunnelConfig
from funnel.model.heads import FunnelForMaskedLM, FunnelForPreTraining
from funnel.pretraining import electra
from funnel.pretraining.electra import Electra, generator_config, replace, sample
from funnel.training.distributed import Distributed
from funnel.training.optim import build_adamw, param_groups


def make_objective(**changes) -> Electra:
    torch.manual_seed(0)
    objective = Electra(FunnelForPreTraining(tiny_config(**changes)))
    randomize(objective, 0.1)
    return objective


def as_double(inputs):
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


# --- the generator ----------------------------------------------------------------------------------------------------


def test_the_generator_has_the_blocks_and_a_quarter_of_the_width_and_of_the_heads():
    config = FunnelConfig(blocks="4,3x2,3", num_decoder_layers=2, hidden_act="gelu", hidden_dropout=0.2)
    generator = generator_config(config)
    changes = {"d_model": 192, "d_inner": 768, "n_head": 3, "embedding_size": 768, "lm_head_transform": True}
    assert generator == config.replace(**changes)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"d_model": 128, "n_head": 2, "d_inner": 512}, (32, 1, 128, 128)),
        ({"d_model": 312, "n_head": 12, "d_inner": 1200}, (78, 3, 300, 312)),
        ({"d_model": 20, "n_head": 5, "d_inner": 3}, (4, 1, 1, 20)),  # 5 is odd
        ({"d_model": 4, "n_head": 1, "d_inner": 2}, (2, 1, 1, 4)),
        ({"d_model": 2, "n_head": 1, "d_inner": 2}, (2, 1, 1, None)),
        ({"d_model": 256, "n_head": 4, "d_inner": 1024, "embedding_size": 128}, (64, 1, 256, 128)),
        ({"d_model": 256, "n_head": 4, "d_inner": 1024, "embedding_size": 64}, (64, 1, 256, None)),
    ],
)
def test_widths_and_heads_of_the_generator(fields, expected):
    generator = generator_config(FunnelConfig(**fields))
    assert (generator.d_model, generator.n_head, generator.d_inner, generator.embedding_size) == expected
    assert generator.d_head == 64


@pytest.mark.parametrize("changes", [*POSITIONS, {"embedding_size": 4}], ids=str)
def test_the_embeddings_are_shared_except_the_projection(changes):
    objective = make_objective(**changes)
    own = dict(objective.model.embeddings.named_parameters())
    generators = dict(objective.generator.embeddings.named_parameters())
    names = {name for name in own if not name.startswith("projection")}
    assert {name for name in generators if not name.startswith("projection")} == names
    assert all(generators[name] is own[name] for name in names)
    assert not any(generators[name] is own.get(name) for name in generators if name.startswith("projection"))
    parameters = [id(parameter) for parameter in objective.parameters()]
    assert len(parameters) == len(set(parameters))
    groups = [id(parameter) for group in param_groups(objective, 0.01) for parameter in group["params"]]
    assert sorted(groups) == sorted(parameters)
    count = sum(p.numel() for p in objective.model.parameters()) + sum(p.numel() for p in objective.generator.parameters())
    assert sum(p.numel() for p in objective.parameters()) == count - sum(own[name].numel() for name in names)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_samples_follow_the_softmax():
    logits = torch.tensor(np.random.default_rng(0).normal(0, 2, 50), dtype=torch.float32)
    uniforms = torch.rand(1, 200_000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(sample(logits.expand(1, 1, -1).expand(1, 200_000, -1), uniforms)[0], minlength=50)
    expected = softmax(logits.double().numpy()) * 200_000
    is_frequent = expected > 10
    observed = np.append(counts[is_frequent], counts[~is_frequent].sum())
    assert stats.chisquare(observed, np.append(expected[is_frequent], expected[~is_frequent].sum())).pvalue > 0.01


def test_each_position_is_sampled_from_its_own_logits_with_its_own_number():
    random = np.random.default_rng(0)
    logits, uniforms = random.normal(0, 2, (3, 4, 99)), random.random((3, 4))
    expected = [[np.flatnonzero(np.cumsum(softmax(logits[i, j])) > uniforms[i, j])[0] for j in range(4)] for i in range(3)]
    samples = sample(torch.tensor(logits, dtype=torch.float32), torch.tensor(uniforms, dtype=torch.float32))
    assert samples.tolist() == expected


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 30.0])
def test_tokens_with_probability_0_are_never_sampled(scale):
    logits = scale * torch.randn(2000, 1, 1001, generator=torch.Generator().manual_seed(0))
    logits[:, :, 0] = -1e4  # the first and the last token have probability 0
    logits[:, :, -1] = -1e4
    largest = 1 - 2**-24
    assert sample(logits, torch.full((2000, 1), largest)).max() <= 999
    assert sample(logits, torch.zeros(2000, 1)).min() >= 1


# --- the discriminator's input and labels -----------------------------------------------------------------------------


def test_only_used_positions_are_replaced_and_cls_never():
    ids = torch.arange(10).view(2, 5) + 20
    positions = torch.tensor([[3, 0, 0], [1, 4, 0]])
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    replaced = replace(ids, positions, tokens, torch.tensor([[1, 0, 0], [1, 1, 0]]) > 0)
    assert replaced.tolist() == [[20, 21, 22, 1, 24], [25, 4, 27, 28, 5]]


def reference(objective: Electra, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """The values in float64, from the full logits, with loops over the tokens."""
    types = inputs["attention_mask"], inputs["token_type_ids"]
    with torch.no_grad():
        full = objective.generator(inputs["masked_ids"], *types).numpy()
    ids = inputs["input_ids"].clone()
    losses, correct = [], []
    for row, count in enumerate(MASKED):
        for column in range(count):
            position, label = int(inputs["positions"][row, column]), int(inputs["labels"][row, column])
            logits = full[row, position]
            losses.append(-log_softmax(logits)[label])
            correct.append(logits.argmax() == label)
            ids[row, position] = int(np.flatnonzero(np.cumsum(softmax(logits)) > float(inputs["uniforms"][row, column]))[0])
    with torch.no_grad():
        logits = objective.model(ids, *types).numpy()
    targets = (ids != inputs["input_ids"]).numpy()
    terms, decided = [], []
    for row, length in enumerate(LENGTHS):
        for position in range(length):
            probability = expit(logits[row, position])
            terms.append(-np.log(probability if targets[row, position] else 1 - probability))
            decided.append((logits[row, position] > 0) == targets[row, position])
    return {
        "loss": np.mean(losses) + 50 * np.mean(terms),
        "generator_loss": np.mean(losses),
        "discriminator_loss": np.mean(terms),
        "generator_accuracy": np.mean(correct),
        "discriminator_accuracy": np.mean(decided),
    }


@pytest.mark.parametrize("changes", [*POSITIONS, {"embedding_size": 4}, {"blocks": "2", "num_decoder_layers": 0}], ids=str)
def test_all_values_are_those_of_a_computation_token_by_token(changes):
    objective = make_objective(**changes).double().eval()
    inputs = make_inputs(LENGTHS, MASKED)
    values = dict(zip(Electra.names, objective(**inputs).tolist(), strict=True))
    assert values == pytest.approx(reference(objective, inputs), rel=1e-4)


def test_a_correct_guess_counts_as_original(monkeypatch):
    objective = make_objective().eval()
    inputs = make_inputs(LENGTHS, MASKED)
    seen = {}

    def forward(input_ids, *_):
        seen["ids"] = input_ids
        return torch.full(input_ids.shape, -30.0)  # certain that no token is replaced

    monkeypatch.setattr(objective.model, "forward", forward)
    monkeypatch.setattr(electra, "sample", lambda logits, uniforms: inputs["labels"])
    values = dict(zip(Electra.names, objective(**inputs).tolist(), strict=True))
    assert torch.equal(seen["ids"], inputs["input_ids"])
    assert values["discriminator_accuracy"] == pytest.approx(1)
    assert values["discriminator_loss"] == pytest.approx(0, abs=1e-6)

    wrong = inputs["labels"].clone()
    wrong[0, 1] += 1
    monkeypatch.setattr(electra, "sample", lambda logits, uniforms: wrong)
    values = dict(zip(Electra.names, objective(**inputs).tolist(), strict=True))
    assert values["discriminator_accuracy"] == pytest.approx(1 - 1 / sum(LENGTHS))
    assert values["discriminator_loss"] == pytest.approx(30 / sum(LENGTHS))


def test_padding_of_tokens_and_positions_does_not_count():
    objective = make_objective().double().eval()
    inputs = as_double(make_inputs(LENGTHS, MASKED))
    padded = {}
    for name, tensor in inputs.items():
        is_positions = tensor.shape[1] == max(MASKED)
        padded[name] = F.pad(tensor, (0, 2 if is_positions else 5), value=0)
    padded["labels"][:, -2:] = 17
    padded["uniforms"][:, -2:] = 0.7
    torch.testing.assert_close(objective(**padded), objective(**inputs), rtol=1e-6, atol=1e-7)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_no_gradient_passes_through_sampling():
    """The generator's gradient is that of its own loss; only the shared embeddings get the discriminator's, too."""
    objective = make_objective(**ABSOLUTE).double()
    inputs = as_double(make_inputs(LENGTHS, MASKED))
    total = gradients(objective, objective(**inputs)[0])
    types = inputs["attention_mask"], inputs["token_type_ids"]
    logits = objective.generator(inputs["masked_ids"], *types)
    rows = torch.arange(4).unsqueeze(-1)
    at_positions = logits[rows, inputs["positions"]]
    losses = -at_positions.log_softmax(-1).gather(-1, inputs["labels"].unsqueeze(-1)).squeeze(-1)
    generators = gradients(objective, (losses * inputs["position_weights"]).sum())

    ids = replace(
        inputs["input_ids"], inputs["positions"], sample(at_positions, inputs["uniforms"]), inputs["position_weights"] > 0
    )
    targets = (ids != inputs["input_ids"]).double()
    logits = objective.model(ids, *types)
    losses = F.softplus(logits) - targets * logits
    discriminators = gradients(objective, 50 * (losses * inputs["token_weights"]).sum())
    for name, gradient in total.items():
        torch.testing.assert_close(gradient, generators[name] + discriminators[name], rtol=1e-4, atol=1e-6, msg=name)
        is_shared = name.startswith("model.embeddings.")
        assert generators[name].any() == (is_shared or name.startswith("generator.")), name
        assert discriminators[name].any() == (is_shared or name.startswith("model.")), name


def test_gradients_of_micro_batches_add_up_to_those_of_the_batch():
    objective = make_objective().double()
    inputs = as_double(make_inputs(LENGTHS, MASKED))
    values = objective(**inputs)
    expected = gradients(objective, values[0])
    parts = [objective(**{name: tensor[rows] for name, tensor in inputs.items()}) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), values, rtol=1e-6, atol=1e-9)
    summed = gradients(objective, sum(part[0] for part in parts))
    for name, gradient in expected.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_losses_are_computed_in_float32():
    objective = make_objective()
    inputs = make_inputs(LENGTHS, MASKED)
    with torch.autocast("cpu", torch.bfloat16):
        values = objective(**inputs)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[1], objective(**inputs)[1], rtol=0.05, atol=0)


def test_the_losses_of_a_repeated_batch_fall():
    objective = make_objective()
    optimizer = build_adamw(param_groups(objective, 0.01), 3e-3)
    inputs = make_inputs([12] * 8, [2] * 8)
    values = []
    for _ in range(50):
        outputs = objective(**inputs)
        outputs[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(outputs.tolist())
    _, generator_loss, discriminator_loss, *_ = zip(*values, strict=True)
    assert np.mean(generator_loss[-5:]) < np.mean(generator_loss[:5]) / 2
    assert np.mean(discriminator_loss[-5:]) < np.mean(discriminator_loss[:5]) / 2


@pytest.mark.parametrize("changes", [{}, ABSOLUTE], ids=str)
def test_a_step_reads_no_tensor_on_the_host(changes):
    """With tensors without values, reading one is an error, as is a shape that depends on values: CUDA graphs allow neither."""
    inputs = make_inputs(LENGTHS, MASKED)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        objective = make_objective(hidden_dropout=0.1, **changes)
        values = objective(**{name: mode.from_tensor(tensor) for name, tensor in inputs.items()})
        values[0].backward()
    assert values.shape == (5,)


# --- saving, resuming, several processes ------------------------------------------------------------------------------


def take_step(objective: Electra, optimizer: torch.optim.Optimizer, seed: int) -> torch.Tensor:
    values = objective(**make_inputs(LENGTHS, MASKED, seed))
    values[0].backward()
    optimizer.step()
    optimizer.zero_grad()
    return values.detach()


@pytest.mark.parametrize("changes", [{}, ABSOLUTE, BUCKETS, BOTH], ids=str)
def test_a_resumed_run_is_the_same_bit_for_bit(changes, tmp_path):
    dist = Distributed(torch.device("cpu"))
    objective = make_objective(**changes)
    optimizer = build_adamw(param_groups(objective, 0.01), 1e-3)
    for seed in range(3):
        take_step(objective, optimizer, seed)
    objective.model.save_pretrained(tmp_path / "model")
    objective.save(tmp_path, objective.state_dict())
    torch.save(dist.optimizer_state(objective, optimizer), tmp_path / "optimizer.pt")
    expected = [take_step(objective, optimizer, seed) for seed in (3, 4)]

    resumed = Electra(FunnelForPreTraining.from_pretrained(tmp_path / "model").train())
    resumed.load(tmp_path)
    optimizer = build_adamw(param_groups(resumed, 0.01), 1e-3)
    dist.load_optimizer_state(resumed, optimizer, torch.load(tmp_path / "optimizer.pt"))
    actual = [take_step(resumed, optimizer, seed) for seed in (3, 4)]
    assert torch.equal(torch.stack(actual), torch.stack(expected))
    for (name, parameter), other in zip(resumed.named_parameters(), objective.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert resumed.generator.embeddings.word_embeddings is resumed.model.embeddings.word_embeddings


def test_the_saved_generator_is_an_ordinary_checkpoint(tmp_path):
    objective = make_objective().eval()
    objective.save(tmp_path, objective.state_dict())
    assert sorted(path.name for path in (tmp_path / "generator").iterdir()) == ["config.json", "model.safetensors"]
    generator = FunnelForMaskedLM.from_pretrained(tmp_path / "generator")
    inputs = make_inputs(LENGTHS, MASKED)
    arguments = [inputs[name] for name in ("masked_ids", "attention_mask", "token_type_ids")]
    assert torch.equal(generator(*arguments), objective.generator(*arguments))


def test_a_generator_that_does_not_fit_is_an_error(tmp_path):
    with pytest.raises(FunnelError, match="generator"):
        make_objective().load(tmp_path)
    objective = make_objective(blocks="1,1")
    objective.save(tmp_path, objective.state_dict())
    with pytest.raises(FunnelError, match="generator: the generator has blocks 1,1, the discriminator 1,2,1; use "):
        make_objective().load(tmp_path)
    objective = make_objective(d_model=32)
    objective.save(tmp_path, objective.state_dict())
    with pytest.raises(FunnelError, match=r"generator: weight .* has shape"):
        make_objective().load(tmp_path)
    without_transform = generator_config(tiny_config()).replace(lm_head_transform=False)
    FunnelForMaskedLM(without_transform).save_pretrained(tmp_path / "generator")
    with pytest.raises(FunnelError, match=r"missing or of another shape: lm_layer_norm\.weight, lm_layer_norm\.bias"):
        make_objective().load(tmp_path)


# Trains on the rows of each rank; rank 0 writes the values and the weights.
WORKER = f"""
import sys
import torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests/pretraining")!r}]
from objective_inputs import make_inputs
from test_electra import MASKED, LENGTHS, make_objective
from funnel.training.distributed import init_distributed
from funnel.training.optim import param_groups

with init_distributed("cpu") as dist:
    objective = make_objective()
    wrapped = dist.wrap(objective)
    # The gradient of a key's bias is 0 up to rounding, which a smaller epsilon would amplify.
    optimizer = torch.optim.AdamW(param_groups(objective, 0.01), lr=1e-3, eps=1e-3)
    values = []
    for seed in range(6):
        inputs = make_inputs(LENGTHS, MASKED, seed)
        for name in ("token_weights", "position_weights"):
            inputs[name] = inputs[name] * dist.world_size
        parts = {{name: tensor[dist.rank :: dist.world_size] for name, tensor in inputs.items()}}
        for rows in (slice(0, 1), slice(1, None)):
            with dist.sync_gradients(wrapped, rows.stop is None):
                outputs = wrapped(**{{name: tensor[rows] for name, tensor in parts.items()}})
                outputs[0].backward()
            values.append(dist.mean(outputs.detach().clone()))
        optimizer.step()
        optimizer.zero_grad()
        if seed == 2:
            state = dist.optimizer_state(objective, optimizer)
            state = dist.run_on_main_and_broadcast(lambda: state)
            optimizer = torch.optim.AdamW(param_groups(objective, 0.01), lr=1e-3, eps=1e-3)
            dist.load_optimizer_state(objective, optimizer, state)
    if dist.is_main:
        sums = torch.stack(values).view(6, 2, 5).sum(1)
        torch.save((sums, objective.state_dict()), sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_give_the_values_and_weights_of_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    results = []
    for world_size in (1, 2):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"] if world_size > 1 else []
        command = [sys.executable, *torchrun, str(tmp_path / "worker.py"), str(tmp_path / f"{world_size}.pt")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(tmp_path / f"{world_size}.pt"))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
