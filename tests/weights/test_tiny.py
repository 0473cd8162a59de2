"""The pretrained weights in the package: what the folder contains, that they load, and that they are worth having."""

import json

import pytest
import torch
from conftest import run_command
from safetensors.torch import load_file

from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.heads import FunnelBaseModel, FunnelForSequenceClassification
from funnel.weights.load import read_source, read_source_config

MAX_BYTES = 12e6


def test_the_folder_has_recipe_and_license_and_is_small(tiny_weights):
    files = {path.name: path.stat().st_size for path in tiny_weights.iterdir()}
    assert files.keys() == {"LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert all(files.values())
    assert sum(files.values()) <= MAX_BYTES


def test_matrices_take_8_bits_and_word_embeddings_4(tiny_weights):
    stored = load_file(tiny_weights / "model.safetensors")
    assert stored["embeddings.word_embeddings.weight"].dtype == torch.uint8
    assert {tensor.dtype for tensor in stored.values()} == {torch.uint8, torch.int8, torch.float16}


@pytest.mark.filterwarnings("ignore:tiny. newly initialized")
def test_the_model_loads_in_another_layout_and_computes_finite_logits(tiny_weights):
    model = FunnelForSequenceClassification.from_pretrained("tiny", blocks="2,2,2,2,2,2,2", num_labels=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.no_grad():
        logits = model(**FunnelTokenizer.load(tiny_weights)(["a gorgeous , witty film", "a dull film"]))
    assert logits.isfinite().all()


def test_known_words_are_single_tokens(tiny_weights):
    source = read_source(tiny_weights)
    assert source.require_tokenizer().vocab_size == source.config.vocab_size
    assert len(source.require_tokenizer().encode(["a film that is not dull"])[0].input_ids) == 6 + 2


@pytest.fixture
def untrained(tiny_weights, tmp_path):
    """The same network with random weights, initialized as for training from scratch."""
    torch.manual_seed(0)
    model = FunnelBaseModel(read_source_config(tiny_weights).replace(num_decoder_layers=0))
    for table in model.embeddings.children():
        if isinstance(table, torch.nn.Embedding):
            table.weight.data *= 0.02  # as in BERT's initialization
    model.save_pretrained(tmp_path / "untrained")
    FunnelTokenizer.load(tiny_weights).save(tmp_path / "untrained")
    return "untrained"


@pytest.mark.slow
def test_fine_tuning_beats_training_the_same_network_from_scratch(untrained, tmp_path):
    accuracies = []
    for weights in ("tiny", untrained):
        arguments = ("--weights", weights, "--lr", "2e-4", "--epochs", "0.4", "--eval-every", "60", "--out", f"run-{weights}")
        done = run_command("train.py", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        evaluations = [json.loads(line) for line in (tmp_path / f"run-{weights}/metrics.jsonl").read_text().splitlines()]
        accuracies.append(evaluations[-1]["accuracy"])
    assert accuracies[0] > accuracies[1] + 0.05
