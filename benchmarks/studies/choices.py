"""A multiple-choice data set in RACE's layout, made from SQuAD.

    python -m benchmarks.studies.choices --data dev-v1.1.json.xz --out data/squad-choices
    python train.py --task race --data data/squad-choices --weights MINILM --max-length 256 --epochs 3

The article is a paragraph of SQuAD, the question stays, and the options are its answer and three distractors: answers to other
questions about the same Wikipedia article, of the same kind (with a digit, capitalized, or neither) and with at most two words
more or fewer. As in RACE, there are two levels: in "high", all options occur in the paragraph, so that looking them up does not
help; the questions for which there are too few such distractors are "middle", with options from the whole Wikipedia article.
Each Wikipedia article is in one of train, dev and test, so that no text occurs in two of them.

Easier than RACE: the answers are spans of the paragraph, so that finding the sentence that resembles the question is often
enough, and paragraphs are shorter than RACE's articles, whose questions also ask for reasons, intentions and summaries.

Prints the accuracy on dev of baselines that do not read: "options only", a logistic regression on the lengths of the options
and on how often their words are those of right options in train; "lookup", which chooses at random among the options that occur
in the paragraph; and "overlap", which chooses the option around which most of the question's words occur.
"""

import argparse
import json
import lzma
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from funnel.errors import FunnelError
from funnel.io import atomic_folder

LEVELS = ("middle", "high")
N_DISTRACTORS = 3
MAX_LENGTH_DIFFERENCE = 2  # words
SHARES = {"train": 0.75, "dev": 0.125, "test": 0.125}  # of the Wikipedia articles
WINDOW = 60  # characters on each side of an option, for the overlap baseline
STEPS, RATE, PENALTY = 300, 0.5, 1e-3  # of the options-only baseline

Item = dict[str, Any]  # the content of one of RACE's files


def read_squad(path: Path) -> list[dict[str, Any]]:
    """The Wikipedia articles of a SQuAD 1.1 file, which may be xz-compressed."""
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
        data: list[dict[str, Any]] = json.load(file)["data"]
    return data


def kind_of(answer: str) -> str:
    """What distractors have in common with an answer."""
    if any(character.isdigit() for character in answer):
        return "number"
    return "capitalized" if answer[:1].isupper() else "other"


def find_distractors(answers: Sequence[str], candidates: Sequence[str]) -> list[str]:
    """The candidates that may stand beside a right answer; none of them contains another one.

    Args:
        answers: all right answers; the first one becomes an option.
    """
    n_words, kind = len(answers[0].split()), kind_of(answers[0])
    right = [answer.lower() for answer in answers]
    found = [
        text
        for text in candidates
        if kind_of(text) == kind
        and abs(len(text.split()) - n_words) <= MAX_LENGTH_DIFFERENCE
        and not any(text.lower() in answer or answer in text.lower() for answer in right)
    ]
    return [text for text in found if not any(text != other and text in other for other in found)]


def occurs(text: str, paragraph: str) -> bool:
    """Whether a paragraph contains a text as whole words."""
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", paragraph) is not None


def make_items(article: dict[str, Any], generator: random.Random) -> Iterator[tuple[str, Item]]:
    """Yields level and content of the files of a Wikipedia article: at most one of each level per paragraph."""
    questions = [question for paragraph in article["paragraphs"] for question in paragraph["qas"]]
    candidates = sorted({question["answers"][0]["text"].strip() for question in questions if question["answers"]})
    for paragraph in article["paragraphs"]:
        items: dict[str, Item] = {
            level: {"article": paragraph["context"], "questions": [], "options": [], "answers": []} for level in LEVELS
        }
        for question in paragraph["qas"]:
            answers = [answer["text"].strip() for answer in question["answers"]]
            if not answers:
                continue
            near = [text for text in candidates if occurs(text, paragraph["context"])]
            level, distractors = "high", find_distractors(answers, near)
            if len(distractors) < N_DISTRACTORS:
                level, distractors = "middle", find_distractors(answers, candidates)
            if len(distractors) < N_DISTRACTORS:
                continue
            options = [answers[0], *generator.sample(distractors, N_DISTRACTORS)]
            generator.shuffle(options)
            items[level]["questions"].append(question["question"].strip())
            items[level]["options"].append(options)
            items[level]["answers"].append("ABCD"[options.index(answers[0])])
        yield from ((level, item) for level, item in items.items() if item["questions"])


def split_articles(articles: Sequence[dict[str, Any]], seed: int) -> dict[str, list[tuple[str, Item]]]:
    """Level and content of each split's files."""
    generator = random.Random(seed)
    order = generator.sample(list(articles), len(articles))
    ends = np.round(np.cumsum(list(SHARES.values())) * len(order)).astype(int)
    starts = [0, *ends[:-1]]
    return {
        split: [item for article in order[start:end] for item in make_items(article, generator)]
        for split, start, end in zip(SHARES, starts, ends, strict=True)
    }


def write_race(splits: dict[str, list[tuple[str, Item]]], out: Path) -> None:
    """Writes SPLIT/LEVEL/N.txt files."""
    with atomic_folder(out) as folder:
        for split, items in splits.items():
            for number, (level, item) in enumerate(items):
                path = folder / split / level / f"{number}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                content = json.dumps({**item, "id": f"{level}{number}.txt"}, ensure_ascii=False)
                path.write_text(content + "\n", encoding="utf-8")


# --- baselines --------------------------------------------------------------------------------------------------------


def flatten(items: Sequence[Item]) -> Iterator[tuple[str, str, list[str], int]]:
    """Yields article, question, options and the index of the answer."""
    for item in items:
        for question, options, answer in zip(item["questions"], item["options"], item["answers"], strict=True):
            yield item["article"], question, options, "ABCD".index(answer)


def options_only_accuracy(train: Sequence[Item], dev: Sequence[Item]) -> float:
    """The accuracy of a logistic regression on features of the options alone."""
    right, wrong = Counter[str](), Counter[str]()

    def own_counts(option: str, sign: int, is_right: bool) -> None:
        (right if is_right else wrong).update(dict.fromkeys(set(option.lower().split()), sign))

    for _, _, options, label in flatten(train):
        for i, option in enumerate(options):
            own_counts(option, 1, i == label)

    def features(options: Sequence[str], label: int | None) -> np.ndarray:
        """[c, features]; a training question's own counts are left out."""
        lengths = np.array([[len(option), len(option.split())] for option in options], float)
        rows = []
        for i, option in enumerate(options):
            if label is not None:
                own_counts(option, -1, i == label)
            words = option.lower().split()
            scores = [math.log((right[word] + 1) / (wrong[word] + N_DISTRACTORS)) for word in words]
            seen = [math.log1p(right[word] + wrong[word]) for word in words]
            rows.append([np.mean(scores), np.mean(seen), *(lengths[i] - lengths.mean(0)), *np.log1p(lengths[i])])
            if label is not None:
                own_counts(option, 1, i == label)
        return np.array(rows)

    x = np.array([features(options, label) for _, _, options, label in flatten(train)])
    y = np.array([label for *_, label in flatten(train)])
    mean, std = x.mean((0, 1)), x.std((0, 1)) + 1e-9
    x = (x - mean) / std
    weights = np.zeros(x.shape[2])
    for _ in range(STEPS):  # softmax over the options
        scores = x @ weights
        probabilities = np.exp(scores - scores.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        probabilities[np.arange(len(y)), y] -= 1
        weights -= RATE * (np.einsum("nc,ncf->f", probabilities, x) / len(y) + PENALTY * weights)
    hits = [int(((features(options, None) - mean) / std @ weights).argmax()) == label for _, _, options, label in flatten(dev)]
    return float(np.mean(hits))


def lookup_accuracy(dev: Sequence[Item]) -> float:
    """The expected accuracy of choosing among the options that occur in the article at random."""
    return float(np.mean([1 / sum(option in article for option in options) for article, _, options, _ in flatten(dev)]))


def overlap_accuracy(dev: Sequence[Item]) -> float:
    """The accuracy of choosing the option around which most of the question's words occur."""
    hits = []
    for article, question, options, label in flatten(dev):
        words = set(re.findall(r"\w{4,}", question.lower()))
        scores = []
        for option in options:
            places = [match.start() for match in re.finditer(re.escape(option), article)]
            around = [article[max(0, i - WINDOW) : i + len(option) + WINDOW].lower() for i in places]
            scores.append(max((len(words & set(re.findall(r"\w{4,}", text))) for text in around), default=-1))
        hits.append(int(np.argmax(scores)) == label)
    return float(np.mean(hits))


def main() -> None:
    """Writes the data set and prints its size and the baselines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="SQuAD 1.1 as .json or .json.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        raise FunnelError(f"out {args.out}: already exists; choose another folder", "out")
    splits = split_articles(read_squad(args.data), args.seed)
    write_race(splits, args.out)
    train = [item for _, item in splits["train"]]
    for split, items in splits.items():
        for level in LEVELS:
            chosen = [item for item_level, item in items if item_level == level]
            words = np.mean([len(item["article"].split()) for item in chosen])
            print(f"{split}/{level}: {len(list(flatten(chosen))):,} questions about paragraphs of {words:.0f} words")
    for level in LEVELS:
        dev = [item for item_level, item in splits["dev"] if item_level == level]
        figures = {
            "options only": options_only_accuracy(train, dev),
            "lookup": lookup_accuracy(dev),
            "overlap": overlap_accuracy(dev),
        }
        print(f"dev/{level}: " + ", ".join(f"{name} {figure:.1%}" for name, figure in figures.items()))


if __name__ == "__main__":
    main()
