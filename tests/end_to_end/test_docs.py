"""Tests README and docs: their commands and Python blocks run, and the files they name exist.

Fenced commands run in order, in a folder with the files they need: tiny weights and a few rows of data. Benchmarks, pytest and
multi-node commands are only parsed, as is `funnel serve`, but curl's requests are sent to its application; .ci/run runs the two
installation commands.
"""

import argparse
import importlib
import json
import lzma
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny_config

import convert_weights
import pretrain
import train
from funnel.cli import main as cli
from funnel.cli import sweep
from funnel.data import demo, tasks
from funnel.data.tokenizer import FunnelTokenizer
from funnel.model.heads import FunnelForSequenceClassification
from funnel.weights import build, load

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
ROWS = [("a good film", "5"), ("a bad film , sadly", "1"), ("an average film", "3")] * 12


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXTS[page], re.MULTILINE | re.DOTALL)


def fenced_commands(page: str) -> list[str]:
    """The commands in a page's shell blocks, without comments."""
    lines = "".join(code_blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in re.sub(r"\s+#.*", "", line).split("&&")]


def inline_commands(page: str) -> list[str]:
    """Commands in backticks."""
    prose = re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)
    starts = r"(?:python|pytest|torchrun|pip|funnel|convert_weights\.py|train\.py|pretrain\.py)"
    return re.findall(rf"`({starts} [^`]+)`", prose.replace("\n", " "))


@pytest.fixture(scope="module")
def executed() -> set[str]:
    """Commands that have run already."""
    return set()


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_bert):
    """A folder with the files that the commands read."""
    folder = tmp_path_factory.mktemp("home")
    for name in (
        "train.py",
        "pretrain.py",
        "convert_weights.py",
        "funnel",
        "benchmarks",
        "tests",
        "constraints.txt",
        "pyproject.toml",
    ):
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs").mkdir()
    (folder / "google-bert").mkdir()
    for name in ("MINILM", "google-bert/bert-base-uncased"):
        (folder / name).symlink_to(tiny_bert)
    tokenizer = FunnelTokenizer.train([text for text, _ in ROWS])
    for name in ("funnel-transformer/small", "weights/minilm"):
        torch.manual_seed(0)
        config = tiny_config(vocab_size=tokenizer.vocab_size, blocks="2,2,2", num_decoder_layers=0)
        FunnelForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save(folder / name)
    (folder / "reviews.csv").write_text(
        "review,stars\n" + "".join(f'"{text} {i}",{stars}\n' for i, (text, stars) in enumerate(ROWS))
    )
    documents = ["\n".join(text for text, _ in ROWS[i : i + 3]) for i in range(0, len(ROWS), 3)] * 16  # a batch at least
    (folder / "wiki.txt.xz").write_bytes(lzma.compress("\n\n".join(documents).encode()))
    (folder / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (folder / "more.jsonl").write_text("".join(json.dumps({"review": t, "stars": s}) + "\n" for t, s in ROWS[:6]))
    sst2 = "sentence\tlabel\n" + "".join(f"{text}\t{int(stars) // 4}\n" for text, stars in ROWS)
    for place in ("glue/SST-2", "cache/data/sst2/unpacked/SST-2"):
        (folder / place).mkdir(parents=True)
        for split in ("train", "dev"):
            (folder / place / f"{split}.tsv").write_text(sst2)
        (folder / place / "test.tsv").write_text("index\tsentence\n0\ta good film\n1\ta bad film\n")
    return folder


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory) -> Path:
    """A tiny BERT, as transformers saves it."""
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
    """Commands run in this process where possible, with a demo task of a few sentences, and other weights in the package."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("FUNNEL_CACHE", str(home / "cache"))
    subset = [examples._replace(texts=examples.texts[:n], labels=examples.labels[:n])
              for examples, n in zip(demo.examples(), (256, 64), strict=True)]  # fmt: skip
    monkeypatch.setattr(demo, "examples", lambda: subset)
    monkeypatch.setattr(load, "TINY_FOLDER", home / "weights/minilm")
    monkeypatch.setitem(tasks.TASKS, "demo", replace(tasks.TASKS["demo"], epochs=1))
    monkeypatch.setattr(build, "RANDOM_CONFIG", build.RANDOM_CONFIG.replace(d_model=32, n_head=2, d_head=16, d_inner=64))
    monkeypatch.setattr(sweep, "run_training", lambda script, arguments: train.main(list(arguments)))
    return home


def parse_only(module: str, arguments: list[str], monkeypatch) -> None:
    """Checks that a command's parser accepts the arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, arguments if args is None else args, namespace)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(KeyboardInterrupt):
            importlib.import_module(module).main()


def check_install(arguments: list[str]) -> None:
    """Checks that the extras exist; .ci/run installs them."""
    assert arguments[0] == "install"
    assert (ROOT / arguments[arguments.index("-c") + 1]).is_file()
    extras = (ROOT / "pyproject.toml").read_text().split("optional-dependencies")[1]
    wanted = arguments[arguments.index("-e") + 1].removeprefix(".").strip("[]").split(",")
    assert set(filter(None, wanted)) <= set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE)), wanted


def exit_status(main: Callable[[list[str]], int], arguments: list[str]) -> int | str | None:
    try:
        return main(arguments)
    except SystemExit as end:  # --help
        return end.code


def execute(command: str, home: Path, monkeypatch) -> None:
    """Runs a command, or checks its arguments if it cannot run in a test."""
    words = shlex.split(command.replace(".venv/bin/", ""))
    match words:
        case ["python3", "-m", "venv", ".venv"] | [".", "activate"]:
            pass
        case ["pip", *rest]:
            check_install(rest)
        case ["ruff" | "mypy", *_]:
            assert " ".join(words) in (ROOT / ".ci/run").read_text().replace(".venv/bin/", "")
        case ["python", "-m", "pytest", *_] | ["pytest", *_]:
            pass  # test_every_pytest_selection_names_tests_that_exist
        case ["funnel", "convert", *_] if "--push-to-hub" in words:
            check_flags(command)  # tested in tests/weights/test_hub.py
        case ["mkdocs", *_]:
            pass  # tests/end_to_end/test_site.py builds the site
        case [*_, "--to", "onnx"]:
            pass  # takes half a minute; tested in tests/weights/test_export.py
        case ["python", "train.py", *rest]:
            assert exit_status(train.main, rest) == 0
        case ["python", "pretrain.py", *rest]:
            check_flags(command)
            shortened = {"--steps": "2", "--batch-size": "8", "--max-length": "24"}
            shortened |= {} if {"--weights", "--teacher"} & set(rest) else {"--d-model": "32"}
            assert exit_status(pretrain.main, [*rest, *(word for pair in shortened.items() for word in pair)]) == 0
        case ["python", "convert_weights.py", *rest]:
            assert exit_status(convert_weights.main, rest) == 0
        case ["funnel", "serve", *rest]:
            assert cli._parse(["serve", *rest]).work.__name__ == "serve"
        case ["curl", *rest]:
            send_request(rest)
        case ["funnel", *rest] | ["python", "-m", "funnel", *rest]:
            assert exit_status(cli.main, rest) == 0
        case ["python", "-m", module, *rest] if module.startswith("benchmarks."):
            parse_only(module, rest, monkeypatch)
        case ["python", "tests/fuzz/fuzz.py", *rest]:
            monkeypatch.syspath_prepend(ROOT / "tests/fuzz")
            parse_only("fuzz", rest, monkeypatch)
        case ["torchrun", "--nnodes", *_]:
            from torch.distributed.run import parse_args

            parsed = parse_args(words[1:])
            assert parsed.training_script == "train.py"
            check_flags(shlex.join(["python", "train.py", *parsed.training_script_args]))
        case ["torchrun", *rest]:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "torch.distributed.run", *rest]
            done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
        case _:
            pytest.fail(f"this test cannot run the command: {command}")


SERVED: dict[str, Any] = {}  # the service, and the id of the file that was uploaded last


@pytest.fixture(scope="module", autouse=True)
def close_service():
    yield
    if "service" in SERVED:
        SERVED["service"].close()


def send_request(arguments: list[str]) -> None:
    """Sends curl's request to the application that serves runs/NAME."""
    testclient = pytest.importorskip("fastapi.testclient", reason="needs the extra serve")
    from funnel.serving.app import create_app
    from funnel.serving.engines import load_models
    from funnel.serving.service import Service
    from funnel.serving.settings import Settings

    parser = argparse.ArgumentParser()
    for flags in (["-H"], ["--data-binary", "-d"], ["-X"]):
        parser.add_argument(*flags, action="append", default=[])
    parser.add_argument("url")
    parsed = parser.parse_args(arguments)
    headers = dict(header.split(": ", 1) for header in parsed.H)
    content = b"".join(Path(part[1:]).read_bytes() if part[0] == "@" else part.encode() for part in parsed.data_binary)
    if "service" not in SERVED:
        SERVED["service"] = Service(load_models([Path("runs/NAME")], "cpu"), Settings())
        SERVED["service"].start()
    client = testclient.TestClient(create_app(SERVED["service"]))  # without its lifespan: uploads are kept between commands
    url = parsed.url.replace("http://127.0.0.1:8000", "").replace("/ID", f"/{SERVED.get('id')}")
    response = client.request((parsed.X or ["POST" if parsed.data_binary else "GET"])[0], url, headers=headers, content=content)
    assert response.is_success, (arguments, response.text)
    SERVED["id"] = response.json()["id"] if response.status_code == 202 else SERVED.get("id")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if code_blocks(page, "sh") or code_blocks(page, "python")])
def test_fenced_commands_and_python_blocks_run(page, at_home, executed, monkeypatch, capsys):
    for name in ("NAME", "OTHER"):  # the runs that the pages refer to
        if not Path("runs", name).exists():
            own = "--data reviews.csv --text-column review --label-column stars --weights weights/minilm --epochs 1"
            execute(f"python train.py {own} --out runs/{name}", at_home, monkeypatch)
    fences = re.findall(r"^```(sh|python)\n", TEXTS[page], re.MULTILINE)
    assert fences.count("sh") == len(code_blocks(page, "sh"))
    for command in fenced_commands(page):
        if command not in executed:
            execute(command, at_home, monkeypatch)
            executed.add(command)
    for code in code_blocks(page, "python"):
        if "import onnxruntime" not in code:  # tested in tests/weights/test_export.py, too
            exec(compile(code, page, "exec"), {})
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if inline_commands(page)])
def test_inline_commands_run_or_have_existing_flags(page, at_home, executed, monkeypatch):
    for command in dict.fromkeys(inline_commands(page)):
        words = command.split()
        is_pattern = re.search(r"\.\.\.|…|[A-Z]{3}|/NAME", command) or len([w for w in words if w[0] != "-"]) < 3
        if is_pattern:
            check_flags(command)
        elif command not in executed:
            execute(command, at_home, monkeypatch)
            executed.add(command)


def test_every_pytest_selection_names_tests_that_exist():
    commands = [command for page in PAGES for command in fenced_commands(page) + inline_commands(page)]
    selections = [shlex.split(c.partition("pytest ")[2]) for c in commands if re.match(r"(python -m )?pytest ", c)]
    selections = [arguments for arguments in selections if any("/" in word for word in arguments)]
    assert len(selections) > 5
    for arguments in selections:
        paths = [ROOT / word for word in arguments if "/" in word]
        files = [file for path in paths for file in (path.rglob("test_*.py") if path.is_dir() else [path])]
        names = re.findall(r"def (test_\w+)", "".join(file.read_text() for file in files))
        keywords = arguments[arguments.index("-k") + 1].split(" or ") if "-k" in arguments else ["test_"]
        for keyword in keywords:
            assert any(keyword in name for name in names), (arguments, keyword)


def help_text(words: list[str]) -> str:
    """The help of the command that `words` start with."""
    match words:
        case ["python", "-m", module, *_] if module.startswith("benchmarks."):
            return "".join(path.read_text() for path in (ROOT / module.replace(".", "/")).parent.glob("*.py"))
        case ["funnel", subcommand, *_] | ["python", "-m", "funnel", subcommand, *_]:
            command = ["-m", "funnel", subcommand]
        case ["funnel", *_]:
            command = ["-m", "funnel"]
        case _:
            script = next((word for word in words if word.endswith(".py")), None)
            command = [str(ROOT / (script or pytest.fail(f"unknown command: {' '.join(words)}")))]
    return subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True).stdout


def check_flags(command: str) -> None:
    """Checks that the command has these flags."""
    words = command.split()
    flags = [flag for flag in re.findall(r"(?<!\S)--[a-z-]+", command) if flag != "--nproc-per-node"]
    text = help_text(words) if flags else ""
    for flag in flags:
        assert re.search(rf"{flag}\b", text), f"{command}: {flag}"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXTS[page]):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    for name in re.findall(r"`([\w/.]+/[\w.]+\.(?:py|md|txt|toml|png))`", TEXTS[page]):
        assert (ROOT / name).exists() or (ROOT / "funnel" / name).exists(), name


def test_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 200
