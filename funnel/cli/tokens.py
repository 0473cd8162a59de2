"""`funnel predict` and `funnel evaluate` for token classifiers."""

import argparse
import itertools
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

from funnel.cli.classifier import choose_output, load_predictor, read_standard_input
from funnel.cli.common import flag, positional
from funnel.errors import FunnelError, plural

if TYPE_CHECKING:
    from funnel.data.files import ExampleFile
    from funnel.data.tagged import TaggedFile
    from funnel.inference.tokens import Entity, TokenClassifier

NO_EFFECT = ("pair", "text_pair_column", "keep_columns")
OUTPUTS = (".jsonl", ".conll")
SEPARATORS = re.compile(r"[\t\r\n]")  # of columns and rows; replaced in words


def predict(args: argparse.Namespace) -> None:
    """Prints the entities of texts, or writes the tags of a file.

    Raises:
        FunnelError: arguments conflict, the model cannot be loaded, or the input is malformed.
    """
    from funnel.inference.tokens import TokenClassifier

    _reject(args, NO_EFFECT)
    if args.file is not None:
        _predict_file(args)
        return
    with load_predictor(args, TokenClassifier) as classifier:
        for text in args.texts or (line for line, _ in read_standard_input(has_pairs=False)):
            _print_entities(text, classifier(text))


def evaluate(args: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """Scores by name, and the error analysis, on a labeled file. The tag column is by default that of training."""
    from funnel.inference.predictor import run_record
    from funnel.inference.tokens import TokenClassifier

    _reject(args, ("text_pair_column",))
    source = _open(args, args.label_column or run_record(args.run, "arguments").get("label_column"))
    print(source.description, file=sys.stderr)
    with load_predictor(args, TokenClassifier) as classifier:
        functions = classifier.problem.metric_functions(classifier.problem.labels)
        metrics = run_record(args.run).get("metrics") or [name for name in functions if "(" not in name]
        return classifier.evaluate_file(source, metrics)


def _reject(args: argparse.Namespace, names: Iterable[str]) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise FunnelError(f"{flag(name)} has no effect for a token classifier; omit it")


def _open(args: argparse.Namespace, tag_column: str | None) -> "TaggedFile":
    """The file of sentences; columns are by default those of training."""
    from funnel.inference.predictor import run_record
    from funnel.problems.token_labels import open_tagged

    word_column = args.text_column or run_record(args.run, "arguments").get("text_column")
    with positional("file"):
        return open_tagged(args.file, word_column, tag_column, "file")


def _predict_file(args: argparse.Namespace) -> None:
    """Writes the tags of a file's sentences, or the entities of its texts."""
    from funnel.data.custom import ColumnChoice, open_examples
    from funnel.data.formats import file_format
    from funnel.data.tagged import WORDS, TaggedFile, has_token_lists, is_column_file
    from funnel.inference.tokens import TokenClassifier
    from funnel.io import atomic_write

    is_column = is_column_file(args.file) and file_format(args.file) != "csv"
    out = choose_output(args, OUTPUTS, ".conll" if is_column else ".jsonl")
    source: TaggedFile | ExampleFile
    with positional("file"):
        if is_column or has_token_lists(args.file, [args.text_column or WORDS]):
            source = replace(_open(args, None), labeled=False)
        elif out.suffix.lower() == ".conll":
            raise FunnelError(f"out {out}: the entities of texts are written to .jsonl files", "out")
        else:
            source = open_examples(args.file, ColumnChoice(args.text_column, labeled=False), "file")
    with (
        load_predictor(args, TokenClassifier) as classifier,
        atomic_write(out) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        if isinstance(source, TaggedFile):
            written = plural(_write_tags(classifier, source, file, as_columns=out.suffix.lower() == ".conll"), "sentence")
        else:
            written = plural(_write_entities(classifier, source, file), "text")
    print(f"wrote predictions for {written} to {out}")


def _write_tags(classifier: "TokenClassifier", sentences: "TaggedFile", file: TextIO, as_columns: bool) -> int:
    """Writes the tags of sentences, and returns the number of sentences."""
    from funnel.inference.predictions import write_json_line

    count = 0
    for sentence, tags in classifier.predict_file(sentences):
        names = classifier.tag_names(tags)
        if as_columns:
            words = (SEPARATORS.sub(" ", word) for word in sentence.words)
            file.write("".join(f"{word}\t{name}\n" for word, name in zip(words, names, strict=True)) + "\n")
        else:
            probabilities = [round(float(p), 6) for p in tags.probabilities]
            write_json_line({"index": count, "tokens": sentence.words, "tags": names, "probabilities": probabilities}, file)
        count += 1
    return count


def _write_entities(classifier: "TokenClassifier", texts: "ExampleFile", file: TextIO) -> int:
    """Writes the entities of texts, and returns the number of texts."""
    from funnel.inference.predictions import write_json_line
    from funnel.inference.tokens import CHUNK_SIZE

    count = 0
    rows = texts.rows()
    while chunk := [row.text for row in itertools.islice(rows, CHUNK_SIZE)]:
        for text, entities in zip(chunk, classifier(chunk), strict=True):
            write_json_line({"index": count, "text": text, "entities": [entity._asdict() for entity in entities]}, file)
            count += 1
    return count


def _print_entities(text: str, entities: list["Entity"]) -> None:
    """Prints a text, and one line for each of its entities: label, probability, positions of the first and last character."""
    print(" ".join(text.split()))
    for entity in entities:
        place = f"{entity.start}-{entity.end}"
        print(f"  {entity.label}\t{entity.probability:.1%}\t{place}\t{' '.join(entity.text.split())}", flush=True)
    if not entities:
        print("  (no entities)", flush=True)
