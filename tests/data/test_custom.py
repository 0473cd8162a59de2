"""Custom tasks: choosing columns and inferring the kind of labels."""

import pytest

from funnel.data.custom import ColumnChoice, open_examples
from funnel.data.tasks import CUSTOM
from funnel.errors import FunnelError
from funnel.problems.task_args import TaskArgs, load_task


def load(tmp_path, rows, problem=None, header="text,label"):
    (tmp_path / "custom.csv").write_text("\n".join([header, *rows]) + "\n")
    return load_task(TaskArgs(data=tmp_path / "custom.csv", problem=problem))


@pytest.mark.parametrize(
    ("labels", "problem", "expected", "description"),
    [
        (["b", "a", "b"], None, ["a", "b"], "2 classes: a (1), b (2)"),
        (["10", "9", "9"], None, ["9", "10"], "2 classes: 9 (2), 10 (1); problem=regression reads them as scores"),
        (["1.5", "2"], None, None, "scores from 1.5 to 2: regression; problem=classification reads them as classes"),
        ([str(i) for i in range(60)], None, None, "scores from 0 to 59: regression"),
        (["1.5", "2"] * 9, "classification", ["1.5", "2"], "2 classes"),
        (["1", "2"], "regression", None, "scores from 1 to 2"),
        (["0", "x", "nan"], None, ["0", "nan", "x"], "3 classes"),
        (["1.5", "x", "y"], None, ["1.5", "x", "y"], "3 classes"),
        (["1.5", "2", "x"], "classification", ["1.5", "2", "x"], "3 classes"),
        (["pos", "pos ", "neg"], None, ["neg", "pos", "pos "], "3 classes: neg (1), pos (1), 'pos ' (1)"),
        ([f"x{i}" for i in range(11)], "classification", sorted(f"x{i}" for i in range(11)), "11 classes"),
    ],
)
def test_labels_are_classes_or_scores(tmp_path, labels, problem, expected, description):
    task = load(tmp_path, [f"t,{label}" for label in labels], problem)
    assert task.label_names == expected
    assert task.problem == ("regression" if expected is None else "classification")
    assert task.description.splitlines()[1].startswith(description)
    assert task.metrics == (("accuracy", "f1 (macro)") if expected else ("pearson", "spearman", "rmse"))


@pytest.mark.parametrize(
    ("rows", "problem", "header", "message"),
    [
        (["t,a", "t,a"], None, "text,label", "every label is 'a'"),
        (["t,a", "t,b"], "regression", "text,label", "custom.csv, line 2: label 'a' is not a finite float32$"),
        (["t,a"], None, "review,label", "cannot find the text column; choose text_column from review, label"),
        (["t,a"], None, "text,stars", "cannot find the label column; choose label_column from text, stars"),
        ([f"t,x{i}" for i in range(60)], None, "text,label", "60 classes for 60 texts; is 'label' the label column"),
        ([f"t,x{i}" for i in range(11)], None, "text,label", "11 classes for 11 texts; .* pass problem=classification"),
        (["t,a", "t,", "t,b"], None, "text,label", "custom.csv, line 3: 'label' is empty; add the label or remove the row"),
        (
            ["t,1.5", "t,2", "t,n/a"],
            None,
            "text,label",
            "custom.csv, line 4: label 'n/a' is not a finite float32, but most others are numbers; problem=classification",
        ),
        ([f"t,{i}" for i in range(60)] + ["t,nan"], None, "text,label", "line 62: label 'nan' is not a finite"),
        (["t,1.5", "t,1e39"], "regression", "text,label", "line 3: label '1e39' is not a finite float32$"),
        (["t,2020_01", "t,2020_02", "t,1.5"], "regression", "text,label", "line 2: label '2020_01' is not a finite"),
    ],
)
def test_unusable_custom_files_are_rejected(tmp_path, rows, problem, header, message):
    with pytest.raises(FunnelError, match=message):
        load(tmp_path, rows, problem, header)


def test_column_cannot_be_chosen_twice(tmp_path):
    (tmp_path / "custom.csv").write_text("text,label\nt,a\n")
    for pair, label in (("text", None), (None, "text"), ("label", None)):
        with pytest.raises(FunnelError, match=r"custom.csv: column '\w+' is chosen twice"):
            load_task(TaskArgs(data=tmp_path / "custom.csv", text_pair_column=pair, label_column=label))


def test_errors_name_the_parameter_that_resolves_them(tmp_path):
    for rows, header, parameter in (
        (["t,a"], "review,label", "text_column"),
        (["t,a"], "text,stars", "label_column"),
        ([f"t,x{i}" for i in range(11)], "text,label", "problem"),
        (["t,1.5", "t,2", "t,n/a"], "text,label", "problem"),
    ):
        with pytest.raises(FunnelError) as error:
            load(tmp_path, rows, header=header)
        assert error.value.parameter == parameter
        assert parameter in str(error.value)


def test_columns_and_dev_file_are_used(tmp_path):
    for name in ("train.csv", "dev.csv"):
        (tmp_path / name).write_text(f"stars,review,reply\n1,{name},x\n5,b,y\n")
    task = load_task(
        TaskArgs(
            data=tmp_path / "train.csv",
            dev=tmp_path / "dev.csv",
            text_column="review",
            text_pair_column="reply",
            label_column="stars",
        )
    )
    assert (task.name, task.title, task.text_columns) == (CUSTOM, "train.csv", ("review", "reply"))
    assert [next(task.files[split].rows())[:3] for split in ("train", "dev")] == [
        ("train.csv", "x", "1"),
        ("dev.csv", "x", "1"),
    ]


def test_files_of_unknown_format_are_rejected(tmp_path):
    (tmp_path / "a.feather").write_text("")
    (tmp_path / "a.csv").write_text("text,label\nx,1\n")
    message = "not supported; convert the table to .parquet or .csv"
    with pytest.raises(FunnelError, match=f"data .*{message}"):
        load_task(TaskArgs(data=tmp_path / "a.feather"))
    with pytest.raises(FunnelError, match=f"dev .*{message}"):
        load_task(TaskArgs(data=tmp_path / "a.csv", dev=tmp_path / "a.feather"))
    with pytest.raises(FunnelError, match="no such file"):
        load_task(TaskArgs(data=tmp_path / "b.csv"))


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "positive_label", "metric", "expected"),
    [
        ("ab", "b", None, ("accuracy", "f1 (b)")),
        ("abc", "a", "f1", ("f1 (a)", "accuracy")),
        ("abc", None, "f1", ("f1 (macro)", "accuracy")),
        ("ab", None, "f1 (a)", ("f1 (a)", "accuracy", "f1 (macro)")),
        ("ab", "a", "loss", ("loss", "accuracy", "f1 (a)")),
        ("ab", None, "matthews", ("matthews", "accuracy", "f1 (macro)")),
        (["1.5", "2"], None, "rmse", ("rmse", "pearson", "spearman")),
    ],
)
def test_the_chosen_metric_is_the_first(tmp_path, labels, positive_label, metric, expected):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"t,{label}\n" for label in labels))
    args = TaskArgs(data=tmp_path / "a.csv", positive_label=positive_label, metric=metric)
    assert load_task(args).metrics == expected


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (
            "ab",
            {"metric": "rmse"},
            "metric 'rmse' does not apply to a.csv; choose from f1, accuracy, .*, f1 .b., loss$",
        ),
        ("ab", {"metric": "f1 (c)"}, "metric 'f1 .c.' does not apply"),
        ("ab", {"positive_label": "c"}, "unknown positive_label 'c'; choose from a, b$"),
        (["1.5", "2"], {"positive_label": "2"}, "positive_label '2': the labels are scores, not classes"),
        (["1.5", "2"], {"metric": "f1"}, "metric 'f1' does not apply to a.csv; choose from pearson, spearman, rmse, loss$"),
        (["macro", "b"], {"positive_label": "macro"}, "positive_label 'macro': 'f1 .macro.' is the mean over all classes"),
    ],
)
def test_metrics_that_do_not_apply_are_rejected(tmp_path, labels, options, message):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"t,{label}\n" for label in labels))
    with pytest.raises(FunnelError, match=message) as error:
        load_task(TaskArgs(data=tmp_path / "a.csv", **options))
    assert error.value.parameter == next(iter(options))


# --- columns, quoting, folders ----------------------------------------------------------------------------------------


def open_text(tmp_path, name, content, **choice):
    (tmp_path / name).write_text(content)
    return open_examples(tmp_path / name, ColumnChoice(**choice))


@pytest.mark.parametrize(
    ("name", "content", "choice", "columns"),
    [
        ("a.csv", "Text,LABEL\na,b\n", {}, ("Text", "LABEL")),
        ("a.csv", "id, text , label\n1, a, b\n", {}, (" text ", " label")),
        ("a.csv", "Text,sentence,label\na,b,c\n", {}, ("Text", "label")),
        ("a.csv", "REVIEW,Stars\na,b\n", {"text_column": "review", "label_column": "stars"}, ("REVIEW", "Stars")),
        ("a.jsonl", '{"Text": "a", "Label": "b"}\n', {}, ("Text", "Label")),
        ("a.json", '[{"Text": "a", "Label": "b"}]', {}, ("Text", "Label")),
        ("a.csv", "text;label\na, b;c\n", {}, ("text", "label")),
        ("a.csv", 'text\tlabel\na "b\tc\n', {}, ("text", "label")),
        ("a.csv", "review|stars\na|b\n", {"text_column": "review", "label_column": "stars"}, ("review", "stars")),
        ("a.tsv", "text,label\na,b\n", {}, ("text", "label")),
        ("a.csv", "a,b\nc,d\n", {"text_column": "0", "label_column": "1"}, (0, 1)),
        ("a.csv", "a b;b\nc, d;d\n", {"text_column": "0", "label_column": "1"}, (0, 1)),
        ("a.tsv", "b\tx\ta\n", {"text_column": "2", "text_pair_column": "1", "label_column": "0"}, (2, 1, 0)),
        ("a.csv", "good,1\nbad,0\n", {"text_column": "0", "label_column": "1"}, (0, 1)),
        ("a.csv", '"text";"label"\n"a;b";"c"\n', {}, ("text", "label")),
        ("a.csv", "0,1\na,b\n", {"text_column": "0", "label_column": "1"}, ("0", "1")),
        ("a.csv", "what; why\na\n", {"text_column": "what; why", "labeled": False}, ("what; why",)),
        ("a.csv", "Review,text\na,b\n", {"trained": ("review",), "labeled": False}, ("Review",)),
        ("a.csv", "a,b,text\n1,2,3\n", {"trained": ("a", "b"), "labeled": False}, ("a", "b")),
        ("a.csv", "x,y,z\n1,2,3\n", {"trained": ("2", "0"), "labeled": False}, (2, 0)),
        ("a.csv", "text,stars,label\na,b,c\n", {"trained_label": "stars"}, ("text", "stars")),
        ("a.csv", "text,label\na,b\n", {"trained_label": "stars"}, ("text", "label")),
    ],
)
def test_columns_are_found(tmp_path, name, content, choice, columns):
    file = open_text(tmp_path, name, content, **choice)
    assert file.columns == columns
    has_header = isinstance(columns[0], str) and not name.startswith("a.json")
    assert len(list(file.rows())) == len(content.splitlines()) - has_header


@pytest.mark.parametrize(
    ("name", "content", "choice", "message"),
    [
        (
            "a.csv",
            "Text,text ,label\n",
            {"text_column": "TEXT"},
            "no column 'TEXT'; choose text_column from Text, text ",
        ),
        ("a.csv", "text,label\n", {"label_column": "nope"}, "no column 'nope'; choose label_column from text, label$"),
        ("a.csv", "text,label\n", {"text_pair_column": "b"}, "no column 'b'; choose text_pair_column from text, label$"),
        (
            "a.csv",
            "x;y\n",
            {},
            "cannot find the text column; choose text_column from x, y, or, if line 1 is not a header",
        ),
        ("a.csv", f"{'good ' * 20},pos\n", {}, "cannot find the text column; choose text_column from good .{30,40}…, pos, or"),
        ("a.csv", "a,b\n", {"text_column": "0"}, "cannot find the label column; choose label_column from 0 to 1$"),
        ("a.csv", "a,b\n", {"text_column": "0", "label_column": "2"}, "no column '2'; choose label_column from 0 to 1$"),
        ("a.csv", "x,y\n", {}, "cannot find the text column; .*, or, if line 1 is not a header, from 0 to 1$"),
        ("a.csv", "text,label\n", {"text_column": "0"}, "line 1 looks like a header; choose text_column from text, label$"),
        ("a.jsonl", '{"a": 1}\n', {"text_column": "0"}, "no column '0'; choose text_column from a$"),
        ("a.csv", "b\n", {"trained": ("a",), "labeled": False}, "no column 'a'; choose text_column from b"),
    ],
)
def test_missing_columns_raise_errors_that_name_the_parameter(tmp_path, name, content, choice, message):
    with pytest.raises(FunnelError, match=f"{name}: {message}") as error:
        open_text(tmp_path, name, content, **choice)
    assert f"choose {error.value.parameter} from" in str(error.value)


@pytest.mark.parametrize(
    ("rows", "texts"),
    [
        (['"He said ""great"""\tx', "plain\ty"], ['He said "great"', "plain"]),
        (['"a"\t"x"', '"b"\t"y"'], ["a", "b"]),
        (['"two\nlines"\tx', "b\ty"], ["two\nlines", "b"]),
        (['"a\ttab"\tx', "b\ty"], ["a\ttab", "b"]),
        (['"a ""b""\tc\nd"\tx', "e\ty"], ['a "b"\tc\nd', "e"]),
        (['"two\nlines', "b\ty"], None),
        (['a "lone quote\tx', '"b"\ty'], None),
        (['"a" b\tx', "b\ty"], None),
        (['"a\tx', "b\ty", 'c"\ty'], None),
        (['"never closed\tx', "b\ty"], None),
        (["no quotes\tx", "b\ty"], None),
    ],
)
def test_standard_quoting_in_tsv_is_detected_from_the_whole_file(tmp_path, rows, texts):
    (tmp_path / "a.tsv").write_text("".join(f"{row}\n" for row in ["text\tlabel", *rows]))
    file = open_examples(tmp_path / "a.tsv")
    assert ("quotes enclose fields" in file.description) == (texts is not None)
    if texts is not None:
        assert [row.text for row in file.rows()] == texts
    else:
        assert file.dialect is None


def test_train_and_dev_file_detect_their_own_format(tmp_path):
    (tmp_path / "train.tsv").write_text('Text\tlabel\n"a ""b"""\tx\nc\ty\n')
    (tmp_path / "dev.csv").write_text("label;text\nx;a\n")
    task = load_task(TaskArgs(data=tmp_path / "train.tsv", dev=tmp_path / "dev.csv"))
    assert [next(file.rows())[:3] for file in task.files.values()] == [('a "b"', None, "x"), ("a", None, "x")]
    assert task.description.splitlines()[:2] == [
        "train.tsv: text column 'Text', label column 'label', separated by tabs, quotes enclose fields",
        "dev.csv: text column 'text', label column 'label', separated by semicolons",
    ]


def test_dev_file_without_the_columns_of_the_training_file_is_rejected(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "dev.csv").write_text("review,stars\na,x\n")
    message = r"dev .*dev.csv: no column 'text' as in the training file train.csv; rename one of its columns .review, stars.$"
    with pytest.raises(FunnelError, match=message) as error:
        load_task(TaskArgs(data=tmp_path / "train.csv", dev=tmp_path / "dev.csv"))
    assert error.value.parameter == "dev"


def test_dev_file_must_have_a_header_if_the_training_file_has_one_and_vice_versa(tmp_path):
    (tmp_path / "with.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "without.csv").write_text("a,x\nb,y\n")
    numbers = {"text_column": "0", "label_column": "1"}
    for train, dev, names, message in (
        ("with", "without", {}, "no column 'text' as in the training file with.csv"),
        ("without", "with", numbers, "line 1 looks like a header, but the training file without.csv has none"),
    ):
        with pytest.raises(FunnelError, match=f"dev .*{dev}.csv: {message}"):
            load_task(TaskArgs(data=tmp_path / f"{train}.csv", dev=tmp_path / f"{dev}.csv", **names))
    task = load_task(TaskArgs(data=tmp_path / "without.csv", dev=tmp_path / "without.csv", **numbers))
    assert task.files["dev"].columns == (0, 1)


def test_folder_with_train_and_dev_files_is_a_task(tmp_path):
    for name in ("train.csv", "valid.csv", "test.csv", "notes.csv"):
        (tmp_path / name).write_text(f"text,label\n{name},x\nb,y\n")
    task = load_task(TaskArgs(data=tmp_path))
    assert (task.name, task.title) == (CUSTOM, tmp_path.name)
    assert {split: file.path.name for split, file in task.files.items()} == {"train": "train.csv", "dev": "valid.csv"}
    other = load_task(TaskArgs(data=tmp_path, dev=tmp_path / "test.csv"))
    assert other.files["dev"].path.name == "test.csv"
    with pytest.raises(FunnelError, match=r"dev_share cannot be combined with the dev file .*valid.csv"):
        load_task(TaskArgs(data=tmp_path, dev_share=0.2))
    (tmp_path / "dev.jsonl").touch()
    with pytest.raises(FunnelError, match=r"data .*: dev.jsonl and valid.csv are both a dev file; remove one"):
        load_task(TaskArgs(data=tmp_path))


def test_labels_that_may_be_spellings_of_one_are_reported(tmp_path):
    task = load(tmp_path, ["t,Pos", "t,pos", "t,pos ", "t,neg"])
    expected = (
        "labels 'Pos' (1), 'pos' (1), 'pos ' (1) differ only in case, spaces or number format; do they mean the same class?"
    )
    assert task.warnings == (expected,)
    assert load(tmp_path, ["t,1", "t,1.0", "t,0"]).warnings[0].startswith("labels '1' (1), '1.0' (1) differ")
    assert load(tmp_path, ["t,1", "t,0"]).warnings == ()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["5.5"] * 3, "every score is 5.5; is 'label' the label column"),
        (
            ["123456789.25", "123456790.05"],
            "the scores from 123456789.25 to 123456790.05 are almost the same number in float32",
        ),
    ],
)
def test_scores_must_differ_in_float32(tmp_path, labels, message):
    with pytest.raises(FunnelError, match=message):
        load(tmp_path, [f"t,{label}" for label in labels], "regression")
    assert load(tmp_path, ["t,1000000", "u,1000003.5"]).label_names is None


def test_formatted_numbers_are_pointed_out(tmp_path):
    rows = [f't{i},"{number}"' for i, number in enumerate(["1,5", "2,5", "1,5", "2,5"])]
    assert (
        "labels such as '1,5' are read as classes; to train on scores, write plain numbers" in load(tmp_path, rows).warnings[0]
    )
    with pytest.raises(FunnelError, match=r"50 classes for 50 texts; labels such as '100,0 €' are read as classes"):
        load(tmp_path, [f't,"{100 + i},0 €"' for i in range(50)])
    assert load(tmp_path, ["t,a-1", "t,b-2"]).warnings == ()


def test_a_separator_line_for_excel_is_pointed_out(tmp_path):
    with pytest.raises(FunnelError, match=r"a.csv, line 1: the separator, for Excel; remove this line"):
        open_text(tmp_path, "a.csv", "sep=;\ntext;label\na;b\n")
