"""Non-finite losses and gradients: no update, and a diagnosis."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import padded_batch, tiny_config

from funnel.data.batches import text_batch
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model.compilation import compile_regions
from funnel.model.heads import FunnelForSequenceClassification
from funnel.problems.classification import Classification
from funnel.problems.regression import Regression
from funnel.training.distributed import Distributed
from funnel.training.divergence import NonFiniteGuard, find_nonfinite_gradient, forward_and_find_nonfinite
from funnel.training.evaluate import Evaluation
from funnel.training.loss import TaskLoss
from funnel.training.optim import LinearWarmupDecay, clip_grad_norm
from funnel.training.state import TrainComponents

CPU = torch.device("cpu")
LOSS = TaskLoss(Classification(tiny_config()))


def make_batch():
    return text_batch(*padded_batch([5, 7]), torch.tensor([0, 1]))


@pytest.fixture
def components():
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainComponents(Distributed(CPU), model, model, FunnelTokenizer.train(["a"]), optimizer, scaler, "fp32", LOSS)


def batches(start):
    while True:
        yield make_batch()


def make_guard(components):
    schedule = LinearWarmupDecay(components.optimizer, 1e-2, range(10), 0.5)
    return NonFiniteGuard(components, batches, schedule, SimpleNamespace(seed=0, grad_accum=2))


def take_steps(components, guard, n_steps, bad_steps=()):
    for step in range(n_steps):
        batch = make_batch()
        loss = LOSS(components.model, batch) * (math.nan if step in bad_steps else 1)
        loss.backward()
        guard.observe(loss.detach(), clip_grad_norm(components.model, 1.0))
        components.optimizer.step()
        components.optimizer.zero_grad()


def weights_of(components):
    return {name: tensor.clone() for name, tensor in components.model.state_dict().items()}


def test_weights_stay_as_they_were_before_the_offending_step(components):
    guard = make_guard(components)
    take_steps(components, guard, 3)
    before = weights_of(components)
    take_steps(components, guard, 4, bad_steps={0})  # the later ones are finite
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(components).items())
    assert float(next(iter(components.optimizer.state.values()))["step"]) == 3


def test_finite_steps_update_the_weights_and_pass_the_check(components):
    guard = make_guard(components)
    before = weights_of(components)
    take_steps(components, guard, 2)
    guard.check(2)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights_of(components).items())


def test_the_check_names_step_learning_rate_and_cause(components):
    guard = make_guard(components)
    take_steps(components, guard, 5)
    with torch.no_grad():
        components.model.classifier.linear_out.weight[0, 0] = math.inf
    take_steps(components, guard, 3)
    with pytest.raises(FunnelError, match=r"step 6 \(learning rate 0.01\): the first non-finite output is that of classifier"):
        guard.check(8)


def test_a_cause_that_does_not_recur_is_reported_as_such(components):
    guard = make_guard(components)
    take_steps(components, guard, 2, bad_steps={1})
    with pytest.raises(FunnelError, match=r"diverged at step 2 .* are finite when recomputed"):
        guard.check(2)


def test_the_first_layer_with_a_nonfinite_output_is_named(components):
    components.model.encoder.blocks[1][0].ffn.linear_1.weight.data[0, 0] = math.inf
    _, cause = forward_and_find_nonfinite(components.model, LOSS, make_batch())
    assert "encoder.blocks.1.0.ffn.linear_1" in cause


def test_the_layer_is_named_also_if_the_model_is_compiled(components, compile_with):
    compile_with("eager")
    compile_regions(components.model.train())
    components.model(**make_batch().inputs)
    components.model.encoder.blocks[1][0].ffn.linear_1.weight.data[0, 0] = math.inf
    _, cause = forward_and_find_nonfinite(components.model, LOSS, make_batch())
    assert "encoder.blocks.1.0.ffn.linear_1" in cause


def test_a_finite_forward_pass_has_no_cause(components):
    loss, cause = forward_and_find_nonfinite(components.model, LOSS, make_batch())
    assert loss.isfinite()
    assert cause is None


def test_the_first_nonfinite_gradient_of_the_backward_pass_is_named(components):
    parameters = list(components.model.named_parameters())
    for number in (3, 7):
        parameters[number][1].register_hook(lambda gradient: gradient * math.nan)
    loss, _ = forward_and_find_nonfinite(components.model, LOSS, make_batch())
    loss.backward()
    cause = find_nonfinite_gradient(components.model)
    assert parameters[7][0] in cause
    assert "2 parameters" in cause


def test_the_reported_learning_rate_is_that_of_the_offending_step(components):
    guard = make_guard(components)
    take_steps(components, guard, 2, bad_steps={0})
    with pytest.raises(FunnelError, match=r"step 1 \(learning rate 0.002\)"):  # a fifth of the peak: warmup takes 5 steps
        guard.check(2)


def test_fp16_relies_on_the_scaler_until_its_scale_collapses(components):
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    components = replace(components, scaler=scaler, dtype="fp16")
    guard = make_guard(components)
    guard.observe(torch.tensor(math.nan), torch.tensor(math.nan))
    assert not hasattr(components.optimizer, "found_inf")
    scaler.scale(torch.ones(1))
    guard.check(1)
    scaler.update(2.0**-6)
    with pytest.raises(FunnelError, match="loss scale has collapsed"):
        guard.check(7)


def test_the_diagnosis_uses_micro_batches(components):
    guard = make_guard(components)
    sizes = []
    components.model.register_forward_pre_hook(lambda _module, _args, inputs: sizes.append(len(inputs["input_ids"])),
                                               with_kwargs=True)  # fmt: skip
    take_steps(components, guard, 1, bad_steps={0})
    sizes.clear()
    with pytest.raises(FunnelError):
        guard.check(1)
    assert sizes == [1, 1]


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [("fp16", "use dtype bf16 or fp32"), ("bf16", "use dtype fp32 or a"), ("fp32", "with a lower learning")],
)
def test_an_evaluation_with_nonfinite_logits_ends_the_run(components, dtype, advice):
    guard = make_guard(replace(components, dtype=dtype))
    logits = torch.zeros(5, 2)
    results = {"dev": Evaluation(logits, {"loss": 1.0}), "dev_mismatched": Evaluation(logits.clone(), {"loss": math.nan})}
    guard.check_evaluation(1200, results)  # a loss that is NaN alone does not end a run
    results["dev_mismatched"].results[:2] = torch.tensor([math.nan, math.inf])
    with pytest.raises(FunnelError) as error:
        guard.check_evaluation(1200, results)
    message = f"evaluation at step 1,200: the logits of 2 examples of dev_mismatched are not finite in {dtype}"
    assert str(error.value).startswith(message)
    assert advice in str(error.value)
    assert error.value.parameter == (None if dtype == "fp32" else "dtype")


def test_the_diagnosis_uses_the_units_of_training():
    config = tiny_config(id2label={0: "score"}, problem_type="regression", label_mean=2e30, label_std=1e30)
    batch = text_batch(*padded_batch([5, 7]), torch.tensor([1e30, 3e30]))
    loss, cause = forward_and_find_nonfinite(FunnelForSequenceClassification(config), TaskLoss(Regression(config)), batch)
    assert cause is None
    assert loss.item() < 100
