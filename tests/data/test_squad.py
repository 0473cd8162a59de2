"""Reading files in SQuAD's format."""

import gzip
import json
import lzma

import pytest
from conftest import shared
from squad_files import question, single, squad, write

from funnel.data.squad import GoldAnswer, Question, SquadFile, is_squad
from funnel.errors import FunnelError

CONTEXT = "The king 👑 was born in 1900."
BORN = question("q1", "When was he born?", ("1900", 23))


def message_of(path, values, labeled: bool = True) -> str:
    write(path, values)
    with pytest.raises(FunnelError) as error:
        list(SquadFile(path, labeled).rows())
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


def test_questions_are_read_in_order_with_all_answers(tmp_path):
    values = single(CONTEXT, question("a", "When?", ("1900", 23), ("in 1900", 20)), question("b", "Why?", is_impossible=True))
    rows = list(SquadFile(write(tmp_path / "x.json", values)).rows())
    assert rows == [
        Question("a", "When?", CONTEXT, (GoldAnswer("1900", 23), GoldAnswer("in 1900", 20))),
        Question("b", "Why?", CONTEXT, ()),
    ]


@pytest.mark.parametrize("suffix", ["json", "json.gz", "json.xz"])
def test_compressed_files_have_the_same_questions(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    compress = {"json": bytes, "json.gz": gzip.compress, "json.xz": lzma.compress}[suffix]
    path.write_bytes(compress(json.dumps(squad(2)).encode()))
    assert is_squad(path)
    assert [row.id for row in SquadFile(path).rows()][:3] == ["0-0-where", "0-0-who", "0-1-where"]


@pytest.mark.parametrize(("version", "counts"), [("v1.1", (10570, 0, 48)), ("v2.0", (11873, 5945, 35))])
def test_the_published_files_are_read_without_an_error(version, counts):
    file = SquadFile(shared(f"data/squad/dev-{version}.json.xz"))
    rows = list(file.rows())
    assert (len(rows), sum(not row.answers for row in rows), len({row.group for row in rows})) == counts
    assert is_squad(file.path)
    assert file.group_name == "article"
    assert file.has_unanswerable == (version == "v2.0")


def test_answers_are_not_read_from_a_file_for_prediction(tmp_path):
    unlabeled = {name: value for name, value in BORN.items() if name != "answers"}
    path = write(tmp_path / "x.json", single(CONTEXT, unlabeled, question("q2", "?", ("not there", 900))))
    assert [row.answers for row in SquadFile(path, labeled=False).rows()] == [None, None]


@pytest.mark.parametrize(("n_articles", "name", "groups"), [(10, "article", 10), (9, "paragraph", 18)])
def test_questions_are_grouped_by_article_or_in_small_files_by_paragraph(tmp_path, n_articles, name, groups):
    file = SquadFile(write(tmp_path / "x.json", squad(n_articles)))
    assert file.group_name == name
    assert len({row.group for row in file.rows()}) == groups


def test_texts_are_every_context_once_and_all_questions(tmp_path):
    file = SquadFile(write(tmp_path / "x.json", single(CONTEXT, BORN, question("q2", "Where?", ("king", 4)))))
    assert list(file.iter_texts()) == [CONTEXT, "When was he born?", "Where?"]


def test_the_digest_depends_on_the_content_and_on_whether_answers_are_read(tmp_path):
    path = write(tmp_path / "x.json", single(CONTEXT, BORN))
    digests = {SquadFile(path).digest(), SquadFile(path, labeled=False).digest()}
    write(path, single(CONTEXT + " ", BORN))
    assert len(digests | {SquadFile(path).digest()}) == 3


def test_description_counts_questions_without_an_answer(tmp_path):
    file = SquadFile(write(tmp_path / "x.json", squad(2, unanswerable=True)))
    assert file.description == "x.json: 12 questions (4 without an answer), 4 paragraphs, 2 articles"


WITHOUT = object()


def changed(**fields) -> dict:
    values = {**BORN, **fields}
    return single(CONTEXT, {name: value for name, value in values.items() if value is not WITHOUT})


ANSWERS = {
    "not at the offset": ([{"text": "1900", "answer_start": 22}],
                          "the answer '1900' is not at answer_start 22 of the context; it begins at character 23"),
    "not in the context": ([{"text": "1901", "answer_start": 23}], "answer_start 23 of the context; the context does not"),
    "before the context": ([{"text": "1900", "answer_start": -5}], "not at answer_start -5 of the context"),
    "after the context": ([{"text": "1900", "answer_start": 10**9}], "not at answer_start 1000000000 of the context"),
    "empty": ([{"text": " ", "answer_start": 3}], "an answer is empty"),
    "no offset": ([{"text": "1900"}], "no field 'answer_start'; the fields are text"),
    "boolean offset": ([{"text": "1900", "answer_start": True}], "'answer_start' is true; expected an integer"),
    "offset as text": ([{"text": "1900", "answer_start": "23"}], "'answer_start' is \"23\"; expected an integer"),
    "not an object": (["1900"], "expected a JSON object, found str"),
    "lists, as in datasets": ({"text": ["1900"]}, "'answers' is {\"text\": [\"1900\"]}; expected a list"),
    "missing": (WITHOUT, "no answers; they are required in a file to train or evaluate on"),
    "none": ([], "an empty list of answers; a question has either answers or is_impossible true"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_invalid_answer_is_an_error_with_the_questions_id(tmp_path, kind):
    answers, words = ANSWERS[kind]
    message = message_of(tmp_path / "x.json", changed(answers=answers))
    assert message.startswith(", question q1: ")
    assert words in message


def test_answers_of_an_impossible_question_are_an_error(tmp_path):
    message = message_of(tmp_path / "x.json", changed(is_impossible=True))
    assert (
        message == ", question q1: has answers, but is_impossible is true; a question has either answers or is_impossible true"
    )
    assert "'is_impossible' is 1; expected true or false" in message_of(tmp_path / "x.json", changed(is_impossible=1))


STRUCTURES = {
    "a list": ([], ", top level: expected a JSON object, found list"),
    "no data": ({"version": "1.1"}, ", top level: no field 'data'; the fields are version"),
    "data": ({"data": {}}, ", top level: 'data' is {}; expected a list"),
    "no articles": ({"data": []}, ": no questions; expected at least one"),
    "no paragraphs": ({"data": [{"paragraphs": []}]}, ": no questions; expected at least one"),
    "article": ({"data": [{"paragraphs": []}, 1]}, ", data[1]: expected a JSON object, found int"),
    "article without paragraphs": ({"data": [{"title": ""}]}, ", data[0]: no field 'paragraphs'; the fields are title"),
    "paragraph": ({"data": [{"paragraphs": [None]}]}, ", data[0].paragraphs[0]: expected a JSON object, found NoneType"),
    "context": ({"data": [{"paragraphs": [{"context": 1}]}]}, ", data[0].paragraphs[0]: 'context' is 1; expected a string"),
    "questions": ({"data": [{"paragraphs": [{"context": ""}]}]}, ", data[0].paragraphs[0]: no field 'qas'"),
    "id": (changed(id=7), ", data[0].paragraphs[0].qas[0]: 'id' is 7; expected a string"),
    "question": (changed(question=WITHOUT), ", question q1: no field 'question'"),
    "surrogate": (changed(question="\ud800"), ", question q1: 'question' contains a lone surrogate"),
    "duplicate id": (single(CONTEXT, BORN, BORN), ", question q1: duplicate id"),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_a_wrong_structure_is_an_error_with_its_place(tmp_path, kind):
    values, words = STRUCTURES[kind]
    assert message_of(tmp_path / "x.json", values).startswith(words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ": empty; expected JSON in the format of SQuAD"),
        (b'{"data": [', ": invalid JSON (Expecting value: line 1 column 11"),
        (b'{"data": []} x', ": invalid JSON (Extra data: line 1 column 14"),
        (b"[" * 100_000, ": invalid JSON ("),
        (b"\xff\xfe{\0", ": UTF-16 text; convert it to UTF-8"),
        (b'{"\xe9": 1}', ", item 1: not UTF-8 text"),
        (gzip.compress(b"{}", mtime=0), ": gzip-compressed, but the name does not end in .gz"),
    ],
)
def test_files_that_are_not_json_are_errors(tmp_path, content, words):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(FunnelError) as error:
        list(SquadFile(tmp_path / "x.json").rows())
    assert str(error.value).removeprefix(str(tmp_path / "x.json")).startswith(words)


def test_a_truncated_compressed_file_is_an_error(tmp_path):
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(json.dumps(squad(30)).encode())[:-20])
    with pytest.raises(FunnelError, match=r"x\.json\.gz, item 1: cannot read"):
        list(SquadFile(tmp_path / "x.json.gz").rows())


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.json", json.dumps(squad(1)), True),
        ("x.json", json.dumps(squad(1), indent=2), True),
        ("x.json", json.dumps(squad(1))[:-9], True),  # its error is that of the reader
        ("x.JSON", json.dumps(squad(1)), True),
        ("x.json", "\ufeff" + json.dumps(squad(1)), True),
        ("x.jsonl", json.dumps(squad(1)), False),
        ("x.json", '[{"text": "\\"paragraphs\\"", "label": 1}]', False),
        ("x.json", '{"text": "a", "label": "b"}\n', False),
        ("x.json", "", False),
        ("x.json.gz", "not gzip", False),
    ],
)
def test_the_format_is_recognized_by_its_beginning(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert is_squad(tmp_path / name) == expected


def test_a_file_of_one_long_line_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "x.json").write_text("\ufeff" + json.dumps(squad(1) | {"more": "x" * 2**26}))
    assert len(list(SquadFile(tmp_path / "x.json").rows())) == 4


def test_a_missing_file_is_not_in_the_format(tmp_path):
    assert not is_squad(tmp_path / "x.json")
    assert not is_squad(tmp_path)
