"""Parity with transformers on random weights, converted by this project.

transformers follows the same pooling rules where the padded length is a multiple of 2**(blocks - 1) and at least 2**blocks,
so that is where they are compared. States at masked positions are meaningless in both and not compared. What transformers
cannot run (short texts, padding without truncation) is tested in test_pooling.py.
"""

import itertools
import math

import pytest
import torch
from conftest import padded_batch

from funnel.model import pooling
from funnel.model.checkpoint import load_weights
from funnel.model.config import FunnelConfig
from funnel.model.heads import MODELS
from funnel.weights.huggingface import TABLE
from funnel.weights.key_map import rename
from funnel.weights.load import read_source

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install funnel[test]")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "vocab_size": 99}
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}

# Every option alone, and the combinations of options that interact in the code.
GRID = [
    *({"block_sizes": [1] * n} for n in range(1, 8)),
    {"block_sizes": [2, 2, 2]},
    {"block_sizes": [2, 1, 1], "block_repeats": [1, 2, 2]},
    {"block_sizes": [1, 2], "block_repeats": [1, 3]},
    {"block_sizes": [3, 1, 2, 1]},
    *(
        {"pooling_type": p, "separate_cls": s, "pool_q_only": q, "attention_type": a}
        for p, s, q, a in itertools.product(("mean", "max"), (True, False), (True, False), ("relative_shift", "factorized"))
    ),
    {"truncate_seq": False},
    {"truncate_seq": False, "pooling_type": "max"},
    {"truncate_seq": False, "pool_q_only": False},
    {"separate_cls": False, "truncate_seq": False},
    {"hidden_act": "gelu"},
    {"hidden_act": "relu"},
    {"num_decoder_layers": 0},
    {"num_decoder_layers": 3},
    {"d_head": 4, "n_head": 3},
    {"layer_norm_eps": 1e-5},
]


def options_id(options: dict) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items()).replace(" ", "")


def make_pair(cls_name: str, folder, **options):
    """A random model of transformers and the same model of this project, converted from its files; in eval mode."""
    torch.manual_seed(0)
    config = transformers.FunnelConfig(**{**SIZES, **NO_DROPOUT, "block_sizes": [1, 2, 1], **options})
    peer = getattr(transformers, cls_name)(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():  # includes biases and LayerNorms, which are initialized to 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.1)
    peer.save_pretrained(folder)
    source = read_source(folder)
    assert source.architecture == cls_name
    model = MODELS[cls_name](source.config).eval()
    assert load_weights(model, source.weights, str(folder)) == []
    return peer, model


def make_batch(config, padded: bool) -> tuple[torch.Tensor, ...]:
    """A batch with a width at which transformers follows the pooling rules.

    Padded texts end where no pooled position is part text, part padding. Both mask such positions, but transformers'
    decoder reads them.
    """
    window = 2 ** (len(config.blocks) - 1)
    width = max(2 * window, window * math.ceil(24 / window))
    lengths = [width, width - min(window - 1, 3), width - 1] if config.separate_cls else [width, width - window]
    return padded_batch(lengths if padded and window > 1 else [width, width], width)


def call_peer(peer, batch, **options):
    return peer(batch[0], attention_mask=batch[1], token_type_ids=batch[2], **options)


def all_states(model, batch) -> list[torch.Tensor]:
    return model.encode_and_decode(*batch) if model.has_decoder else model.encode(*batch)[0]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("options", GRID, ids=options_id)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("cls_name", ["FunnelBaseModel", "FunnelModel"])
@torch.no_grad()
def test_hidden_states_agree(options, padded, cls_name, tmp_path):
    """Also with a float64 version of the model, so that neither of the two hides the other's error."""
    if padded and not options.get("truncate_seq", True):
        pytest.skip("transformers drops partial pairs of padded texts even with truncate_seq=False")
    peer, model = make_pair(cls_name, tmp_path, **options)
    batch = make_batch(model.config, padded)
    peer_states = call_peer(peer, batch, output_hidden_states=True).hidden_states
    exact_model = MODELS[cls_name](model.config).eval().double()
    exact_model.load_state_dict(model.state_dict())
    states, exact_states = all_states(model, batch), all_states(exact_model, batch)
    assert len(peer_states) == len(states)
    masks = [batch[1].bool()]
    for _ in model.config.blocks[1:]:
        masks.append(pooling.pool_mask(masks[-1], model.config))
    mask_of_length = {mask.shape[1]: mask for mask in masks}
    for state, peer_state, exact_state in zip(states, peer_states, exact_states, strict=True):
        assert state.shape == peer_state.shape
        mask = mask_of_length[state.shape[1]]
        assert_close(state[mask], peer_state[mask])
        assert_close(state[mask], exact_state[mask])
        assert_close(peer_state[mask], exact_state[mask])


@pytest.mark.parametrize("options", GRID, ids=options_id)
@pytest.mark.parametrize("cls_name", ["FunnelForSequenceClassification", "FunnelForMaskedLM"])
def test_gradients_of_all_parameters_agree(options, cls_name, tmp_path):
    peer, model = make_pair(cls_name, tmp_path, **options)
    batch = make_batch(model.config, padded=options.get("truncate_seq", True))
    peer_logits, logits = call_peer(peer, batch).logits, model(*batch)
    weights = torch.randn(peer_logits.shape)
    if weights.dim() == 3:
        weights = weights * batch[1].unsqueeze(-1)
    (peer_logits * weights).sum().backward()
    (logits * weights).sum().backward()
    peer_gradients = {
        name.removeprefix("funnel.").replace("lm_head.bias", "lm_bias"): parameter.grad
        for name, parameter in peer.named_parameters()
        if parameter.grad is not None
    }
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert set(gradients) == set(peer_gradients)
    # Some gradients are zero except for rounding (k_head.bias adds the same to all keys); these are compared relative to the
    # largest gradient.
    largest = max(gradient.abs().max().item() for gradient in peer_gradients.values())
    for name, gradient in gradients.items():
        scale = max(peer_gradients[name].abs().max().item(), 1e-3 * largest)
        assert (gradient - peer_gradients[name]).abs().max().item() <= 2e-4 * scale, name


@pytest.mark.parametrize(
    ("cls_name", "fields"),
    [
        ("FunnelForSequenceClassification", ["logits"]),
        ("FunnelForMaskedLM", ["logits"]),
        ("FunnelForPreTraining", ["logits"]),
        ("FunnelForTokenClassification", ["logits"]),
        ("FunnelForQuestionAnswering", ["start_logits", "end_logits"]),
    ],
)
@pytest.mark.parametrize("options", [{}, {"block_sizes": [1] * 5}, {"separate_cls": False}], ids=options_id)
@torch.no_grad()
def test_logits_of_every_head_agree(cls_name, fields, options, tmp_path):
    num_labels = 2 if cls_name == "FunnelForQuestionAnswering" else 3
    peer, model = make_pair(cls_name, tmp_path, num_labels=num_labels, **options)
    batch = make_batch(model.config, padded=True)
    output, actual = call_peer(peer, batch), model(*batch)
    expected = torch.stack([output[field] for field in fields], dim=-1) if len(fields) > 1 else output[fields[0]]
    assert actual.shape == expected.shape
    is_per_token = actual.dim() > 1 and actual.shape[1] == batch[1].shape[1]
    mask = batch[1].bool() if is_per_token else ...
    assert_close(actual[mask], expected[mask])


@torch.no_grad()
def test_logits_of_multiple_choice_agree(tmp_path):
    peer, model = make_pair("FunnelForMultipleChoice", tmp_path)
    batch = tuple(x.view(2, 3, -1) for x in padded_batch([24, 23, 24, 22, 21, 24], 24))
    assert_close(model(*batch), call_peer(peer, batch).logits)


@torch.no_grad()
def test_scores_of_a_regression_agree(tmp_path):
    peer, model = make_pair("FunnelForSequenceClassification", tmp_path, num_labels=1, problem_type="regression")
    batch = make_batch(model.config, padded=True)
    assert_close(model(*batch), call_peer(peer, batch).logits)
    assert model.config.problem_type == "regression"


@pytest.mark.parametrize("num_blocks", [2, 3, 5])
@pytest.mark.parametrize("cls_name", ["FunnelBaseModel", "FunnelModel"])
@torch.no_grad()
def test_unpadded_texts_of_any_length_agree_with_padded_ones_in_transformers(num_blocks, cls_name, tmp_path):
    """This project's models need no padding. With a decoder, lengths start where transformers' own tail has no padding."""
    peer, model = make_pair(cls_name, tmp_path, block_sizes=[1] * num_blocks)
    window = 2 ** (num_blocks - 1)
    for length in range(1 if cls_name == "FunnelBaseModel" else window + 1, 3 * window + 2):
        ids, mask, types = padded_batch([length], seed=length)
        width = max(2 * window, window * math.ceil(length / window))
        padded = [torch.nn.functional.pad(x, (0, width - length)) for x in (ids, mask, types)]
        expected, actual = call_peer(peer, padded)[0], model(ids, mask, types)
        counts = model.encode(ids, mask, types)[1][0] if cls_name == "FunnelBaseModel" else mask[0].bool()
        assert_close(actual[0][counts], expected[0, : actual.shape[1]][counts])


@pytest.mark.parametrize("argument", [None, "attention_mask", "token_type_ids"])
@torch.no_grad()
def test_default_arguments_agree(argument, tmp_path):
    peer, model = make_pair("FunnelModel", tmp_path)
    ids, mask, types = make_batch(model.config, padded=True)
    arguments = {None: {}, "attention_mask": {"attention_mask": mask}, "token_type_ids": {"token_type_ids": types}}[argument]
    counts = mask.bool() if argument == "attention_mask" else torch.ones_like(mask).bool()
    assert_close(model(ids, **arguments)[counts], peer(ids, **arguments)[0][counts])


@torch.no_grad()
def test_the_decoder_reads_the_output_of_block_0_even_with_repeats(tmp_path):
    """transformers takes the decoder's skip connection from the state after `block_sizes[0]` runs, which with repeats is
    inside block 0. This project takes the block's output. So the encoder's states agree and the decoder's differ."""
    peer, model = make_pair("FunnelModel", tmp_path, block_sizes=[1, 1], block_repeats=[2, 1])
    batch = make_batch(model.config, padded=False)
    peer_states, states = call_peer(peer, batch, output_hidden_states=True).hidden_states, all_states(model, batch)
    for index in range(4):
        assert_close(states[index], peer_states[index])
    assert (states[4] - peer_states[4]).abs().max() > 1e-3


@pytest.mark.parametrize("cls_name", ["FunnelModel", "FunnelForSequenceClassification", "FunnelForPreTraining"])
def test_initialization_has_the_same_distributions(cls_name):
    """Compares mean and standard deviation of every weight, in models large enough for these to be precise."""
    torch.manual_seed(0)
    sizes = {"d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 256, "vocab_size": 500, "block_sizes": [1, 1]}
    peer = getattr(transformers, cls_name)(transformers.FunnelConfig(**sizes))
    state = MODELS[cls_name](FunnelConfig.from_dict(sizes)).state_dict()
    for name, expected in peer.state_dict().items():
        actual = state[rename(name.removeprefix("funnel."), TABLE)]
        expected_std = expected.std().item() if expected.numel() > 1 else 0
        margin = 10 / math.sqrt(actual.numel()) * max(expected_std, 1e-9) + 1e-9
        assert abs(actual.mean() - expected.mean()) <= margin, name
        if actual.numel() > 64:
            assert abs(actual.std() - expected.std()) <= margin, name
