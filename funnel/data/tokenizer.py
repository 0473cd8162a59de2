"""WordPiece tokenizer with Funnel's token types, built on the `tokenizers` library.

A text is encoded as [CLS] text [SEP], a pair as [CLS] text [SEP] second text [SEP]. [CLS] has token type 2, the second
text and its [SEP] have type 1, everything else has type 0. The special tokens are named "<cls>" in the Funnel
vocabularies on the hub and "[CLS]" in the original vocabulary and BERT's; both are recognized.

If a text contains the name of a special token, it is read as this token, as in transformers; `escape_special_tokens` turns
this off.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from funnel.data.files import is_utf8
from funnel.errors import FunnelError, error_reason, plural
from funnel.io import os_errors, read_json, write_json

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCABULARIES = ("vocab.txt", "vocab.uncased.txt", "vocab.cased.txt")
SPECIAL = {  # role: known names
    "pad": ("<pad>", "[PAD]"),
    "unk": ("<unk>", "[UNK]"),
    "cls": ("<cls>", "[CLS]"),
    "sep": ("<sep>", "[SEP]"),
    "mask": ("<mask>", "[MASK]"),
}
MIN_FREQUENCY = 5  # of a word in a trained vocabulary
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

    Attributes:
        names, ids: name and id of each special token, by role ("pad", "unk", "cls", "sep", "mask").

    Raises:
        FunnelError: the vocabulary lacks a special token.
    """

    def __init__(self, tokenizer: Tokenizer, source: str = "tokenizer") -> None:
        self.source = source
        self.names: dict[str, str] = {}
        self.ids: dict[str, int] = {}
        for role, names in SPECIAL.items():
            ids = {name: token_id for name in names if (token_id := tokenizer.token_to_id(name)) is not None}
            if not ids:
                raise FunnelError(f"{source}: the vocabulary has no {' or '.join(names)}; expected a WordPiece vocabulary")
            self.names[role], self.ids[role] = next(iter(ids.items()))
        cls, sep = self.names["cls"], self.names["sep"]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{cls}:2 $A:0 {sep}:0",
            pair=f"{cls}:2 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(cls, self.cls_id), (sep, self.ids["sep"])],
        )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self._special_tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]

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
        return self._without({token_id for token_id, token in added if token.special and token.content in vocabulary})

    def drop_added_tokens(self, vocab_size: int) -> "FunnelTokenizer":
        """A copy without the added tokens that a model with this vocabulary size has no embedding for; `self` if none.

        transformers adds <s> and </s> to vocabularies that lack them, and saves them with the tokenizer.
        """
        names = self.names.values()
        added = self.tokenizer.get_added_tokens_decoder().items()
        return self._without({token_id for token_id, token in added if token_id >= vocab_size and token.content not in names})

    def _without(self, added_ids: set[int]) -> "FunnelTokenizer":
        """A copy without the added tokens with these ids; `self` if there are none."""
        if not added_ids:
            return self
        values = json.loads(self.tokenizer.to_str())
        values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] not in added_ids]
        return FunnelTokenizer(Tokenizer.from_str(json.dumps(values)), self.source)

    # --- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: str | Path) -> "FunnelTokenizer":
        """Reads tokenizer.json, or builds a tokenizer from vocab.txt and tokenizer_config.json (optional).

        Raises:
            FunnelError: the files are missing or damaged.
        """
        folder = Path(folder)
        vocabulary = next((folder / name for name in VOCABULARIES if (folder / name).is_file()), None)
        if (folder / FILE).is_file():
            try:
                tokenizer = cls(Tokenizer.from_file(str(folder / FILE)), str(folder / FILE))
            except FunnelError:
                raise
            except Exception as error:  # the library raises plain Exception for any invalid file
                raise FunnelError(f"{folder / FILE}: damaged tokenizer ({error_reason(error)})") from None
        elif vocabulary is not None:
            tokenizer = cls.from_vocabulary(vocabulary)
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
        return cls._wordpiece(tokens, normalizer, str(path))

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
        special = [names[0] for names in SPECIAL.values()]
        characters = sorted({character for word in counts for character in word})
        continuations = [f"##{character}" for character in characters]
        words = sorted((word for word in counts if counts[word] >= MIN_FREQUENCY), key=lambda word: (-counts[word], word))
        tokens = list(dict.fromkeys(special + characters + continuations + words))[:vocab_size]
        return cls._wordpiece(tokens, normalizer, "vocabulary of the training texts")

    @classmethod
    def _wordpiece(cls, tokens: list[str], normalizer: BertNormalizer, source: str) -> "FunnelTokenizer":
        vocabulary = {token: i for i, token in enumerate(tokens)}
        unknown = next((name for name in SPECIAL["unk"] if name in vocabulary), SPECIAL["unk"][0])
        tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=100))
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = BertPreTokenizer()
        tokenizer.add_special_tokens([name for names in SPECIAL.values() for name in names if name in vocabulary])
        return cls(tokenizer, source)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json into an existing folder."""
        self.tokenizer.save(str(Path(folder) / FILE))

    def save_for_transformers(self, folder: Path, max_length: int | None = None) -> None:
        """Writes tokenizer.json, vocab.txt and a tokenizer_config.json that makes transformers encode identically.

        Args:
            max_length: the number of tokens to which transformers truncates texts; default: `DEFAULT_MAX_LENGTH`.
        """
        self.save(folder)
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
        normalizer = json.loads(self.tokenizer.to_str()).get("normalizer") or {}
        config = {
            "tokenizer_class": "FunnelTokenizer",
            "do_lower_case": bool(normalizer.get("lowercase", True)),
            "strip_accents": normalizer.get("strip_accents"),
            "tokenize_chinese_chars": bool(normalizer.get("handle_chinese_chars", True)),
            "model_max_length": max_length or DEFAULT_MAX_LENGTH,
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            "split_special_tokens": not self._special_tokens,
            # By default, transformers adds these tokens, with ids that the model has no embeddings for.
            "bos_token": "<s>" if "<s>" in self._special_tokens else None,
            "eos_token": "</s>" if "</s>" in self._special_tokens else None,
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
        special = 2 if pairs is None else 3
        if not special < max_length < 2**31:
            message = f"invalid max_length {max_length}: expected more than the {special} special tokens, and below 2**31"
            raise FunnelError(message, "max_length")
        try:
            sides = [self.tokenizer.encode_batch_fast(side, add_special_tokens=False) for side in (texts, pairs or [])]
        except Exception as error:  # the library raises plain Exception, for instance if [UNK] is missing
            for text in (*texts, *(pairs or ())):
                if not is_utf8(text):
                    raise FunnelError(f"{text[:40]!a}: not valid UTF-8; convert the text first") from None
            raise FunnelError(f"{self.source}: cannot encode ({error_reason(error)}); use another tokenizer") from None
        if pairs is None:
            return [self._join(encoding.ids, None, max_length) for encoding in sides[0]]
        return [self._join(first.ids, second.ids, max_length) for first, second in zip(*sides, strict=True)]

    def _join(self, first: list[int], second: list[int] | None, max_length: int) -> Encoding:
        """Truncates the ids of a text or pair and adds the special tokens.

        The library's own truncation keeps all parts that it cuts off, and for pairs all combinations of them.
        """
        cls, sep = self.cls_id, self.ids["sep"]
        if second is None:
            ids = [cls, *first[: max_length - 2], sep]
            return Encoding(ids, [2] + [0] * (len(ids) - 1), len(first) + 2)
        lengths = truncate_pair(len(first), len(second), max_length - 3)
        ids = [cls, *first[: lengths[0]], sep, *second[: lengths[1]], sep]
        return Encoding(ids, [2] + [0] * (lengths[0] + 1) + [1] * (lengths[1] + 1), len(first) + len(second) + 3)

    def decode(self, ids: Iterable[int]) -> str:
        """Turns ids back into text, without special tokens; the texts of a pair are separated by " | "."""
        texts: list[list[str]] = [[]]
        for token_id in ids:
            if token_id == self.ids["sep"]:
                texts.append([])
            elif token_id not in (self.cls_id, self.pad_id):
                texts[-1].append(self.tokenizer.id_to_token(int(token_id)) or "")
        decoder = self.tokenizer.decoder or decoders.WordPiece()
        return " | ".join(decoder.decode(text) for text in (texts[:-1] or texts))


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
