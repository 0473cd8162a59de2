"""The models: calls, dropout, no state, no graph breaks, saving and loading."""

import pytest
import torch
from conftest import padded_batch, tiny_config

from funnel.errors import FunnelError
from funnel.model.heads import MODELS, FunnelForSequenceClassification, FunnelForTokenClassification, FunnelModel

SHAPES = {
    "FunnelBaseModel": (3, 4, 16),
    "FunnelModel": (3, 13, 16),
    "FunnelForSequenceClassification": (3, 2),
    "FunnelForMaskedLM": (3, 13, 99),
    "FunnelForPreTraining": (3, 13),
    "FunnelForTokenClassification": (3, 13, 2),
    "FunnelForQuestionAnswering": (3, 13, 2),
}


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_have_the_documented_shapes(name):
    model = MODELS[name](tiny_config())
    assert model(*padded_batch([13, 5, 1])).shape == SHAPES[name]


def test_multiple_choice_scores_each_choice():
    ids, mask, types = (x.view(2, 3, 8) for x in padded_batch([8] * 6))
    model = MODELS["FunnelForMultipleChoice"](tiny_config()).eval()
    scores = model(ids, mask, types)
    assert scores.shape == (2, 3)
    torch.testing.assert_close(model(ids[:, 1:2], mask[:, 1:2], types[:, 1:2])[:, 0], scores[:, 1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(4, dtype=torch.long),), "input_ids"),
        ((torch.zeros(2, 0, dtype=torch.long),), "input_ids"),
        ((torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4)), "attention_mask"),
        ((torch.zeros(2, 3, dtype=torch.long), None, torch.zeros(1, 3)), "token_type_ids"),
    ],
)
def test_wrong_shapes_are_errors_that_name_the_argument(arguments, words):
    with pytest.raises(FunnelError, match=words):
        FunnelModel(tiny_config())(*arguments)


def test_every_dropout_of_the_paper_is_at_work():
    batch = padded_batch([13, 9])
    for field in ("hidden_dropout", "attention_dropout", "activation_dropout"):
        model = FunnelForSequenceClassification(tiny_config(**{field: 0.5})).train()
        assert (model(*batch) != model(*batch)).any(), field
        model.eval()
        assert torch.equal(model(*batch), model(*batch))


def test_sines_and_cosines_are_dropped_out_too():
    build = FunnelModel(tiny_config(hidden_dropout=0.5)).train().encoder.attention_inputs
    encodings = build.distances(64, torch.float32, torch.device("cpu"))
    cosines = encodings[:, 8:]
    exact = FunnelModel(tiny_config()).encoder.attention_inputs.distances(64, torch.float32, torch.device("cpu"))[:, 8:]
    dropped = cosines == 0
    assert 0.4 < dropped.float().mean() < 0.6
    torch.testing.assert_close(cosines[~dropped], 2 * exact[~dropped])


def test_the_forward_keeps_nothing_on_modules():
    model = FunnelModel(tiny_config()).eval()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    first = model(*padded_batch([13]))
    model(*padded_batch([40, 3]))
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert before.keys() == after.keys()
    assert all(before[name].keys() == after[name].keys() for name in before)
    assert torch.equal(model(*padded_batch([13])), first)


@pytest.mark.parametrize(
    ("name", "changes", "most"),
    [
        ("FunnelForSequenceClassification", {}, 1),
        ("FunnelForMaskedLM", {"pooling_type": "max"}, 1),
        # One for even lengths, one for odd: a partner is made up.
        ("FunnelForSequenceClassification", {"separate_cls": False, "truncate_seq": False}, 2),
        ("FunnelForMaskedLM", {"separate_cls": False, "truncate_seq": False}, 2),
    ],
)
def test_the_forward_compiles_to_one_graph_for_all_lengths(name, changes, most):
    """With fullgraph=True a break is an error. Tracing alone (backend eager): the kernels are PyTorch's business."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = MODELS[name](tiny_config(**changes)).eval()
    graphs = 0

    def count(graph, _):
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    for length in (13, 20, 33, 64, 65, 100):
        batch = padded_batch([length, length - 4])
        torch.testing.assert_close(compiled(*batch), model(*batch))
    assert graphs <= most


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_loads_as_it_was(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name](tiny_config(block_repeats=(1, 2, 1))).eval()
    model.save_pretrained(tmp_path / "saved")
    loaded = MODELS[name].from_pretrained(tmp_path / "saved")
    assert loaded.config == model.config
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


@pytest.mark.filterwarnings("ignore:.*the head is new")
def test_a_body_fits_every_class(tmp_path):
    body = FunnelModel(tiny_config())
    body.save_pretrained(tmp_path / "body")
    for name, cls in MODELS.items():
        loaded = cls.from_pretrained(tmp_path / "body").state_dict()
        for key, tensor in body.state_dict().items():
            if key in loaded:
                assert torch.equal(loaded[key], tensor), (name, key)


def test_a_model_with_a_decoder_needs_the_decoders_weights(tmp_path):
    FunnelForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "base")
    with pytest.raises(FunnelError, match=r"missing decoder\.layers"):
        FunnelModel.from_pretrained(tmp_path / "base")


def test_a_head_that_is_not_there_is_new_and_says_so(tmp_path):
    FunnelModel(tiny_config()).save_pretrained(tmp_path / "body")
    with pytest.warns(UserWarning, match="the head is new"):
        FunnelForSequenceClassification.from_pretrained(tmp_path / "body")


def test_position_0_counts_whatever_the_mask_says():
    model = FunnelForSequenceClassification(tiny_config()).eval()
    ids, mask, types = padded_batch([9, 4])
    without = mask.clone()
    without[:, 0] = 0
    assert torch.equal(model(ids, without, types), model(ids, mask, types))


@pytest.mark.parametrize(
    "changes", [{}, {"block_sizes": (2, 1)}, {"block_repeats": (1, 1, 3)}, {"pool_q_only": False}, {"separate_cls": False}]
)
def test_a_classifier_computes_cls_alone_in_its_last_layer_and_loses_nothing(changes):
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(
        tiny_config(**{"block_repeats": (1,) * len(changes.get("block_sizes", "123")), **changes})
    )
    model = model.double().eval()
    batch = padded_batch([13, 30, 1])
    whole, _ = model.encode(*batch)
    only, _ = model.encode(*batch, cls_only=True)
    assert only[-1].shape == (3, 1, model.config.d_model)
    torch.testing.assert_close(only[-1], whole[-1][:, :1], rtol=0, atol=1e-12)
    torch.testing.assert_close(model(*batch), model.classifier(whole[-1][:, 0]), rtol=0, atol=1e-12)


def test_gradient_checkpointing_changes_no_gradient_and_keeps_less():
    torch.manual_seed(0)
    model = FunnelForTokenClassification(tiny_config(hidden_dropout=0.3, attention_dropout=0.3)).train()
    gradients, kept = [], []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        torch.manual_seed(1)
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(*padded_batch([40, 33])).square().sum()
        kept.append(sum(sizes))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)
    assert kept[1] < kept[0] / 3
