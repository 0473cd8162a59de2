"""The benchmark of freezing: its table."""

import sys

from conftest import tiny_config

from benchmarks.speed import freezing


def test_the_table_has_a_row_per_setting(monkeypatch, capsys):
    monkeypatch.setattr(freezing.Setting, "measure_memory", lambda self: 200.0 - 10 * self.frozen)
    monkeypatch.setattr(
        freezing, "small_config", lambda layout: tiny_config(vocab_size=30_000, blocks=layout, num_decoder_layers=0)
    )
    monkeypatch.setattr(sys, "argv", ["freezing", "--blocks", "1,1", "--shape", "2,8", "--rounds", "1", "--steps", "1"])
    freezing.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[4:]]
    assert [" ".join(row[:-9]) for row in rows] == ["nothing", "embeddings", "embeddings, 1 layer", "embeddings, 2 layers"]
    assert [row[-2] for row in rows] == ["210", "200", "190", "180"]
