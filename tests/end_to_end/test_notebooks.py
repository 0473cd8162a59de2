"""The notebooks in docs/notebooks: their stored outputs are those of a complete run, and they run with few steps."""

import ast
import json
import re

import pytest
from conftest import ROOT

FOLDER = ROOT / "docs/notebooks"
NOTEBOOKS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.ipynb"))}
# Values of the first code cell that make a run short.
PARAMETERS = {
    "own_csv": {"STEPS": 2, "N_TEXTS": 200},
    "layout_cost": {"STEPS": 1, "LAYOUTS": ["1,1"]},
}
by_name = pytest.mark.parametrize("name", NOTEBOOKS)


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@by_name
def test_stored_outputs_are_those_of_one_run_without_errors(name):
    cells = code_cells(NOTEBOOKS[name])
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert len(outputs) >= 4
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"]


@by_name
def test_stored_outputs_name_no_paths_of_a_machine(name):
    outputs = json.dumps([[output.get("text") for output in cell["outputs"]] for cell in code_cells(NOTEBOOKS[name])])
    assert not re.search(r"/(home|root|tmp|work|Users)/", outputs)


@by_name
def test_links_of_a_notebook_exist(name):
    text = "".join("".join(cell["source"]) for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "markdown")
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert targets
    for target in targets:
        assert (FOLDER / target).exists(), target


@pytest.mark.slow
@by_name
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra docs")
    nbformat = pytest.importorskip("nbformat", reason="needs the extra docs")
    pytest.importorskip("ipykernel", reason="needs the extra docs")
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    first = code_cells(notebook)[0]
    assert [node.targets[0].id for node in ast.parse(first["source"]).body] == list(PARAMETERS[name])
    first["source"] = "\n".join(f"{key} = {value!r}" for key, value in PARAMETERS[name].items())
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    executed = client.execute()  # raises at the first error
    for stored, cell in zip(code_cells(NOTEBOOKS[name]), code_cells(executed), strict=True):
        assert bool(stored["outputs"]) == bool(cell["outputs"]), "".join(stored["source"])
