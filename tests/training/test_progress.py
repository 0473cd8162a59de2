"""What a run prints."""

from funnel.training.progress import Progress, format_scores
from funnel.training.run_dir import RunDir
from funnel.training.state import TrainState


def test_only_rank_0_reads_the_run_folder_for_the_summary(tmp_path, monkeypatch, capsys):
    """The others may be at the end while rank 0 still replaces checkpoints."""
    run = RunDir(tmp_path)
    monkeypatch.setattr(run, "size", None)
    run.is_main = False
    Progress(run, TrainState(total_steps=1)).print_summary()
    assert capsys.readouterr().out == ""


def test_scores_are_printed_with_their_step_if_they_have_one():
    assert format_scores({"step": 1200, "loss": 0.5, "f1 (a\nb)": 1.0}) == "step 1,200: loss 0.5000, f1 (a b) 1.0000"
    assert format_scores({"loss": 1234567890.0}) == "loss 1.23457e+09"
