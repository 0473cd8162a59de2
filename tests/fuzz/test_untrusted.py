"""Property tests: reading arbitrary content gives a result or a FunnelError, and what is written can be read back."""

import contextlib
import csv
import io
import json

import pytest

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis generates the files")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from targets import CONFIG, TARGETS  # noqa: E402

from funnel.data.files import ExampleFile  # noqa: E402
from funnel.errors import FunnelError  # noqa: E402
from funnel.model.config import MODEL_TYPES, FunnelConfig, format_blocks, parse_blocks  # noqa: E402
from funnel.weights.surgery import INITS, KEEPS, make_plan, read_plan, write_plan  # noqa: E402

few_examples = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
many_examples = settings(max_examples=500, deadline=None)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=12,
)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
CONFIG_FIELDS = FunnelConfig().to_dict()


@pytest.fixture(scope="module")
def valid_folder(tmp_path_factory):
    """A function that makes a target's folder, once per target."""
    folders = {}

    def make(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("valid")
            TARGETS[name].make(folders[name])
        return folders[name]

    return make


def read_content(name, folder, content):
    """Overwrites a target's file and reads its folder; only FunnelError is expected."""
    (folder / TARGETS[name].file).write_bytes(content)
    with contextlib.suppress(FunnelError):
        TARGETS[name].read(folder)


@many_examples
@given(st.text(alphabet="0123456789x,_ -.é٣", max_size=30))
def test_layout_strings_are_rejected_or_can_be_formatted_and_parsed_again(text):
    try:
        blocks = parse_blocks(text)
    except FunnelError:
        return
    assert len(blocks) == text.count(",") + text.count("_") + 1
    assert parse_blocks(format_blocks(blocks)) == blocks


@pytest.mark.slow
@many_examples
@given(st.dictionaries(st.sampled_from(list(CONFIG_FIELDS)), json_values))
def test_configs_are_rejected_or_survive_a_round_trip(changes):
    try:
        config = FunnelConfig.from_dict({**CONFIG_FIELDS, **changes})
    except FunnelError:
        return
    assert FunnelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", ["config.json", "transformers config.json", "BERT config.json", "layout plan", "run.json"])
@few_examples
@given(st.data())
def test_any_json_gives_a_result_or_a_clear_error(name, valid_folder, data):
    folder = valid_folder(name)
    fields = {"layout plan": ["layers"], "run.json": ["version", "command", "settings", "arguments"]}
    known = fields.get(name, [*CONFIG_FIELDS, "model_type", "hidden_size", "format"])
    content = data.draw(json_values | st.dictionaries(st.sampled_from(known), json_values))
    read_content(name, folder, json.dumps(content).encode())


@few_examples
@given(st.data())
def test_any_change_of_a_bert_config_gives_a_result_or_a_clear_error(tmp_path, data):
    TARGETS["BERT config.json"].make(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    optional = ["pad_token_id", "is_decoder", "position_embedding_type", "embedding_size", "num_hidden_groups"]
    changes = dict.fromkeys([*values, *optional], json_values) | {"model_type": st.sampled_from(MODEL_TYPES)}
    names = data.draw(st.lists(st.sampled_from(list(changes)), min_size=1, max_size=3, unique=True))
    values |= {name: data.draw(changes[name]) for name in names}
    read_content("BERT config.json", tmp_path, json.dumps(values).encode())


@pytest.mark.parametrize("name", ["safetensors", "tokenizer.json", "vocab.txt", "training_state.pt", "data.tsv", "data.csv",
                                  "data.jsonl", "data.json", "data.csv.gz", "metrics.jsonl"])  # fmt: skip
@few_examples
@given(st.data())
def test_any_bytes_give_a_result_or_a_clear_error(name, valid_folder, data):
    encoded_text = st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
    read_content(name, valid_folder(name), data.draw(st.binary(max_size=300) | encoded_text))


@few_examples
@given(json_values, st.binary(max_size=64))
def test_any_safetensors_header_gives_a_result_or_a_clear_error(valid_folder, header, rest):
    text = json.dumps(header).encode()
    read_content("safetensors", valid_folder("safetensors"), len(text).to_bytes(8, "little") + text + rest)


@pytest.mark.parametrize("format_name", ["csv", "jsonl", "tsv"])
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8))
def test_files_written_by_standard_libraries_are_read_unchanged(format_name, tmp_path, rows):
    path = tmp_path / f"x.{format_name}"
    if format_name == "tsv":  # cannot represent tabs and line breaks
        rows = [tuple("".join(c for c in text if c not in "\t\n\r") for text in row) for row in rows]
        content = "a\tb\n" + "".join(f"{a}\t{b}\n" for a, b in rows)
    elif format_name == "jsonl":
        content = "".join(json.dumps({"b": b, "a": a}) + "\n" for a, b in rows)
    else:
        file = io.StringIO(newline="")
        csv.writer(file, lineterminator="\r\n", quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
        content = file.getvalue()
    path.write_bytes(content.encode())
    assert [(example.text, example.label) for example in ExampleFile(path, ("a",), "b").rows()] == rows


@few_examples
@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.sampled_from(INITS), st.sampled_from(KEEPS))
def test_layout_plans_survive_a_round_trip(tmp_path, sizes, init, keep):
    new = CONFIG.replace(blocks=",".join(map(str, sizes)))
    plan = make_plan(CONFIG, new, init, keep)
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json", CONFIG, new) == plan
