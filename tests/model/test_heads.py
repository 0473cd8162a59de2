"""Models: output shapes, input checks, dropout, statelessness, compilation, [CLS]-only last layer, checkpointing."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import count_compiled_graphs, padded_batch, tiny_config

from funnel.errors import FunnelError
from funnel.model.attention_backends import BACKENDS, attention_backend
from funnel.model.heads import (
    MODELS,
    FunnelForMaskedLM,
    FunnelForSequenceClassification,
    FunnelForTokenClassification,
    FunnelModel,
)

OUTPUT_SHAPES = {  # for a batch of 3 with 13 tokens
    "FunnelBaseModel": (3, 4, 16),
    "FunnelModel": (3, 13, 16),
    "FunnelForSequenceClassification": (3, 2),
    "FunnelForMaskedLM": (3, 13, 99),
    "FunnelForPreTraining": (3, 13),
    "FunnelForTokenClassification": (3, 13, 2),
    "FunnelForQuestionAnswering": (3, 13, 2),
}


@pytest.mark.parametrize("name", OUTPUT_SHAPES)
def test_outputs_have_the_documented_shapes(name):
    model = MODELS[name](tiny_config())
    assert model(*padded_batch([13, 5, 1])).shape == OUTPUT_SHAPES[name]


def test_multiple_choice_scores_each_choice_independently():
    ids, mask, types = (x.view(2, 3, 8) for x in padded_batch([8] * 6))
    model = MODELS["FunnelForMultipleChoice"](tiny_config()).eval()
    scores = model(ids, mask, types)
    assert scores.shape == (2, 3)
    torch.testing.assert_close(model(ids[:, 1:2], mask[:, 1:2], types[:, 1:2])[:, 0], scores[:, 1])


def test_state_dict_keys_match_the_file_format():
    keys = set(FunnelForSequenceClassification(tiny_config(blocks="1,2", num_decoder_layers=0)).state_dict())
    layer = {
        *(f"attention.{name}" for name in ("r_w_bias", "r_r_bias", "r_s_bias", "r_kernel", "seg_embed", "q_head.weight")),
        *(
            f"{module}.{kind}"
            for module, kind in itertools.product(
                ("attention.k_head", "attention.v_head", "attention.post_proj", "attention.layer_norm",
                 "ffn.linear_1", "ffn.linear_2", "ffn.layer_norm"),
                ("weight", "bias"),
            )
        ),
    }  # fmt: skip
    assert keys == {
        "embeddings.word_embeddings.weight", "embeddings.layer_norm.weight", "embeddings.layer_norm.bias",
        "classifier.linear_hidden.weight", "classifier.linear_hidden.bias",
        "classifier.linear_out.weight", "classifier.linear_out.bias",
        *(f"encoder.blocks.{place}.{name}" for place in ("0.0", "1.0", "1.1") for name in layer),
    }  # fmt: skip


@pytest.mark.parametrize("embedding_size", [None, 6])
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
def test_the_masked_lm_head_with_a_transform_computes_the_formula(embedding_size, hidden_act):
    """Linear, activation, LayerNorm, word embeddings; in numpy."""
    torch.manual_seed(0)
    config = tiny_config(lm_head_transform=True, embedding_size=embedding_size, hidden_act=hidden_act, layer_norm_eps=1e-3)
    model = FunnelForMaskedLM(config).double().eval()
    torch.nn.init.normal_(model.lm_bias)
    torch.nn.init.normal_(model.lm_layer_norm.bias)
    batch = padded_batch([13, 7])
    hidden = model.encode_and_decode(*batch)[-1]
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    x = hidden.detach().numpy() @ weights["lm_projection.weight"].T + weights["lm_projection.bias"]
    activations = {
        "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
        "gelu_new": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": lambda x: np.maximum(x, 0),
    }
    x = activations[hidden_act](x)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    x = x * weights["lm_layer_norm.weight"] + weights["lm_layer_norm.bias"]
    expected = x @ weights["embeddings.word_embeddings.weight"].T + weights["lm_bias"]
    np.testing.assert_allclose(model(*batch).detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(model.token_logits(hidden[:, 3:5]).detach().numpy(), expected[:, 3:5], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("embedding_size", [None, 6])
def test_a_masked_lm_without_a_transform_has_the_weights_of_earlier_versions(embedding_size):
    head = {"lm_bias"} | ({"lm_projection.weight", "lm_projection.bias"} if embedding_size else set())
    names = set(FunnelForMaskedLM(tiny_config(embedding_size=embedding_size)).state_dict())
    assert names - set(FunnelModel(tiny_config(embedding_size=embedding_size)).state_dict()) == head


@pytest.mark.parametrize("embedding_size", [None, 6])
def test_a_masked_lm_with_a_transform_survives_saving_and_loading(embedding_size, tmp_path):
    model = FunnelForMaskedLM(tiny_config(lm_head_transform=True, embedding_size=embedding_size)).eval()
    model.save_pretrained(tmp_path)
    loaded = FunnelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(*padded_batch([9, 4])), model(*padded_batch([9, 4])))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((torch.zeros(4, dtype=torch.long),), "input_ids"),
        ((torch.zeros(2, 0, dtype=torch.long),), "input_ids"),
        ((torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4)), "attention_mask"),
        ((torch.zeros(2, 3, dtype=torch.long), None, torch.zeros(1, 3)), "token_type_ids"),
    ],
)
def test_an_input_of_the_wrong_shape_is_an_error_that_names_it(arguments, name):
    with pytest.raises(FunnelError, match=name):
        FunnelModel(tiny_config())(*arguments)


@pytest.mark.parametrize("token_id", [99, -1])
def test_an_id_outside_the_vocabulary_is_an_error_that_names_it(token_id):
    ids = torch.tensor([[2, 5], [2, token_id]])
    with pytest.raises(FunnelError, match=f"input_ids contains {token_id}, but the model has 99 embeddings"):
        FunnelModel(tiny_config())(ids)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_an_empty_output(name, backend):
    model = MODELS[name](tiny_config(hidden_dropout=0.1, attention_dropout=0.1))
    shape = (0, 3, 13) if name == "FunnelForMultipleChoice" else (0, 13)
    ids = torch.zeros(shape, dtype=torch.long)
    with attention_backend(backend):
        output = model.train()(ids, torch.ones_like(ids), torch.zeros_like(ids))
        output.sum().backward()
        expected = (0, 3) if name == "FunnelForMultipleChoice" else (0, *OUTPUT_SHAPES[name][1:])
        assert output.shape == model.eval()(ids).shape == expected
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_regression_scores_have_the_units_of_the_labels():
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config(id2label={0: "score"}, problem_type="regression")).eval()
    standardized = model(*padded_batch([9, 5]))
    model.config = model.config.replace(label_mean=50_000.0, label_std=20_000.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(*padded_batch([9, 5])).dtype == torch.float32
    torch.testing.assert_close(model(*padded_batch([9, 5])), standardized * 20_000 + 50_000)


def test_position_0_is_never_masked():
    model = FunnelForSequenceClassification(tiny_config()).eval()
    ids, mask, types = padded_batch([9, 4])
    without_cls = mask.clone()
    without_cls[:, 0] = 0
    assert torch.equal(model(ids, without_cls, types), model(ids, mask, types))


# --- dropout and state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["hidden_dropout", "attention_dropout", "activation_dropout"])
def test_each_kind_of_dropout_is_active_only_in_training_mode(field):
    batch = padded_batch([13, 9])
    model = FunnelForSequenceClassification(tiny_config(**{field: 0.5})).train()
    assert (model(*batch) != model(*batch)).any()
    model.eval()
    assert torch.equal(model(*batch), model(*batch))


def test_dropout_applies_to_the_distance_encodings():
    def cosines(**options):
        encoder = FunnelModel(tiny_config(**options)).train().encoder
        return encoder.distance_encodings(64, torch.float32, torch.device("cpu"))[:, 8:]

    exact, dropped_out = cosines(), cosines(hidden_dropout=0.5)
    is_dropped = dropped_out == 0
    assert 0.4 < is_dropped.float().mean() < 0.6
    torch.testing.assert_close(dropped_out[~is_dropped], 2 * exact[~is_dropped])


def test_forward_keeps_no_state_on_modules():
    model = FunnelModel(tiny_config()).eval()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    first = model(*padded_batch([13]))
    model(*padded_batch([40, 3]))
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert before.keys() == after.keys()
    assert all(before[name].keys() == after[name].keys() for name in before)
    assert torch.equal(model(*padded_batch([13])), first)


# --- compilation and export -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "max_graphs"),
    [
        ("FunnelForSequenceClassification", {}, 1),
        ("FunnelForSequenceClassification", {"blocks": "1,1x2,2", "pool_q_only": False}, 1),
        ("FunnelForMaskedLM", {"pooling_type": "max"}, 1),
        # One graph for even and one for odd lengths, because odd ones are padded by one position.
        ("FunnelForSequenceClassification", {"separate_cls": False, "truncate_seq": False}, 2),
        ("FunnelForMaskedLM", {"separate_cls": False, "truncate_seq": False}, 2),
    ],
)
def test_forward_compiles_to_one_graph_for_all_lengths(name, changes, max_graphs):
    torch.manual_seed(0)
    assert count_compiled_graphs(MODELS[name](tiny_config(**changes)).eval()) <= max_graphs


# --- [CLS] only in the last layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"blocks": "2,1"}, {"blocks": "1"}, {"blocks": "1,2,1x3"}, {"pool_q_only": False}, {"separate_cls": False}]
)
def test_computing_cls_only_in_the_last_layer_does_not_change_the_logits(changes):
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(tiny_config(**changes)).double().eval()
    batch = padded_batch([13, 30, 1])
    states, _ = model.encode(*batch)
    cls_states, _ = model.encode(*batch, cls_only=True)
    assert cls_states[-1].shape == (3, 1, model.config.d_model)
    torch.testing.assert_close(cls_states[-1], states[-1][:, :1], rtol=0, atol=1e-12)
    torch.testing.assert_close(model(*batch), model.classifier(states[-1][:, 0]), rtol=0, atol=1e-12)


# --- gradient checkpointing -------------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_gradients_and_saves_less():
    torch.manual_seed(0)
    model = FunnelForTokenClassification(tiny_config(hidden_dropout=0.3, attention_dropout=0.3)).train()
    gradients, saved_elements = [], []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        torch.manual_seed(1)
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(*padded_batch([40, 33])).square().sum()
        saved_elements.append(sum(sizes))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for gradient, checkpointed_gradient in zip(*gradients, strict=True):
        assert torch.equal(gradient, checkpointed_gradient)
    assert saved_elements[1] < saved_elements[0] / 3
