"""The demo task: is a sentence from a movie review positive or negative?

The sentences are the sentence polarity dataset of Pang and Lee (2005), "Seeing stars", 5331 of each class. They are part of the
package, so that a first run needs no download; `movie_reviews/LICENSE.txt` has source, license and attribution.
"""

import gzip
from pathlib import Path

from funnel.data.files import InMemoryExamples
from funnel.io import os_errors

FOLDER = Path(__file__).parent / "movie_reviews"
FILES = ("rt-polarity.neg.gz", "rt-polarity.pos.gz")  # by label: 0 is negative, 1 positive. Contents as published
DEV_EVERY = 10  # one sentence in ten
# The files were converted to UTF-8 as if they were Latin-1; these characters are a quotation mark and dashes in Windows-1252.
WINDOWS_1252 = {code: bytes([code]).decode("cp1252") for code in (0x91, 0x96, 0x97)}


def examples() -> tuple[InMemoryExamples, InMemoryExamples]:
    """Reads the training set (9594 sentences) and the dev set (1068).

    Every tenth sentence of each class is in the dev set, always the same ones. Both sets alternate between the labels. No
    sentence occurs twice.

    Raises:
        FunnelError: the installed package does not contain the sentences.
    """
    classes = [_read_sentences(FOLDER / name) for name in FILES]
    train = [[text for i, text in enumerate(texts) if i % DEV_EVERY] for texts in classes]
    return _alternate(train), _alternate([texts[::DEV_EVERY] for texts in classes])


def _read_sentences(path: Path) -> list[str]:
    with os_errors(path, hint="reinstall funnel-transformer, or train on a file of your own"):
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    return text.translate(WINDOWS_1252).rstrip("\n").split("\n")


def _alternate(classes: list[list[str]]) -> InMemoryExamples:
    texts = [text for group in zip(*classes, strict=True) for text in group]
    return InMemoryExamples(texts, None, ["0", "1"] * (len(texts) // 2))
