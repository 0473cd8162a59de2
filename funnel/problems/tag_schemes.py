"""Schemes of tags: how a tag for every word marks entities of several words.

    IOB2     B-person, I-person, ...: an entity begins with B- and continues with I-
    IOB1     an entity begins with I-; with B- only if it follows another entity of the same type (CoNLL-2003 as published)
    BIOES    as IOB2, but the last word has E-, and an entity of one word S-
    plain    any other tags, such as parts of speech; every word is by itself

O is the tag of words outside entities. Tags without a type (B, I, ...) have the type "_".

Reading entities: a tag continues the previous one if that is B- or I-, it is itself I- or E-, and both have the same type. Any
other tag but O begins an entity. This is how conlleval, the script of CoNLL's shared tasks, and seqeval's default mode read
tags, valid or not. Strict reading, as seqeval's strict mode, omits entities that are not valid in IOB2 or BIOES.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from funnel.data.files import normalize_label
from funnel.data.tagged import TaggedFile
from funnel.errors import FunnelError, format_list, plural
from funnel.problems.metrics import ClassCounts

OUTSIDE = "O"
TAG = re.compile(r"([BIES])(?:-(.+))?")
PREFIXES = {"IOB1": "BI", "IOB2": "BI", "BIOES": "BIES"}
PLAIN = "plain"
NO_TYPE = "_"
MAX_LISTED = 20  # types or tags in a description


class TagSequence(NamedTuple):
    """The tags of words.

    Attributes:
        ids: label ids, [m].
        sentences: number of each word's sentence, [m]; increasing.
    """

    ids: np.ndarray
    sentences: np.ndarray


class Spans(NamedTuple):
    """Entities.

    Attributes:
        starts, ends: index of the first word and of the last one, [s] each.
        types: index in the list of types, [s].
    """

    starts: np.ndarray
    ends: np.ndarray
    types: np.ndarray


class TagTable:
    """Prefix and type of each of a model's labels.

    Attributes:
        types: names of the types of entities, sorted; of plain tags, none.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        parsed = [split_tag(label) for label in labels]
        self.types = sorted({kind for prefix, kind in parsed if prefix != OUTSIDE})
        self.is_bioes = any(prefix in "ES" for prefix, _ in parsed)
        self._prefixes = np.array([prefix for prefix, _ in parsed])
        self._types = np.array([self.types.index(kind) if kind in self.types else -1 for _, kind in parsed])

    def find_spans(self, tags: TagSequence, strict: bool = False) -> Spans:
        """The entities in a sequence of tags."""
        prefixes, types = self._prefixes[tags.ids], self._types[tags.ids]
        is_inside = prefixes != OUTSIDE
        continues = np.zeros(len(prefixes), bool)
        continues[1:] = (
            np.isin(prefixes[:-1], ("B", "I"))
            & np.isin(prefixes[1:], ("I", "E"))
            & (types[1:] == types[:-1])
            & (tags.sentences[1:] == tags.sentences[:-1])
        )
        starts = np.flatnonzero(is_inside & ~continues)
        ends = np.flatnonzero(is_inside & ~np.append(continues[1:], False))
        if strict:
            first, last = prefixes[starts], prefixes[ends]
            is_valid = ((first == "B") & (last == "E")) | ((first == "S") & (starts == ends)) if self.is_bioes else first == "B"
            starts, ends = starts[is_valid], ends[is_valid]
        return Spans(starts, ends, types[starts])


def count_spans(labels: Sequence[str], predictions: TagSequence, targets: TagSequence, strict: bool = False) -> ClassCounts:
    """Counts entities by type. One is correct if its first and its last word and its type are."""
    table = TagTable(labels)
    predicted, actual = (table.find_spans(tags, strict) for tags in (predictions, targets))
    _, i, j = np.intersect1d(predicted.starts, actual.starts, assume_unique=True, return_indices=True)
    is_correct = (predicted.ends[i] == actual.ends[j]) & (predicted.types[i] == actual.types[j])
    correct = actual.types[j][is_correct]
    return ClassCounts(*(np.bincount(types, minlength=len(table.types)) for types in (correct, actual.types, predicted.types)))


def split_tag(tag: str) -> tuple[str, str]:
    """Prefix and type of a tag; of O, and of a tag outside the schemes: (O, "")."""
    match = TAG.fullmatch(tag)
    return (match[1], match[2] or NO_TYPE) if match else (OUTSIDE, "")


def mark_entities(labels: Iterable[str]) -> bool:
    """Whether tags are of one of the schemes with prefixes."""
    return all(label == OUTSIDE or TAG.fullmatch(label) for label in labels)


# --- the tags of a file -----------------------------------------------------------------------------------------------


class Tags(NamedTuple):
    """The tags of a training file.

    Attributes:
        names: the labels of a model: for plain tags, those of the file; otherwise O and, for each type, all prefixes.
        scheme: one of the keys of `PREFIXES`, or `PLAIN`.
        description: for the user.
        warnings: suspected problems, one line each.
    """

    names: list[str]
    scheme: str
    description: str
    warnings: tuple[str, ...] = ()


def infer_tags(file: TaggedFile) -> Tags:
    """Reads a file's tags and detects their scheme.

    Tags have prefixes if one of them begins with B- or I-, or if all are prefixes or O. Then it is BIOES if one is E or S,
    otherwise IOB1 if more entities that do not follow one of the same type begin with I than with B, otherwise IOB2.

    Raises:
        FunnelError: the file is malformed, a tag is outside the scheme, or all tags are the same.
    """
    counts: Counter[str] = Counter()
    first_lines: dict[str, int] = {}
    begins: Counter[str] = Counter()  # prefixes of entities that do not follow one of the same type
    begin_lines: dict[str, int] = {}
    n_entities: Counter[str] = Counter()
    for sentence in file.rows():
        previous = (OUTSIDE, "")
        for line, tag in zip(sentence.lines, sentence.tags or (), strict=True):
            counts[tag] += 1
            first_lines.setdefault(tag, line)
            current = split_tag(tag)
            if current[0] != OUTSIDE:
                if current[1] != previous[1]:
                    begins[current[0]] += 1
                    begin_lines.setdefault(current[0], line)
                n_entities[current[1]] += not (previous[0] in "BI" and current[0] in "IE" and previous[1] == current[1])
            previous = current
    if len(counts) == 1:
        raise FunnelError(f"{file.path}: every tag is {next(iter(counts))!r}; is column {file.columns[-1]!r} that of the tags?")
    if not mark_entities(counts) and not any(tag.startswith(("B-", "I-")) for tag in counts):
        return _describe_plain(file, counts)
    for tag in counts:
        if tag != OUTSIDE and not TAG.fullmatch(tag):
            expected = "others mark entities, so it must be O or begin with B-, I-, E- or S-"
            hint = "; write BILOU's L- and U- as E- and S-" if tag[:2] in ("L-", "U-") else ""
            raise file.error(first_lines[tag], f"tag {tag!r} is outside the scheme: {expected}{hint}")
    used = {split_tag(tag)[0] for tag in counts}
    scheme = "BIOES" if used & {"E", "S"} else "IOB1" if begins["I"] > begins["B"] else "IOB2"
    warnings = []
    invalid = begins["B"] if scheme == "IOB1" else begins["I"]
    if invalid:
        prefix = "B" if scheme == "IOB1" else "I"
        found = f"{plural(invalid, 'tag')} with {prefix}- at the beginning of an entity, which {scheme} does not allow there"
        warnings.append(f"{file.path.name}: {found}; the first one is in line {begin_lines[prefix]}; read as entities")
    types = sorted(n_entities)
    shown = format_list((f"{kind} ({n_entities[kind]:,})" for kind in types), MAX_LISTED)
    names = [OUTSIDE, *(prefix if kind == NO_TYPE else f"{prefix}-{kind}" for kind in types for prefix in PREFIXES[scheme])]
    return Tags(names, scheme, f"{scheme} tags, {plural(len(types), 'type')} of entities: {shown}", tuple(warnings))


def _describe_plain(file: TaggedFile, counts: Counter[str]) -> Tags:
    """Plain tags, sorted."""
    names = sorted(counts)
    if 2 * len(names) > counts.total() and len(names) > MAX_LISTED:
        found = f"{len(names):,} different tags for {counts.total():,} words"
        raise FunnelError(f"{file.path}: {found}; choose another label_column", "label_column")
    similar: dict[str | float, list[str]] = {}
    for name in names:
        similar.setdefault(normalize_label(name), []).append(name)
    groups = [format_list(map(repr, group)) for group in similar.values() if len(group) > 1]
    warnings = tuple(f"tags {group} differ only in case, spaces or number format" for group in groups)
    shown = format_list((f"{name} ({counts[name]:,})" for name in names), MAX_LISTED)
    return Tags(names, PLAIN, f"{plural(len(names), 'tag')} without B- and I-, one class per word: {shown}", warnings)
