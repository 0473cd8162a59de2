"""Model cards: the header as huggingface_hub reads it, what they say, and that their code runs."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from trained_runs import KINDS, LABELS, write_trained_run

from funnel.analysis.card import REPO_ID, as_code, metric_type, render_card
from funnel.analysis.runs import read_run
from funnel.cli.main import main
from funnel.errors import FunnelError
from funnel.model.flops import count_parameters, total_flops
from funnel.problems.metrics import LOWER_IS_BETTER

pytest.importorskip("jinja2", reason="needs the extra report")
BERT = {"family": "bert", "relative_attention": False, "position_embeddings": 40, "token_type_embeddings": 2}


def card_of(folder: Path) -> ModelCard:
    """The card as huggingface_hub parses it."""
    return ModelCard(render_card(read_run(folder)))


def change(run: Path, part: str, **values) -> None:
    record = json.loads((run / "run.json").read_text())
    record[part] = {**record[part], **values} if isinstance(record[part], dict) else values["value"]
    (run / "run.json").write_text(json.dumps(record))


@pytest.fixture(scope="module", params=KINDS)
def shared_run(request, tmp_path_factory) -> tuple[str, Path, str]:
    """Of every kind of problem: the kind, a run, its card."""
    run = write_trained_run(tmp_path_factory.mktemp("runs") / "mine", request.param, teacher="/home/me/big", teacher_weight=0.5)
    return request.param, run, render_card(read_run(run))


def test_the_header_has_the_best_evaluation_of_every_kind_of_problem(shared_run):
    kind, run, text = shared_run
    data = ModelCard(text).data
    assert data.license == "unknown"
    assert (data.model_name, data.library_name) == ("mine", "transformers")
    best = json.loads((run / "metrics.jsonl").read_text().splitlines()[3])
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    assert found == {name: pytest.approx(best[name], abs=1e-4) for name in KINDS[kind][2]}
    assert {result.dataset_name for result in data.eval_results} == {"train.csv"}
    assert {result.task_type for result in data.eval_results} == {data.pipeline_tag}
    assert (data.language, data.base_model, data.datasets) == (None, None, None)


def test_results_show_the_best_and_the_last_evaluation(shared_run):
    kind, _, text = shared_run
    for name in KINDS[kind][2]:
        cells = "0.1877 | 0.5" if name in LOWER_IS_BETTER else "81.2 | 50.0"
        assert re.search(rf"^\| dev \| {re.escape(name)}(, %)? \| {re.escape(cells)} \|$", text, re.MULTILINE), name
    assert "step 20 of 30" in text
    assert "last evaluation (step 30)" in text
    assert "not finished" not in text


def test_cards_have_no_local_paths(shared_run):
    _, run, text = shared_run
    assert not re.search(r"/home|secret/|clients|\.\./", text)
    assert str(run.parent) not in text
    command = "python3 train.py --data train.csv --dev=dev.csv --weights none --out mine --text-column a/b"
    assert f"```text\n{command}\n```" in text


def test_the_code_for_funnel_runs_and_the_other_code_compiles(shared_run, tmp_path, monkeypatch):
    _, run, text = shared_run
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert [re.findall(r"from funnel|from transformers|import onnxruntime", block) for block in blocks] == [
        ["from funnel"],
        ["from transformers"],
        ["import onnxruntime"],
    ]
    for block in blocks:
        compile(block, "card", "exec")
    assert main(["convert", str(run), str(tmp_path / "model")]) == 0
    monkeypatch.chdir(tmp_path)
    exec(blocks[0], {})


def test_cost_is_that_of_the_model(tmp_path):
    run = read_run(write_trained_run(tmp_path))
    text = render_card(run)
    flops, unpooled = total_flops(run.config, 9, 8), total_flops(run.config.replace(blocks="4"), 9, 8)
    assert f"| parameters | {count_parameters(run.config) / 1e6:.3g} M |" in text
    assert f"(one example of 9 tokens) | {flops / 1e6:.3g} M |" in text
    assert f"| relative to the same layers without pooling | {flops / unpooled:.2f} |" in text
    assert "layout of the source" not in text


def test_training_lists_the_layout_plan_and_what_was_frozen(tmp_path):
    run = write_trained_run(tmp_path, weights="source")
    change(run, "settings", layout_plan="plans/mine.json", freeze_embeddings=True, freeze_layers=2)
    text = render_card(read_run(run))
    for name, value in (("new layers", "as in mine.json"), ("freeze embeddings", "True"), ("freeze layers", "2")):
        assert f"| {name} | {value} |" in text


def test_cost_relative_to_the_source_if_it_is_on_this_machine(tmp_path):
    source = write_trained_run(tmp_path / "source", changes={"blocks": "1,1"})
    run = write_trained_run(tmp_path / "mine", weights="source")
    change(run, "arguments", weights=str(source))
    config = read_run(run).config
    ratio = total_flops(config, 9, 8) / total_flops(config.replace(blocks="1,1"), 9, 8)
    text = render_card(read_run(run))
    assert f"| relative to the layout of the source, `1,1` | {ratio:.2f} |" in text
    assert "# base_model: OWNER/NAME  # to fill in" in text


def test_a_hub_id_is_the_base_model_and_a_folder_is_not(tmp_path):
    run = write_trained_run(tmp_path, weights="google-bert/bert-base-uncased")
    assert card_of(run).data.base_model == "google-bert/bert-base-uncased"
    change(run, "arguments", weights="/home/me/google-bert/bert-base-uncased")
    card = card_of(run)
    assert card.data.base_model is None
    assert "from pretrained weights (to fill in: which)" in card.text


def test_a_published_task_names_its_data(tmp_path):
    (result, *_) = card_of(write_trained_run(tmp_path, task="imdb", data=None)).data.eval_results
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == ("stanfordnlp/imdb", "IMDB", "test")
    card = card_of(write_trained_run(tmp_path, task="sst2", data=None))
    (result, *_) = card.data.eval_results
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("nyu-mll/glue", "sst2", "validation")
    assert (card.data.language, card.data.datasets) == ("en", ["nyu-mll/glue"])
    run = write_trained_run(tmp_path, weights="tiny", task="demo", data=None)
    card = card_of(run)
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert "Apache License 2.0" in card.text
    assert "CC BY 4.0" in card.text


def test_other_sets_are_in_the_results(tmp_path):
    run = write_trained_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as log:
        for step, value in ((20, 0.7), (30, None)):
            log.write(json.dumps({"step": step, "split": "test", "loss": 1, "accuracy": value, "f1 (macro)": 0.6}) + "\n")
    card = card_of(run)
    assert "| test | accuracy, % | 70.0 | not finite |" in card.text
    assert [(r.dataset_split, r.metric_value) for r in card.data.eval_results][2:] == [("test", 0.7), ("test", 0.6)]


def test_a_model_that_transformers_does_not_have_says_why(tmp_path):
    card = card_of(write_trained_run(tmp_path, changes={**BERT, "blocks": "1,1"}))
    assert "Not with transformers: transformers has no BERT with pooling (blocks 1,1)." in card.text
    assert "from transformers" not in card.text
    assert card.data.library_name is None
    assert "pad_to_multiple_of" not in str(card_of(write_trained_run(tmp_path, changes={**BERT, "blocks": "2", "d_inner": 64})))


def test_names_of_labels_are_escaped(tmp_path):
    text = render_card(read_run(write_trained_run(tmp_path)))
    (row,) = [line for line in text.splitlines() if line.startswith("| labels")]
    assert row == f"| labels | {', '.join(map(as_code, LABELS))} |"
    assert row == r"| labels | `no`, `` a\|b `c` ``, `<b>yes</b>` |"


@pytest.mark.parametrize(
    ("name", "expected"), [("f1 (macro)", "f1"), ("subset accuracy", "accuracy"), ("pearson", "pearsonr"), ("rmse", "rmse")]
)
def test_metrics_have_the_hubs_names(name, expected):
    assert metric_type(name) == expected


def test_an_edited_card_is_replaced_only_with_overwrite(tmp_path, capsys):
    run = write_trained_run(tmp_path / "mine")
    assert main(["card", str(run)]) == 0
    (run / "README.md").write_text("edited")
    assert main(["card", str(run)]) == 2
    assert "already exists; choose another name, or add --overwrite" in capsys.readouterr().err
    assert main(["card", str(run), "--out", str(tmp_path / "other.md")]) == 0
    assert (run / "README.md").read_text() == "edited"
    assert main(["card", str(run), "--overwrite"]) == 0
    assert (run / "README.md").read_text() == (tmp_path / "other.md").read_text()
    assert REPO_ID in (run / "README.md").read_text()


def test_only_runs_have_cards(tmp_path, capsys):
    assert main(["card", str(tmp_path)]) == 2
    assert "not a run; expected a folder with a run.json" in capsys.readouterr().err
    run = write_trained_run(tmp_path / "mine")
    change(run, "settings", batch_size="x")
    with pytest.raises(FunnelError, match="damaged or from another version"):
        render_card(read_run(run))


def test_conversion_copies_the_card_of_the_best_checkpoint(tmp_path):
    run = write_trained_run(tmp_path / "mine")
    (run / "README.md").write_text("card")
    for source, name in ((run, "a"), (run / "best", "b")):
        assert main(["convert", str(source), str(tmp_path / name)]) == 0
        assert (tmp_path / name / "README.md").read_text() == "card"
    (run / "best").rename(run / "last")
    assert main(["convert", str(run / "last"), str(tmp_path / "c")]) == 2  # no best checkpoint
