"""The multiple-choice data set made from SQuAD."""

import random

from benchmarks.studies.choices import flatten, lookup_accuracy, make_items, overlap_accuracy, split_articles, write_race
from funnel.data.choices import ChoiceFile

TEXT = "In 1066 William came. In 1215 John signed. In 1348 many died. In 1485 Henry won. In 1603 Anne married."
YEARS = ["1066", "1215", "1348", "1485", "1603"]


def article(name):
    questions = [{"question": f"When was event {i}?", "answers": [{"text": year}]} for i, year in enumerate(YEARS)]
    questions += [{"question": "Who won?", "answers": [{"text": "Henry"}]}, {"question": "?", "answers": []}]
    return {"title": name, "paragraphs": [{"context": f"{name}. {TEXT}", "qas": questions}]}


def test_options_are_the_answer_and_three_others_of_its_kind_from_the_paragraph():
    ((level, item),) = make_items(article("a"), random.Random(0))
    assert level == "high"
    assert len(item["questions"]) == 5  # "Henry" has no other name among the answers beside it
    for i, (_, question, options, label) in enumerate(flatten([item])):
        assert question == f"When was event {i}?"
        assert options[label] == YEARS[i]
        assert len(set(options)) == 4
        assert set(options) <= set(YEARS)


def test_a_distractor_is_not_part_of_a_right_answer():
    paragraph = article("a")["paragraphs"][0]
    paragraph["qas"][0]["answers"].append({"text": "In 1215 John"})
    ((_, item),) = make_items({"paragraphs": [paragraph]}, random.Random(0))
    assert "1215" not in item["options"][0]


def test_options_of_the_middle_level_come_from_the_whole_article():
    both = article("a")
    both["paragraphs"].append({"context": "In 1700 x.", "qas": [{"question": "When x?", "answers": [{"text": "1700"}]}]})
    items = dict(make_items(both, random.Random(0)))
    (row,) = flatten([items["middle"]])
    assert row[1] == "When x?"
    assert row[2][row[3]] == "1700"
    assert set(row[2]) - {"1700"} <= set(YEARS)
    assert lookup_accuracy([items["middle"]]) == 1
    assert lookup_accuracy([items["high"]]) == 0.25


def test_articles_are_in_one_split_only_and_files_can_be_read(tmp_path):
    splits = split_articles([article(f"title{i}") for i in range(8)], seed=0)
    assert {split: len(items) for split, items in splits.items()} == {"train": 6, "dev": 1, "test": 1}
    titles = [{item["article"].split(".")[0] for _, item in items} for items in splits.values()]
    assert len(set.union(*titles)) == 8
    write_race(splits, tmp_path / "out")
    rows = [(row.question, list(row.choices), row.label) for row in ChoiceFile(tmp_path / "out/train").rows()]
    assert rows == [row[1:] for _, item in splits["train"] for row in flatten([item])]
    assert 0 <= overlap_accuracy([item for _, item in splits["dev"]]) <= 1
