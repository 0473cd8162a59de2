"""Corpora: formats, encoding, the cache, and errors."""

import errno
import gzip
import json
import lzma
import multiprocessing
import os
import warnings

import numpy as np
import pytest

from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.io import cache_dir
from funnel.pretraining import corpus as corpus_module
from funnel.pretraining.corpus import prepare_corpus, read_documents

DOCUMENTS = ["a good film\nwas it not?", "bad", "naïve films, good films and bad films", "the the film"]
TEXT = "\n\n".join(DOCUMENTS) + "\n"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNNEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return FunnelTokenizer.train(DOCUMENTS * 5)


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(content))
    return path


def jsonl(documents, column="text"):
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(documents))


def documents_of(corpus):
    return [corpus.tokens(start, n).tolist() for start, n in zip(corpus.starts(), corpus.lengths, strict=True)]


def cache_entries():
    folder = cache_dir() / "corpus"
    return list(folder.iterdir()) if folder.exists() else []


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_text_and_jsonl_contain_the_same_documents(suffix, tmp_path):
    assert list(read_documents(write(tmp_path / f"a.txt{suffix}", TEXT))) == DOCUMENTS
    assert list(read_documents(write(tmp_path / f"a.jsonl{suffix}", jsonl(DOCUMENTS, "body")), "body")) == DOCUMENTS


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("\n\na\nb\n\n\n\nc", ["a\nb", "c"]),
        ("a\r\nb\r\n\r\nc\r\n", ["a\nb", "c"]),
        ("\ufeffa\n", ["a"]),
        ("a\n \nb\n", ["a", "b"]),
        ("", []),
        ("\n\n", []),
    ],
)
def test_empty_lines_separate_documents(content, documents, tmp_path):
    assert list(read_documents(write(tmp_path / "a.txt", content))) == documents


def test_long_documents_are_split_between_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "MAX_CHARACTERS", 8)
    path = write(tmp_path / "a.txt", "aaa\nbbb\nccc\nddddddddddddd\ne\n\nf\n")
    assert list(read_documents(path)) == ["aaa\nbbb", "ccc", "ddddddddddddd", "e", "f"]


# --- encoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("documents", "characters"), [(1024, 2**20), (2, 2**20), (1024, 10)])
def test_tokens_are_those_of_each_document_encoded_by_itself(documents, characters, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "CHUNK_DOCUMENTS", documents)
    monkeypatch.setattr(corpus_module, "CHUNK_CHARACTERS", characters)
    texts = [*DOCUMENTS, "", *DOCUMENTS[::-1]]
    corpus = prepare_corpus([write(tmp_path / "a.jsonl", jsonl(texts)), write(tmp_path / "b.txt.xz", TEXT)], tokenizer)
    expected = [tokenizer.encode([text])[0].input_ids[1:-1] for text in [*texts, *DOCUMENTS]]
    assert documents_of(corpus) == expected
    assert (corpus.n_documents, corpus.n_tokens, corpus.shards[0].dtype) == (13, sum(map(len, expected)), np.uint16)


def test_corpus_in_tiny_shards_equals_that_in_one(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", jsonl(["", *DOCUMENTS, "", ""]))
    one = prepare_corpus([path], tokenizer)
    monkeypatch.setattr(corpus_module, "SHARD_TOKENS", 3)
    monkeypatch.setattr(corpus_module, "CORPUS_VERSION", -1)
    many = prepare_corpus([path], tokenizer)
    assert (len(one.shards), len(many.shards)) == (1, 3)
    assert documents_of(many) == documents_of(one)


def test_large_vocabularies_take_four_bytes_per_token(tmp_path):
    words = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>", *(f"w{i}" for i in range(70_000))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    corpus = prepare_corpus([write(tmp_path / "a.txt", "w0 w69999")], FunnelTokenizer.load(tmp_path))
    assert corpus.shards[0].dtype == np.uint32
    assert documents_of(corpus) == [[5, 70_004]]


def test_corpus_of_mostly_unknown_tokens_gives_a_warning(tokenizer, tmp_path):
    path = write(tmp_path / "a.txt", "a good film 漢字\n")
    for _ in range(2):  # also from the cache
        with pytest.warns(UserWarning, match="40.0% of the corpus' tokens are unknown; use a tokenizer trained"):
            assert prepare_corpus([path], tokenizer).unknown_share == 2 / 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_corpus([write(tmp_path / "b.txt", "a good film\n" * 100 + "漢")], tokenizer)


# --- cache ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* tokens are unknown")
def test_cache_depends_on_contents_tokenizer_and_column(tokenizer, tmp_path, monkeypatch):
    writes = []
    original = corpus_module._Job.write
    monkeypatch.setattr(corpus_module._Job, "write", lambda *args: (writes.append(1), original(*args)))
    path = write(tmp_path / "a.jsonl", '{"text": "a good film", "other": "bad"}\n')
    first = prepare_corpus([path], tokenizer)
    os.utime(path, (0, 0))
    assert prepare_corpus([path.rename(tmp_path / "b.jsonl")], tokenizer).digest == first.digest
    assert len(writes) == 1
    path = tmp_path / "b.jsonl"
    assert documents_of(prepare_corpus([path], tokenizer, "other")) != documents_of(first)
    assert prepare_corpus([path], FunnelTokenizer.train(["good film"] * 5)).digest == first.digest
    assert len(writes) == 3
    assert prepare_corpus([write(path, '{"text": "bad"}')], tokenizer).digest != first.digest
    assert prepare_corpus([write(tmp_path / "a.txt", '{"text": "bad"}')], tokenizer).n_tokens > 1
    assert len(writes) == 5


@pytest.mark.parametrize("name", ["tokens-0000.bin", "lengths.bin", "about.json"])
@pytest.mark.parametrize("is_empty", [False, True])
def test_damaged_cache_entry_is_replaced(name, is_empty, tokenizer, tmp_path):
    path = write(tmp_path / "a.txt", TEXT)
    expected = documents_of(prepare_corpus([path], tokenizer))
    (folder,) = cache_entries()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(b"" if is_empty else content[: len(content) // 2])
    assert documents_of(prepare_corpus([path], tokenizer)) == expected


def test_unwritable_cache_gives_a_warning_and_the_same_corpus(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", TEXT)
    expected = documents_of(prepare_corpus([path], tokenizer))
    write(tmp_path / "file", "")
    monkeypatch.setenv("FUNNEL_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot write"):
        corpus = prepare_corpus([path], tokenizer)
    assert documents_of(corpus) == expected
    folder = os.path.dirname(corpus.shards[0].base.filename)
    assert os.path.isdir(folder)
    del corpus
    assert not os.path.exists(folder)


def report_peak_memory(path, queue):
    import resource

    tokenizer = FunnelTokenizer.train(DOCUMENTS * 5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    corpus = prepare_corpus([path], tokenizer)
    queue.put((corpus.n_documents, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


@pytest.mark.slow
@pytest.mark.parametrize("separator", ["\n", ""])
def test_memory_does_not_grow_with_the_file(separator, tmp_path):
    """With 60 MB of text in many documents, and without any empty line."""
    with (tmp_path / "a.txt").open("w") as file:
        file.writelines(f"{'a good film was bad ' * 30}\n{separator}" for _ in range(100_000))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=report_peak_memory, args=(tmp_path / "a.txt", queue))
    process.start()
    count, kib = queue.get(timeout=240)
    process.join()
    assert count == 100_000 if separator else 200 < count < 300
    assert kib < 200_000


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "corpus .*a.txt: no text; expected plain text"),
        ("a.jsonl", '{"text": ""}\n', "corpus .*a.jsonl: no text"),
        ("a.txt", b"good\nfil\xe9m\n", "a.txt, line 2: not UTF-8 text .byte 3 of the line."),
        ("a.jsonl", '{"text": "a"}\n{"texte": "b"}\n', "line 2: no field 'text'; set text_column to one of the fields, texte"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', "line 2: 'text' has type int; expected a string"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b\\ud800"}\n', "line 2: 'text' contains a lone surrogate"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2: invalid JSON"),
        ("a.jsonl", '["a"]\n', "line 1: expected a JSON object, found list"),
        ("a.csv", "a\n", "corpus .*a.csv: unsupported format"),
        ("a.json.gz", "a\n", "corpus .*a.json.gz: unsupported format"),
        ("a.txt", gzip.compress(b"good", mtime=0), "a.txt: gzip-compressed, but the name does not end in .gz"),
        ("a.txt", lzma.compress(b"good"), "a.txt: xz-compressed"),
    ],
)
def test_malformed_files_are_errors_that_leave_nothing_in_the_cache(name, content, message, tokenizer, tmp_path):
    with pytest.raises(FunnelError, match=message):
        prepare_corpus([write(tmp_path / name, content)], tokenizer)
    assert cache_entries() == []


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "not compressed"])
def test_broken_compressed_files_are_errors(suffix, damage, tokenizer, tmp_path):
    path = write(tmp_path / f"a.txt{suffix}", os.urandom(5000).hex())
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(100)
    path.write_bytes({"truncated": path.read_bytes()[:3000], "changed": content, "not compressed": b"good film"}[damage])
    with pytest.raises(FunnelError, match=f"a.txt{suffix}, line 1: cannot read"):
        prepare_corpus([path], tokenizer)
    assert cache_entries() == []


def test_missing_files_and_folders_are_errors(tokenizer, tmp_path):
    with pytest.raises(FunnelError, match=r"corpus .*b.txt: no such file"):
        prepare_corpus([write(tmp_path / "a.txt", TEXT), tmp_path / "b.txt"], tokenizer)
    with pytest.raises(FunnelError, match="expected a file, found a folder; name the files in it"):
        prepare_corpus([tmp_path], tokenizer)


def test_file_that_changes_while_being_read_is_an_error(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", TEXT)
    original = corpus_module._Job.write
    monkeypatch.setattr(corpus_module._Job, "write", lambda *args: (original(*args), write(path, "other")))
    with pytest.raises(FunnelError, match=r"a.txt: changed while being read; try again"):
        prepare_corpus([path], tokenizer)
    assert cache_entries() == []


def test_full_disk_is_an_error_that_leaves_nothing_in_the_cache(tokenizer, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(corpus_module._ShardWriter, "write", fail)
    with pytest.raises(FunnelError, match=r"cannot write .*cache/corpus/.* \(No space left on device\); set FUNNEL_CACHE"):
        prepare_corpus([write(tmp_path / "a.txt", TEXT)], tokenizer)
    assert cache_entries() == []
