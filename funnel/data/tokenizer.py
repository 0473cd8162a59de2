"""WordPiece tokenizer with Funnel's token types, built on the `tokenizers` library.

A text is encoded as [CLS] text [SEP], a pair as [CLS] text [SEP] second text [SEP]. [CLS] has token type 2, the second
text and its [SEP] have type 1, everything else has type 0. The special tokens are named "<cls>" in the Funnel
vocabularies on the hub and "[CLS]" in the original vocabulary and BERT's; both are recognized.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
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
from funnel.errors import FunnelError, error_reason
from funnel.io import os_errors, read_json, write_json

FILE = "tokenizer.json"
VOCABULARIES = ("vocab.txt", "vocab.uncased.txt", "vocab.cased.txt")
SPECIAL = {  # role: known names
    "pad": ("<pad>", "[PAD]"),
    "unk": ("<unk>", "[UNK]"),
    "cls": ("<cls>", "[CLS]"),
    "sep": ("<sep>", "[SEP]"),
    "mask": ("<mask>", "[MASK]"),
}
MIN_FREQUENCY = 5  # of a word in a trained vocabulary


class Encoding(NamedTuple):
    """An encoded text or pair.

    Attributes:
        input_ids, token_type_ids: of equal length.
        truncated: whether the text exceeded the maximum length.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    truncated: bool


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

    # --- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: str | Path) -> "FunnelTokenizer":
        """Reads tokenizer.json, or builds a tokenizer from vocab.txt and tokenizer_config.json (optional).

        Raises:
            FunnelError: the files are missing or damaged.
        """
        folder = Path(folder)
        if (folder / FILE).is_file():
            try:
                return cls(Tokenizer.from_file(str(folder / FILE)), str(folder / FILE))
            except FunnelError:
                raise
            except Exception as error:  # the library raises plain Exception for any invalid file
                raise FunnelError(f"{folder / FILE}: damaged tokenizer ({error_reason(error)})") from None
        for name in VOCABULARIES:
            if (folder / name).is_file():
                return cls.from_vocabulary(folder / name)
        raise FunnelError(f"{folder}: no tokenizer; expected {FILE} or {' or '.join(VOCABULARIES)}")

    @classmethod
    def from_vocabulary(cls, path: Path) -> "FunnelTokenizer":
        """Builds a WordPiece tokenizer from a file with one token per line.

        It is uncased unless tokenizer_config.json in the same folder, or the name vocab.cased.txt, says otherwise.

        Raises:
            FunnelError: the file is not UTF-8, has duplicate tokens, or lacks a special token.
        """
        config_path = path.with_name("tokenizer_config.json")
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

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json."""
        self.tokenizer.save(str(folder / FILE))

    def save_for_transformers(self, folder: Path) -> None:
        """Writes tokenizer.json, vocab.txt and a tokenizer_config.json that makes transformers encode identically."""
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
        }
        write_json(folder / "tokenizer_config.json", config | {f"{role}_token": name for role, name in self.names.items()})

    # --- encoding and decoding ----------------------------------------------------------------------------------------

    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int = 512) -> dict[str, Tensor]:
        """Encodes texts as a padded batch, to be passed to a model.

        Returns:
            input_ids, attention_mask and token_type_ids, each [b, l], int64.
        """
        encodings = self.encode(texts, pairs, max_length)
        width = max(len(encoding.input_ids) for encoding in encodings)

        def pad(rows: Iterable[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (width - len(row)) for row in rows])

        return {
            "input_ids": pad((encoding.input_ids for encoding in encodings), self.pad_id),
            "attention_mask": pad(([1] * len(encoding.input_ids) for encoding in encodings), 0),
            "token_type_ids": pad((encoding.token_type_ids for encoding in encodings), 0),
        }

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int = 512) -> list[Encoding]:
        """Encodes texts, or pairs of texts; of a pair, the longer text is truncated first.

        Args:
            pairs: the second texts, one per text.
            max_length: maximum number of tokens, including the special ones.

        Raises:
            FunnelError: `max_length` leaves no room for the text, or a text cannot be encoded.
        """
        special = 2 if pairs is None else 3
        if not special < max_length < 2**31:
            message = f"invalid max_length {max_length}: expected more than the {special} special tokens, and below 2**31"
            raise FunnelError(message, "max_length")
        self.tokenizer.enable_truncation(max_length, strategy="longest_first")
        try:
            inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
            encodings = self.tokenizer.encode_batch(inputs)
        except Exception as error:  # the library raises plain Exception, for instance if [UNK] is missing
            for text in (*texts, *(pairs or ())):
                if not is_utf8(text):
                    raise FunnelError(f"{text[:40]!a}: not valid UTF-8; convert the text first") from None
            raise FunnelError(f"{self.source}: cannot encode ({error_reason(error)}); use another tokenizer") from None
        finally:
            self.tokenizer.no_truncation()
        return [Encoding(e.ids, e.type_ids, bool(e.overflowing)) for e in encodings]

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
