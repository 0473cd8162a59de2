"""Shared test helpers: tiny configs and batches, commands in a subprocess, and the project's shared data if available."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from funnel.data.files import InMemoryExamples
from funnel.model.config import FunnelConfig

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("FUNNEL_SHARED", ROOT.parent / "shared"))

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers already use all cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for subprocesses
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # runs Triton's kernels on the CPU
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


# Config fields of the ways in which a model can get positions and token types. Absolute positions allow 512 tokens.
ABSOLUTE = {"relative_attention": False, "position_embeddings": 512, "token_type_embeddings": 2}  # as in BERT
BUCKETS = {"relative_attention": False, "position_embeddings": 514, "position_offset": 2, "distance_buckets": 32}  # MPNet
BOTH = {"distance_buckets": 8, "position_embeddings": 512, "token_type_embeddings": 1, "embedding_size": 6}
NONE = {"relative_attention": False}
POSITIONS: list[dict[str, Any]] = [{}, ABSOLUTE, BUCKETS, BOTH, NONE]


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


def review_sentences(count: int) -> InMemoryExamples:
    """The first training sentences of the demo task, half of them positive."""
    from funnel.data import demo

    train, _ = demo.examples()
    return InMemoryExamples(train.texts[:count], None, train.labels[:count])


@pytest.fixture
def tiny_weights() -> Path:
    """The folder of the pretrained weights in the package; skips the test if they are not in this checkout."""
    from funnel.weights.load import TINY_FOLDER

    if not (TINY_FOLDER / "model.safetensors").is_file():
        pytest.skip("funnel/tiny has no weights")
    return TINY_FOLDER


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


def pretrained_model(script: str, folder: Path) -> Path:
    """Runs a script of the project's shared folder that downloads a model; skips the test if that fails."""
    done = subprocess.run(["bash", str(shared(script)), str(folder)], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"the weights could not be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    return folder


@pytest.fixture(scope="session")
def minilm(tmp_path_factory) -> Path:
    """Folder of MiniLM-L6-H384, a BERT with pretrained weights."""
    return pretrained_model("get_minilm.sh", tmp_path_factory.mktemp("minilm"))


@pytest.fixture(scope="session")
def mpnet(tmp_path_factory) -> Path:
    """Folder of all-mpnet-base-v2, an MPNet with pretrained weights (404 MB)."""
    return pretrained_model("get_mpnet.sh", tmp_path_factory.mktemp("mpnet"))


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


@pytest.fixture
def compile_with(monkeypatch) -> Iterator[Callable[[Any], None]]:
    """A function that sets the backend of torch.compile; graph breaks are errors. Restores torch.compile's settings."""
    torch._dynamo.reset()
    compile = torch.compile
    with (
        torch._dynamo.config.patch(cache_size_limit=8, optimize_ddp=True),
        torch.fx.experimental._config.patch(use_duck_shape=True),
    ):
        yield lambda backend: monkeypatch.setattr(torch, "compile", functools.partial(compile, backend=backend, fullgraph=True))
    torch._dynamo.reset()


def count_compiled_graphs(model: torch.nn.Module, only_real_tokens: bool = False) -> int:
    """Compiles a model, compares its outputs for several lengths with eager mode, and returns the number of graphs.

    With fullgraph=True, a graph break is an error. Graphs are only traced; no kernels are generated.
    """
    torch._dynamo.reset()
    graphs = []

    def record(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=record, fullgraph=True, dynamic=True)
    for length in (13, 20, 33, 64, 65, 100):
        batch = padded_batch([length, length - 4])
        actual, expected = compiled(*batch), model(*batch)
        if only_real_tokens:
            actual, expected = (logits[batch[1] == 1] for logits in (actual, expected))
        torch.testing.assert_close(actual, expected)
    return len(graphs)
