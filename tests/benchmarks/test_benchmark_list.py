"""benchmarks/README.md lists every program."""

from conftest import ROOT


def test_every_benchmark_is_listed() -> None:
    folder = ROOT / "benchmarks"
    page = (folder / "README.md").read_text()
    names = [path.relative_to(folder).as_posix() for path in folder.glob("*/*.py") if path.name != "__init__.py"]
    assert len(names) > 20
    assert [name for name in names if f"`{name}`" not in page] == []
