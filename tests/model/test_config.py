"""FunnelConfig: layout strings, validation, config.json, the released models."""

import json
import math

import pytest

from funnel.errors import FunnelError
from funnel.model.config import BlockSpec, FunnelConfig, format_blocks, parse_blocks, released_config


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("4,4,4", ((4, 1), (4, 1), (4, 1))),
        ("6,3x2,3x2", ((6, 1), (3, 2), (3, 2))),
        ("2_1x2_1x2", ((2, 1), (1, 2), (1, 2))),
        (" 2, 2 ", ((2, 1), (2, 1))),
        ("12", ((12, 1),)),
    ],
)
def test_layout_strings_are_parsed(text, blocks):
    assert parse_blocks(text) == blocks
    assert parse_blocks(format_blocks(parse_blocks(text))) == blocks
    assert FunnelConfig(blocks=text).blocks == blocks
    assert FunnelConfig().replace(blocks=text).blocks == blocks


def test_runs_are_layers_times_repeats():
    assert [block.runs for block in parse_blocks("6,3x2")] == [6, 6]
    assert BlockSpec(4).runs == 4


@pytest.mark.parametrize("text", ["", "2,,2", "0", "2,x", "-1", "2,2,", "1.5", "2x0", "x2", "2x", "²", "1e3", "9999", "2;2"])
def test_an_invalid_layout_string_is_an_error_that_quotes_it(text):
    with pytest.raises(FunnelError) as error:
        parse_blocks(text)
    assert (
        str(error.value)
        == f"invalid blocks {text!r}: expected layer counts such as 4,4,4 or 6,3x2,3x2, with numbers from 1 to 999"
    )
    assert error.value.parameter == "blocks"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", 0),
        ("d_model", 15),
        ("d_model", "768"),
        ("n_head", True),
        ("blocks", ()),
        ("blocks", ((2, 1), (0, 1))),
        ("blocks", ((2, 1), (2, 0))),
        ("blocks", ((2, 1, 1),)),
        ("blocks", (2, 2)),
        ("blocks", 4),
        ("blocks", ((999, 1),) * 3),
        ("blocks", ((999, 999),)),
        ("hidden_dropout", 1.0),
        ("layer_norm_eps", 0),
        ("pooling_type", "median"),
        ("attention_type", "absolute"),
        ("hidden_act", "tanh"),
        ("separate_cls", 1),
        ("num_decoder_layers", -1),
        ("id2label", {}),
        ("id2label", {1: "a", 2: "b"}),
        ("id2label", 2),
        ("problem_type", "multi_label"),
        ("relative_attention", 0),
        ("lm_head_transform", "yes"),
        ("distance_buckets", 2),
        ("distance_buckets", 5),
        ("distance_buckets", -4),
        ("distance_buckets", 512),
        ("position_embeddings", -1),
        ("position_embeddings", 1.5),
        ("position_offset", 1),
        ("token_type_embeddings", True),
        ("embedding_size", 0),
        ("classifier_act", "softmax"),
        ("family", "gpt2"),
    ],
)
def test_an_invalid_value_is_an_error_that_names_the_field(field, value):
    with pytest.raises(FunnelError, match=f"invalid {field}"):
        FunnelConfig(**{field: value})


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"block_sizes": []}, "block_sizes"),
        ({"block_sizes": [2, 0]}, "block_sizes"),
        ({"block_sizes": 4}, "block_sizes"),
        ({"block_sizes": "4,4,4"}, "block_sizes"),
        ({"block_repeats": [1]}, "block_repeats"),
        ({"block_sizes": [2, 2], "block_repeats": [1, True]}, "block_repeats"),
        ({"block_sizes": [999] * 3}, "blocks"),
        ({"d_model": 15}, "d_model"),
    ],
)
def test_an_invalid_config_json_is_an_error_that_names_file_and_field(values, name):
    with pytest.raises(FunnelError, match=f"^some/config.json: .*{name}"):
        FunnelConfig.from_dict(values, "some/config.json")


def test_a_config_round_trips_through_json():
    config = FunnelConfig(
        blocks="6,3x2",
        relative_attention=False,
        distance_buckets=32,
        position_embeddings=514,
        position_offset=2,
        token_type_embeddings=1,
        embedding_size=128,
        classifier_act="relu",
        family="mpnet",
        id2label={0: "no", 1: "yes", 2: "maybe"},
    )
    values = json.loads(json.dumps(config.to_dict()))
    assert FunnelConfig.from_dict(values) == config
    assert (values["block_sizes"], values["block_repeats"]) == ([6, 3], [1, 2])
    assert "blocks" not in values
    assert values["label2id"] == {"no": 0, "yes": 1, "maybe": 2}


def test_an_odd_width_is_an_error_only_with_relative_attention():
    assert FunnelConfig(d_model=15, relative_attention=False).d_model == 15  # ("d_model", 15) is an error above


def test_max_positions_excludes_the_rows_before_the_offset():
    assert FunnelConfig().max_positions is None
    assert FunnelConfig(position_embeddings=514, position_offset=2).max_positions == 512


def test_missing_fields_of_a_config_json_get_defaults():
    assert FunnelConfig.from_dict({"unknown": 1}) == FunnelConfig()
    assert FunnelConfig.from_dict({"block_sizes": [2, 3]}).layout == "2,3"
    assert FunnelConfig.from_dict({"block_sizes": [2, 3], "block_repeats": None}).layout == "2,3"
    assert FunnelConfig.from_dict({"block_repeats": [1, 2, 2]}).layout == "4,4x2,4x2"


def test_a_new_layout_does_not_inherit_repeats():
    config = released_config("medium").replace(blocks="2,2")
    assert config.layout == "2,2"


@pytest.mark.parametrize(
    ("name", "layout", "d_model", "decoder_layers"),
    [
        ("small", "4,4,4", 768, 2),
        ("small-base", "4,4,4", 768, 0),
        ("medium", "6,3x2,3x2", 768, 2),
        ("intermediate-base", "6,6,6", 768, 0),
        ("funnel-transformer/large", "8,8,8", 1024, 2),
        ("xlarge", "10,10,10", 1024, 2),
    ],
)
def test_released_models_have_the_published_sizes(name, layout, d_model, decoder_layers):
    config = released_config(name)
    assert (config.layout, config.d_model, config.num_decoder_layers) == (layout, d_model, decoder_layers)


def test_an_unknown_released_model_is_an_error():
    with pytest.raises(FunnelError, match="unknown model 'tiny'"):
        released_config("tiny")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("label_mean", math.nan),
        ("label_std", 0.0),
        ("label_std", math.inf),
        ("model_max_length", 0),
        ("model_max_length", True),
        ("text_columns", "text"),
        ("text_columns", [1]),
    ],
)
def test_fields_of_a_fine_tuned_classifier_are_checked(field, value):
    with pytest.raises(FunnelError, match=f"invalid {field} "):
        FunnelConfig(**{field: value})
