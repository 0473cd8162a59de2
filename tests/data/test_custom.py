"""Custom tasks: choosing columns and inferring the kind of labels."""

import pytest

from funnel.data.tasks import CUSTOM, TaskArgs, load_task
from funnel.errors import FunnelError


def load(tmp_path, rows, problem=None, header="text,label"):
    (tmp_path / "custom.csv").write_text("\n".join([header, *rows]) + "\n")
    return load_task(TaskArgs(data=tmp_path / "custom.csv", problem=problem))


@pytest.mark.parametrize(
    ("labels", "problem", "expected", "description"),
    [
        (["b", "a", "b"], None, ["a", "b"], "2 classes: a (1), b (2)"),
        (["10", "9", "9"], None, ["9", "10"], "2 classes: 9 (2), 10 (1); set problem to regression to treat them as scores"),
        (["1.5", "2"], None, None, "scores from 1.5 to 2: regression; set problem to classification to treat them as classes"),
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
    assert task.num_labels == len(expected or [""])
    assert task.description.startswith(description)
    assert task.metrics == {0: ("pearson", "spearman"), 2: ("accuracy", "f1")}.get(
        len(expected or ()), ("accuracy", "macro_f1")
    )


@pytest.mark.parametrize(
    ("rows", "problem", "header", "message"),
    [
        (["t,a", "t,a"], None, "text,label", "every label is 'a'"),
        (["t,a", "t,b"], "regression", "text,label", "custom.csv, line 2: label 'a' is not a finite float32$"),
        (["t,a"], None, "review,label", "cannot find the text column; choose text_column from review, label"),
        (["t,a"], None, "text,stars", "cannot find the label column; choose label_column from text, stars"),
        ([f"t,x{i}" for i in range(60)], None, "text,label", "60 classes for 60 texts; is 'label' the label column"),
        ([f"t,x{i}" for i in range(11)], None, "text,label", "11 classes for 11 texts; .* set problem to classification"),
        (["t,a", "t,", "t,b"], None, "text,label", "custom.csv, line 3: 'label' is empty; add the label or remove the row"),
        (
            ["t,1.5", "t,2", "t,n/a"],
            None,
            "text,label",
            "custom.csv, line 4: label 'n/a' is not a finite float32, but most others are numbers; set problem",
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
    (tmp_path / "a.parquet").write_text("")
    (tmp_path / "a.csv").write_text("text,label\nx,1\n")
    message = "unknown file format; expected a .tsv, .csv or .jsonl file"
    with pytest.raises(FunnelError, match=f"data .*{message}"):
        load_task(TaskArgs(data=tmp_path / "a.parquet"))
    with pytest.raises(FunnelError, match=f"dev .*{message}"):
        load_task(TaskArgs(data=tmp_path / "a.csv", dev=tmp_path / "a.parquet"))
    with pytest.raises(FunnelError, match="no such file"):
        load_task(TaskArgs(data=tmp_path / "b.csv"))
