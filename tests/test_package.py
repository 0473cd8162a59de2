"""The package: public names, and the wheel in a clean environment."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import funnel
from funnel.data import demo


def test_every_public_name_exists():
    for name in funnel.__all__:
        assert getattr(funnel, name).__name__ == name
    assert set(funnel.__all__) <= set(dir(funnel))
    with pytest.raises(AttributeError, match="nothing"):
        funnel.nothing  # noqa: B018


def test_importing_the_package_does_not_import_torch():
    code = "import sys, funnel, funnel.cli.main; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The wheel and the sdist, built from a copy of the checkout."""
    pytest.importorskip("build", reason="needs the extra test")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode != 0:  # the tree that .ci/run copies has no repository
        names = [p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*"), *(ROOT / "funnel").rglob("*")] if p.is_file()]
    else:
        names = files.stdout.split("\0")[:-1]
    for name in names:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_CONSTRAINT": ""})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.mark.slow
def test_the_distributions_pass_twine_check(distributions):
    pytest.importorskip("twine", reason="needs the extra test")
    files = [str(path) for path in distributions.iterdir()]
    assert len(files) == 2
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_wheel_and_sdist_contain_the_pretrained_weights(distributions, tiny_weights):
    (wheel,), (sdist,) = distributions.glob("*.whl"), distributions.glob("*.tar.gz")
    files = {f"funnel/tiny/{path.name}" for path in tiny_weights.iterdir()}
    assert files <= set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        assert files <= {name.partition("/")[2] for name in archive.getnames()}


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(distributions, tmp_path):
    """Installed without its dependencies, which come from the environment of the tests."""
    (wheel,) = distributions.glob("funnel_transformer-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"funnel/py.typed", "funnel/analysis/report.html", "funnel/cli/main.py"} <= set(names)
    assert {f"funnel/data/movie_reviews/{name}" for name in ("LICENSE.txt", "README.txt", *demo.FILES)} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/")) or name == "train.py"]

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True, cwd=tmp_path)
    import torch

    environment = {**os.environ, "PYTHONPATH": str(Path(torch.__file__).parent.parent)}  # the dependencies

    def run(*command):
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    located = run(python, "-c", "import funnel; print(funnel.__file__)").stdout.strip()
    assert Path(located).is_relative_to(tmp_path / "venv"), located
    command = python.parent / "funnel"
    assert "convert" in run(command, "--help").stdout
    layout = run(command, "layout", "--blocks", "2,2")
    assert layout.returncode == 0, layout.stderr
    assert "block 1" in layout.stdout
    source = ROOT / "tests/fixtures/written_by_0_1/converted"
    converted = run(command, "convert", str(source), "out")
    assert converted.returncode == 0, converted.stderr
    assert (tmp_path / "out/model.safetensors").is_file()
    sentences = run(python, "-c", "from funnel.data import demo; print(len(demo.examples()[0].texts))")
    assert sentences.stdout == "9594\n", sentences.stderr
    sweep = run(command, "sweep", "--blocks", "2,2")
    assert sweep.returncode == 2
    assert "train.py" in sweep.stderr
    assert "--script" in sweep.stderr
