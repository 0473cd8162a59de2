"""`funnel report`: an HTML page and a Markdown table of one or several runs."""

import argparse
import os
import sys
from pathlib import Path

from funnel.cli.common import ArgumentParser, add_overwrite, check_output
from funnel.errors import FunnelError


def add_report(subparsers: "argparse._SubParsersAction[ArgumentParser]") -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser("report", help="HTML page and Markdown table of runs (extra: report)")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or folder that contains runs")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="HTML file to write (default: report.html in the folder of the run or runs)"
    )
    add_overwrite(parser)
    parser.set_defaults(work=report)


def report(args: argparse.Namespace) -> None:
    """Checks --out, then writes the report."""
    if args.out is not None:
        if args.out.suffix.lower() not in (".html", ".htm"):
            raise FunnelError(f"out {args.out}: expected the name of an .html file", "out")
        check_output(args.out, "out", overwrite=args.overwrite)
    write_report(args.runs, args.out)


def write_report(paths: list[Path], out: Path | None) -> None:
    """Writes the page and prints the table. Runs that cannot be read are skipped with a warning.

    Args:
        paths: folders of runs, or folders that contain runs.

    Raises:
        FunnelError: no run can be read, or the page cannot be written.
    """
    from funnel.analysis.report import markdown_table, render_page
    from funnel.analysis.runs import find_runs, read_run
    from funnel.io import atomic_write

    folders, runs = find_runs(paths), []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except FunnelError as error:
            if folder == folders[-1] and not runs:
                raise
            print(f"warning: skipped a run: {error}", file=sys.stderr)
    if out is None:
        parent = folders[0] if len(folders) == 1 else Path(os.path.commonpath([folder.parent for folder in folders]))
        out = parent / "report.html"
    page = render_page(runs)
    with atomic_write(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{markdown_table(runs)}\n\nwrote {os.path.relpath(out) if out.resolve().is_relative_to(Path.cwd()) else out}")
