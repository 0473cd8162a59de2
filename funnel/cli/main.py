"""Commands around training: before it, what a layout module_costs; after it, predictions, reports, a look inside; many runs in one.

python -m funnel layout --blocks 2,2,2,2,2,2,2               # what a layout module_costs, and where its layers come from
python -m funnel predict runs/NAME "a gorgeous , witty film" # labels with probabilities, of texts, standard input or a file
python -m funnel report runs/NAME [runs/OTHER …]             # a page to send to a colleague, and a table
python -m funnel explain runs/NAME "a gorgeous , witty film" # what each block keeps of a text, and what reaches [cls]
python -m funnel sweep --blocks 2,2,2 --blocks 4,4,4 --lr 1e-5,2e-5 --seeds 3 …    # runs train.py for each, then reports
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from funnel.cli.common import ArgumentParser, run_command
from funnel.model.config import INITS, KEEPS

Subparsers = argparse._SubParsersAction


def main(arguments: list[str] | None = None) -> int:
    """Runs one of the commands with its arguments (default: the command line's). Gives the exit status."""
    parser = ArgumentParser(prog="funnel", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_layout, add_predict, add_report, add_explain, add_sweep):
        add(commands)
    args, more = parser.parse_known_args(arguments)
    if args.command == "predict" and not any(argument.startswith("-") for argument in more):
        args.texts, more = args.texts + more, []  # argparse does not look for TEXT behind an option
    if more and args.command != "sweep":
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    args.more = more
    work: Callable[[argparse.Namespace], object] = args.work
    return run_command("funnel", lambda: work(args), on_interrupt="the same command goes on", debug=args.debug)


# Each command's module is imported when it runs, not before: `--help` and mistakes in the arguments need none of them.


def add_layout(commands: "Subparsers[ArgumentParser]") -> None:
    parser = commands.add_parser("layout", help="what a layout module_costs, and where each of its layers comes from")
    parser.add_argument("--blocks", help="layers in each block, as in 2,2,2,2 or 6,3x2,3x2 (default: as in the weights)")
    parser.add_argument("--weights", default="small", help="a checkpoint folder of ours, or the name of a released size, as in "
                        "small, medium-base, xlarge (default: %(default)s)")  # fmt: skip
    parser.add_argument("--against", metavar="BLOCKS", help="layout of the same width to compare the cost with, as in 12 for a "
                        "network that never pools (default: the weights' own)")  # fmt: skip
    parser.add_argument("--init", choices=INITS, default="identity", help="(default: %(default)s)")
    parser.add_argument("--keep", choices=KEEPS, default="spread", help="which layers stay where the weights have more "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--layout-plan", type=Path, help="JSON file with a plan, instead of --init")
    parser.add_argument("--plot", type=Path, help="picture of the funnel to write (needs the extra plot)")

    def work(args: argparse.Namespace) -> None:
        from funnel.cli import layout

        layout.show_layout(args)

    parser.set_defaults(work=work)


def add_predict(commands: "Subparsers[ArgumentParser]") -> None:
    parser = commands.add_parser("predict", help="labels with probabilities, of texts, of standard input, or of a file")
    _add_classifier(parser)
    parser.add_argument("texts", nargs="*", default=[], metavar="TEXT", help="(default: standard input, a text a line; of a "
                        "pair the second one behind a tab)")  # fmt: skip
    parser.add_argument("--pair", action="append", metavar="TEXT", help="the second text of a pair; once for each TEXT")
    parser.add_argument("--file", type=Path, help=".tsv, .csv or .jsonl file of texts, each also with .gz")
    parser.add_argument("--out", type=Path, help="file for the predictions of --file, in any of those formats (default: "
                        "predictions-FILE in the run's folder)")  # fmt: skip
    parser.add_argument("--text-column", help="of --file (default: as in training, else text or sentence)")
    parser.add_argument("--text-pair-column", help="of --file (default: as in training)")

    def work(args: argparse.Namespace) -> None:
        from funnel import inference

        inference.predict_command(args)

    parser.set_defaults(work=work)


def add_report(commands: "Subparsers[ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report", help="one page on one or several runs, and a Markdown table (needs the extra report)"
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or folder with several of them")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the folder that has the runs)")

    def work(args: argparse.Namespace) -> None:
        from funnel.analysis import report

        report.report_command(args.runs, args.out)

    parser.set_defaults(work=work)


def add_explain(commands: "Subparsers[ArgumentParser]") -> None:
    parser = commands.add_parser("explain", help="what each block keeps of a text, and how much of it reaches [cls]")
    _add_classifier(parser)
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--pair", metavar="TEXT", help="the second text of a pair")

    def work(args: argparse.Namespace) -> None:
        from funnel.analysis import rollout
        from funnel.inference import Classifier, warn_truncated

        classifier = Classifier.load(args.run, args.device, args.dtype)
        classifier.check_pairs(args.pair is not None)
        print(rollout.describe(rollout.explain(classifier, args.text, args.pair)))
        warn_truncated(classifier)

    parser.set_defaults(work=work)


def add_sweep(commands: "Subparsers[ArgumentParser]") -> None:
    parser = commands.add_parser(
        "sweep",
        help="train.py for every combination of layouts, learning rates and seeds, then the report",
        allow_abbrev=False,  # --seed is train.py's, not a short --seeds
        description="Trains every combination, one after the other, each in a folder of its own in --out. The same command "
        "goes on where it was stopped and skips what is done. Arguments that are not format_list here go to train.py as they are.",
    )
    parser.add_argument("--blocks", action="append", help="a layout; once for each (default: as in the weights)")
    parser.add_argument("--init", help="one or several of identity,copy,random (default: identity)")
    parser.add_argument("--lr", help="learning rates, as in 1e-5,2e-5 (default: the task's)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1 (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the runs (default: %(default)s)")

    def work(args: argparse.Namespace) -> None:
        from funnel.cli import sweep

        sweep.sweep_command(args.out, args.blocks, args.init, args.lr, args.seeds, args.more)

    parser.set_defaults(work=work)


def _add_classifier(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, or of a checkpoint")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), help="(default: the fastest that is there)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="(default: bf16 where the device computes in it)")


if __name__ == "__main__":
    sys.exit(main())
