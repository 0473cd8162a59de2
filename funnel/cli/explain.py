"""`funnel explain`: how much each token contributes to a prediction."""

import argparse
from typing import TYPE_CHECKING

from funnel.cli.classifier import add_classifier_arguments, load_classifier
from funnel.cli.common import ArgumentParser
from funnel.errors import plural

if TYPE_CHECKING:
    from funnel.analysis.rollout import Explanation

BAR_WIDTH = 40
LEGEND = (
    "Percentages: share of the final [CLS] state that comes from the token or passes through the position, according to the\n"
    "attention weights; each list sums to 100%. Bars are relative to the longest in their list."
)


def add_explain(subparsers: "argparse._SubParsersAction[ArgumentParser]") -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "explain",
        help="how much each token contributes to a prediction",
        description="Attention rollout: how much of the final [CLS] state comes from each token and from each position of\n"
        "every block's output, according to the attention weights.",
    )
    add_classifier_arguments(parser)
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--pair", metavar="TEXT", help="second text of a pair")
    parser.set_defaults(work=explain_text)


def explain_text(args: argparse.Namespace) -> None:
    """Prints the explanation of one text."""
    from funnel.analysis.rollout import explain

    with load_classifier(args) as classifier:
        classifier.check_pairs(args.pair is not None)
        print(format_explanation(explain(classifier, args.text, args.pair)))


def format_explanation(explanation: "Explanation") -> str:
    """The prediction, then one line with a bar for each token and for each position of every block's output."""
    from funnel.analysis.rollout import Position
    from funnel.inference.predictions import format_label

    prediction = explanation.prediction
    if prediction.probability is None:
        lines = [format_label(prediction.label, digits=7)]
    else:
        lines = [f"{prediction.label} ({prediction.probability:.1%})"]
    lines.append(LEGEND)
    tokens = [Position([index], contribution) for index, contribution in enumerate(explanation.contributions)]
    blocks = [(f"block {number}", positions) for number, positions in enumerate(explanation.blocks)]
    for name, positions in [("tokens", tokens), *blocks]:
        lines.append(f"\n{name}: {plural(len(positions), 'position')}")
        largest = max(position.contribution for position in positions)
        for position in positions:
            text = "".join(explanation.tokens[index] for index in position.tokens).strip() or "(none)"
            bar = "#" * round(BAR_WIDTH * position.contribution / largest)
            lines.append(f"  {position.contribution:6.1%} {bar:<{BAR_WIDTH}} {text}")
    return "\n".join(lines)
