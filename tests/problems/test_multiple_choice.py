"""Multiple choice: loss, error analysis, training, prediction, export."""

import csv
import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ABSOLUTE, tiny_config

import train
from funnel import FunnelForMultipleChoice, MultipleChoice
from funnel.cli.main import main
from funnel.data.checks import compare_sets
from funnel.data.choices import ChoiceEncoder, ChoiceExample, InMemoryQuestions
from funnel.data.encoding import encode_in_memory
from funnel.data.tasks import TASKS, locate_files
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.inference.choices import ChoicePrediction
from funnel.inference.predictions import write_choices
from funnel.model.checkpoint import Checkpoint
from funnel.problems import multiple_choice as module
from funnel.problems.registry import encode_split
from funnel.problems.task_args import TaskArgs, load_task
from funnel.training.evaluate import predict
from funnel.weights.export import write_onnx, write_transformers
from funnel.weights.surgery import calibrate_layer_norms, make_plan

COLORS = ["red", "blue", "green", "black"]


def make_rows(count, n_choices=3):
    rows = []
    for i in range(count):
        choices = [COLORS[(i + j * (1 + i // 4)) % 4] for j in (0, 1, 3)][:n_choices]
        rows.append({"context": f"car {i} is {choices[i % n_choices]}", "question": "the car is _ .",
                     "choices": [f"{c} {j}" for j, c in enumerate(choices)], "label": i % n_choices})  # fmt: skip
    return rows


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return FunnelTokenizer.train(["the car is red blue green black . 0 1 2 3"] * 5)


@pytest.fixture
def dataset(tokenizer):
    examples = [
        ChoiceExample(r["context"], r["question"], tuple(r["choices"]), r["label"], i) for i, r in enumerate(make_rows(10))
    ]
    return encode_in_memory(InMemoryQuestions(tuple(examples)), ChoiceEncoder(), tokenizer, 64)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_decoder_layers=0, id2label={0: "score"})
    return FunnelForMultipleChoice(config).eval()


def test_loss_and_accuracy_are_those_of_a_softmax_over_the_choices(model):
    problem = module.MultipleChoice(model.config)
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.5]])
    labels = np.array([2, 1], np.int32)
    data = SimpleNamespace(labels=labels)
    expected = -np.mean([np.log(np.exp(row[k]) / np.exp(row).sum()) for row, k in zip(logits.numpy(), labels, strict=True)])
    scores = problem.score(logits, data, ["accuracy"])
    assert scores == {"loss": pytest.approx(expected), "accuracy": 0.5}
    assert float(problem.loss(logits, torch.from_numpy(labels).long())) == pytest.approx(expected)


def test_label_smoothing_applies_and_class_weights_are_an_error(model, dataset):
    problem = module.MultipleChoice(model.config)
    problem.prepare(dataset, SimpleNamespace(label_smoothing=0.3, class_weights=None))
    logits, labels = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0])
    log_p = logits.log_softmax(1)
    assert float(problem.loss(logits, labels)) == pytest.approx(float(-0.7 * log_p[0, 0] - 0.3 * log_p.mean()))
    with pytest.raises(FunnelError, match="class_weights has no effect for multiple choice") as error:
        problem.prepare(dataset, SimpleNamespace(label_smoothing=0.0, class_weights="balanced"))
    assert error.value.parameter == "class_weights"


def test_predictions_do_not_depend_on_batching(model, dataset):
    problem = module.MultipleChoice(model.config)
    results = predict(model, problem, dataset)
    with torch.no_grad():
        alone = torch.cat([model(**dataset.batch(np.array([row])).inputs) for row in range(len(dataset))])
    assert results.shape == (10, 3)
    torch.testing.assert_close(results, alone)


def test_gradient_checkpointing_and_micro_batches_give_the_same_gradient(model, dataset):
    problem, batch = module.MultipleChoice(model.config), dataset.batch(np.arange(7))

    def gradient(parts, checkpointing):
        model.zero_grad()
        model.set_gradient_checkpointing(checkpointing)
        model.train()
        for part in batch.split(parts):
            (problem.loss(model(**part.inputs), part.labels) * part.weight).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = gradient(1, False)
    torch.testing.assert_close(gradient(3, False), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient(1, True), expected, rtol=1e-4, atol=1e-6)


def test_identity_layers_are_calibrated_on_all_choices(model, dataset):
    from funnel.weights.build import BuiltModel

    config = model.config.replace(blocks="1,2,2")
    grown, plan = FunnelForMultipleChoice(config).eval(), make_plan(model.config, config)
    twin = FunnelForMultipleChoice(config).eval()
    twin.load_state_dict(grown.state_dict())
    BuiltModel(grown, None, plan, "").calibrate(dataset)
    inputs = dataset.batch(np.arange(10)).inputs
    calibrate_layer_norms(twin, plan, *(tensor.reshape(30, -1) for tensor in inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(grown.parameters(), twin.parameters(), strict=True))


def test_error_analysis_shows_article_question_and_both_choices(model, dataset, tokenizer):
    problem = module.MultipleChoice(model.config)
    logits = torch.zeros(10, 3)
    logits[range(10), dataset.labels] = 2.0
    logits[4] = torch.tensor([3.0, 1.0, 0.0])  # label 1
    analysis = problem.analyze(logits, dataset, tokenizer)
    assert analysis["labels"] == ["A", "B", "C"]
    assert analysis["confusion"] == [[4, 0, 0], [1, 2, 0], [0, 0, 3]]
    (mistake,) = analysis["mistakes"]
    example = make_rows(10)[4]
    assert mistake["text"] == "car <unk> is green"
    assert mistake["label"] == f"B: the car is {example['choices'][1]}."
    assert mistake["predicted"] == f"A: the car is {example['choices'][0]}."
    right, wrong = float(logits[0].max().exp() / logits[0].exp().sum()), float(logits[4].softmax(0)[0])
    assert analysis["calibration"]["ece"] == pytest.approx((9 * (1 - right) + wrong) / 10)
    assert mistake["probability"] == pytest.approx([float(logits[4].softmax(0)[1]), float(logits[4].softmax(0)[0])])


def test_race_has_the_authors_settings_and_both_levels(tmp_path):
    race = TASKS["race"]
    assert (race.batch_size, race.steps, race.learning_rate, race.max_length) == (16, 24_000, 2e-5, 512)
    assert race.warmup * race.steps == 2400
    for split in ("train", "dev"):
        for level, letter in (("middle", "A"), ("high", "B")):
            folder = tmp_path / "RACE" / split / level
            folder.mkdir(parents=True)
            item = {"article": "a", "questions": ["q"], "options": [["1", "2", "3", "4"]], "answers": [letter], "id": "x"}
            (folder / "1.txt").write_text(json.dumps(item))
    files = locate_files(race, tmp_path).files
    labels = {split: [example.label for example in file.rows()] for split, file in files.items()}
    assert labels == {"train": [1, 0], "dev": [1, 0], "dev_middle": [0], "dev_high": [1]}


# --- the user's own files ---------------------------------------------------------------------------------------------


def test_own_files_are_recognized_by_their_fields(tmp_path):
    path = write_lines(tmp_path / "mine.jsonl", make_rows(4))
    task = load_task(TaskArgs(data=path))
    assert (task.problem, task.description) == ("multiple-choice", "mine.jsonl: questions with 3 choices")
    (tmp_path / "both").mkdir()
    for name in ("train", "dev"):
        write_lines(tmp_path / f"both/{name}.jsonl", make_rows(4))
    assert set(load_task(TaskArgs(data=tmp_path / "both")).files) == {"train", "dev"}


def test_contexts_that_train_and_dev_share_give_a_warning(tmp_path, tokenizer):
    (tmp_path / "both").mkdir()
    write_lines(tmp_path / "both/train.jsonl", make_rows(6))
    write_lines(tmp_path / "both/dev.jsonl", make_rows(8)[4:])
    task = load_task(TaskArgs(data=tmp_path / "both"))
    train_set, dev_set = (encode_split(task, split, tokenizer, 64) for split in ("train", "dev"))
    expected = "dev: 2 of 4 texts also occur in the training set, such as 'car 4 is green'"
    assert list(compare_sets(task, train_set, {"dev": dev_set})) == [expected]


def test_texts_are_not_taken_for_questions(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "x", "label": "a"}\n{"text": "y", "label": "b"}\n' * 3)
    assert load_task(TaskArgs(data=path)).problem == "classification"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "question"}, "text_column has no effect for multiple choice"),
        ({"positive_label": "A"}, "positive_label has no effect for multiple choice"),
        ({"metric": "f1"}, "metric 'f1' does not apply to mine.jsonl; choose from accuracy, loss"),
        ({"problem": "multiple-choice", "dev": "none.jsonl"}, "dev none.jsonl: no such file or folder"),
    ],
)
def test_options_that_do_not_apply_are_errors(tmp_path, options, message):
    from pathlib import Path

    path = write_lines(tmp_path / "mine.jsonl", make_rows(4))
    if "dev" in options:
        options = {**options, "dev": Path(options["dev"])}
    with pytest.raises(FunnelError, match=message):
        load_task(TaskArgs(data=path, **options))


def test_other_files_are_errors_if_the_problem_is_multiple_choice(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": "a"}\n')
    with pytest.raises(FunnelError, match="line 1: no field 'question'; the fields are text, label"):
        load_task(TaskArgs(data=tmp_path / "a.jsonl", problem="multiple-choice"))
    with pytest.raises(FunnelError, match="no such file or folder"):
        load_task(TaskArgs(data=tmp_path / "missing.jsonl", problem="multiple-choice"))


# --- from training to predictions -------------------------------------------------------------------------------------


def test_training_resuming_prediction_evaluation_and_report(tmp_path, capsys):
    path, run = write_lines(tmp_path / "mine.jsonl", make_rows(60)), tmp_path / "run"
    options = ["--weights", "none", "--blocks", "1,1", "--batch-size", "8", "--lr", "1e-3", "--grad-accum", "2"]
    assert train.main([*options, "--data", str(path), "--steps", "4", "--out", str(run)]) == 0
    assert "54 training questions, 6 in dev" in capsys.readouterr().out
    assert train.main(["--resume", "--steps", "8", "--out", str(run)]) == 0
    assert "resumed at step 4" in capsys.readouterr().out
    config = json.loads((run / "best/config.json").read_text())
    assert (config["architectures"], config["id2label"]) == (["FunnelForMultipleChoice"], {"0": "score"})
    assert config["text_columns"] == []
    assert train.main(["--data", str(path), "--weights", str(run), "--steps", "1", "--out", str(tmp_path / "next")]) == 0
    assert "new classifier" not in capsys.readouterr().out

    assert main(["evaluate", str(run), str(path)]) == 0
    output = capsys.readouterr().out
    assert "mine.jsonl: 60 examples, loss" in output
    assert "confusion matrix" in output
    unlabeled = write_lines(tmp_path / "new.jsonl", [{k: v for k, v in r.items() if k != "label"} for r in make_rows(5)])
    assert main(["predict", str(run), "--file", str(unlabeled)]) == 0
    rows = [json.loads(line) for line in (run / "predictions-new.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(5))
    assert main(["predict", str(run), "--file", str(unlabeled), "--out", str(tmp_path / "out.csv")]) == 0
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "index,label,choice,probability of A,probability of B,probability of C,question"
    assert len(lines) == 6
    prediction = ChoicePrediction(0, "a\rb", 0.9, [0.9, 0.1])
    write_choices([(ChoiceExample("", "x\ry", ("a\rb", "c")), prediction)], tmp_path / "returns.csv.gz")
    with gzip.open(tmp_path / "returns.csv.gz", "rt", newline="") as file:
        assert list(csv.reader(file))[1:] == [["0", "A", "a\nb", "0.900000", "0.100000", "x\ny"]]

    answerer = MultipleChoice.load(run, device="cpu", dtype="fp32")
    for row, example in zip(rows, make_rows(5), strict=True):
        prediction = answerer(example["question"], example["choices"], example["context"])
        assert (prediction.letter, prediction.choice) == (row["label"], row["choice"])
        assert prediction.probabilities == pytest.approx(row["probabilities"], abs=0.02)
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    for command in (["explain", str(run), "text"], ["predict", str(run), "text"], ["evaluate", str(run), str(tmp_path / "x")]):
        assert main(command) == 2
        message = capsys.readouterr().err.strip().splitlines()
        assert len(message) == 1, message


def test_races_layout_from_training_to_predictions(tmp_path, capsys):
    for split, count in (("train", 8), ("dev", 3)):
        (tmp_path / "mine" / split).mkdir(parents=True)
        for i, row in enumerate(make_rows(count)):
            item = {"article": row["context"], "questions": [row["question"]], "options": [row["choices"]], "id": str(i)}
            item["answers"] = ["ABC"[row["label"]]]
            (tmp_path / f"mine/{split}/{i}.txt").write_text(json.dumps(item))
    run = tmp_path / "run"
    options = ["--weights", "none", "--blocks", "1,1", "--batch-size", "4", "--steps", "2", "--out", str(run)]
    assert train.main(["--data", str(tmp_path / "mine"), *options]) == 0
    assert "8 training questions, 3 in dev" in capsys.readouterr().out
    assert main(["evaluate", str(run), str(tmp_path / "mine/dev")]) == 0
    assert main(["predict", str(run), "--file", str(tmp_path / "mine/dev")]) == 0
    assert len((run / "predictions-dev.jsonl").read_text().splitlines()) == 3


@pytest.fixture
def answerer(model, tokenizer):
    return MultipleChoice(model, tokenizer)


def test_one_question_gives_one_prediction_and_several_a_list(answerer, model, tokenizer):
    prediction = answerer("the car is _ .", ["red", "blue"], "the car is blue")
    logits = []
    for color in ("red", "blue"):
        encoding = tokenizer.encode(["the car is blue"], [f"the car is {color} ."])[0]
        ids, types = (torch.tensor([[x]]) for x in (encoding.input_ids, encoding.token_type_ids))
        with torch.no_grad():
            logits.append(float(model(ids, None, types)))
    expected = torch.tensor(logits).softmax(0).tolist()
    assert prediction.probabilities == pytest.approx(expected, abs=1e-5)
    assert prediction.choice == ["red", "blue"][prediction.index]
    assert prediction.probability == max(prediction.probabilities)
    several = answerer(["the car is _ .", "red ?"], [["red", "blue"], ["0", "1", "2"]], ["the car is blue", ""])
    assert several[0].probabilities == pytest.approx(prediction.probabilities, abs=1e-5)
    assert len(several[1].probabilities) == 3
    assert several[1].probabilities == pytest.approx(answerer("red ?", ["0", "1", "2"]).probabilities, abs=1e-5)
    assert answerer([], []) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("q", ["a"]), r"choices\[0\] has 1 item: expected 2 to 26"),
        (("q", "ab"), r"choices\[0\] has type str: expected a list of strings"),
        (("q", ["a", "b"], ["c"]), "questions and contexts must both be strings or both be lists"),
        ((["q"], [["a", "b"], ["a", "b"]]), "1 question, but 2 lists of choices and 1 context"),
        ((["q"], [["a", 1]]), r"choices\[0\]\[1\] has type int"),
    ],
)
def test_invalid_arguments_are_errors(answerer, arguments, message):
    with pytest.raises(FunnelError, match=message):
        answerer(*arguments)


# --- export -----------------------------------------------------------------------------------------------------------


def inputs_of(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    ids = torch.randint(5, 30, shape, generator=generator)
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    mask[..., shape[2] - 2 :] = 0
    types[..., shape[2] // 2 :] = 1
    types[..., 0] = 2
    return ids, mask, types


FAMILIES = {
    "bert": ("BertForMultipleChoice", {"classifier_act": "tanh"}),
    "albert": ("AlbertForMultipleChoice", {"embedding_size": 8}),
    "roberta": ("RobertaForMultipleChoice", {"position_offset": 2}),
    "electra": ("ElectraForMultipleChoice", {"classifier_act": "gelu"}),
    "distilbert": ("DistilBertForMultipleChoice", {"classifier_act": "relu", "token_type_embeddings": 0}),
    "mpnet": ("MPNetForMultipleChoice", {"position_offset": 2, "distance_buckets": 32, "token_type_embeddings": 0}),
}


@pytest.mark.parametrize("family", ["funnel", *FAMILIES])
def test_transformers_computes_the_same_logits(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    name, changes = FAMILIES.get(family, ("FunnelForMultipleChoice", {}))
    values = {**ABSOLUTE, "blocks": "2", "family": family, "layer_norm_eps": 1e-12, "lm_head_transform": True, **changes}
    torch.manual_seed(1)
    config = tiny_config(num_decoder_layers=0, id2label={0: "score"}, **(values if family != "funnel" else {}))
    model = FunnelForMultipleChoice(config).eval()
    write_transformers(tmp_path, Checkpoint(config, model.state_dict(), "FunnelForMultipleChoice"))
    peer, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids, mask, types = inputs_of((2, 3, 12))
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family == "funnel":
        inputs["token_type_ids"] = types
    elif config.token_type_embeddings:
        inputs["token_type_ids"] = types * (types == 1)
    with torch.no_grad():
        logits, expected = model(ids, mask, types), peer.eval()(**inputs).logits
    assert expected.std() > 1e-3
    assert (logits - expected).abs().max() < 1e-5


@pytest.mark.slow
def test_an_onnx_file_answers_any_number_of_questions_choices_and_tokens(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    config = tiny_config(num_decoder_layers=0, id2label={0: "score"})
    model = FunnelForMultipleChoice(config).eval()
    write_onnx(tmp_path, Checkpoint(config, model.state_dict(), "FunnelForMultipleChoice"))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_inputs()]
    for shape in ((1, 1, 3), (1, 2, 5), (3, 4, 33), (2, 26, 8)):
        inputs = inputs_of(shape)
        (logits,) = session.run(None, dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True)))
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(*inputs).numpy(), atol=1e-5)
