"""Shared test helpers: tiny configs and batches, commands in a subprocess, and the project's shared data if available."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from funnel.model.config import FunnelConfig

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("FUNNEL_SHARED", ROOT.parent / "shared"))

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers already use all cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for subprocesses
torch.set_num_threads(1)  # tiny models gain nothing from more threads


def tiny_config(**changes) -> FunnelConfig:
    """A config small enough for hundreds of forward passes."""
    values = {
        "vocab_size": 99,
        "blocks": "1,2,1",
        "d_model": 16,
        "n_head": 2,
        "d_head": 8,
        "d_inner": 32,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return FunnelConfig(**{**values, **changes})


def padded_batch(lengths: list[int], width: int | None = None, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Ids, mask and token types of random sequences with the given lengths: [CLS] and two segments, padded to `width`."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids = torch.randint(5, 99, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    types = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        types[row, length // 2 : length] = 1
    types[:, 0] = 2
    return ids * mask, mask, types


def run_command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script of the project in a subprocess. Keyword arguments are environment variables."""
    return subprocess.run(
        [sys.executable, str(ROOT / arguments[0]), *arguments[1:]],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def shared(path: str) -> Path:
    """A path in the project's shared folder; skips the test if it is not on this machine."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs {path} from the project's shared folder (environment variable FUNNEL_SHARED)")
    return SHARED / path


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keeps downloads and encoded data out of the user's cache."""
    os.environ["FUNNEL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def minilm(tmp_path_factory) -> Path:
    """Folder of MiniLM-L6-H384, a BERT with pretrained weights."""
    script = shared("get_minilm.sh")
    folder = tmp_path_factory.mktemp("minilm")
    done = subprocess.run(["bash", str(script), str(folder)], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"MiniLM's weights could not be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    return folder


CLASSES = ["no", 'yes, "really"', "a\tb"]  # names that need quoting in csv and tsv files


@pytest.fixture
def classifier_folder(tmp_path) -> Path:
    """A checkpoint folder tmp_path/run/best with a random three-class classifier and its tokenizer."""
    from funnel.data.tokenizer import FunnelTokenizer
    from funnel.model.heads import FunnelForSequenceClassification

    torch.manual_seed(0)
    tokenizer = FunnelTokenizer.train(["good bad film a the very not"] * 5)
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_decoder_layers=0, id2label=dict(enumerate(CLASSES)))
    folder = tmp_path / "run/best"
    FunnelForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def reference_probabilities(folder: Path, text: str, pair: str | None = None) -> list[float]:
    """The class probabilities of one text, computed without padding or batching."""
    from funnel.data.tokenizer import FunnelTokenizer
    from funnel.model.heads import FunnelForSequenceClassification

    model = FunnelForSequenceClassification.from_pretrained(folder)
    encoding = FunnelTokenizer.load(folder).encode([text], None if pair is None else [pair])[0]
    with torch.no_grad():
        logits = model(torch.tensor([encoding.input_ids]), None, torch.tensor([encoding.token_type_ids]))
    return logits[0].double().softmax(0).tolist()
