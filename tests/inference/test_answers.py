"""`QuestionAnswerer`, and `funnel predict` and `funnel evaluate` for models that answer questions."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from squad_files import question, single, squad, write

import funnel
from funnel.cli.main import main
from funnel.data.spans import SpanEncoder
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.inference.answers import QuestionAnswerer
from funnel.inference.predictor import InputFormat
from funnel.model.heads import FunnelForQuestionAnswering

CONTEXT = " Hugo lives in Rome .  The city is old . "


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder with a random model in best/."""
    torch.manual_seed(0)
    tokenizer = FunnelTokenizer.train([CONTEXT + "Who lives there ? Where is the home ?"] * 5)
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_decoder_layers=1, id2label={0: "start", 1: "end"})
    folder = tmp_path / "answers/best"
    FunnelForQuestionAnswering(config.replace(model_max_length=80)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder.parent


def set_threshold(run: Path, threshold: float) -> None:
    path = run / "best/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decision_threshold": threshold}))


def load(folder: Path) -> QuestionAnswerer:
    return QuestionAnswerer.load(folder, "cpu", "fp32")


def test_the_answer_is_the_best_span_of_the_models_logits(run):
    answerer = load(run / "best")
    answer = answerer("Who lives there ?", CONTEXT)
    encoding = answerer.tokenizer.encode(["Who lives there ?"], [CONTEXT])[0]
    with torch.no_grad():
        logits = answerer.model(torch.tensor([encoding.input_ids]), None, torch.tensor([encoding.token_type_ids]))[0]
    first = encoding.token_type_ids.index(1)
    scores = {
        (i, j): float(logits[i, 0] + logits[j, 1])
        for i in range(first, len(logits) - 1)
        for j in range(i, min(i + 30, len(logits) - 1))
    }
    (start, end), score = max(scores.items(), key=lambda item: item[1])
    text = answerer.tokenizer.decode(encoding.input_ids[start : end + 1])
    assert answer.text.lower().replace(" ", "") == text.replace(" ", "")
    assert answer.candidates[0].score == pytest.approx(score, abs=1e-5)


def test_positions_are_those_of_the_original_context(run):
    answer = load(run / "best")("Who lives there ?", CONTEXT)
    assert answer.text == CONTEXT[answer.start : answer.end]
    assert (answer.text, answer.probability) == answer.candidates[0][:2]
    assert all(candidate.text == CONTEXT[candidate.start : candidate.end] for candidate in answer.candidates)
    assert len({candidate.text for candidate in answer.candidates}) == len(answer.candidates) == 20


def test_probabilities_are_the_softmax_of_the_candidates_scores(run):
    without = load(run / "best")("Who lives there ?", CONTEXT)
    assert sum(candidate.probability for candidate in without.candidates) == pytest.approx(1)
    ratio = without.candidates[0].probability / without.candidates[5].probability
    assert math.log(ratio) == pytest.approx(without.candidates[0].score - without.candidates[5].score)
    set_threshold(run, 1000.0)
    answer = load(run / "best")("Who lives there ?", CONTEXT)
    assert answer.text == without.text
    assert sum(candidate.probability for candidate in answer.candidates) < 0.99  # the rest is that of no answer


def test_above_the_threshold_there_is_no_answer(run):
    set_threshold(run, -1000.0)
    answer = load(run / "best")("Who lives there ?", CONTEXT)
    assert (answer.text, answer.start, answer.end) == ("", None, None)
    assert answer.probability + sum(candidate.probability for candidate in answer.candidates) == pytest.approx(1)


def test_an_empty_context_has_no_answer(run):
    assert load(run / "best")("Who lives there ?", "") == ("", 1.0, None, None, [])


def test_several_questions_have_one_context_each_or_share_one(run):
    answerer = load(run / "best")
    questions = ["Who lives there ?", "Where is the home ?"]
    one_by_one = [answerer(question, CONTEXT) for question in questions]
    for answers in (answerer(questions, CONTEXT), answerer(iter(questions), [CONTEXT, CONTEXT])):
        for answer, expected in zip(answers, one_by_one, strict=True):
            assert answer[:1] + answer[2:4] == expected[:1] + expected[2:4]
            assert answer.probability == pytest.approx(expected.probability, abs=1e-5)
    assert answerer([], CONTEXT) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("Who ?", ["a"]), "contexts must be a string, as questions is one"),
        ((["Who ?"], ["a", "b"]), "got 1 questions and 2 contexts"),
        ((["Who ?", 3], "a"), r"questions\[1\] has type int"),
        ((["Who ?"], [None]), r"contexts\[0\] has type NoneType"),
    ],
)
def test_wrong_arguments_are_errors(run, arguments, words):
    with pytest.raises(FunnelError, match=words):
        load(run / "best")(*arguments)


def test_a_long_context_is_read_in_windows(run):
    answerer = load(run / "best")
    answerer.encoder = SpanEncoder(max_query_length=8, doc_stride=5)
    answerer.inputs = InputFormat(30)
    long = ("The city is old . " * 200) + "Hugo lives in Rome ."
    answer = answerer("Who lives there ?", long)
    assert answer.text == long[answer.start : answer.end]
    assert answerer.n_truncated == 0
    assert answerer("Who lives there ? " * 5, long).text
    assert answerer.n_truncated == 1


def test_a_run_is_loaded_with_its_settings(run):
    (run / "run.json").write_text(json.dumps({"settings": {"max_query_length": 9, "doc_stride": None}, "arguments": {}}))
    assert load(run).encoder == SpanEncoder(9, 128)
    assert load(run / "best").encoder == SpanEncoder(9, 128)
    assert load(run).inputs.max_length == 80


def test_a_checkpoint_without_a_run_leaves_room_for_the_context(run):
    assert load(run / "best").encoder == SpanEncoder(40, 128)
    path = run / "best/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 512}))
    assert load(run / "best").encoder == SpanEncoder(64, 128)


def test_other_models_are_errors(classifier_folder, run):
    with pytest.raises(FunnelError, match="expected a question answerer, found a text classifier"):
        load(classifier_folder)
    with pytest.raises(FunnelError, match="expected a text classifier, found a question answerer"):
        funnel.Classifier.load(run / "best")
    assert funnel.QuestionAnswerer is QuestionAnswerer


# --- commands ---------------------------------------------------------------------------------------------------------


def test_predict_prints_answers_with_positions(run, capsys):
    pair = ["--pair", CONTEXT]
    assert main(["predict", str(run / "best"), "Who lives there ?", "Where is it ?", *pair, *pair]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    answer = load(run / "best")("Who lives there ?", CONTEXT)
    text = " ".join(answer.text.split())
    assert lines[0] == [text, f"{answer.probability:.1%}", f"{answer.start}-{answer.end}", "Who lives there ?"]
    assert len(lines) == 2
    set_threshold(run, -1000.0)
    assert main(["predict", str(run / "best"), "Who lives there ?", *pair]) == 0
    assert capsys.readouterr().out.split("\t")[::2] == ["(no answer)", "-"]


def test_predict_reads_questions_and_contexts_from_standard_input(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"Who ?\t{CONTEXT}\nWhere ?\t{CONTEXT}\n".encode())))
    assert main(["predict", str(run / "best")]) == 0
    assert [line.split("\t")[3] for line in capsys.readouterr().out.splitlines()] == ["Who ?", "Where ?"]


def test_predictions_of_a_file_are_texts_by_id(run, tmp_path, capsys):
    unlabeled = {"id": "x", "question": "Who lives there ?"}
    path, out = (
        write(tmp_path / "q.json", single(CONTEXT, unlabeled, question("y", "Where ?", ("no", 3)))),
        tmp_path / "out.json",
    )
    assert main(["predict", str(run / "best"), "--file", str(path), "--out", str(out)]) == 0
    assert f"wrote 2 answers to {out}" in capsys.readouterr().out
    answers = load(run / "best")(["Who lives there ?", "Where ?"], CONTEXT)
    assert json.loads(out.read_text()) == {"x": answers[0].text, "y": answers[1].text}
    assert main(["predict", str(run / "best"), "--file", str(path)]) == 0
    assert (run / "best/predictions-q.json").is_file()


def test_evaluate_prints_metrics_and_wrong_answers(run, tmp_path, capsys):
    path = write(tmp_path / "q.json", squad(1, unanswerable=True))
    out = tmp_path / "results.json"
    assert main(["evaluate", str(run / "best"), str(path), "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("q.json: 6 examples, loss ")
    assert "f1 0." in output
    assert "label (no answer), predicted " in output
    assert set(json.loads(out.read_text())["scores"]) == {"loss", "f1", "exact"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "{run}", "Who ?"], "--pair is required: the text that contains the answer"),
        (["predict", "{run}", "--file", "{none}"], "--file {none}: no such file; expected a .json or"),
        (["predict", "{run}", "--file", "{file}", "--out", "x.csv"], "--out x.csv: unknown format; expected a .json file"),
        (["predict", "{run}", "--file", "{file}", "--out", "{file}"], "this command reads the file"),
        (["predict", "{run}", "--file", "{file}", "--text-column", "a"], "--text-column does not apply"),
        (["evaluate", "{run}", "{file}", "--label-column", "a"], "--label-column does not apply"),
        (["evaluate", "{run}", "{none}"], "file {none}: no such file"),
        (["evaluate", "{run}", "{file}"], "question x: no answers; they are required"),
        (["explain", "{run}", "Who ?"], "expected a text classifier, found a question answerer"),
        (["predict", "{missing}", "Who ?", "--pair", "x"], "no such folder"),
    ],
)
def test_wrong_commands_are_errors_on_one_line(run, tmp_path, capsys, arguments, words):
    names = {"run": run / "best", "none": tmp_path / "none.json", "missing": tmp_path / "missing"}
    names["file"] = write(tmp_path / "q.json", single(CONTEXT, {"id": "x", "question": "Who ?"}))
    assert main([argument.format(**names) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert words.format(**names) in error
    assert len(error.splitlines()) == 1
