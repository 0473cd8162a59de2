"""The roofline of a training step: FLOPs and bytes by hand, and the table with measured times."""

import json
import sys

import pytest

from benchmarks.speed import roofline
from funnel.model.flops import count_parameters, total_flops


@pytest.fixture
def models(monkeypatch):
    models = {"tiny": roofline.small_config("1,1").replace(d_model=64, n_head=2, d_head=32, d_inner=128)}
    monkeypatch.setattr(roofline, "MODELS", models)
    return models


def test_costs_of_a_step_follow_from_those_of_the_model(models):
    config = models["tiny"]
    cost = roofline.roofline(config, batch=8, length=32)
    assert cost.parameters == count_parameters(config)
    assert cost.flops == 3 * 8 * total_flops(config, 32, 8)
    assert cost.weight_bytes == 40 * cost.parameters
    assert cost.compute_ms == pytest.approx(cost.flops / 989e12 * 1000)
    assert cost.memory_ms == pytest.approx((cost.weight_bytes + cost.activation_bytes) / 3.35e12 * 1000)
    assert cost.perfect_ms == max(cost.compute_ms, cost.memory_ms)


def test_attention_weights_take_no_memory(models):
    """Activations therefore grow linearly with the length."""
    config = models["tiny"]
    short, middle, long = (roofline.roofline(config, 1, length).activation_bytes for length in (32, 64, 128))
    assert long - middle == 2 * (middle - short)


@pytest.mark.parametrize("with_times", [False, True])
def test_table_has_a_row_per_shape_and_the_fastest_time_of_funnel(with_times, models, tmp_path, monkeypatch, capsys):
    shape = {"table": "step", "blocks": "1,1", "d_model": 64, "batch": 128, "length": 128}
    rows = [{**shape, "side": side, "ms": ms} for side, ms in (("transformers", 4.0), ("graphs", 5.0), ("eager", 9.0))]
    rows.append({"table": "demo", "side": "graphs", "ms": 1.0})
    (tmp_path / "times.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["roofline", *(["--measured", str(tmp_path / "times.jsonl")] if with_times else [])])
    roofline.main()
    header, _, *lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:3] for row in cells] == [["tiny", "1,1 H64", "128 x 128"], ["tiny", "1,1 H64", "16 x 512"]]
    assert all(len(row) == header.count("|") - 1 for row in cells)
    if with_times:
        perfect = roofline.roofline(models["tiny"], 128, 128).perfect_ms
        assert cells[0][-2:] == ["5.0", f"{5.0 / perfect:.1f}x"]
        assert cells[1][-2:] == ["", ""]
