"""Labeling the words of texts: named entities, parts of speech."""

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from funnel.data.encoding import encode_examples, encode_in_memory
from funnel.data.tagged import InMemorySentences, TaggedFile, TaggedSentence
from funnel.data.token_encoder import TokenEncoder, labeled_tokens
from funnel.data.tokenizer import list_of_strings
from funnel.errors import FunnelError
from funnel.inference.predictor import Predictor
from funnel.problems.tag_schemes import TagSequence, TagTable, mark_entities

CHUNK_SIZE = 4096  # sentences held in memory at a time
NON_SPACE = re.compile(r"\S+")


class Entity(NamedTuple):
    """A labeled part of a text: an entity or, of plain tags such as parts of speech, a word.

    Attributes:
        text: as in the original text.
        label: the entity's type, or the word's tag.
        probability: of the tag; of an entity of several words, the mean of their tags' probabilities.
        start, end: position of the first character in the original text, and of the one after the last.
    """

    text: str
    label: str
    probability: float
    start: int
    end: int


class WordTags(NamedTuple):
    """The predicted tags of a sentence's words.

    Attributes:
        ids: label ids, [w].
        probabilities: of these labels, [w].
    """

    ids: np.ndarray
    probabilities: np.ndarray


class TokenClassifier(Predictor):
    """Labels the words of texts. Arguments and attributes as in `Predictor`.

    Long texts are labeled in overlapping windows; no text is truncated.
    """

    problems = ("token-labels",)
    title = "token classifier"

    @overload
    def __call__(self, texts: str) -> list[Entity]: ...  # type: ignore[overload-overlap]  # a string is an iterable, too
    @overload
    def __call__(self, texts: Iterable[str] | Iterable[Sequence[str]]) -> list[list[Entity]]: ...
    def __call__(self, texts: str | Iterable[str] | Iterable[Sequence[str]]) -> list[Entity] | list[list[Entity]]:
        """Finds the labeled parts of one text, or of several.

        Args:
            texts: a text, texts, or texts that are lists of words. Texts are split by `split_words`. Positions in a list of
                words are those in the words joined by single spaces.

        Raises:
            FunnelError: an item is neither a string nor a list of words, or a word is empty.
        """
        if isinstance(texts, str):
            return self([texts])[0]
        items = list(texts)
        originals: list[str] = []
        positions: list[list[tuple[int, int]]] = []
        for number, item in enumerate(items):
            if isinstance(item, str):
                originals.append(item)
                positions.append(split_words(item))
            else:
                words = list_of_strings(item, f"texts[{number}]")
                if "" in words:
                    raise FunnelError(f"texts[{number}][{words.index('')}] is empty: expected a word", "texts")
                originals.append(" ".join(words))
                starts = itertools.accumulate((len(word) + 1 for word in words), initial=0)
                positions.append([(start, start + len(word)) for word, start in zip(words, starts, strict=False)])
        sentences = [[text[a:b] for a, b in spans] for text, spans in zip(originals, positions, strict=True)]
        tagged = self.tag(sentences)
        return [self.find_entities(*parts) for parts in zip(originals, positions, tagged, strict=True)]

    def tag(self, sentences: Sequence[list[str]]) -> list[WordTags]:
        """The tags of the words of several sentences.

        Raises:
            FunnelError: a word cannot be encoded.
        """
        if not sentences:
            return []
        dataset = encode_in_memory(InMemorySentences(sentences), TokenEncoder(None), self.tokenizer, self.inputs.max_length)
        results, words = self.run_checked(dataset), labeled_tokens(dataset)
        _, ids, probabilities = results[words.rows, words.columns].numpy().T
        ends = np.cumsum([len(sentence) for sentence in sentences])[:-1]
        pairs = zip(np.split(ids.astype(np.int64), ends), np.split(probabilities, ends), strict=True)
        return [WordTags(*pair) for pair in pairs]

    def tag_names(self, tags: WordTags) -> list[str]:
        """The names of the tags."""
        return [self.model.config.id2label[int(i)] for i in tags.ids]

    def find_entities(self, text: str, positions: Sequence[tuple[int, int]], tags: WordTags) -> list[Entity]:
        """The labeled parts of a text.

        Args:
            positions: start and end of each word in the text.
        """
        labels = self.problem.labels
        if mark_entities(labels):
            table = TagTable(labels)
            spans = table.find_spans(TagSequence(tags.ids, np.zeros(len(tags.ids), int)))
            found = [(i, j, table.types[k]) for i, j, k in zip(*(array.tolist() for array in spans), strict=True)]
        else:
            found = [(i, i, labels[label]) for i, label in enumerate(tags.ids.tolist())]
        return [
            Entity(text[positions[i][0] : positions[j][1]], name, float(tags.probabilities[i : j + 1].mean()), *bounds)
            for i, j, name in found
            for bounds in [(positions[i][0], positions[j][1])]
        ]

    def predict_file(self, source: TaggedFile) -> Iterator[tuple[TaggedSentence, WordTags]]:
        """Yields the sentences of a file with their tags, in order.

        Raises:
            FunnelError: the file is malformed.
        """
        rows = source.rows()
        while chunk := list(itertools.islice(rows, CHUNK_SIZE)):
            yield from zip(chunk, self.tag([sentence.words for sentence in chunk]), strict=True)

    def evaluate_file(self, source: TaggedFile, metrics: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
        """Evaluates the model on a labeled file; results as `Predictor.evaluate`.

        Raises:
            FunnelError: the file is malformed or has a tag that the model lacks, or a metric is unknown.
        """
        encoder = TokenEncoder({name: i for i, name in enumerate(self.problem.labels)})
        dataset = encode_examples(source, encoder, self.tokenizer, self.inputs.max_length)
        return self.evaluate(dataset, metrics, source.path.name)


def split_words(text: str) -> list[tuple[int, int]]:
    """Start and end of each word of a text.

    Words are separated by white space; every punctuation mark and symbol (Unicode categories P and S) is a word by itself,
    with the combining marks that follow it.
    """
    words = []
    for match in NON_SPACE.finditer(text):
        start, after_symbol = match.start(), False
        for i in range(match.start(), match.end()):
            category = unicodedata.category(text[i])[0]
            if category in "PS" or (after_symbol and category != "M"):
                if i > start:
                    words.append((start, i))
                start, after_symbol = i, category in "PS"
        words.append((start, match.end()))
    return words
