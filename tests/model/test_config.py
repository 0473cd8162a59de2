"""FunnelConfig: layouts, checks, config.json, released sizes."""

import json

import pytest

from funnel.errors import FunnelError
from funnel.model.config import FunnelConfig, format_blocks, parse_blocks, released_config


@pytest.mark.parametrize(
    ("text", "sizes", "repeats"),
    [
        ("4,4,4", (4, 4, 4), (1, 1, 1)),
        ("6,3x2,3x2", (6, 3, 3), (1, 2, 2)),
        ("2_1x2_1x2", (2, 1, 1), (1, 2, 2)),
        (" 2, 2 ", (2, 2), (1, 1)),
        ("12", (12,), (1,)),
    ],
)
def test_layout_strings_are_read(text, sizes, repeats):
    assert parse_blocks(text) == (sizes, repeats)
    assert parse_blocks(format_blocks(sizes, repeats)) == (sizes, repeats)


@pytest.mark.parametrize("text", ["", "2,,2", "0", "2,x", "-1", "2,2,", "1.5", "2x0", "x2", "2x", "²", "1e3", "9999", "2;2"])
def test_what_is_no_layout_is_an_error_that_names_it(text):
    with pytest.raises(FunnelError, match="--blocks") as error:
        parse_blocks(text)
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", 0),
        ("d_model", 15),
        ("d_model", "768"),
        ("n_head", True),
        ("block_sizes", ()),
        ("block_sizes", (2, 0)),
        ("block_sizes", 4),
        ("block_repeats", (1,)),
        ("hidden_dropout", 1.0),
        ("layer_norm_eps", 0),
        ("pooling_type", "median"),
        ("attention_type", "absolute"),
        ("hidden_act", "tanh"),
        ("separate_cls", 1),
        ("num_decoder_layers", -1),
        ("id2label", {}),
        ("id2label", {1: "a", 2: "b"}),
        ("problem_type", "multi_label"),
    ],
)
def test_impossible_values_are_errors_that_name_the_field(field, value):
    with pytest.raises(FunnelError, match=field):
        FunnelConfig(**{field: value})


def test_a_config_survives_json():
    config = FunnelConfig(block_sizes=(6, 3), block_repeats=(1, 2), id2label={0: "no", 1: "yes", 2: "maybe"})
    values = json.loads(json.dumps(config.to_dict()))
    assert FunnelConfig.from_dict(values) == config
    assert values["label2id"] == {"no": 0, "yes": 1, "maybe": 2}


def test_a_new_layout_forgets_the_old_repeats():
    config = released_config("medium").replace(block_sizes=(2, 2))
    assert config.layout == "2,2"


@pytest.mark.parametrize(
    ("name", "layout", "width", "decoder"),
    [
        ("small", "4,4,4", 768, 2),
        ("small-base", "4,4,4", 768, 0),
        ("medium", "6,3x2,3x2", 768, 2),
        ("intermediate-base", "6,6,6", 768, 0),
        ("funnel-transformer/large", "8,8,8", 1024, 2),
        ("xlarge", "10,10,10", 1024, 2),
    ],
)
def test_released_sizes(name, layout, width, decoder):
    config = released_config(name)
    assert (config.layout, config.d_model, config.num_decoder_layers) == (layout, width, decoder)


def test_an_unknown_release_is_an_error():
    with pytest.raises(FunnelError, match="tiny"):
        released_config("tiny")
