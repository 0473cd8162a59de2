"""Mapping the token ids of one tokenizer to those of another with the same tokens."""

from collections.abc import Iterable

import torch
from torch import Tensor

from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, format_list

MAX_LISTED = 5  # missing tokens in an error message
# Texts that tokenizers with different rules split differently: case, accents, punctuation, numbers, scripts, white space.
SAMPLES = (
    'The QUICK brown Fox isn\'t here; "well-known" (state-of-the-art) e-mail@example.com!',
    "Café naïve Zürich résumé, 3.14 and 1,234,567 in 1999/2000: $5 + 20% = ?",
    "internationalization, unbelievably electroencephalographic antidisestablishmentarianism",
    "日本語 中文 한국어 русский العربية ελληνικά",
    "tabs\tand\u00a0spaces   ``quotes'' … — – 😀 x² ½",
)


def token_map(student: FunnelTokenizer, teacher: FunnelTokenizer) -> Tensor:
    """The teacher's id of each of the student's tokens, [largest id of the student + 1].

    Special tokens are matched by role, all others by name. Ids without a token map to the teacher's padding. A student may have
    a part of the teacher's vocabulary.

    Raises:
        FunnelError: the teacher lacks a token of the student, or it splits texts differently.
    """
    vocabulary = student.tokenizer.get_vocab(with_added_tokens=True)
    result = torch.full((max(vocabulary.values()) + 1,), teacher.pad_id)
    roles = {token_id: role for role, token_id in student.ids.items()}
    missing = []
    for token, token_id in sorted(vocabulary.items(), key=lambda item: item[1]):
        role = roles.get(token_id)
        mapped = teacher.tokenizer.token_to_id(token) if role is None else teacher.ids.get(role)
        if mapped is None:
            missing.append(token)
        else:
            result[token_id] = mapped
    if missing:
        raise FunnelError(
            f"{teacher.source}: the teacher's vocabulary lacks {len(missing):,} of the student's {len(vocabulary):,} tokens: "
            f"{format_list(map(repr, missing), MAX_LISTED)}; use a teacher and a student with the same vocabulary"
        )
    is_smaller = len(vocabulary) < len(teacher.tokenizer.get_vocab(with_added_tokens=True))
    for text in SAMPLES:
        ids, expected = (tokenizer.encode([text])[0].input_ids for tokenizer in (student, teacher))
        pieces, others = (
            [tokenizer.tokenizer.id_to_token(token_id) or "" for token_id in row[1:-1]]
            for tokenizer, row in ((student, ids), (teacher, expected))
        )
        is_same = result[ids].tolist() == expected
        if is_smaller:  # a student with a part of the vocabulary splits words into more pieces
            is_same = student.names.get("unk") in pieces or _join(pieces) == _join(others)
        if not is_same:
            i = next((i for i, pair in enumerate(zip(pieces, others, strict=False)) if pair[0] != pair[1]), 0)
            raise FunnelError(
                f"{teacher.source}: the teacher splits texts differently: {format_list(map(repr, others[i:]), MAX_LISTED)} "
                f"instead of {format_list(map(repr, pieces[i:]), MAX_LISTED)}; use a teacher with the student's tokenizer"
            )
    return result


def _join(pieces: Iterable[str]) -> str:
    """The text of word pieces, without the markers of continuations."""
    return "".join(piece.removeprefix("##") for piece in pieces)


def is_identity(ids: Tensor) -> bool:
    """Whether a map leaves all ids as they are."""
    return torch.equal(ids, torch.arange(len(ids)))
