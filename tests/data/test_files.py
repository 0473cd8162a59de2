"""Files of examples: what comes out, and what is refused with file and line."""

import csv
import gzip
import json
import os

import pytest

from funnel.data import files
from funnel.data.files import Example, ExampleFile, check_format, read_column_names
from funnel.errors import FunnelError


def write(folder, name, content: bytes):
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def read(path, texts=("sentence",), label="label", **more):
    return [(row.text, row.pair, row.label) for row in ExampleFile(path, texts, label, **more).rows()]


def test_tsv_has_no_quoting_and_keeps_empty_texts_and_spaces(tmp_path):
    path = write(tmp_path, "a.tsv", b'\xef\xbb\xbfsentence\tlabel\r\na "lone quote\t1\r\n\t0\r\n caf\xc3\xa9 \t1')
    assert read(path) == [('a "lone quote', None, "1"), ("", None, "0"), (" café ", None, "1")]


def test_csv_is_what_the_csv_module_writes(tmp_path):
    texts = ['a "fine" film, really', "two\nlines", "", " spaces ", "crlf\r\ninside", "ünï", "comma,", '"', "tab\there"]
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "sentence"])
        writer.writerows([i, "x", text] for i, text in enumerate(texts))
    assert [row[0] for row in read(tmp_path / "a.csv")] == texts


def test_rows_know_the_line_where_they_begin(tmp_path):
    path = write(tmp_path, "a.csv", b'sentence,label\n"two\nlines",1\nthird,0\n')
    assert list(ExampleFile(path, ("sentence",), "label").rows()) == [
        Example("two\nlines", None, "1", 2),
        Example("third", None, "0", 4),
    ]


def test_jsonl_labels_may_be_numbers_and_booleans(tmp_path):
    values = [{"sentence": "a\nb", "label": 1, "more": []}, {"label": "x", "sentence": ""}, {"sentence": "c", "label": 0.5}]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, [*values, {"sentence": "d", "label": True}])).encode())
    assert read(path) == [("a\nb", None, "1"), ("", None, "x"), ("c", None, "0.5"), ("d", None, "true")]


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_pairs_and_columns_in_any_order(tmp_path, name):
    path = write(tmp_path, name, b"label\tb\ta\n1\tsecond\tfirst\n")
    assert read(path, ("a", "b")) == [("first", "second", "1")]


def test_numbered_columns_joined_texts_and_escapes(tmp_path):
    path = write(tmp_path, "a.csv", b'"3","A title","He said ""no"".\\nThen \\""yes\\""."\n')
    assert read(path, (1, 2), 0, joined=True, escaped=True) == [('A title He said "no".\nThen "yes".', None, "3")]
    path = write(tmp_path, "b.tsv", b"gj04\t1\t\tOur friends .\n")
    assert read(path, (3,), 1) == [("Our friends .", None, "1")]


def test_folders_of_texts(tmp_path):
    for label in ("neg", "pos", "unsup"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1_1.txt").write_text(f"{label} one\n")
    (tmp_path / "pos" / "0_9.txt").write_text("pos zero")
    source = ExampleFile(tmp_path, (), "neg pos")
    assert [(row.text, row.label) for row in source.rows()] == [("neg one", "neg"), ("pos zero", "pos"), ("pos one", "pos")]
    (tmp_path / "pos" / "2_2.txt").write_bytes(b"caf\xe9")
    with pytest.raises(FunnelError, match=r"2_2.txt: not UTF-8"):
        list(source.rows())


TSV = b"sentence\tlabel\n"
CSV = b"sentence,label\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.tsv", b"", "empty"),
        ("a.tsv", TSV, "empty"),
        ("a.tsv", b"text\tlabel\na\t1\n", "line 1: no column 'sentence'; it has text, label"),
        ("a.tsv", b"sentence\tlabel\tsentence\na\t1\tb\n", "line 1: the column 'sentence' is there twice"),
        ("a.tsv", TSV + b"a\t1\nb\n", "line 3: 1 fields, but line 1 names 2 columns"),
        ("a.tsv", TSV + b"a\t1\nb\t1\t2\n", "line 3: 3 fields"),
        ("a.tsv", TSV + b"a\t1\n\n", "line 3: 1 fields"),
        ("a.tsv", TSV + b"caf\xe9\t1\n", "line 2: not UTF-8 text .byte 3 of the line"),
        ("a.tsv", TSV + b"a\0b\t1\n", "line 2: has a NUL byte"),
        ("a.tsv", TSV.replace(b"\n", b"\r") + b"a\t1\r", "line 1: lines end with CR alone"),
        ("a.tsv", "sentence\tlabel\na\t1\n".encode("utf-16"), "line 1: .*UTF-"),
        ("a.csv", CSV + b'"open,1\nb,2\n', "line 2: not csv .unexpected end of data"),
        ("a.csv", CSV + b'a,1\n"b"c,2\n', "line 3: not csv"),
        ("a.csv", CSV + b"a,1\n\nb,1\n", "line 3: blank"),
        ("a.csv", CSV + b"a,b,1\n", "line 2: 3 fields"),
        ("a.csv", CSV + b"a,1\rb,2\r", "line 2: not csv"),
        ("a.jsonl", b'{"sentence": "a"}\n', "line 1: no field 'label'; it has sentence"),
        ("a.jsonl", b'{"sentence": 1, "label": 1}\n', "line 1: 'sentence' is 1, not a text"),
        ("a.jsonl", b'{"sentence": "a", "label": null}\n', "line 1: 'label' is null, not a text or number"),
        ("a.jsonl", b'{"sentence": "a", "label": 1}\n[1]\n', "line 2: a JSON list"),
        ("a.jsonl", b'{"sentence": "a", "label": 1, "label": 2}\n', "line 1: the field 'label' is there twice"),
        ("a.jsonl", b'{"sentence": "a", "label": 1}\n\n', "line 2: blank"),
        (
            "a.jsonl",
            b'{"sentence": "a", "label": 1}\n{"sentence": "b\n',
            "line 2: not a JSON object .Unterminated string starting at character 14.",
        ),
        ("a.jsonl", b"[" * 100000, "line 1: not a JSON object"),
    ],
)
def test_mistakes_are_errors_with_file_and_line(tmp_path, name, content, words):
    path = write(tmp_path, name, content)
    with pytest.raises(FunnelError, match=words) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_gz_that_is_none_or_was_cut_off_is_an_error(tmp_path):
    (tmp_path / "a.tsv.gz").write_bytes(TSV)
    with pytest.raises(FunnelError, match=r"a.tsv.gz, line 1: cannot be read .Not a gzipped file"):
        read(tmp_path / "a.tsv.gz")
    whole = gzip.compress(TSV + b"a\t1\n" * 10000)
    (tmp_path / "a.tsv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FunnelError, match=r"cannot be read .*end-of-stream"):
        read(tmp_path / "a.tsv.gz")


def test_an_endless_line_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 1000)
    with pytest.raises(FunnelError, match="line 2: longer than 1,000 bytes"):
        read(write(tmp_path, "a.tsv.gz", TSV + b"a" * 2000))


def test_the_digest_depends_on_content_and_columns_alone(tmp_path):
    first = ExampleFile(write(tmp_path, "a.tsv", TSV + b"a\t1\n"), ("sentence",), "label")
    same = ExampleFile(write(tmp_path, "b.tsv", TSV + b"a\t1\n"), ("sentence",), "label")
    other = ExampleFile(write(tmp_path, "c.tsv", TSV + b"b\t1\n"), ("sentence",), "label")
    assert first.digest() == same.digest() != other.digest()
    assert first.digest() != ExampleFile(first.path, ("label",), "sentence").digest()


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.tsv", b"\xef\xbb\xbfx\ty\r\n1\t2\n"), ("a.csv.gz", b'x,"y"\n1,2\n'), ("a.jsonl", b'{"x": 1, "y": 2}\n')],
)
def test_column_names(tmp_path, name, content):
    assert read_column_names(write(tmp_path, name, content)) == ["x", "y"]


def test_names_of_csv_may_have_line_ends_and_any_length(tmp_path):
    long = "z" * 200_000
    assert read_column_names(write(tmp_path, "a.csv", f'x,"my\nnote",{long}\n1,2,3\n'.encode())) == ["x", "my\nnote", long]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", "a.csv: empty"),
        ("a.tsv", b"\xef\xbb\xbf", "a.tsv: empty"),
        ("a.tsv", b"\ntext\tlabel\n", "line 1: blank; remove the line"),
        ("a.csv", b"\r\ntext,label\n", "line 1: blank; remove the line"),
        ("a.jsonl", b'["a", 1]\n', "line 1: a JSON list, not an object"),
        ("a.jsonl", b'{"x": 1, "x": 2}\n', "line 1: the field 'x' is there twice"),
        ("a.jsonl", b'{"x": 1}\r{"x": 2}\r', "line 1: lines end with CR alone"),
        ("a.csv", b"text,label\ra,1\r", "line 1: lines end with CR alone"),
        ("a.csv", b'"text,label\n', "line 1: not csv"),
    ],
)
def test_names_of_columns_that_cannot_be_read_are_an_error(tmp_path, name, content, words):
    with pytest.raises(FunnelError, match=words):
        read_column_names(write(tmp_path, name, content))


def test_a_cr_within_a_row_is_told_with_its_way_out(tmp_path):
    with pytest.raises(FunnelError, match=r"line 3: not csv .a CR alone, outside of quotes.; convert line ends to LF"):
        read(write(tmp_path, "a.csv", CSV + b"a,1\nb\rc,1\n"))


def test_what_is_no_file_is_told_as_what_it_is(tmp_path):
    (tmp_path / "a.csv").mkdir()
    os.mkfifo(tmp_path / "b.csv")
    for name, words in (
        ("a.csv", "no file but a folder"),
        ("b.csv", "no file but a pipe"),
        ("c.cvs", "no such file; it takes a"),
    ):
        with pytest.raises(FunnelError, match=f"--dev .*{name}: (is )?{words}"):
            check_format("--dev", tmp_path / name)


def test_capitals_in_a_name_do_not_matter(tmp_path):
    (tmp_path / "A.CSV.GZ").write_bytes(gzip.compress(CSV + b"a,1\n"))
    check_format("--data", tmp_path / "A.CSV.GZ")
    assert read(tmp_path / "A.CSV.GZ") == [("a", None, "1")]
