"""What the tests share: tiny_config models, and the real data and weights where a machine has them."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from funnel.model.config import FunnelConfig

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("FUNNEL_SHARED", ROOT.parent / "shared"))

if "PYTEST_XDIST_WORKER" in os.environ:  # as many threads as there are cores, in all
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what the tests start
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def tiny_config(**changes) -> FunnelConfig:
    """A config small enough for hundreds of forward passes."""
    values = {
        "vocab_size": 99,
        "block_sizes": (1, 2, 1),
        "d_model": 16,
        "n_head": 2,
        "d_head": 8,
        "d_inner": 32,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return FunnelConfig(**{**values, **changes})


def padded_batch(lengths: list[int], width: int | None = None, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Ids, mask and token types of texts of the given lengths, padded: two segments each behind [cls]."""
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
    """Runs a command of the project as a user does, in a process of its own."""
    import sys

    return subprocess.run(
        [sys.executable, str(ROOT / arguments[0]), *arguments[1:]],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def shared(path: str) -> Path:
    """A path of the project's shared material, or a skip that says why."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs {path} of the project's shared material (FUNNEL_SHARED), which is not on this machine")
    return SHARED / path


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Encoded texts and downloads go into a folder of the test run, not of the user."""
    os.environ["FUNNEL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def minilm(tmp_path_factory) -> Path:
    """MiniLM-L6-H384: a BERT with real weights."""
    script = shared("get_minilm.sh")
    folder = tmp_path_factory.mktemp("minilm")
    done = subprocess.run(["bash", str(script), str(folder)], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"MiniLM's weights could not be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    return folder
