"""README and docs are true: every command in them runs, every Python block runs, every file they name is there.

Fenced commands run in their order, in a folder that has what they read: tiny_config weights, a few lines of data. Those of
benchmarks, of pytest and of several machines are parsed but not run; the two that install are what .ci/run runs.
"""

import argparse
import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_config

import convert_weights
import train
from funnel.cli import main as commands
from funnel.cli import sweep
from funnel.data import demo, tasks
from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.heads import FunnelForSequenceClassification
from funnel.weights import build

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
ROWS = [("a good film", "5"), ("a bad film , sadly", "1"), ("an average film", "3")] * 12


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXTS[page], re.MULTILINE | re.DOTALL)


def fenced_commands(page: str) -> list[str]:
    """The commands of a page's shell blocks, without their comments."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in re.sub(r"\s+#.*", "", line).split("&&")]


def inline_commands(page: str) -> list[str]:
    """Commands between backticks."""
    prose = re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)
    starts = r"(?:python|pytest|torchrun|pip|convert_weights\.py|train\.py)"
    return re.findall(rf"`({starts} [^`]+)`", prose.replace("\n", " "))


@pytest.fixture(scope="module")
def has_run() -> set[str]:
    """Commands that need no second time."""
    return set()


@pytest.fixture(scope="module")
def home(tmp_path_factory, minilm_like):
    """A folder that has what the commands read."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("train.py", "convert_weights.py", "funnel", "benchmarks", "tests", "constraints.txt", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs").mkdir()
    (folder / "MINILM").symlink_to(minilm_like)
    tokenizer = FunnelTokenizer.train([text for text, _ in ROWS])
    for name in ("funnel-transformer/small", "weights/minilm"):
        torch.manual_seed(0)
        model = FunnelForSequenceClassification(
            tiny_config(vocab_size=tokenizer.vocab_size, block_sizes=(2, 2, 2), num_decoder_layers=0)
        )
        model.save_pretrained(folder / name)
        tokenizer.save(folder / name)
    (folder / "reviews.csv").write_text("review,stars\n" + "".join(f'"{text}",{stars}\n' for text, stars in ROWS))
    (folder / "more.jsonl").write_text("".join(json.dumps({"review": t, "stars": s}) + "\n" for t, s in ROWS[:6]))
    sst2 = "sentence\tlabel\n" + "".join(f"{text}\t{int(stars) // 4}\n" for text, stars in ROWS)
    for place in ("glue/SST-2", "cache/data/sst2/unpacked/SST-2"):
        (folder / place).mkdir(parents=True)
        for split in ("train", "dev"):
            (folder / place / f"{split}.tsv").write_text(sst2)
        (folder / place / "test.tsv").write_text("index\tsentence\n0\ta good film\n1\ta bad film\n")
    return folder


@pytest.fixture(scope="module")
def minilm_like(tmp_path_factory) -> Path:
    """A tiny_config BERT, as transformers saves it."""
    transformers = pytest.importorskip("transformers", reason="needs the extra test")
    folder = tmp_path_factory.mktemp("bert")
    FunnelTokenizer.train([text for text, _ in ROWS]).save(folder)
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    config = transformers.BertConfig(vocab_size=size, hidden_size=32, num_hidden_layers=6, num_attention_heads=4,
                                     intermediate_size=64, max_position_embeddings=80)  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    """Commands run in this process where they can, on a demo task of a few sentences."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("FUNNEL_CACHE", str(home / "cache"))
    monkeypatch.setattr(demo.examples, "__defaults__", (256, 64, 0))
    monkeypatch.setitem(tasks.TASKS, "demo", replace(tasks.TASKS["demo"], epochs=1))
    monkeypatch.setattr(build, "SMALL", build.SMALL.replace(d_model=32, n_head=2, d_head=16, d_inner=64))
    monkeypatch.setattr(sweep, "_run", train.main)
    return home


def parse_only(module: str, arguments: list[str], monkeypatch) -> None:
    """A command's arguments are what its parser takes."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, arguments if args is None else args, namespace)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(KeyboardInterrupt):
            importlib.import_module(module).main()


def install(arguments: list[str]) -> None:
    """What pip is asked for is in pyproject.toml. Installing is .ci/run's part."""
    assert arguments[:2] == ["install", "-q"] or arguments[:1] == ["install"]
    assert (ROOT / arguments[arguments.index("-c") + 1]).is_file()
    known = set(
        re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("optional-dependencies")[1], re.MULTILINE)
    )
    wanted = arguments[arguments.index("-e") + 1]
    assert set(filter(None, wanted.removeprefix(".").strip("[]").split(","))) <= known, wanted


def status(main: Callable[[list[str]], int], arguments: list[str]) -> int | str | None:
    """A command's exit status, of --help too."""
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


def run(command: str, home: Path, monkeypatch) -> None:
    """Runs a command, or as much of it as a test can."""
    words = shlex.split(command.replace(".venv/bin/", ""))
    match words:
        case ["python3", "-m", "venv", ".venv"] | [".", "activate"]:
            pass
        case ["pip", *rest]:
            install(rest)
        case ["ruff" | "mypy", *_]:
            assert " ".join(words) in (ROOT / ".ci/run").read_text().replace(".venv/bin/", "")
        case ["python", "-m", "pytest", *_] | ["pytest", *_]:
            pass  # test_every_choice_of_tests_has_tests
        case ["python", "convert_weights.py", *_, "--to", "onnx"]:
            pass  # test_export.py runs it: half a minute
        case ["python", "train.py", *rest]:
            assert status(train.main, rest) == 0
        case ["python", "convert_weights.py", *rest]:
            assert status(convert_weights.main, rest) == 0
        case ["python", "-m", "funnel", *rest]:
            assert status(commands.main, rest) == 0
        case ["python", "-m", module, *rest] if module.startswith("benchmarks."):
            parse_only(module, rest, monkeypatch)
        case ["python", "tests/faults/fuzz.py", *rest]:
            monkeypatch.syspath_prepend(ROOT / "tests/faults")
            parse_only("fuzz", rest, monkeypatch)
        case ["torchrun", "--nnodes", *_]:
            from torch.distributed.run import parse_args

            parsed = parse_args(words[1:])
            assert parsed.training_script == "train.py"
            train.parse_arguments(parsed.training_script_args)
        case ["torchrun", *rest]:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "torch.distributed.run", *rest]
            done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
        case _:
            pytest.fail(f"no one runs this command: {command}")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh") or blocks(page, "python")])
def test_what_stands_in_a_fence_runs(page, at_home, has_run, monkeypatch, capsys):
    for name in ("NAME", "OTHER"):  # the runs that the pages speak of
        if not Path("runs", name).exists():
            own = "--data reviews.csv --text-column review --label-column stars --weights weights/minilm --epochs 1"
            run(f"python train.py {own} --out runs/{name}", at_home, monkeypatch)
    fences = re.findall(r"^```(sh|python)\n", TEXTS[page], re.MULTILINE)
    assert fences.count("sh") == len(blocks(page, "sh"))
    for command in fenced_commands(page):
        if command not in has_run:
            run(command, at_home, monkeypatch)
            has_run.add(command)
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), {})
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("page", [page for page in PAGES if inline_commands(page)])
def test_commands_between_the_lines_run_or_have_arguments_that_exist(page, at_home, has_run, monkeypatch):
    for command in dict.fromkeys(inline_commands(page)):
        if re.search("…|[A-Z]{3}|/NAME", command):  # a pattern of a command
            check_flags(command)
        elif command not in has_run:
            run(command, at_home, monkeypatch)
            has_run.add(command)


def test_every_choice_of_tests_has_tests():
    """`pytest … -k …` in the pages selects something."""
    every = [command for page in PAGES for command in fenced_commands(page) + inline_commands(page)]
    chosen = [shlex.split(command.partition("pytest ")[2]) for command in every if re.match(r"(python -m )?pytest ", command)]
    chosen = [arguments for arguments in chosen if arguments != ["-q"]]
    assert len(chosen) > 5
    code = (
        "import contextlib, io, pytest\n"
        f"for arguments in {chosen!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        "        code = pytest.main([*arguments, '--collect-only', '-q', '-n0'])\n"
        "    if code: print(int(code), arguments)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout + found.stderr == ""


def check_flags(command: str) -> None:
    """Its script is there, and knows its flags."""
    words = command.split()
    source = {
        "funnel": ["funnel/__main__.py"],
        "benchmarks": ["benchmarks/" + (re.search(r"benchmarks\.(\w+)", command) or [" ", "?"])[1] + ".py"],
    }
    kind = next((name for name in source if f"-m {name}" in command), None)
    script = next((word for word in words if word.endswith(".py")), None)
    files = source[kind] if kind else [script or pytest.fail(f"no one knows this command: {command}")]
    text = "".join((ROOT / file).read_text() for file in files)
    for flag in re.findall(r"--[a-z-]+", command):
        assert f'"{flag}"' in text or (words[0] == "torchrun" and flag == "--nproc-per-node"), f"{command}: {flag}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_every_file_that_is_named_is_there(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXTS[page]):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    for name in re.findall(r"`([\w/.]+/[\w.]+\.(?:py|md|txt|toml|png))`", TEXTS[page]):
        assert (ROOT / name).exists() or (ROOT / "funnel" / name).exists(), name


def test_imports_run_one_way():
    """As docs/architecture.md draws it: a file imports only from lines above its own."""
    drawing = next(
        block for block in re.findall(r"```\n(.*?)```", TEXTS["docs/architecture.md"], re.DOTALL) if block[:6] == "errors"
    )
    level = {name.removesuffix(".py"): number for number, line in enumerate(drawing.splitlines()) for name in line.split()}
    files = [*(ROOT / "funnel").rglob("*.py"), ROOT / "train.py", ROOT / "convert_weights.py"]
    for path in files:
        place = "convert" if path.parent.name == "convert" else path.stem
        if place == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("funnel"):
                continue
            parts = (node.module or "").split(".")[1:2]
            for name in parts or [alias.name for alias in node.names]:
                assert level[name] < level[place] or name == place == "convert", f"{path.name} imports {name}"
    named = {path.stem for path in files if path.parent.name != "convert" and path.stem != "__init__"}
    assert set(level) == named | {"convert"}
