"""`funnel card`: a model card, the README.md of a model that is shared."""

import argparse
from pathlib import Path

from funnel.cli.common import ArgumentParser, add_overwrite, check_output, files_of_run
from funnel.errors import FunnelError
from funnel.io import RUN_FILE


def add_card(subparsers: "argparse._SubParsersAction[ArgumentParser]") -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "card",
        help="model card of a run: README.md for sharing",
        description="Writes a model card: Markdown with a header that the Hugging Face Hub reads. Edit it afterwards: search\n"
        'it for "to fill in". `funnel convert RUN OUT` copies the README.md of a run.',
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: README.md in the run folder)")
    add_overwrite(parser)
    parser.set_defaults(work=write_card)


def write_card(args: argparse.Namespace) -> None:
    """Writes the card.

    Raises:
        FunnelError: the folder is not a finished or evaluated run, or the file exists or cannot be written.
    """
    from funnel.analysis.card import render_card
    from funnel.analysis.runs import read_run
    from funnel.io import atomic_write

    if not (args.run / RUN_FILE).is_file():
        raise FunnelError(f"{args.run}: not a run; expected a folder with a run.json")
    out = args.out or args.run / "README.md"
    check_output(out, "out", files_of_run(args.run), args.overwrite)
    text = render_card(read_run(args.run))
    with atomic_write(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f'wrote {out}; search it for "to fill in"')
