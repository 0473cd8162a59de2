"""What the loop is made of: groups, schedule, prediction, the run's folder."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import tiny

from funnel import demo, training
from funnel.config import FunnelConfig
from funnel.data import encode
from funnel.errors import FunnelError
from funnel.heads import FunnelForSequenceClassification
from funnel.tokenizer import FunnelTokenizer

CPU = torch.device("cpu")


def test_only_matrices_decay():
    model = FunnelForSequenceClassification(tiny())
    decayed, plain = (group["params"] for group in training.parameter_groups(model, 0.01))
    by_id = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed) + len(plain) == len(by_id)
    decayed_names = {by_id[id(p)] for p in decayed}
    for name in by_id.values():
        is_matrix = name.endswith(("weight", "r_kernel", "seg_embed")) and "layer_norm" not in name
        assert (name in decayed_names) == is_matrix, name


def test_the_learning_rate_rises_and_falls_in_straight_lines():
    factor = training.linear_schedule(total=100, warmup=0.1)
    values = [factor(step) for step in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == values[9] == pytest.approx(1.0)
    rises, falls = np.diff(values[:10]), np.diff(values[10:])
    np.testing.assert_allclose(rises, rises[0])
    np.testing.assert_allclose(falls, falls[0])
    assert factor(100) == pytest.approx(0.0)
    assert all(0 < training.linear_schedule(1, w)(0) <= 1 for w in (0, 0.1, 0.9))


@pytest.fixture(scope="module")
def dataset():
    examples = demo.examples(train=150, dev=10)[0]
    return encode(examples, {"0": 0, "1": 1}, FunnelTokenizer.train(examples.texts), 30)


def test_predictions_come_in_the_order_of_the_dataset(dataset):
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny(vocab_size=999))
    model.train()
    found = training.predict(model, dataset, CPU, "fp32", batch_size=16)
    assert model.training
    model.eval()
    for row in (0, 1, 77, 149):
        batch = dataset.batch(np.array([row]))
        with torch.no_grad():
            expected = model(batch.input_ids, batch.attention_mask, batch.token_type_ids)
        torch.testing.assert_close(found[row : row + 1], expected)


def test_one_class_is_said_in_words():
    config, labels = FunnelConfig(id2label={0: "no", 1: "yes"}), np.array([0, 1, 1, 1])
    text = training.one_class_warning(np.array([1, 1, 1, 1]), labels, config)
    assert "one class only, 'yes'" in text
    assert "75.0%" in text
    assert training.one_class_warning(np.array([1, 0, 1, 1]), labels, config) is None
    assert training.one_class_warning(np.array([1, 1]), np.array([1, 1]), config) is None


def test_a_device_that_is_not_there_is_an_error():
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(FunnelError, match=missing):
        training.choose_device(missing)


def test_bf16_is_for_wide_models():
    assert training.choose_dtype(None, CPU, 128) == "fp32"
    assert training.choose_dtype("bf16", CPU, 128) == "bf16"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(loss):
    with pytest.raises(FunnelError, match=r"step 7.*--lr"):
        training.check_loss(loss, 7, 1e-3)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(FunnelError, match="--resume"):
        training.Run(tmp_path, {}, "train", resume=False)
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


def test_a_run_is_resumed_with_its_own_settings_only(tmp_path):
    training.Run(tmp_path / "run", {"lr": 1e-5, "seed": 0}, "train", resume=False)
    training.Run(tmp_path / "run", {"lr": 1e-5, "seed": 0}, "train", resume=True)
    with pytest.raises(FunnelError, match=r"lr 1e-05, not 2e-05"):
        training.Run(tmp_path / "run", {"lr": 2e-5, "seed": 0}, "train", resume=True)
    with pytest.raises(FunnelError, match="holds no run"):
        training.Run(tmp_path / "none", {}, "train", resume=True)


def test_the_log_is_a_line_an_event(tmp_path):
    run = training.Run(tmp_path / "run", {}, "train", resume=False)
    run.log(step=1, split="train", loss=0.5)
    run.log(step=2, split="dev", loss=0.25, accuracy=1.0)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[1] == {"step": 2, "split": "dev", "loss": 0.25, "accuracy": 1.0}
