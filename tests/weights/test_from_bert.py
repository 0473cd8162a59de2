"""BERT conversion: exact without position information, close with fitted relative positions; errors."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_sources import are_equal, change_config, make_bert_folder, transformers

from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model.config import FunnelConfig
from funnel.model.heads import FunnelBaseModel
from funnel.weights import from_bert
from funnel.weights.load import read_source


def unpooled_model(config: FunnelConfig, weights: dict[str, torch.Tensor]) -> FunnelBaseModel:
    """All layers of a converted BERT in one block, which does not pool."""
    positions = [f"blocks.{block}.{layer}." for block, spec in enumerate(config.blocks) for layer in range(spec.layers)]
    renamed = {}
    for name, tensor in weights.items():
        index = next((i for i, position in enumerate(positions) if position in name), 0)
        renamed[name.replace(positions[index], f"blocks.0.{index}.")] = tensor
    model = FunnelBaseModel(config.replace(blocks=str(len(positions)))).eval()
    model.load_state_dict(renamed)
    return model


@pytest.mark.parametrize(
    ("layers", "blocks"), [(1, [1]), (2, [1, 1]), (4, [2, 1, 1]), (6, [2, 2, 2]), (12, [4, 4, 4])]
)  # fmt: skip
def test_layers_are_split_into_three_blocks(layers, blocks):
    assert from_bert.split_into_blocks(layers) == blocks


@pytest.mark.parametrize("cls_name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_conversion_is_exact_if_all_position_embeddings_are_equal(cls_name, tmp_path):
    peer = make_bert_folder(tmp_path / "bert", cls_name)
    body = peer if cls_name == "BertModel" else peer.bert
    with torch.no_grad():
        body.embeddings.position_embeddings.weight.copy_(body.embeddings.position_embeddings.weight[:1].clone())
    peer.save_pretrained(tmp_path / "bert")
    source = read_source(tmp_path / "bert")
    assert source.config.layout == "2,1,1"
    ids = torch.randint(5, 99, (3, 20))
    ids[:, 0] = 2
    mask = (torch.arange(20) < torch.tensor([[20], [11], [3]])).long()
    with torch.no_grad():
        expected = body(ids, attention_mask=mask).last_hidden_state
        output = unpooled_model(source.config, source.weights)(ids, mask)
    torch.testing.assert_close(output[mask == 1], expected[mask == 1], rtol=0, atol=1e-4)


def test_fitted_positions_bring_the_output_closer_to_bert(minilm):
    source = read_source(minilm)
    peer = transformers.BertModel.from_pretrained(minilm, add_pooling_layer=False).eval()
    text = "the film was not as dull as the trailer , but the ending came late and nobody in the room laughed at it ."
    ids = torch.tensor([FunnelTokenizer.load(minilm).encode([text])[0].input_ids])
    without_positions = {
        name: torch.zeros_like(tensor) if name.endswith(("r_kernel", "r_r_bias")) else tensor
        for name, tensor in source.weights.items()
    }
    with torch.no_grad():
        expected = peer(ids).last_hidden_state
        fitted, zero = (
            torch.cosine_similarity(unpooled_model(source.config, weights)(ids), expected, dim=-1).mean().item()
            for weights in (source.weights, without_positions)
        )
    assert 1 - fitted < 0.4 * (1 - zero)


def test_weights_that_bert_does_not_have_are_reported(tmp_path):
    make_bert_folder(tmp_path / "bert")
    source = read_source(tmp_path / "bert")
    assert {name.rsplit(".", 1)[-1] for name in source.initialized} == {"r_s_bias", "seg_embed", "r_r_bias", "r_kernel"}
    assert {"pooler.dense.weight", from_bert.POSITIONS, from_bert.TOKEN_TYPES} <= set(source.unused)


def test_relative_positions_are_an_error(tmp_path):
    make_bert_folder(tmp_path / "bert")
    change_config(tmp_path / "bert", position_embedding_type="relative_key")
    with pytest.raises(FunnelError, match="relative_key"):
        read_source(tmp_path / "bert")


def test_missing_position_embeddings_are_an_error(tmp_path):
    make_bert_folder(tmp_path / "bert")
    weights = load_file(tmp_path / "bert/model.safetensors")
    del weights[from_bert.POSITIONS]
    save_file(weights, tmp_path / "bert/model.safetensors")
    with pytest.raises(FunnelError, match=r"missing embeddings\.position_embeddings\.weight"):
        read_source(tmp_path / "bert")


def test_missing_tokenizer_is_an_error(tmp_path):
    make_bert_folder(tmp_path / "bert")
    (tmp_path / "bert/vocab.txt").unlink()
    with pytest.raises(FunnelError, match="bert: no tokenizer found"):
        read_source(tmp_path / "bert")


def test_non_finite_weight_is_named(tmp_path):
    make_bert_folder(tmp_path / "bert")
    weights = load_file(tmp_path / "bert/model.safetensors")
    weights["encoder.layer.0.output.dense.bias"][0] = torch.nan
    save_file(weights, tmp_path / "bert/model.safetensors")
    with pytest.raises(FunnelError, match=r"encoder\.layer\.0\.output\.dense\.bias is not finite"):
        read_source(tmp_path / "bert")


def test_overflowing_attention_scores_are_an_error(tmp_path):
    make_bert_folder(tmp_path / "bert")
    weights = load_file(tmp_path / "bert/model.safetensors")
    weights["encoder.layer.1.attention.self.query.weight"] *= 1e37
    save_file(weights, tmp_path / "bert/model.safetensors")
    with pytest.raises(FunnelError, match="bert: the attention scores of layer 1 overflow"):
        read_source(tmp_path / "bert")


def test_half_precision_weights_are_converted_in_float32(tmp_path):
    make_bert_folder(tmp_path / "bert")
    weights = load_file(tmp_path / "bert/model.safetensors")
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_file(half, tmp_path / "bert/model.safetensors")
    source = read_source(tmp_path / "bert")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in source.weights.values())


def test_old_layer_norm_names_are_recognized(tmp_path):
    make_bert_folder(tmp_path / "bert")
    expected = read_source(tmp_path / "bert").weights
    weights = load_file(tmp_path / "bert/model.safetensors")
    old = {
        f"bert.{name}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for name, tensor in weights.items()
    }
    save_file(old, tmp_path / "bert/model.safetensors")
    assert are_equal(read_source(tmp_path / "bert").weights, expected)
