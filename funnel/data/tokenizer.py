"""WordPiece, BPE and Unigram tokenizers of the `tokenizers` library, with Funnel's token types.

A text is encoded as [CLS] text [SEP], a pair as [CLS] text [SEP] second text [SEP]; tokenizers like RoBERTa's put two
separators between the texts of a pair. [CLS] has token type 2, the second text and its [SEP] have type 1 (type 0 in tokenizers
like RoBERTa's), everything else has type 0.

Special tokens are found by role, because their names differ: BERT's "[CLS]" is "<s>" in RoBERTa and "<cls>" in the Funnel
vocabularies on the hub. If a text contains the name of a special token, it is read as this token, as in transformers;
`escape_special_tokens` turns this off.
"""

import copy
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from funnel.data.files import is_utf8
from funnel.errors import FunnelError, error_reason, plural
from funnel.io import os_errors, read_json, write_json

FILE, CONFIG, NAMES = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
VOCABULARIES = ("vocab.txt", "vocab.uncased.txt", "vocab.cased.txt")
CONVERTIBLE = ("vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model")  # transformers converts these
TOKENIZER_FILES = (FILE, *VOCABULARIES, *CONVERTIBLE)
# Names by role. Vocabularies with several of them exist: MPNet's contains BERT's [CLS], [PAD] and [SEP] as ordinary words
# besides <s>, <pad> and </s>, and its unknown token is [UNK]; Funnel's contains <s> and </s> besides <cls> and <sep>.
SPECIAL = {
    "pad": ("<pad>", "[PAD]"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("<cls>", "<s>", "[CLS]"),
    "sep": ("<sep>", "</s>", "[SEP]"),
    "mask": ("<mask>", "[MASK]"),
}
REQUIRED = ("pad", "cls", "sep")
MIN_FREQUENCY = 5  # of a word in a trained vocabulary
MIN_VOCAB_SIZE = 100  # of a vocabulary of word pieces
CHARACTER_COVERAGE = 0.9999  # of a vocabulary of word pieces; SentencePiece's default is 0.9995
REPETITIONS = 10_000  # of a word in one string
MAX_WORD_LENGTH = 100  # characters; a longer word is unknown
PRIVATE_USE = 0xF0000  # the first of 65,534 characters that mean nothing
DEFAULT_MAX_LENGTH = 512  # tokens


class Encoding(NamedTuple):
    """An encoded text or pair.

    Attributes:
        input_ids, token_type_ids: of equal length.
        full_length: number of tokens before truncation.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    full_length: int


class FunnelTokenizer:
    """Encodes texts and pairs of texts.

    Args:
        tokenizer: from the `tokenizers` library; its post-processor is replaced.
        source: where it comes from, for error messages.
        declared: names of special tokens by role, from tokenizer_config.json; the post-processor's take precedence.

    Attributes:
        names, ids: name and id of each special token, by role ("pad", "unk", "cls", "sep", "mask"); "unk" and "mask" are
            absent if the tokenizer has none.
        separators: number of separators between the texts of a pair.
        second_type: token type of the second text: 1, or 0 in tokenizers like RoBERTa's.

    Raises:
        FunnelError: the vocabulary lacks a special token, or the post-processor's template is not supported.
    """

    def __init__(self, tokenizer: Tokenizer, source: str = "tokenizer", declared: Mapping[str, str] | None = None) -> None:
        self.source = source
        self.tokenizer = tokenizer
        found, template = _read_post_processor(tokenizer, source)
        unknown = getattr(tokenizer.model, "unk_token", None)
        if unknown is not None:
            found["unk"] = unknown
        self.names = _find_names(tokenizer, {**(declared or {}), **found})
        for role in REQUIRED:
            if role not in self.names:
                known = " or ".join(SPECIAL[role])
                raise FunnelError(f"{source}: the vocabulary has no {known}; name its {role}_token in {CONFIG}")
            if re.search(r"[\s:$]", self.names[role]):
                raise FunnelError(f"{source}: unsupported {role}_token {self.names[role]!r}: it contains a space, ':' or '$'")
        if unknown is not None and self.names.get("unk") != unknown:
            raise FunnelError(f"{source}: the vocabulary has no {unknown}, which the tokenizer needs for unknown words")
        ids = {role: tokenizer.token_to_id(name) for role, name in self.names.items()}
        self.ids = {role: token_id for role, token_id in ids.items() if token_id is not None}
        self.separators, self.second_type = template or ((2, 0) if self.names["cls"] == "<s>" else (1, 1))
        tokenizer.post_processor = self._template(cls_type=2, second_type=self.second_type)
        if tokenizer.decoder is None and isinstance(tokenizer.model, WordPiece):
            tokenizer.decoder = decoders.WordPiece(tokenizer.model.continuing_subword_prefix)
        tokenizer.no_padding()
        tokenizer.no_truncation()

    def _template(self, cls_type: int, second_type: int) -> TemplateProcessing:
        """The post-processor for the given token types.

        It also records the ids of pad, unk and mask, because our checkpoints have no tokenizer_config.json.
        """
        cls, sep = self.names["cls"], self.names["sep"]
        others = [role for role in ("pad", "unk", "mask") if role in self.names]
        return TemplateProcessing(
            single=f"{cls}:{cls_type} $A:0 {sep}:0",
            pair=f"{cls}:{cls_type} $A:0 {f'{sep}:0 ' * self.separators}$B:{second_type} {sep}:{second_type}",
            special_tokens=[
                (cls, self.cls_id),
                (sep, self.ids["sep"]),
                *({"id": role, "ids": [self.ids[role]], "tokens": [self.names[role]]} for role in others),
            ],
        )

    @property
    def cls_id(self) -> int:
        """The id of [CLS]."""
        return self.ids["cls"]

    @property
    def pad_id(self) -> int:
        """The id of the padding token."""
        return self.ids["pad"]

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added ones."""
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    def check_vocab_size(self, vocab_size: int, source: str | Path) -> None:
        """Checks that a model has an embedding for every token.

        Args:
            vocab_size: the model's vocabulary size.
            source: where the model comes from, for the error message.

        Raises:
            FunnelError: the tokenizer belongs to another model.
        """
        largest = max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        if largest >= vocab_size:
            raise FunnelError(
                f"{source}: the tokenizer has ids up to {largest}, but the model has {vocab_size} embeddings; use the "
                "tokenizer that the model was trained with"
            )

    # --- special tokens in texts --------------------------------------------------------------------------------------

    def escape_special_tokens(self) -> "FunnelTokenizer":
        """A copy that reads the names of special tokens in texts as ordinary text; `self` if it already does.

        `save` preserves this.
        """
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=False)  # keeps the ids of the tokens
        added = self.tokenizer.get_added_tokens_decoder().items()
        special = {token_id: token.content for token_id, token in added if token.special and token.content in vocabulary}
        escaped = self._without(special)
        # Some models, such as Unigram, can produce any token of the vocabulary, so the name is split first.
        visible = [name for token_id, name in special.items() if token_id in escaped.encode([name])[0].input_ids[1:-1]]
        if visible:
            first_characters = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in visible)
            split = pre_tokenizers.Split(Regex(first_characters), "merged_with_previous")
            previous = escaped.tokenizer.pre_tokenizer
            escaped.tokenizer.pre_tokenizer = pre_tokenizers.Sequence([previous, split]) if previous else split
        return escaped

    def drop_added_tokens(self, vocab_size: int) -> "FunnelTokenizer":
        """A copy without the added tokens that a model with this vocabulary size has no embedding for; `self` if none.

        transformers adds <s> and </s> to vocabularies that lack them, and saves them with the tokenizer.
        """
        names = self.names.values()
        added = self.tokenizer.get_added_tokens_decoder().items()
        return self._without({token_id for token_id, token in added if token_id >= vocab_size and token.content not in names})

    def _without(self, added_ids: Collection[int]) -> "FunnelTokenizer":
        """A copy without the added tokens with these ids; `self` if there are none."""
        if not added_ids:
            return self
        values = json.loads(self.tokenizer.to_str())
        values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] not in added_ids]
        return FunnelTokenizer(Tokenizer.from_str(json.dumps(values)), self.source)

    # --- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: str | Path) -> "FunnelTokenizer":
        """Reads tokenizer.json, or builds a WordPiece tokenizer from vocab.txt.

        tokenizer_config.json and special_tokens_map.json are optional. They name special tokens and, with vocab.txt, set
        the normalization.

        Raises:
            FunnelError: the files are missing or damaged.
        """
        folder = Path(folder)
        vocabulary = next((folder / name for name in VOCABULARIES if (folder / name).is_file()), None)
        convertible = next((name for name in CONVERTIBLE if (folder / name).is_file()), None)
        if (folder / FILE).is_file():
            declared = _declared_names(folder)
            try:
                tokenizer = cls(Tokenizer.from_file(str(folder / FILE)), str(folder / FILE), declared)
            except FunnelError:
                raise
            except Exception as error:  # the library raises plain Exception for any invalid file
                raise FunnelError(f"{folder / FILE}: damaged tokenizer ({error_reason(error)})") from None
        elif vocabulary is not None:
            tokenizer = cls.from_vocabulary(vocabulary)
        elif convertible is not None:
            raise FunnelError(
                f"{folder}: no {FILE}, and {convertible} cannot be read; create {FILE} with transformers: "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
        else:
            raise FunnelError(f"{folder}: no tokenizer; expected {FILE} or {' or '.join(VOCABULARIES)}")
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        return tokenizer.escape_special_tokens() if config.get("split_special_tokens") is True else tokenizer

    @classmethod
    def from_vocabulary(cls, path: Path) -> "FunnelTokenizer":
        """Builds a WordPiece tokenizer from a file with one token per line.

        It is uncased unless tokenizer_config.json in the same folder, or the name vocab.cased.txt, says otherwise.

        Raises:
            FunnelError: the file is not UTF-8, has duplicate tokens, or lacks a special token.
        """
        config_path = path.with_name(CONFIG)
        config = read_json(config_path) if config_path.is_file() else {}
        for name in ("tokenize_chinese_chars", "strip_accents", "do_lower_case"):
            if not isinstance(config.get(name), bool | None):
                raise FunnelError(f"{config_path}: invalid {name} {config[name]!r}: expected true or false")
        try:
            with os_errors(path):
                lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise FunnelError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        tokens = [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
        if duplicate := next((token for token, count in Counter(tokens).items() if count > 1), None):
            raise FunnelError(f"{path}: duplicate token {duplicate!r}")
        normalizer = BertNormalizer(
            clean_text=True,
            handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
            strip_accents=config.get("strip_accents"),
            lowercase=bool(config.get("do_lower_case", path.name != "vocab.cased.txt")),
        )
        return cls._wordpiece(tokens, normalizer, str(path), _declared_names(path.parent))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 8000) -> "FunnelTokenizer":
        """Builds an uncased vocabulary for a model trained from scratch.

        It contains all characters, with which any word can be spelled, and the most frequent words that occur at least
        `MIN_FREQUENCY` times. The `tokenizers` library's own trainer breaks ties at random, so that runs with the same
        seed would differ.
        """
        normalizer, pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)))
        special = [f"<{role}>" for role in SPECIAL]
        characters = sorted({character for word in counts for character in word})
        continuations = [f"##{character}" for character in characters]
        words = sorted((word for word in counts if counts[word] >= MIN_FREQUENCY), key=lambda word: (-counts[word], word))
        tokens = list(dict.fromkeys(special + characters + continuations + words))[:vocab_size]
        return cls._wordpiece(tokens, normalizer, "vocabulary of the training texts")

    @classmethod
    def train_wordpiece(cls, texts: Iterable[str], vocab_size: int) -> "FunnelTokenizer":
        """Trains an uncased WordPiece vocabulary, the same in every run.

        The merges are those of byte-pair encoding, as in the `tokenizers` library's own WordPiece trainer, which numbers
        tokens in an order that differs between runs. The rarest characters are unknown: all but `CHARACTER_COVERAGE` of a
        text's characters.

        Args:
            texts: may be an iterator; only the words and their counts are held in memory.
            vocab_size: number of tokens, special ones included. A small text gives fewer.

        Raises:
            FunnelError: `vocab_size` is too small, or there are no words.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise FunnelError(f"invalid vocab_size {vocab_size}: expected at least {MIN_VOCAB_SIZE}", "vocab_size")
        normalizer = BertNormalizer(lowercase=True)
        words = _count_words(texts, normalizer)
        if not words:
            raise FunnelError("cannot train a vocabulary: the texts contain no words")
        alphabet = _frequent_characters(words, vocab_size // 4)
        # The first character of a word becomes a character of its own, because only later ones get the prefix "##".
        initial = {character: chr(PRIVATE_USE + i) for i, character in enumerate(alphabet)}
        known = sorted(word for word in words if len(word) <= MAX_WORD_LENGTH and initial.keys() >= set(word))
        marked = (
            f"{initial[word[0]]}{word[1:]} " * min(words[word] - done, REPETITIONS)
            for word in known
            for done in range(0, words[word], REPETITIONS)
        )
        trainer = BpeTrainer(vocab_size=vocab_size - len(SPECIAL), min_frequency=2, show_progress=False)
        bpe = Tokenizer(BPE())
        bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        bpe.train_from_iterator(marked, trainer)
        first = {marker: character for character, marker in initial.items()}
        learned = sorted(bpe.get_vocab(), key=bpe.get_vocab().__getitem__)
        tokens = [first[token[0]] + token[1:] if token[0] in first else f"##{token}" for token in learned]
        return cls._wordpiece([f"<{role}>" for role in SPECIAL] + tokens, normalizer, "vocabulary of the corpus")

    @classmethod
    def _wordpiece(
        cls, tokens: list[str], normalizer: BertNormalizer, source: str, declared: Mapping[str, str] | None = None
    ) -> "FunnelTokenizer":
        vocabulary = {token: i for i, token in enumerate(tokens)}
        names = ((declared or {}).get("unk"), *SPECIAL["unk"])
        unknown = next((name for name in names if name in vocabulary), SPECIAL["unk"][0])
        tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=MAX_WORD_LENGTH))
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = BertPreTokenizer()
        result = cls(tokenizer, source, declared)
        tokenizer.add_special_tokens(list(result.names.values()))
        return result

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json into an existing folder."""
        self.tokenizer.save(str(Path(folder) / FILE))

    def save_for_transformers(self, folder: Path, max_length: int | None = None, token_types: int = 3) -> None:
        """Writes tokenizer.json, and a tokenizer_config.json with which transformers encodes identically.

        Args:
            max_length: the number of tokens to which transformers truncates texts; default: `DEFAULT_MAX_LENGTH`.
            token_types: number of token types of the model: 3 if [CLS] has its own, as in Funnel, 2 if only the second text
                has, as in BERT; with fewer, all tokens have type 0, and token_type_ids is not an input of the model.
        """
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.post_processor = self._template(2 if token_types > 2 else 0, self.second_type if token_types > 1 else 0)
        tokenizer.save(str(folder / FILE))
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
            "model_max_length": max_length or DEFAULT_MAX_LENGTH,
            "model_input_names": ["input_ids", *(["token_type_ids"] if token_types > 1 else []), "attention_mask"],
            "split_special_tokens": self.names["sep"] not in special,
        }
        write_json(folder / CONFIG, config | {f"{role}_token": name for role, name in self.names.items()})

    # --- encoding and decoding ----------------------------------------------------------------------------------------

    def __call__(
        self, texts: Iterable[str], pairs: Iterable[str] | None = None, max_length: int = DEFAULT_MAX_LENGTH
    ) -> dict[str, Tensor]:
        """Encodes texts as a padded batch, to be passed to a model.

        Args:
            texts, pairs, max_length: as in `encode`; at least one text.

        Returns:
            input_ids, attention_mask and token_type_ids, each [b, l], int64.

        Raises:
            FunnelError: as `encode`, or there are no texts.
        """
        encodings = self.encode(texts, pairs, max_length)
        if not encodings:
            raise FunnelError("texts is empty: expected at least one text", "texts")
        width = max(len(encoding.input_ids) for encoding in encodings)

        def pad(rows: Iterable[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (width - len(row)) for row in rows])

        return {
            "input_ids": pad((encoding.input_ids for encoding in encodings), self.pad_id),
            "attention_mask": pad(([1] * len(encoding.input_ids) for encoding in encodings), 0),
            "token_type_ids": pad((encoding.token_type_ids for encoding in encodings), 0),
        }

    def encode(
        self, texts: Iterable[str], pairs: Iterable[str] | None = None, max_length: int = DEFAULT_MAX_LENGTH
    ) -> list[Encoding]:
        """Encodes texts, or pairs of texts; of a pair, the longer text is truncated first.

        Args:
            texts: any iterable of strings, except a string.
            pairs: the second texts, one per text.
            max_length: maximum number of tokens, including the special ones.

        Raises:
            FunnelError: an argument is invalid, `max_length` leaves no room for the text, or a text cannot be encoded.
        """
        texts = list_of_strings(texts, "texts")
        if pairs is not None:
            pairs = list_of_strings(pairs, "pairs")
            if len(pairs) != len(texts):
                found = f"{plural(len(texts), 'text')} but {plural(len(pairs), 'second text')}"
                raise FunnelError(f"{found}: pairs needs one for each text", "pairs")
        self.check_max_length(max_length, 2 if pairs is None else 2 + self.separators)
        first = self.encode_plain(texts)
        second = self.encode_plain(pairs) if pairs is not None else itertools.repeat(None, len(first))
        return [self._join(ids, pair_ids, max_length) for ids, pair_ids in zip(first, second, strict=True)]

    def check_max_length(self, max_length: int, special: int = 2) -> None:
        """Raises FunnelError if a maximum length leaves no room for text besides the special tokens."""
        if not special < max_length < 2**31:
            message = f"invalid max_length {max_length}: expected more than the {special} special tokens, and below 2**31"
            raise FunnelError(message, "max_length")

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts, in parallel, without special tokens and without truncation.

        Raises:
            FunnelError: a text cannot be encoded.
        """
        return [encoding.ids for encoding in self._encode_batch(texts, self.tokenizer.encode_batch_fast)]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The token ids of texts, [t] each, as `encode_plain`, with their positions in the text, [t, 2] each, int32.

        A position is that of the token's first character and the one after its last. With some tokenizers, it includes the
        space before a word.

        Raises:
            FunnelError: a text cannot be encoded.
        """
        return [
            (np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2))
            for encoding in self._encode_batch(texts, self.tokenizer.encode_batch)
        ]

    def _encode_batch(self, texts: Sequence[str], encode: Callable[..., list[Any]]) -> list[Any]:
        """Encodes texts with a method of the library; raises FunnelError if one cannot be encoded."""
        try:
            return encode(texts, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception, for instance if [UNK] is missing
            for text in texts:
                if not is_utf8(text):
                    raise FunnelError(f"{text[:40]!a}: not valid UTF-8; convert the text first") from None
            raise FunnelError(f"{self.source}: cannot encode ({error_reason(error)}); use another tokenizer") from None

    def _join(self, first: list[int], second: list[int] | None, max_length: int) -> Encoding:
        """Truncates the ids of a text or pair and adds the special tokens.

        The library's own truncation keeps all parts that it cuts off, and for pairs all combinations of them.
        """
        cls, sep, separators = self.ids["cls"], self.ids["sep"], self.separators
        if second is None:
            ids = [cls, *first[: max_length - 2], sep]
            return Encoding(ids, [2] + [0] * (len(ids) - 1), len(first) + 2)
        special = 2 + separators
        lengths = truncate_pair(len(first), len(second), max_length - special)
        ids = [cls, *first[: lengths[0]], *[sep] * separators, *second[: lengths[1]], sep]
        types = [2] + [0] * (lengths[0] + separators) + [self.second_type] * (lengths[1] + 1)
        return Encoding(ids, types, len(first) + len(second) + special)

    def decode(self, ids: Iterable[int]) -> str:
        """Turns ids back into text, without special tokens; the texts of a pair are separated by " | "."""
        texts: list[list[int]] = [[]]
        for token_id in ids:
            if token_id == self.ids["sep"]:
                texts.append([])
            elif token_id not in (self.cls_id, self.pad_id):
                texts[-1].append(int(token_id))
        return " | ".join(self.tokenizer.decode(text, skip_special_tokens=False) for text in texts if text)

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        """The text of each token, without markers such as "##" and "▁"; it starts with a space if the token begins a word.

        Tokens that are only a part of a character are shown as "\ufffd".
        """
        special = {token_id: self.names[role] for role, token_id in self.ids.items()}
        texts: list[str] = []
        stream = None  # None at the beginning of a text
        for token_id in map(int, ids):
            if token_id in special:
                texts.append(f" {special[token_id]}")
                stream = None
                continue
            is_first, stream = stream is None, stream or decoders.DecodeStream(skip_special_tokens=False)
            text = stream.step(self.tokenizer, token_id)
            if not text:  # part of a character, or the "▁" that begins a text
                text = "" if (self.tokenizer.id_to_token(token_id) or "").strip("▁") == "" else "\ufffd"
            texts.append(f" {text.lstrip()}" if is_first else text)
        return texts


def _count_words(texts: Iterable[str], normalizer: BertNormalizer) -> Counter[str]:
    """The words of some texts, split as BERT does, and how often they occur."""
    chunks: Counter[str] = Counter()
    for text in texts:
        chunks.update(text.split())
    words, pre_tokenizer = Counter[str](), BertPreTokenizer()
    for chunk, count in chunks.items():  # each once, because normalizing is slow
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(chunk)):
            words[word] += count
    return words


def _frequent_characters(words: Mapping[str, int], limit: int) -> list[str]:
    """The fewest characters that make up `CHARACTER_COVERAGE` of all, `limit` at most, sorted."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    frequent = sorted(counts, key=lambda character: (-counts[character], character))[:limit]
    covered = itertools.accumulate(counts[character] for character in frequent)
    enough = CHARACTER_COVERAGE * counts.total()
    return sorted(frequent[: 1 + sum(total < enough for total in covered)])


def _find_names(tokenizer: Tokenizer, given: Mapping[str, str]) -> dict[str, str]:
    """Names of the special tokens by role: the given ones, otherwise known ones, if they are in the vocabulary."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    names = {}
    for role, known in SPECIAL.items():
        candidates = [given.get(role), *sorted(known, key=lambda name: name not in special)]
        name = next((name for name in candidates if name is not None and tokenizer.token_to_id(name) is not None), None)
        if name is not None:
            names[role] = name
    return names


def _declared_names(folder: Path) -> dict[str, str]:
    """Names of special tokens by role, from the files that transformers writes next to a tokenizer."""
    names: dict[str, str] = {}
    for path in (folder / CONFIG, folder / NAMES):
        values = read_json(path) if path.is_file() else {}
        for role in SPECIAL:
            value = values.get(f"{role}_token")
            name = value.get("content") if isinstance(value, dict) else value
            if isinstance(name, str):
                names.setdefault(role, name)
    return names


def _read_post_processor(tokenizer: Tokenizer, source: str) -> tuple[dict[str, str], tuple[int, int] | None]:
    """What the post-processor adds: names of special tokens by role; number of separators and second token type of pairs.

    Returns ({}, None) if it adds no tokens.
    """
    if tokenizer.post_processor is None:
        return {}, None
    state = json.loads(tokenizer.post_processor.__getstate__())
    ids: dict[str, int] = {}
    template = None
    for step in state["processors"] if state["type"] == "Sequence" else [state]:
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            ids = {role: step[role][1] for role in ("cls", "sep")}
            template = (1, 1) if step["type"] == "BertProcessing" else (2, 0)
        elif step["type"] == "TemplateProcessing" and step["special_tokens"]:
            ids, template = _parse_template(step, source)
    names = {role: name for role, token_id in ids.items() if (name := tokenizer.id_to_token(token_id)) is not None}
    if missing := ids.keys() - names.keys():
        raise FunnelError(f"{source}: the post-processor adds id {ids[missing.pop()]}, which is not in the vocabulary")
    return names, template


def _parse_template(step: Mapping[str, Any], source: str) -> tuple[dict[str, int], tuple[int, int]]:
    """Ids of the special tokens by role; number of separators and second token type of pairs."""
    tokens = {name: token["ids"] for name, token in step["special_tokens"].items()}
    single, pair = (
        [tokens[part["SpecialToken"]["id"]] if "SpecialToken" in part else part["Sequence"]["id"] for part in step[name]]
        for name in ("single", "pair")
    )
    cls, sep = single[0], single[-1]
    for separators in (1, 2):
        if single == [cls, "A", sep] and pair == [cls, "A", *[sep] * separators, "B", sep] and len(cls) == len(sep) == 1:
            others = {role: tokens[role][0] for role in ("pad", "unk", "mask") if role in tokens}  # see `_template`
            second_type = next(part["Sequence"]["type_id"] for part in step["pair"][2:] if "Sequence" in part)
            return {"cls": cls[0], "sep": sep[0], **others}, (separators, min(second_type, 1))
    found = ", ".join(
        " ".join(part.get("SpecialToken", part.get("Sequence"))["id"] for part in step[name]) for name in ("single", "pair")
    )
    raise FunnelError(
        f"{source}: unsupported special tokens ({found}); expected [CLS] A [SEP] for a text, and [CLS] A [SEP] B [SEP] or "
        "[CLS] A [SEP] [SEP] B [SEP] for a pair"
    )


def truncate_pair(first: int, second: int, limit: int) -> tuple[int, int]:
    """The lengths of two texts after truncation to `limit` tokens in all, taken from the longer text first."""
    if first + second <= limit:
        return first, second
    if first <= second:
        first = min(first, limit // 2)
        return first, limit - first
    second = min(second, limit // 2)
    return limit - second, second


def list_of_strings(values: Iterable[str], name: str) -> list[str]:
    """The strings of an iterable such as a list, a NumPy array, a pandas Series or a generator.

    Args:
        name: the parameter's, for the error message.

    Raises:
        FunnelError: it is not a one-dimensional iterable, or an item is not a string.
    """
    is_flat = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)
    if not is_flat or getattr(values, "ndim", 1) != 1:
        raise FunnelError(f"{name} has type {type(values).__name__}: expected a list of strings or a 1-d array", name)
    items = list(values)
    for index, item in enumerate(items):
        if not isinstance(item, str):
            found = f"{type(item).__name__} ({str(item)[:40]})"
            raise FunnelError(f"{name}[{index}] has type {found}: expected a string", name)
    return items
