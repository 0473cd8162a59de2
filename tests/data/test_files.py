"""Reading examples from files: accepted formats, and errors that name file and line."""

import csv
import gzip
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest

from funnel.data import files, formats
from funnel.data.files import Example, ExampleFile, parse_score
from funnel.data.formats import Dialect, check_file, read_column_names
from funnel.errors import FunnelError


def write(folder, name, content: bytes):
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def read(path, text_columns=("sentence",), label_column="label", **options):
    file = ExampleFile(path, text_columns, label_column, **options)
    return [(row.text, row.pair, row.label) for row in file.rows()]


def test_tsv_reader_ignores_quotes_and_keeps_empty_texts_and_spaces(tmp_path):
    path = write(tmp_path, "a.tsv", b'\xef\xbb\xbfsentence\tlabel\r\na "lone quote\t1\r\n\t0\r\n caf\xc3\xa9 \t1')
    assert read(path) == [('a "lone quote', None, "1"), ("", None, "0"), (" café ", None, "1")]


def test_csv_reader_reads_what_the_csv_module_writes(tmp_path):
    texts = ['a "fine" film, really', "two\nlines", "", " spaces ", "crlf\r\ninside", "ünï", "comma,", '"', "tab\there"]
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "sentence"])
        writer.writerows([i, "x", text] for i, text in enumerate(texts))
    assert [row[0] for row in read(tmp_path / "a.csv")] == texts


def test_examples_record_the_number_of_their_first_line(tmp_path):
    path = write(tmp_path, "a.csv", b'sentence,label\n"two\nlines",1\nthird,0\n')
    assert list(ExampleFile(path, ("sentence",), "label").rows()) == [
        Example("two\nlines", None, "1", 2),
        Example("third", None, "0", 4),
    ]


def test_jsonl_labels_can_be_numbers_and_booleans(tmp_path):
    values = [{"sentence": "a\nb", "label": 1, "extra": []}, {"label": "x", "sentence": ""}, {"sentence": "c", "label": 0.5}]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, [*values, {"sentence": "d", "label": True}])).encode())
    assert read(path) == [("a\nb", None, "1"), ("", None, "x"), ("c", None, "0.5"), ("d", None, "true")]


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_pairs_are_read_in_any_column_order(tmp_path, name):
    path = write(tmp_path, name, b"label\tb\ta\n1\tsecond\tfirst\n")
    assert read(path, ("a", "b")) == [("first", "second", "1")]


def test_numbered_columns_are_joined_and_unescaped(tmp_path):
    path = write(tmp_path, "a.csv", b'"3","A title","He said ""no"".\\nThen \\""yes\\""."\n')
    assert read(path, (1, 2), 0, joined=True, escaped=True) == [('A title He said "no".\nThen "yes".', None, "3")]
    path = write(tmp_path, "b.tsv", b"gj04\t1\t\tOur friends .\n")
    assert read(path, (3,), 1) == [("Our friends .", None, "1")]


def test_folders_with_one_text_per_file_are_read_in_order(tmp_path):
    for label in ("neg", "pos", "unsup"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1_1.txt").write_text(f"{label} one\n")
    (tmp_path / "pos" / "0_9.txt").write_text("pos zero")
    source = ExampleFile(tmp_path, label_folders=("neg", "pos"))
    assert [(row.text, row.label) for row in source.rows()] == [("neg one", "neg"), ("pos zero", "pos"), ("pos one", "pos")]
    digest = source.digest()
    (tmp_path / "pos" / "0_9.txt").rename(tmp_path / "neg" / "2_9.txt")  # the files stay in the same order
    assert source.digest() != digest
    (tmp_path / "pos" / "2_2.txt").write_bytes(b"caf\xe9")
    with pytest.raises(FunnelError, match=r"2_2.txt: not UTF-8"):
        list(source.rows())


TSV = b"sentence\tlabel\n"
CSV = b"sentence,label\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"", "empty"),
        ("a.tsv", TSV, "empty"),
        ("a.tsv", b"text\tlabel\na\t1\n", "line 1: no column 'sentence'; the columns are text, label"),
        ("a.tsv", b"sentence\tlabel\tsentence\na\t1\tb\n", "line 1: duplicate column 'sentence'"),
        ("a.tsv", TSV + b"a\t1\nb\n", "line 3: 1 field, but line 1 names 2 columns"),
        ("a.tsv", TSV + b"a\t1\nb\t1\t2\n", "line 3: 3 fields"),
        ("a.tsv", TSV + b"a\t1\n\nb\t1\n", "line 3: 1 field"),
        ("a.tsv", TSV + b"caf\xe9\t1\n", "line 2: not UTF-8 text .byte 3 of the line"),
        ("a.tsv", TSV + b"a\0b\t1\n", "line 2: contains a NUL byte"),
        ("a.tsv", TSV.replace(b"\n", b"\r") + b"a\t1\r", "line 1: lines end with CR only"),
        ("a.tsv", "sentence\tlabel\na\t1\n".encode("utf-16"), "a.tsv: UTF-16 text; convert it to UTF-8"),
        ("a.tsv", "sentence\tlabel\na\t1\n".encode("utf-16-le"), "line 1: .*UTF-"),
        ("a.csv", b"PK\x03\x04rest", "a.csv: a spreadsheet or zip archive; save the table as CSV UTF-8"),
        ("a.csv", b"PAR1rest", "a.csv: a parquet file; rename it to .parquet"),
        ("a.csv", CSV + b'"open,1\nb,2\n', "line 2: invalid csv .unexpected end of data"),
        ("a.csv", CSV + b'a,1\n"b"c,2\n', "line 3: invalid csv"),
        ("a.csv", CSV + b"a,1\n\nb,1\n", "line 3: blank"),
        ("a.csv", CSV + b"a,b,1\n", "line 2: 3 fields"),
        ("a.csv", CSV + b"a,1\rb,2\r", "line 2: invalid csv"),
        ("a.jsonl", b'{"sentence": "a"}\n', "line 1: no field 'label'; the fields are sentence"),
        ("a.jsonl", b'{"sentence": 1, "label": 1}\n', "line 1: 'sentence' is 1; expected a string$"),
        (
            "a.jsonl",
            b'{"sentence": "a", "label": null}\n',
            "line 1: 'label' is null; expected a string, a number, or a list",
        ),
        ("a.jsonl", b'{"sentence": "a", "label": 1}\n[1]\n', "line 2: expected a JSON object, found list"),
        ("a.jsonl", b'{"sentence": "a", "label": 1, "label": 2}\n', "line 1: invalid JSON .duplicate field 'label'"),
        ("a.jsonl", b'{"sentence": "a", "label": 1}\n\n{"sentence": "a", "label": 1}\n', "line 2: blank"),
        ("a.json", b"", "empty; expected a list of objects"),
        ("a.json", b"[]", "an empty list"),
        ("a.json", b"3", "expected a list of objects"),
        ("a.json", b'[{"sentence": "a", "label": 1}, 3]', "item 2: expected a JSON object, found int"),
        (
            "a.json",
            b'[{"sentence": "a", "label": 1}, {"sentence"',
            "line 1: invalid JSON .Expecting ':' delimiter at character 44",
        ),
        ("a.json", b'[{"sentence": "a", "label": 1},]', "line 1: invalid JSON .Expecting value at character 32"),
        ("a.json", b'[{"sentence": "a", "label": 1}', "line 1: invalid JSON .Expecting ',' delimiter at character 31"),
        ("a.json", b'[{"sentence": "a", "label": 1}] [', "line 1: invalid JSON .Extra data at character 33"),
        ("a.json", b'[{"sentence": "a", "label": 1, "label": 2}]', "invalid JSON .duplicate field 'label'"),
        ("a.json", b'[{"sentence": "a\xe9", "label": 1}]', "not UTF-8 text"),
        ("a.json", b'{"sentence": {"0": "a"}, "label": {"0": 1}}', "item 1: 'sentence' is .*orient='records'"),
        ("a.json", b'{\n"sentence": ["a"]}', "line 1: invalid JSON .*expected a list of objects, or one object per line"),
        (
            "a.jsonl",
            b'{"sentence": "a", "label": 1}\n{"sentence": "b\n',
            "line 2: invalid JSON .Unterminated string starting at character 14.",
        ),
        ("a.jsonl", b"[" * 100000, "line 1: invalid JSON"),
    ],
)
def test_malformed_files_raise_errors_with_file_and_line(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(FunnelError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", TSV + b"a\t1\n\t0\n\n \r\n"),
        ("a.csv", CSV + b"a,1\n,0\n\n\r\n"),
        ("a.jsonl", b'{"sentence": "a", "label": 1}\n{"sentence": "", "label": 0}\n\n'),
        ("a.json", b'[{"sentence": "a", "label": 1}, {"sentence": "", "label": 0}]\n\n'),
    ],
)
def test_blank_lines_at_the_end_are_ignored(tmp_path, name, content):
    assert read(write(tmp_path, name, content)) == [("a", None, "1"), ("", None, "0")]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_json_list_is_read(tmp_path, name):
    rows = [{"sentence": text, "label": i, "more": [{}]} for i, text in enumerate(["a] , [", "ünï \u2028", '"\\', ""])]
    expected = [(row["sentence"], None, str(row["label"])) for row in rows]
    for options in ({}, {"indent": 2}, {"ensure_ascii": False}):
        assert read(write(tmp_path, name, b"\xef\xbb\xbf " + json.dumps(rows, **options).encode())) == expected
    assert [row.line for row in ExampleFile(tmp_path / name, ("sentence",)).rows()] == [1, 2, 3, 4]


def test_json_file_with_one_object_per_line_is_read(tmp_path):
    path = write(tmp_path, "a.json", b'{"sentence": "a", "label": 1}\n{"sentence": "b", "label": 0}\n')
    assert read(path) == [("a", None, "1"), ("b", None, "0")]


def test_parquet_file_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra parquet")
    from pyarrow import parquet

    table = pyarrow.table({"sentence": ["a\nb", ""], "label": [1, 0], "id": [7, None], "score": [0.5, None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [("a\nb", None, "1"), ("", None, "0")]
    file = ExampleFile(tmp_path / "a.parquet", ("sentence",), extra_columns=("id",))
    assert [row.extra for row in file.rows()] == [("7",), ("null",)]
    assert file.column_names() == ["sentence", "label", "id", "score"]
    with pytest.raises(FunnelError, match=r"a.parquet, row 2: 'score' is null; expected a string, a number, or a list"):
        read(tmp_path / "a.parquet", label_column="score")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(FunnelError, match=r"a.parquet: damaged parquet file"):
        read(tmp_path / "a.parquet")


def test_error_names_the_extra_that_parquet_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(FunnelError, match=r"a.parquet needs the extra parquet .*pyarrow.*'funnel-transformer\[parquet\]'"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "extra"),
    [
        ("a.csv", b"id,sentence,label\n07,a,1\n", "07"),
        ("a.jsonl", b'{"sentence": "a", "id": {"x": [7]}, "label": 1}\n', '{"x": [7]}'),
    ],
)
def test_extra_columns_are_read_as_text(tmp_path, name, content, extra):
    file = ExampleFile(write(tmp_path, name, content), ("sentence",), "label")
    (row,) = replace(file, extra_columns=("id",)).rows()
    assert row == Example("a", None, "1", row.line, (extra,))
    assert replace(file, extra_columns=("id",)).digest() == file.digest()
    assert set(file.column_names()) == {"id", "sentence", "label"}


def test_dialect_is_applied_and_is_part_of_the_digest(tmp_path):
    path = write(tmp_path, "a.tsv", b'sentence\tlabel\n"He said ""great"""\tx\n')
    file = ExampleFile(path, ("sentence",), "label")
    quoted = replace(file, dialect=Dialect("\t", quoted=True))
    assert next(file.rows()).text == '"He said ""great"""'
    assert next(quoted.rows()).text == 'He said "great"'
    assert file.digest() != quoted.digest()


def test_invalid_and_truncated_gzip_files_raise_errors(tmp_path):
    (tmp_path / "a.tsv.gz").write_bytes(TSV)
    with pytest.raises(FunnelError, match=r"a.tsv.gz, line 1: cannot read .Not a gzipped file"):
        read(tmp_path / "a.tsv.gz")
    content = gzip.compress(TSV + b"a\t1\n" * 10000)
    (tmp_path / "a.tsv.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(FunnelError, match=r"cannot read .*end-of-stream"):
        read(tmp_path / "a.tsv.gz")


def test_overlong_lines_raise_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1000)
    with pytest.raises(FunnelError, match="line 2: longer than 1,000 bytes"):
        read(write(tmp_path, "a.tsv.gz", TSV + b"a" * 2000))


def test_digest_depends_on_content_and_columns_only(tmp_path):
    first = ExampleFile(write(tmp_path, "a.tsv", TSV + b"a\t1\n"), ("sentence",), "label")
    same = ExampleFile(write(tmp_path, "b.tsv", TSV + b"a\t1\n"), ("sentence",), "label")
    other = ExampleFile(write(tmp_path, "c.tsv", TSV + b"b\t1\n"), ("sentence",), "label")
    assert first.digest() == same.digest() != other.digest()
    assert first.digest() != ExampleFile(first.path, ("label",), "sentence").digest()


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.tsv", b"\xef\xbb\xbfx\ty\r\n1\t2\n"), ("a.csv.gz", b'x,"y"\n1,2\n'), ("a.jsonl", b'{"x": 1, "y": 2}\n')],
)
def test_column_names_are_read_from_all_formats(tmp_path, name, content):
    assert read_column_names(write(tmp_path, name, content)) == ["x", "y"]


def test_csv_column_names_can_have_line_breaks_and_any_length(tmp_path):
    long = "z" * 200_000
    assert read_column_names(write(tmp_path, "a.csv", f'x,"my\nnote",{long}\n1,2,3\n'.encode())) == ["x", "my\nnote", long]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv: empty"),
        ("a.tsv", b"\xef\xbb\xbf", "a.tsv: empty"),
        ("a.tsv", b"\ntext\tlabel\n", "line 1: blank line; remove it"),
        ("a.csv", b"\r\ntext,label\n", "line 1: blank line; remove it"),
        ("a.jsonl", b'["a", 1]\n', "line 1: expected a JSON object, found list"),
        ("a.jsonl", b'{"x": 1, "x": 2}\n', "line 1: invalid JSON .duplicate field 'x'"),
        ("a.jsonl", b'{"x": 1}\r{"x": 2}\r', "line 1: lines end with CR only"),
        ("a.csv", b"text,label\ra,1\r", "line 1: lines end with CR only"),
        ("a.csv", b'"text,label\n', "line 1: invalid csv"),
    ],
)
def test_malformed_headers_raise_errors(tmp_path, name, content, message):
    with pytest.raises(FunnelError, match=message):
        read_column_names(write(tmp_path, name, content))


def test_error_for_a_cr_inside_a_row_says_what_to_do(tmp_path):
    with pytest.raises(FunnelError, match=r"line 3: invalid csv .a CR outside quotes.; convert the line endings to LF"):
        read(write(tmp_path, "a.csv", CSV + b"a,1\nb\rc,1\n"))


def test_check_file_names_the_parameter_and_what_it_found(tmp_path):
    (tmp_path / "a.csv").mkdir()
    os.mkfifo(tmp_path / "b.csv")
    for name in ("d.xyz", "d.txt", "d.XLSX", "d.csv.zip", "d.pkl", "d.parquet.gz"):
        (tmp_path / name).write_text("")
    for name, message in (
        ("a.csv", "expected a file, found a folder"),
        ("b.csv", "expected a file, found a pipe"),
        ("c.cvs", "no such file; expected a .tsv, .csv, .jsonl, .json"),
        ("c.csv", "no such file$"),
        ("d.xyz", "unknown file format; expected a .tsv, .csv, .jsonl, .json"),
        ("d.txt", "unknown format; name the columns in line 1"),
        ("d.XLSX", "a spreadsheet; save it as CSV UTF-8"),
        ("d.csv.zip", "not supported; unpack the file"),
        ("d.pkl", "not supported; convert the table to .parquet or .csv"),
        ("d.parquet.gz", "unknown file format"),
    ):
        with pytest.raises(FunnelError, match=f"dev .*{name}: {message}") as error:
            check_file(tmp_path / name, "dev")
        assert error.value.parameter == "dev"


def test_file_extensions_are_case_insensitive(tmp_path):
    (tmp_path / "A.CSV.GZ").write_bytes(gzip.compress(CSV + b"a,1\n"))
    check_file(tmp_path / "A.CSV.GZ", "data")
    assert read(tmp_path / "A.CSV.GZ") == [("a", None, "1")]


@pytest.mark.parametrize(
    ("label", "score"), [("2.5", 2.5), ("-1e3", -1000), ("1e39", None), ("nan", None), ("2020_01", None), ("٣", None)]
)
def test_scores_are_finite_float32_numbers(label, score):
    assert parse_score(label) == score


def test_largest_score_is_the_largest_float32():
    assert float(np.finfo(np.float32).max) == files.MAX_SCORE
