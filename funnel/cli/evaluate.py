"""`funnel evaluate`: a trained classifier on a labeled file."""

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funnel.cli import answers, choices, tokens
from funnel.cli.classifier import add_classifier_arguments, add_ensemble, load_classifier
from funnel.cli.common import ArgumentParser, add_overwrite, align_columns, check_output, files_of_run, positional
from funnel.errors import FunnelError, plural, shorten

if TYPE_CHECKING:
    from funnel.inference.classifier import Classifier

MAX_WIDTH = 80  # characters of a line
MAX_LABEL_LENGTH = 24  # characters of a label in a table
MAX_HEADING_LENGTH = 12  # characters of a label above a column of the confusion matrix
MAX_ERRORS = 10
MAX_CLASSES = 20  # above this, only some are printed:
N_WORST_CLASSES = 10


def add_evaluate(subparsers: "argparse._SubParsersAction[ArgumentParser]") -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "evaluate",
        help="metrics, confusions and largest errors on a labeled file",
        description="Predicts the texts of a labeled file and prints the metrics, precision, recall and F1 of each class (of\n"
        "many classes, the worst ones), the expected calibration error, the confusion matrix, and the errors with the\n"
        "highest loss; for scores, the metrics and the largest errors.",
    )
    add_classifier_arguments(parser)
    add_ensemble(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help="labeled file, in any format that train.py reads, or, "
                        "for multiple choice, a folder in RACE's layout")  # fmt: skip
    parser.add_argument("--text-column", metavar="NAME", help="text column (default: as in training, else text or sentence)")
    parser.add_argument("--text-pair-column", metavar="NAME", help="second text column (default: as in training)")
    parser.add_argument("--label-column", metavar="NAME", help="label column (default: as in training, else label)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the results to a .json file")
    add_overwrite(parser)
    parser.set_defaults(work=evaluate)


def evaluate(args: argparse.Namespace) -> None:
    """Prints the evaluation and, with --out, writes it.

    Raises:
        FunnelError: the classifier cannot be loaded, the file is malformed, or has a label that the classifier lacks.
    """
    from funnel.inference.predictor import problem_name
    from funnel.io import write_json

    if args.out is not None:
        if args.out.suffix != ".json":
            raise FunnelError(f"out {args.out}: expected the name of a .json file", "out")
        check_output(args.out, "out", [args.file, *files_of_run(args.run)], args.overwrite)
    problem = problem_name(args.run)
    if problem == "answer-spans":
        scores, errors = answers.evaluate(args)
    elif problem == "token-labels":
        scores, errors = tokens.evaluate(args)
    elif problem == "multiple-choice":
        scores, errors = choices.evaluate(args)
    else:
        with load_classifier(args) as classifier:
            scores, errors = _evaluate_file(classifier, args)
    print(format_evaluation(args.file.name, scores, errors))
    if args.out is not None:
        finite = {name: score if math.isfinite(score) else None for name, score in scores.items()}
        write_json(args.out, {"file": str(args.file), "scores": finite, **errors})
        print(f"\nwrote {args.out}")


def _evaluate_file(classifier: "Classifier", args: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """Scores by name, and the error analysis. Metrics and label spellings are those of the run's task."""
    from funnel.data.custom import ColumnChoice
    from funnel.data.tasks import TASKS
    from funnel.inference.predictor import run_record
    from funnel.problems.own_texts import METRICS

    settings = run_record(args.run)
    metrics = settings.get("metrics") or METRICS[classifier.problem.name]
    task = TASKS.get(str(settings.get("task")))
    dev_file = task.files.get("dev") if task else None
    label_column = run_record(args.run, "arguments").get("label_column") or getattr(dev_file, "label_column", None)
    trained_label = label_column if isinstance(label_column, str) else ""
    choice = ColumnChoice(args.text_column, args.text_pair_column, args.label_column, trained_label=trained_label)
    with positional("file"):
        source = classifier.open_file(args.file, choice)
    print(source.description, file=sys.stderr)
    return classifier.evaluate_file(source, metrics, task.labels if task else None)


def format_evaluation(name: str, scores: Mapping[str, float], errors: Mapping[str, Any]) -> str:
    """The evaluation as text, at most 80 characters wide except for long label names.

    Args:
        name: the file's.
        errors: the error analysis.
    """
    from funnel.training.progress import format_scores

    parts = [f"{name}: {plural(errors['examples'], 'example')}", format_scores(scores)]
    sections = [", ".join(parts)]
    if "classes" in errors:
        sections.append(_format_classes(errors))
    if "calibration" in errors:
        sections.append(_format_calibration(errors))
    if "confusion" in errors:
        sections.append(_format_confusion(errors))
    sections.append(_format_errors(errors))
    return "\n\n".join(sections)


def _format_classes(errors: Mapping[str, Any]) -> str:
    """One line per class, or the ones with the lowest F1 if there are many, and the averages over all classes."""
    from funnel.analysis.runs import worst_classes

    shown, title, n_classes = errors["classes"], "", len(errors["classes"])
    if n_classes > MAX_CLASSES:
        shown = worst_classes(errors, N_WORST_CLASSES)
        title = f"classes with the lowest F1 ({len(shown)} of {n_classes:,}; --out writes all)\n"
    rows = [["class", "precision", "recall", "f1", "support"]]
    for scores in [*shown, *errors["averages"]]:
        figures = [f"{scores[name]:.4f}" for name in ("precision", "recall", "f1")]
        rows.append([shorten(scores["label"], MAX_LABEL_LENGTH), *figures, f"{scores['examples']:,}"])
    return title + align_columns(rows)


def _format_calibration(errors: Mapping[str, Any]) -> str:
    """The expected calibration error, and whether the model is too confident on average."""
    ece, confidence, share = (f"{errors['calibration'][name]:.4f}" for name in ("ece", "confidence", "accuracy"))
    name = "base rate" if errors["unit"] == "decision" else "accuracy"  # of decisions: how many are positive
    return f"expected calibration error {ece} (mean probability {confidence}, {name} {share})"


def _format_confusion(errors: Mapping[str, Any]) -> str:
    """The confusion matrix, or the most frequent confusions if it is too wide."""
    from funnel.analysis.runs import top_confusions

    labels, matrix = errors["labels"], errors["confusion"]
    heading = [shorten(label, MAX_HEADING_LENGTH) for label in labels]
    rows = [["label \\ prediction", *heading]]
    rows += [
        [shorten(label, MAX_LABEL_LENGTH), *(f"{count:,}" for count in counts)]
        for label, counts in zip(labels, matrix, strict=True)
    ]
    table = align_columns(rows)
    if max(map(len, table.splitlines())) <= MAX_WIDTH:
        return f"confusion matrix\n{table}"
    confusions = top_confusions(errors)
    if not confusions:
        return "no confusions"
    rows = [["label", "prediction", f"{errors['unit']}s"]]
    rows += [
        [shorten(label, MAX_LABEL_LENGTH), shorten(predicted, MAX_LABEL_LENGTH), f"{n:,}"] for n, label, predicted in confusions
    ]
    return f"most frequent confusions\n{align_columns(rows)}"


def _format_errors(errors: Mapping[str, Any]) -> str:
    """The examples with the largest loss."""
    mistakes = errors["mistakes"][:MAX_ERRORS]
    if not mistakes:
        return "no errors"
    lines = ["errors with the highest loss" if "labels" in errors or "classes" in errors else "largest errors"]
    for mistake in mistakes:
        label, predicted = mistake["label"], mistake["predicted"]
        if "probability" in mistake:
            of_label, of_prediction = mistake["probability"]
            lines.append(f"label {label} ({of_label:.1%}), predicted {predicted} ({of_prediction:.1%})")
        elif isinstance(label, str):
            lines.append(f"label {label}, predicted {predicted}")
        else:
            lines.append(f"label {label:.7g}, predicted {predicted:.7g}")
        lines.append("  " + (shorten(mistake["text"], MAX_WIDTH - 2) or "(empty)"))
    return "\n".join(lines)
