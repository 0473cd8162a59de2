"""Quantized ONNX exports: their accuracy, their nodes, and the dev set on which they are compared."""

import csv
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import convert_weights
import train
from funnel.analysis.onnx_report import load_dev_set
from funnel.cli.convert import convert
from funnel.errors import FunnelError
from funnel.inference.classifier import Classifier
from funnel.weights.load import read_source, resolve

WORDS = {"pos": "good great lovely fine".split(), "neg": "bad awful poor dull".split()}
FILLERS = "the film is a very and plot with actor scene of".split()


@pytest.fixture
def run(tmp_path) -> Path:
    """A classifier trained on 200 texts, of which a quarter are the dev set."""
    chosen = random.Random(0)
    with (tmp_path / "texts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for number in range(200):
            label = ("pos", "neg")[number % 2]
            words = [*chosen.choices(FILLERS, k=chosen.randint(2, 12)), chosen.choice(WORDS[label])]
            rows.writerow([" ".join(chosen.sample(words, len(words))), label])
    arguments = ["--data", str(tmp_path / "texts.csv"), "--dev-share", "0.25", "--seed", "3", "--weights", "none"]
    arguments += ["--blocks", "1,1", "--epochs", "3", "--lr", "1e-3", "--out", str(tmp_path / "run")]
    assert train.main(arguments) == 0
    return tmp_path / "run"


def recorded_scores(run: Path) -> dict[str, float]:
    """The last evaluation of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(record for record in records[::-1] if record["split"] == "dev")


@pytest.mark.parametrize("folder", ["", "best"])
def test_dev_set_is_the_one_that_training_evaluated(folder, run):
    source = read_source(resolve(str(run / folder)))
    dataset, metrics, problem = load_dev_set(source)
    assert (len(dataset), metrics, problem.labels) == (50, ("accuracy", "f1 (macro)"), ["neg", "pos"])
    classifier = Classifier.load(run)
    logits = torch.cat(
        [classifier.model(**dataset.batch(np.array([row])).inputs).detach().float() for row in range(len(dataset))]
    )
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(dataset.labels).long())
    assert float(loss) == pytest.approx(recorded_scores(run)["loss"], rel=0.05)  # training's may be in bf16


def test_dev_set_of_a_changed_file_is_an_error(run):
    with (run.parent / "texts.csv").open("a") as file:
        file.write("a good film,pos\r\n")
    with pytest.raises(FunnelError, match="the run's train file has changed since training"):
        load_dev_set(read_source(resolve(str(run))))


@pytest.mark.slow
def test_int8_export_agrees_with_float32_and_reports_both(run, capsys):
    onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    out = run.parent / "out"
    capsys.readouterr()
    assert convert_weights.main([str(run), str(out), "--to", "onnx", "--quantize", "int8"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = {line.split()[0]: line for line in printed.out.splitlines()}
    assert all("ms per text" in lines[name] for name in ("fp32", "int8"))
    assert "dev: 50 examples" in printed.out

    # every product with a weight matrix is quantized, those of two hidden states are not
    graph = onnx.load(out / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    weights = {weight.name for weight in graph.initializer}
    floats = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    assert not any(weights & set(node.input) for node in floats)
    layers = 2
    assert kinds.count("MatMulInteger") == layers * 7 + 2  # query, key, value, distances, output, feed-forward; head

    classifier = Classifier.load(run)
    session = runtime.InferenceSession(out / "model.onnx")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.onnx", "tokenizer.json"]
    dataset, *_ = load_dev_set(read_source(resolve(str(run))))
    predictions = np.empty((2, len(dataset)))
    for row in range(len(dataset)):
        inputs = dataset.batch(np.array([row])).inputs
        (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        predictions[:, row] = classifier.model(**inputs).argmax(), logits.argmax()
    float32, int8 = predictions
    assert np.mean(float32 == int8) >= 0.9
    assert f"accuracy {np.mean(float32 == dataset.labels):.4f}" in lines["fp32"]
    accuracy = float(re.search(r"accuracy ([\d.]+)", lines["int8"])[1])  # in batches, which share the scales of activations
    assert accuracy == pytest.approx(np.mean(int8 == dataset.labels), abs=0.05)


def test_quantization_without_onnxruntime_is_an_error_and_writes_nothing(classifier_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(FunnelError, match=r"quantization needs the extra onnx .*pip install 'funnel-transformer\[onnx\]'"):
        convert(str(classifier_folder), tmp_path / "out", "onnx", "int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["funnel", "huggingface"])
def test_only_onnx_files_can_be_quantized(to, classifier_folder, tmp_path, capsys):
    status = convert_weights.main([str(classifier_folder), str(tmp_path / "out"), "--to", to, "--quantize", "int8"])
    assert status == 2
    message = "convert_weights.py: error: --quantize int8: only ONNX files can be quantized; add --to onnx\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "out").exists()
