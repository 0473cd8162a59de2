"""Whatever a file holds, reading it gives a result or a FunnelError; what is written comes back (hypothesis)."""

import contextlib
import csv
import io
import json
import sys
from pathlib import Path

import pytest

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis makes up the files here")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent / "faults"))

from targets import CONFIG, TARGETS  # noqa: E402

from funnel.data.files import ExampleFile  # noqa: E402
from funnel.errors import FunnelError  # noqa: E402
from funnel.model.config import INITS, KEEPS, FunnelConfig, format_blocks, parse_blocks  # noqa: E402
from funnel.weights import surgery  # noqa: E402

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
many = settings(max_examples=500, deadline=None)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=12,
)
FIELDS = FunnelConfig().to_dict()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Makes a target's folder once."""
    made = {}

    def function(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("good")
            TARGETS[name].make(made[name])
        return made[name]

    return function


def use(name, good, content):
    """Puts content into a target's file and uses the folder; anything but a FunnelError comes through."""
    (good(name) / TARGETS[name].file).write_bytes(content)
    with contextlib.suppress(FunnelError):
        TARGETS[name].use(good(name))


@many
@given(st.text(alphabet="0123456789x,_ -.é٣", max_size=30))
def test_layout_strings(text):
    try:
        sizes, repeats = parse_blocks(text)
    except FunnelError:
        return
    assert len(sizes) == len(repeats) == text.count(",") + text.count("_") + 1
    assert parse_blocks(format_blocks(sizes, repeats)) == (sizes, repeats)


@many
@given(st.dictionaries(st.sampled_from(list(FIELDS)), values))
def test_config_fields(changes):
    try:
        config = FunnelConfig.from_dict({**FIELDS, **changes})
    except FunnelError:
        return
    assert FunnelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", ["config.json", "transformers' config.json", "BERT's config.json", "plan", "run.json"])
@quick
@given(st.data())
def test_json_files(name, good, data):
    good(name)
    known = {"plan": ["layers"], "run.json": ["command", "settings"]}.get(
        name, [*FIELDS, "model_type", "hidden_size", "format"]
    )
    content = data.draw(values | st.dictionaries(st.sampled_from(known), values))
    use(name, good, json.dumps(content).encode())


@pytest.mark.parametrize("name", ["safetensors", "tokenizer.json", "vocab.txt", "training_state.pt", "data.tsv", "data.csv",
                                  "data.jsonl", "data.csv.gz", "metrics.jsonl"])  # fmt: skip
@quick
@given(st.data())
def test_any_bytes(name, good, data):
    use(
        name, good, data.draw(st.binary(max_size=300) | st.text(max_size=100).map(lambda t: t.encode("utf-8", "surrogatepass")))
    )


@quick
@given(values, st.binary(max_size=64))
def test_safetensors_headers(good, header, rest):
    text = json.dumps(header).encode()
    use("safetensors", good, len(text).to_bytes(8, "little") + text + rest)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "tsv"])
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8))
def test_what_other_programs_write_is_read_as_it_was(kind, tmp_path, rows):
    path = tmp_path / f"x.{kind}"
    if kind == "tsv":  # it has no way to write these
        rows = [tuple("".join(c for c in text if c not in "\t\n\r") for text in row) for row in rows]
        content = "a\tb\n" + "".join(f"{a}\t{b}\n" for a, b in rows)
    elif kind == "jsonl":
        content = "".join(json.dumps({"b": b, "a": a}) + "\n" for a, b in rows)
    else:
        file = io.StringIO(newline="")
        csv.writer(file, lineterminator="\r\n", quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
        content = file.getvalue()
    path.write_bytes(content.encode())
    assert [(row.text, row.label) for row in ExampleFile(path, ("a",), "b").rows()] == rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@quick
@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.sampled_from(INITS), st.sampled_from(KEEPS))
def test_plans_come_back(folder, sizes, init, keep):
    new = CONFIG.replace(block_sizes=tuple(sizes))
    plan = surgery.make_plan(CONFIG, new, init, keep)
    surgery.write_plan(folder / "plan.json", plan)
    assert surgery.read_plan(folder / "plan.json", CONFIG, new) == plan
