"""Commands around training: plan a layout, use a trained classifier, compare runs.

funnel layout --blocks 2,2,2,2,2,2,2                 # cost of a layout, and where its layers come from
funnel sweep --blocks 2,2,2 --blocks 4,4,4 --lr 1e-5,2e-5 --seeds 3 ...   # one training run for each combination
funnel predict RUN "a gorgeous , witty film"         # labels and probabilities for texts, standard input or a file
funnel evaluate RUN FILE                             # metrics, confusions and largest errors on a labeled file
funnel submit RUN --data DIR --out DIR               # submission files for the GLUE server
funnel explain RUN "a gorgeous , witty film"         # how much each token contributes to the prediction
funnel serve RUN [RUN ...]                           # HTTP server with a web page and a JSON API
funnel report RUN [RUN ...]                          # HTML page and Markdown table of runs
funnel card RUN                                      # model card, for sharing a model
funnel convert SOURCE OUT                            # convert a checkpoint to another format
"""

import argparse
import sys
from typing import Any

from funnel.cli.card import add_card
from funnel.cli.common import ArgumentParser, run_command
from funnel.cli.convert import add_convert
from funnel.cli.evaluate import add_evaluate
from funnel.cli.explain import add_explain
from funnel.cli.layout import add_layout
from funnel.cli.predict import add_predict
from funnel.cli.report import add_report
from funnel.cli.serve import add_serve
from funnel.cli.submit import add_submit
from funnel.cli.sweep import add_sweep

# Each module imports PyTorch and the library only when its command runs, to keep `--help` and usage errors fast.
COMMANDS = (
    add_layout, add_sweep, add_predict, add_evaluate, add_submit, add_explain, add_serve, add_report, add_card, add_convert
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status.

    Subcommands set these defaults on their parser:
        work: function of the parsed arguments.
        take_extra: function of the parsed arguments and the unknown ones; returns False to reject these. Optional.
        on_interrupt: what to print after Ctrl-C. Optional.

    Args:
        arguments: default: those of the process.
    """
    try:
        args = _parse(arguments)
    except SystemExit as end:  # after --help or a usage error
        return int(end.code or 0)
    return run_command("funnel", lambda: args.work(args), on_interrupt=args.on_interrupt, debug=args.debug)


def build_parser() -> ArgumentParser:
    """The parser of the command line, with one subparser per command."""
    parser = ArgumentParser(prog="funnel", description=__doc__)
    debug: dict[str, Any] = {"action": "store_true", "help": "show the full traceback of errors"}
    parser.add_argument("--debug", **debug)
    parser.set_defaults(take_extra=None, on_interrupt="")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(subparsers)
    for subparser in subparsers.choices.values():
        subparser.add_argument("--debug", default=argparse.SUPPRESS, **debug)  # without resetting the one before the command
    return parser


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args, extra = parser.parse_known_args(arguments)
    if extra and not (args.take_extra and args.take_extra(args, extra)):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
