"""Builds GLUE's version of MRPC, which cannot be downloaded, from Microsoft's files and GLUE's list of dev ids."""

from pathlib import Path

from funnel.data.formats import read_lines
from funnel.errors import FunnelError, plural
from funnel.io import os_errors


def build_mrpc(source: Path, out: Path) -> None:
    """Writes train.tsv, dev.tsv and test.tsv in GLUE's format.

    Args:
        source: folder with msr_paraphrase_train.txt, msr_paraphrase_test.txt and mrpc_dev_ids.tsv.
        out: folder to write to.

    Raises:
        FunnelError: a source file is missing or malformed.
    """
    dev_ids = {tuple(line.split()) for line in read_lines(source / "mrpc_dev_ids.tsv")}
    header, *train = _read_rows(source / "msr_paraphrase_train.txt")
    test_header, *test = _read_rows(source / "msr_paraphrase_test.txt")
    is_dev = [(row[1], row[2]) in dev_ids for row in train]
    tables = {
        "train": [header, *(row for row, dev in zip(train, is_dev, strict=True) if not dev)],
        "dev": [header, *(row for row, dev in zip(train, is_dev, strict=True) if dev)],
        "test": [["index", *test_header[1:]], *([str(i), *row[1:]] for i, row in enumerate(test))],
    }
    with os_errors(out, "write"):
        out.mkdir(parents=True, exist_ok=True)
        for name, rows in tables.items():
            (out / f"{name}.tsv").write_text("\n".join("\t".join(row) for row in rows) + "\n", encoding="utf-8")


def _read_rows(path: Path) -> list[list[str]]:
    rows = [line.rstrip("\r\n").split("\t") for line in read_lines(path)]
    for number, row in enumerate(rows, 1):
        if len(row) != 5:
            raise FunnelError(f"{path}, line {number}: {plural(len(row), 'field')}, expected 5")
    if not rows:
        raise FunnelError(f"{path}: empty; expected a header and one pair of sentences per line")
    return rows
