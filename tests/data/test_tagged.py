"""Files of tagged sentences: what is read, and errors with file and line."""

import gzip
import json
import re

import pytest
from conftest import shared

from funnel.data.tagged import InMemorySentences, TaggedFile, has_token_lists
from funnel.errors import FunnelError

EXPECTED = [(["New York", "is"], ["B-place", "O"], [2, 3]), (["big"], ["O"], [6])]
TABS = "-DOCSTART- -X- O\nNew York\tB-place\nis\tO\n\n\t\nbig\tO\n"


def read(file: TaggedFile) -> list[tuple]:
    return [(sentence.words, sentence.tags, list(sentence.lines)) for sentence in file.rows()]


def write(tmp_path, content: str | bytes, name: str = "x.conll"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("content", [TABS, TABS.replace("\n", "\r\n"), "\ufeff" + TABS, TABS.rstrip("\n"), TABS + "\n\n"])
def test_columns_are_words_and_tags_and_blank_lines_end_sentences(content, tmp_path):
    assert read(TaggedFile(write(tmp_path, content))) == EXPECTED


def test_gzipped_files_are_read(tmp_path):
    assert read(TaggedFile(write(tmp_path, gzip.compress(TABS.encode()), "x.conll.gz"))) == EXPECTED


def test_columns_may_be_separated_by_spaces_and_chosen_by_number(tmp_path):
    path = write(tmp_path, "-DOCSTART- -X- O O\n\nEU  NNP B-NP\tI-ORG\n\n".replace("\t", " ") + "a\u00a0b DT I-NP O\n")
    assert read(TaggedFile(path)) == [(["EU"], ["I-ORG"], [3]), (["a\u00a0b"], ["O"], [5])]
    assert [tags for _, tags, _ in read(TaggedFile(path, 0, 1))] == [["NNP"], ["DT"]]


def test_unlabeled_files_have_any_number_of_columns(tmp_path):
    for content in ("a\nb\n\nc\n", "a\tO\nb\tO\n\nc\tO\n"):
        sentences = list(TaggedFile(write(tmp_path, content), labeled=False).rows())
        assert [sentence.words for sentence in sentences] == [["a", "b"], ["c"]]
        assert all(sentence.tags is None for sentence in sentences)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_objects_have_lists_and_a_sentence_without_words_is_kept(name, tmp_path):
    rows = [{"tokens": ["a b", "\t"], "tags": ["O", "B-x"]}, {"tokens": [], "tags": []}, {"tokens": ["c"], "tags": ["O"]}]
    content = json.dumps(rows) if name == "x.json" else "".join(json.dumps(row) + "\n" for row in rows)
    path = write(tmp_path, content, name)
    assert read(TaggedFile(path)) == [(["a b", "\t"], ["O", "B-x"], [1, 1]), ([], [], []), (["c"], ["O"], [3])]
    assert has_token_lists(path, ("tokens", "tags"))
    assert not has_token_lists(path, ("tokens", "labels"))


def test_parquet_files_are_read(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"tokens": [["a"], []], "pos": [["DT"], []]}), tmp_path / "x.parquet")
    assert read(TaggedFile(tmp_path / "x.parquet", tag_column="pos")) == [(["a"], ["DT"], [1]), ([], [], [])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tO\nb\0\tO\n", "x.conll, line 2: contains a NUL byte"),
        (b"a\tO\n\nb\xff\tO\n", "x.conll, line 3: not UTF-8 text"),
        (b"a\tO\nb\n", "x.conll, line 2: 1 column, but line 1 has 2, separated by tabs"),
        (b"\na\tO\na\tb\tO\n", "x.conll, line 3: 3 columns, but line 2 has 2, separated by tabs"),
        (b"a O\nb c O\n", "x.conll, line 2: 3 columns, but line 1 has 2, separated by spaces"),
        (b"word\n", "x.conll, line 1: 1 column; expected a word and its tag"),
        (b"a\tO\n\tO\n", "x.conll, line 2: the word is empty"),
        (b"a\tO\nb\t\n", "x.conll, line 2: the tag is empty"),
        (b"a\tO\rb\tO\r", "x.conll, line 1: lines end with CR only"),
        (b"\n-DOCSTART- O\n\n", "x.conll: empty; expected at least one word"),
        (b"\xff\xfea\0", "x.conll: UTF-16 text"),
    ],
)
def test_malformed_column_files_are_errors_with_file_and_line(content, message, tmp_path):
    with pytest.raises(FunnelError, match=re.escape(message)):
        read(TaggedFile(write(tmp_path, content)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "line 2: 2 words in 'tokens', but 1 tag in 'tags'; expected one tag per word"),
        ({"tokens": ["a"]}, "line 2: no field 'tags'; choose label_column from tokens"),
        ({"tokens": "a b", "tags": ["O"]}, "line 2: 'tokens' is \"a b\"; expected a list of strings"),
        ({"tokens": ["a"], "tags": [3]}, "line 2: tags[0] is 3; expected a string"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "line 2: tokens[1] is empty"),
        ({"tokens": ["a\ud800"], "tags": ["O"]}, "line 2: tokens[0] contains a lone surrogate"),
    ],
)
def test_malformed_objects_are_errors_with_file_and_line(row, message, tmp_path):
    path = write(tmp_path, json.dumps({"tokens": ["a"], "tags": ["O"]}) + "\n" + json.dumps(row) + "\n", "x.jsonl")
    with pytest.raises(FunnelError, match=re.escape(f"x.jsonl, {message}")):
        read(TaggedFile(path))


def test_columns_that_do_not_exist_are_errors_that_name_the_parameter(tmp_path):
    path = write(tmp_path, "a\tO\n")
    for column in (2, "pos"):
        with pytest.raises(FunnelError, match=r"no column .*; choose label_column from 0 to 1") as error:
            read(TaggedFile(path, tag_column=column))
        assert error.value.parameter == "label_column"


def test_the_digest_depends_on_content_and_columns(tmp_path):
    path = write(tmp_path, "a\tx\tO\n")
    digests = [TaggedFile(path).digest(), TaggedFile(path, tag_column=1).digest(), TaggedFile(path, labeled=False).digest()]
    path.write_text("a\tx\tB-y\n")
    assert len({*digests, TaggedFile(path).digest()}) == 4
    assert InMemorySentences([["a"]]).digest() != InMemorySentences([["b"]]).digest()


def test_wnut17_has_the_published_numbers_of_sentences_and_words():
    sizes = {"wnut17train.conll": (3394, 62730), "emerging.dev.conll": (1009, 15733), "emerging.test.annotated": (1287, 23394)}
    for name, expected in sizes.items():
        sentences = list(TaggedFile(shared(f"data/wnut17/{name}")).rows())
        assert (len(sentences), sum(len(sentence.words) for sentence in sentences)) == expected
