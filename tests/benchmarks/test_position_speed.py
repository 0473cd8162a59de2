"""The comparison of absolute and relative positions runs on the config of a BERT."""

import sys
from pathlib import Path

import pytest

from benchmarks.speed import positions

transformers = pytest.importorskip("transformers", reason="needs the extra bench: pip install -e '.[bench]'")


def test_table_has_a_row_per_layout_with_rates_and_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertConfig(**sizes).save_pretrained(tmp_path)
    options = ["--blocks", "2", "1,1", "--shapes", "2,8", "--dtypes", "fp32", "--rounds", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["positions", "--weights", str(tmp_path), *options])
    positions.main()
    header, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:3] for row in cells] == [["2", "fp32", "2 x 8"], ["1,1", "fp32", "2 x 8"]]
    assert all(len(row) == header.count("|") - 1 and all(float(cell) > 0 for cell in row[3:]) for row in cells)


def test_transformers_has_as_many_layers_as_the_layout(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertConfig(**sizes).save_pretrained(tmp_path)
    models = positions.build_models(tmp_path, "2,1x2")
    assert list(models) == list(positions.SIDES)
    for name in positions.IMPLEMENTATIONS:
        bert = models[f"transformers, {name}"]
        assert (len(bert.bert.encoder.layer), bert.config._attn_implementation) == (4, name)
    absolute, relative = (models[side].config for side in (positions.ABSOLUTE, positions.RELATIVE))
    assert (absolute.relative_attention, absolute.max_positions, absolute.token_type_embeddings) == (False, 512, 2)
    assert (relative.relative_attention, relative.max_positions, relative.token_type_embeddings) == (True, None, 0)
