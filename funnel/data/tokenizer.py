"""Text to ids and token types, by the `tokenizers` library: WordPiece as in BERT, and a Funnel's way to join texts.

A text becomes [cls] text [sep], a pair [cls] text [sep] second text [sep]; [cls] has token type 2, the second text and
its [sep] have type 1, all else 0. The special tokens are called "<cls>" in the hub's Funnel vocabularies and "[CLS]" in
the original's and BERT's; both are known by their names.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from funnel.data.files import is_utf8
from funnel.errors import FunnelError, error_reason
from funnel.io import read_json, write_json

FILE = "tokenizer.json"
VOCABULARIES = ("vocab.txt", "vocab.uncased.txt", "vocab.cased.txt")
SPECIAL = {  # by role: the names in use
    "pad": ("<pad>", "[PAD]"),
    "unk": ("<unk>", "[UNK]"),
    "cls": ("<cls>", "[CLS]"),
    "sep": ("<sep>", "[SEP]"),
    "mask": ("<mask>", "[MASK]"),
}


class Encoding(NamedTuple):
    """One text or pair: ids and token types, equally long, and whether some of it did not fit."""

    input_ids: list[int]
    token_type_ids: list[int]
    cut: bool


class FunnelTokenizer:
    """Encodes texts and pairs of texts.

    Args:
        tokenizer: of the `tokenizers` library; its way to join texts is replaced by the Funnel's.
        source: where it comes from, for messages.

    Raises:
        FunnelError: the vocabulary lacks a special token.
    """

    def __init__(self, tokenizer: Tokenizer, source: str = "tokenizer") -> None:
        self.source = source
        self.names: dict[str, str] = {}
        self.ids: dict[str, int] = {}
        for role, names in SPECIAL.items():
            found = {name: i for name in names if (i := tokenizer.token_to_id(name)) is not None}
            if not found:
                raise FunnelError(f"{source}: the vocabulary has no {' or '.join(names)}; is it a WordPiece vocabulary?")
            self.names[role], self.ids[role] = next(iter(found.items()))
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
        return self.ids["cls"]

    @property
    def pad_id(self) -> int:
        return self.ids["pad"]

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    def fitting(self, vocab_size: int, source: str | Path) -> "FunnelTokenizer":
        """Itself, if a model with so many word embeddings has one for every token.

        Raises:
            FunnelError: the tokenizer belongs to another model.
        """
        largest = max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        if largest >= vocab_size:
            raise FunnelError(
                f"{source}: the tokenizer has ids up to {largest}, but the model has embeddings for {vocab_size} tokens; "
                "take the tokenizer that these weights were trained with"
            )
        return self

    @classmethod
    def load(cls, folder: str | Path) -> "FunnelTokenizer":
        """Reads tokenizer.json, or builds a tokenizer from vocab.txt (and tokenizer_config.json, where there is one).

        Raises:
            FunnelError: neither is there, or it is damaged.
        """
        folder = Path(folder)
        if (folder / FILE).is_file():
            try:
                return cls(Tokenizer.from_file(str(folder / FILE)), str(folder / FILE))
            except FunnelError:
                raise
            except Exception as error:  # the library raises plain Exception for whatever it cannot read
                text = " ".join(str(error).split())[:160]
                raise FunnelError(f"{folder / FILE}: damaged tokenizer file ({text})") from None
        for name in VOCABULARIES:
            if (folder / name).is_file():
                return cls.from_vocabulary(folder / name)
        raise FunnelError(f"{folder}: has no tokenizer; it takes {FILE} or {' or '.join(VOCABULARIES)}")

    @classmethod
    def from_vocabulary(cls, path: Path) -> "FunnelTokenizer":
        """Builds an uncased WordPiece tokenizer from a file with a token a line, or a cased one where its folder's
        tokenizer_config.json or the file's own name says so.

        Raises:
            FunnelError: the file is not UTF-8 text or lacks the special tokens.
        """
        beside = path.with_name("tokenizer_config.json")
        settings = read_json(beside) if beside.is_file() else {}
        for name in ("tokenize_chinese_chars", "strip_accents", "do_lower_case"):
            if not isinstance(settings.get(name), (bool, type(None))):
                raise FunnelError(f"{beside}: {name} is {settings[name]!r}, not true or false")
        try:
            tokens = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise FunnelError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        if tokens[-1] == "":
            tokens.pop()
        vocabulary = {token.rstrip("\r"): i for i, token in enumerate(tokens)}
        normalizer = BertNormalizer(
            clean_text=True,
            handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
            strip_accents=settings.get("strip_accents"),
            lowercase=bool(settings.get("do_lower_case", path.name != "vocab.cased.txt")),
        )
        if len(vocabulary) < len(tokens):
            repeated = next(token for token, count in Counter(t.rstrip("\r") for t in tokens).items() if count > 1)
            raise FunnelError(f"{path}: the token {repeated!r} stands on several lines; a vocabulary has each once")
        return cls._wordpiece(vocabulary, normalizer, str(path))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 8000) -> "FunnelTokenizer":
        """Makes an uncased WordPiece vocabulary for a model that starts from nothing: the letters, which spell any other
        word, and the most frequent words that occur five times at least.

        The library's own trainer breaks ties at random, which would make runs of one seed differ.
        """
        normalizer, pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)))
        letters = sorted({letter for word in counts for letter in word})
        words = sorted((word for word in counts if counts[word] >= 5), key=lambda word: (-counts[word], word))
        tokens = [names[0] for names in SPECIAL.values()] + letters + [f"##{letter}" for letter in letters]
        tokens = list(dict.fromkeys(tokens + words))[:vocab_size]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        return cls._wordpiece(vocabulary, normalizer, "vocabulary of the training texts")

    @classmethod
    def _wordpiece(cls, vocabulary: dict[str, int], normalizer: BertNormalizer, source: str) -> "FunnelTokenizer":
        unknown = next((name for name in SPECIAL["unk"] if name in vocabulary), SPECIAL["unk"][0])
        tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=100))
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = BertPreTokenizer()
        tokenizer.add_special_tokens([name for names in SPECIAL.values() for name in names if name in vocabulary])
        return cls(tokenizer, source)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json into a folder."""
        self.tokenizer.save(str(folder / FILE))

    def save_for_transformers(self, folder: Path) -> None:
        """Writes tokenizer.json, vocab.txt and a tokenizer_config.json that has transformers use them as we do."""
        self.save(folder)
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
        normalizer = json.loads(self.tokenizer.to_str()).get("normalizer") or {}
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "FunnelTokenizer",
                "do_lower_case": bool(normalizer.get("lowercase", True)),
                "strip_accents": normalizer.get("strip_accents"),
                "tokenize_chinese_chars": bool(normalizer.get("handle_chinese_chars", True)),
                **{f"{role}_token": name for role, name in self.names.items()},
            },
        )

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int = 512) -> list[Encoding]:
        """Encodes texts, or pairs of texts; what does not fit is cut from the end of the longer text of a pair first.

        Args:
            texts: the (first) texts.
            pairs: the second texts, as many.
            max_length: tokens at most, the special ones counted in.

        Raises:
            FunnelError: `max_length` leaves no room beside the special tokens, or a text cannot be encoded.
        """
        special = 2 if pairs is None else 3
        if not special < max_length < 2**31:
            raise FunnelError(f"--max-length {max_length}: it takes more than the {special} special tokens, below 2**31")
        self.tokenizer.enable_truncation(max_length, strategy="longest_first")
        try:
            inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
            encoded = self.tokenizer.encode_batch(inputs)
        except Exception as error:  # the library's own, as of a vocabulary without the token for unknown words
            if odd := next((text for text in (*texts, *(pairs or ())) if not is_utf8(text)), None):
                raise FunnelError(f"{odd[:40]!a}: a text that is not UTF-8; convert it first") from None
            raise FunnelError(f"{self.source}: cannot encode ({error_reason(error)}); take another tokenizer") from None
        finally:
            self.tokenizer.no_truncation()
        return [Encoding(e.ids, e.type_ids, bool(e.overflowing)) for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text that ids stand for, as far as the vocabulary keeps it; the texts of a pair with " | " between them."""
        texts: list[list[str]] = [[]]
        for token in ids:
            if token == self.ids["sep"]:
                texts.append([])
            elif token not in (self.cls_id, self.pad_id):
                texts[-1].append(self.tokenizer.id_to_token(int(token)) or "")
        decoder = self.tokenizer.decoder or decoders.WordPiece()
        return " | ".join(decoder.decode(text) for text in (texts[:-1] or texts))
