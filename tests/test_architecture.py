"""The structure of the source tree: imports go one way, train.py stays short, the library does not mention flags."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

# A group may import only from groups in earlier rows, and from itself.
LAYERS = (
    {"errors"},
    {"io", "options", "threads"},
    {"model", "data"},
    {"problems"},
    {"weights", "training"},
    {"pretraining", "inference"},
    {"analysis"},
    {"serving"},
    {"cli"},
    {"train", "pretrain", "convert_weights"},
)
LEVELS = {group: level for level, groups in enumerate(LAYERS) for group in groups}
# from_pretrained takes hub ids and other formats' folders, so it imports these inside the function.
EXCEPTIONS = {("funnel/model/heads.py", "weights")}

SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in [*(ROOT / "funnel").rglob("*.py"), *ROOT.glob("*.py")])
LIBRARY = [name for name in SOURCES if name.startswith("funnel/") and not name.startswith("funnel/cli/")]


def group_of(path: str) -> str:
    """ "funnel/model/heads.py" -> "model", "funnel/io.py" -> "io", "train.py" -> "train"."""
    return path.removeprefix("funnel/").split("/")[0].removesuffix(".py")


def imported_groups(path: str) -> set[str]:
    """The groups that a file imports, including imports inside functions."""
    groups = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "funnel":
                groups |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            groups |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("funnel.")}
    return groups


@pytest.mark.parametrize("path", [path for path in SOURCES if path not in ("funnel/__init__.py", "funnel/__main__.py")])
def test_imports_run_one_way(path):
    group = group_of(path)
    for imported in imported_groups(path):
        if (path, imported) not in EXCEPTIONS and imported != group:
            assert LEVELS[imported] < LEVELS[group], f"{path} imports funnel.{imported}"


def test_the_exceptions_are_still_needed():
    for path, imported in EXCEPTIONS:
        assert imported in imported_groups(path)


def test_architecture_page_shows_the_groups_in_this_order():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    drawing = next(block for block in re.findall(r"```\n(.*?)```", page, re.DOTALL) if block.startswith("errors"))
    rows = [set(re.findall(r"[\w.]+", line.split("#")[0].replace(".py", ""))) for line in drawing.splitlines()]
    assert [row for row in rows if row] == list(LAYERS)


def function_lengths(path: str) -> dict[str, int]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}


@pytest.mark.parametrize("script", ["train.py", "pretrain.py"])
def test_a_recipe_has_at_most_200_lines(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert max(function_lengths(script).values()) <= 65
    start = text[: text.index("# training loop")].count("\n")
    end = text[: text.index("    if stopping:\n        stop.exit")].count("\n")
    assert end - start <= 45


@pytest.mark.parametrize("script", ["train.py", "pretrain.py"])
def test_a_recipe_has_no_nested_functions(script):
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    nested = [inner.name for f in functions for inner in ast.walk(f) if isinstance(inner, ast.FunctionDef) and inner is not f]
    assert nested == []


@pytest.mark.parametrize("path", LIBRARY)
def test_the_library_mentions_no_flags(path):
    text = (
        (ROOT / path)
        .read_text(encoding="utf-8")
        .replace("torchrun --nproc-per-node", "")
        .replace("torchrun's --nproc-per-node", "")
    )
    assert re.findall(r"(?<![\w-])--[a-z][a-z-]+", text) == []


def parameters_of(node: ast.FunctionDef) -> list[str]:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]


# Calls that read better with keyword arguments; besides these, Triton's kernels.
MANY_PARAMETERS = {"forward", "from_pretrained", "option"}


def is_kernel(node: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.mark.parametrize("path", [*LIBRARY, "train.py", "pretrain.py", "convert_weights.py", "funnel/cli/common.py"])
def test_functions_have_at_most_four_parameters(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if len(parameters_of(f)) > 4 and f.name not in MANY_PARAMETERS and not is_kernel(f)] == []


@pytest.mark.parametrize("package", [p.name for p in (ROOT / "funnel").iterdir() if (p / "__init__.py").exists()])
def test_tests_mirror_the_packages(package):
    assert (ROOT / "tests" / package).is_dir(), f"tests/{package}"
    assert list(Path(ROOT / "tests" / package).glob("test_*.py"))
