"""The original authors' format."""

import json
import shutil

import pytest
import torch
from conftest import shared
from weight_sources import VOCABULARY

from funnel.cli.convert import convert
from funnel.errors import FunnelError
from funnel.model.checkpoint import load_checkpoint
from funnel.weights.load import read_source


@pytest.fixture
def original(tmp_path):
    folder = tmp_path / "original"
    shutil.copytree(shared("golden/original/b2-1x2-1x2_shared"), folder, copy_function=shutil.copyfile)
    (folder / "vocab.uncased.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def test_config_and_classifier_are_converted(original, tmp_path):
    convert(str(original), tmp_path / "out")
    saved = load_checkpoint(tmp_path / "out")
    assert saved.config.layout == "2,1x2,1x2"
    assert saved.architecture == "FunnelForSequenceClassification"
    assert saved.config.num_labels == 3


def test_model_without_classifier_is_a_base_model(original):
    weights = torch.load(original / "model.pt", weights_only=True)
    encoder = {name: tensor for name, tensor in weights.items() if not name.startswith("cls_head")}
    torch.save(encoder, original / "model.pt")
    assert read_source(original).architecture == "FunnelBaseModel"


def test_classifier_with_one_output_is_a_regression(original):
    weights = torch.load(original / "model.pt", weights_only=True)
    weights |= {name: weights[name][..., :1] for name in ("cls_head.3.weight", "cls_head.3.bias")}  # [d, outputs], [outputs]
    torch.save(weights, original / "model.pt")
    config = read_source(original).config
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_weights_without_a_vocabulary_are_converted_with_a_warning(original, tmp_path):
    (original / "vocab.uncased.txt").unlink()
    with pytest.warns(UserWarning, match="no tokenizer found"):
        convert(str(original), tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").config.num_labels == 3


@pytest.mark.parametrize(("field", "value"), [("pooling_size", 4), ("d_embed", 16), ("block_size", "2_x")])
def test_unsupported_config_value_is_an_error(original, field, value):
    path = original / "net_config.pytorch.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(FunnelError, match=field):
        read_source(original)


def test_missing_config_field_is_named(original):
    path = original / "net_config.pytorch.json"
    values = json.loads(path.read_text())
    del values["d_inner"]
    path.write_text(json.dumps(values))
    with pytest.raises(FunnelError, match="missing field 'd_inner'"):
        read_source(original)
