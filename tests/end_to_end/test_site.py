"""The documentation site: it builds without warnings, loads nothing from other hosts, and its reference is complete."""

import ast
import dataclasses
import html
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

import funnel
import train
from funnel.cli import main as cli

REFERENCE = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md"))
DIRECTIVES = set(re.findall(r"^::: ([\w.]+)$", REFERENCE, re.MULTILINE))


def load_module(name: str) -> ModuleType:
    """A module in docs/."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    return load_module("hooks")


# --- the reference ----------------------------------------------------------------------------------------------------


def test_the_reference_has_every_public_name():
    assert {name.removeprefix("funnel.") for name in DIRECTIVES if name.count(".") == 1} == set(funnel.__all__)


def test_the_reference_has_the_parts_that_train_py_uses():
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    parts = [(node.module, alias.name) for node in imports for alias in node.names]
    parts = [part for part in parts if part[0].startswith(("funnel.training.", "funnel.problems.", "funnel.weights."))]
    assert len(parts) > 20
    for module, name in parts:
        assert name.isupper() or {module, f"{module}.{name}"} & DIRECTIVES, f"{module}.{name}"


def test_every_option_of_train_py_is_listed(hooks):
    text = "\n".join(hooks.describe_script("train"))
    for field in dataclasses.fields(train.TrainArgs):
        assert f'id="train-{field.name.replace("_", "-")}"' in text
        assert html.escape(field.metadata["help"].replace("%%", "%").split(";")[0]) in text
    assert "```sh\npython train.py --blocks" in text


def test_every_subcommand_is_listed_with_its_options(hooks, capsys):
    text = "\n".join(hooks.describe_commands())
    cli.main(["--help"])
    names = re.findall(r"^    (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    assert {"layout", "predict"} <= set(names)
    for name in names:
        section = text.partition(f"## funnel {name} ")[2].partition("\n## ")[0]
        cli.main([name, "--help"])
        flags = re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE)
        assert flags
        for flag in flags:
            assert f"<code>{flag}" in section, f"{name} {flag}"


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Args:\n    a, b: both,\n        in a line.\n    c: other.",
         "Args:\n    a: both,\n        in a line.\n    b: both,\n        in a line.\n    c: other."),
        ("Args of forward:\n    x: [b, l].\n    y, z: [b],\n        or None.",
         "Arguments of `forward`:\n\n- `x`: [b, l].\n- `y, z`: [b],\n        or None."),
        ("Returns a, b: no section.", "Returns a, b: no section."),
    ],
)  # fmt: skip
def test_docstrings_are_adapted_to_griffe(docstring, expected):
    pytest.importorskip("griffe", reason="needs the extra docs")
    assert load_module("docstrings").adapt_docstring(docstring) == expected


# --- links and notebooks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "link", "expected"),
    [
        ("index.md", "docs/speed.md#on-a-gpu", "speed.md#on-a-gpu"),
        ("index.md", "docs/funnel.png", "funnel.png"),
        ("index.md", "CHANGELOG.md", "changelog.md"),
        ("index.md", "LICENSE", "licenses/funnel.txt"),
        ("contributing.md", "docs/architecture.md", "architecture.md"),
        ("speed.md", "growth.png", "growth.png"),
        ("speed.md", "../README.md#results", "index.md#results"),
        ("tutorial.md", "notebooks/own_csv.ipynb", "notebooks/own_csv.md"),
        ("reference/models.md", "../architecture.md", "../architecture.md"),
        ("notebooks/own_csv.md", "layout_cost.ipynb", "layout_cost.md"),
        ("speed.md", "#on-a-gpu", "#on-a-gpu"),
        ("speed.md", "https://arxiv.org/abs/2006.03236", "https://arxiv.org/abs/2006.03236"),
        ("speed.md", "missing.md", "missing.md"),
    ],
)
def test_links_that_work_on_github_work_on_the_site(hooks, place, link, expected):
    assert hooks.adapt_links(f"see [this]({link}).", place) == f"see [this]({expected})."


def test_links_in_code_blocks_are_kept(hooks):
    code = "```python\nlinks = '[this](docs/speed.md)'\n```"
    assert hooks.adapt_links(f"{code}\n[this](docs/speed.md)", "index.md") == f"{code}\n[this](speed.md)"


def test_a_notebook_becomes_a_page_with_its_outputs(hooks):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Text."]},
        {"cell_type": "code", "source": ["print(1)"], "metadata": {}, "outputs": [
            {"output_type": "stream", "text": ["1\n"]}, {"output_type": "stream", "text": ["2\n"]}]},
        {"cell_type": "code", "source": ["plot()"], "metadata": {"alt": "A curve"}, "outputs": [
            {"output_type": "display_data", "data": {"image/png": "UE5H", "text/plain": ["<Figure>"]}}]},
    ]  # fmt: skip
    markdown, images = hooks.convert_notebook({"cells": cells}, "name")
    assert markdown.startswith("# Title\nText.\n\n<a href")
    assert "```python\nprint(1)\n```\n\n```{.text .output}\n1\n2\n```" in markdown
    assert "![A curve](name-1.png)" in markdown
    assert "<Figure>" not in markdown
    assert images == {"name-1.png": b"PNG"}


# --- the site ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built in strict mode: no page outside the navigation, no broken link or anchor."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr  # not with --quiet, which hides warnings from --strict
    return folder


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_other_hosts(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        for tag in re.findall(r"<(?:link|script|img|iframe|source)\b[^>]*>", page.read_text(encoding="utf-8")):
            loaded = re.findall(r"\b(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", tag)
            assert not loaded, f"{page.relative_to(site)}: {tag}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )['\"]?(?:https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.slow
def test_pages_of_the_site_have_their_content(site):
    def text(page: str) -> str:
        return (site / page / "index.html").read_text(encoding="utf-8")

    assert "A from-scratch PyTorch implementation" in text("")
    anchors = set(re.findall(r'\bid="?(funnel\.\w+)"?[ >]', text("reference/predictors") + text("reference/models")
                             + text("reference/tokenizer")))  # fmt: skip
    assert {f"funnel.{name}" for name in funnel.__all__} <= anchors
    assert "train-blocks" in text("reference/train")
    assert (site / "notebooks/layout_cost-1.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((site / "notebooks/own_csv.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not list(site.rglob("*.py"))
