"""Parity with transformers on random weights that went through our conversion.

transformers agrees with our pooling contract where the padded length is a multiple of 2**(blocks - 1) and at least
2**blocks, so that is where it is asked. States at positions that are masked out mean nothing on either side and are not
compared. What transformers cannot run (short texts, padding without truncation) is tested in test_pooling.py.
"""

import itertools
import math

import pytest
import torch
from conftest import padded_batch

from funnel.model import pooling
from funnel.model.checkpoint import load_weights
from funnel.model.heads import MODELS
from funnel.weights.load import read_weights_from

transformers = pytest.importorskip("transformers", reason="the peer is not installed: pip install funnel[test]")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BASE = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "vocab_size": 99}
DROPOUT_OFF = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}

# Every option alone and the pairs of options that meet in one place of the code.
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


def name_of(options: dict) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items()).replace(" ", "")


def pair(cls_name: str, folder, seed: int = 0, **options):
    """A random model of transformers, and ours converted from its files. Both in eval mode."""
    torch.manual_seed(seed)
    config = transformers.FunnelConfig(**{**BASE, **DROPOUT_OFF, "block_sizes": [1, 2, 1], **options})
    peer = getattr(transformers, cls_name)(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():  # biases and LayerNorms too, which are drawn as 0 and 1
            parameter.add_(torch.randn_like(parameter) * 0.1)
    peer.save_pretrained(folder)
    source = read_weights_from(folder)
    assert source.architecture == cls_name
    ours = MODELS[cls_name](source.config).eval()
    assert load_weights(ours, source.weights, str(folder)) == []
    return peer, ours


def batch_for(config, padded: bool) -> tuple[torch.Tensor, ...]:
    """A batch at a width where transformers keeps the contract. Padded texts end where no pooled position is part text,
    part padding: such ones are masked out on both sides, but transformers' decoder reads them."""
    window = 2 ** (len(config.block_sizes) - 1)
    width = max(2 * window, window * math.ceil(24 / window))
    lengths = [width, width - min(window - 1, 3), width - 1] if config.separate_cls else [width, width - window]
    return padded_batch(lengths if padded and window > 1 else [width, width], width)


def call(model, batch, **more):
    return model(batch[0], attention_mask=batch[1], token_type_ids=batch[2], **more)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("options", GRID, ids=name_of)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("cls_name", ["FunnelBaseModel", "FunnelModel"])
def test_every_hidden_state_agrees(options, padded, cls_name, tmp_path):
    if padded and not options.get("truncate_seq", True):
        pytest.skip("transformers drops partial pairs of padded texts even with truncate_seq=False")
    peer, ours = pair(cls_name, tmp_path, **options)
    batch = batch_for(ours.config, padded)
    with torch.no_grad():
        theirs = call(peer, batch, output_hidden_states=True).hidden_states
        exact = MODELS[cls_name](ours.config).eval().double()
        exact.load_state_dict(ours.state_dict())

        def states_of(model):
            return model.encode(*batch)[0] if cls_name == "FunnelBaseModel" else model.encode_and_decode(*batch)

        found, reference = states_of(ours), states_of(exact)
    assert len(theirs) == len(found)
    masks = [batch[1].bool()]
    for _ in ours.config.block_sizes[1:]:
        masks.append(pooling.pool_mask(masks[-1], ours.config))
    by_length = {m.shape[1]: m for m in masks}
    for ours_state, their_state, exact_state in zip(found, theirs, reference, strict=True):
        assert ours_state.shape == their_state.shape
        counts = by_length[ours_state.shape[1]]
        close(ours_state[counts], their_state[counts], 1e-5)
        close(ours_state[counts], exact_state[counts], 1e-5)
        close(their_state[counts], exact_state[counts], 1e-5)


@pytest.mark.parametrize("options", GRID, ids=name_of)
@pytest.mark.parametrize("cls_name", ["FunnelForSequenceClassification", "FunnelForMaskedLM"])
def test_the_gradient_of_every_parameter_agrees(options, cls_name, tmp_path):
    peer, ours = pair(cls_name, tmp_path, **options)
    padded = options.get("truncate_seq", True)
    batch = batch_for(ours.config, padded)
    their_logits, our_logits = call(peer, batch).logits, ours(*batch)
    weights = torch.randn(their_logits.shape)
    if weights.dim() == 3:
        weights = weights * batch[1].unsqueeze(-1)
    (their_logits * weights).sum().backward()
    (our_logits * weights).sum().backward()
    theirs = {}
    for name, parameter in peer.named_parameters():
        name = name.removeprefix("funnel.").replace("lm_head.bias", "lm_bias")
        if parameter.grad is not None:
            theirs[name] = parameter.grad
    ours_by_name = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert set(ours_by_name) == set(theirs)
    # A gradient that is zero but for rounding (k_head.bias adds the same to all keys) is held against the largest one.
    largest = max(g.abs().max().item() for g in theirs.values())
    for name, gradient in ours_by_name.items():
        scale = max(theirs[name].abs().max().item(), 1e-3 * largest)
        assert (gradient - theirs[name]).abs().max().item() <= 2e-4 * scale, name


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
@pytest.mark.parametrize("options", [{}, {"block_sizes": [1] * 5}, {"separate_cls": False}], ids=name_of)
def test_logits_of_every_head_agree(cls_name, fields, options, tmp_path):
    peer, ours = pair(cls_name, tmp_path, num_labels=2 if cls_name == "FunnelForQuestionAnswering" else 3, **options)
    batch = batch_for(ours.config, padded=True)
    with torch.no_grad():
        theirs, found = call(peer, batch), ours(*batch)
    expected = torch.stack([theirs[f] for f in fields], dim=-1) if len(fields) > 1 else theirs[fields[0]]
    assert found.shape == expected.shape
    counts = batch[1].bool() if found.dim() > 1 and found.shape[1] == batch[1].shape[1] else ...
    close(found[counts], expected[counts], 1e-5)


def test_logits_of_multiple_choice_agree(tmp_path):
    peer, ours = pair("FunnelForMultipleChoice", tmp_path)
    batch = tuple(x.view(2, 3, -1) for x in padded_batch([24, 23, 24, 22, 21, 24], 24))
    with torch.no_grad():
        close(ours(*batch), call(peer, batch).logits, 1e-5)


def test_regression_has_one_output(tmp_path):
    peer, ours = pair("FunnelForSequenceClassification", tmp_path, num_labels=1, problem_type="regression")
    batch = batch_for(ours.config, padded=True)
    with torch.no_grad():
        close(ours(*batch), call(peer, batch).logits, 1e-5)
    assert ours.config.problem_type == "regression"


@pytest.mark.parametrize("blocks", [2, 3, 5])
@pytest.mark.parametrize("cls_name", ["FunnelBaseModel", "FunnelModel"])
def test_a_text_of_any_length_agrees_with_transformers_fed_the_padded_text(blocks, cls_name, tmp_path):
    """Ours needs no padding. With a decoder, from the length on where transformers' own tail holds no padding."""
    peer, ours = pair(cls_name, tmp_path, block_sizes=[1] * blocks)
    window = 2 ** (blocks - 1)
    for length in range(1 if cls_name == "FunnelBaseModel" else window + 1, 3 * window + 2):
        ids, mask, types = padded_batch([length], seed=length)
        width = max(2 * window, window * math.ceil(length / window))
        padded = [torch.nn.functional.pad(x, (0, width - length)) for x in (ids, mask, types)]
        with torch.no_grad():
            expected, found = call(peer, padded)[0], ours(ids, mask, types)
            counts = ours.encode(ids, mask, types)[1][0] if cls_name == "FunnelBaseModel" else mask[0].bool()
        close(found[0][counts], expected[0, : found.shape[1]][counts], 1e-5)


@pytest.mark.parametrize("given", ["nothing", "mask", "types"])
def test_defaults_of_the_call_agree(given, tmp_path):
    peer, ours = pair("FunnelModel", tmp_path)
    ids, mask, types = batch_for(ours.config, padded=True)
    keywords = {"nothing": {}, "mask": {"attention_mask": mask}, "types": {"token_type_ids": types}}[given]
    counts = mask.bool() if given == "mask" else torch.ones_like(mask).bool()
    with torch.no_grad():
        close(ours(ids, **keywords)[counts], peer(ids, **keywords)[0][counts], 1e-5)


def test_repeats_in_the_first_block_skip_from_the_blocks_end(tmp_path):
    """transformers takes the decoder's skip connection from the state after `block_sizes[0]` runs, which with repeats is
    the middle of block 0; ours takes the block's output. The encoder agrees, the decoder must not."""
    peer, ours = pair("FunnelModel", tmp_path, block_sizes=[1, 1], block_repeats=[2, 1])
    batch = batch_for(ours.config, padded=False)
    with torch.no_grad():
        theirs = call(peer, batch, output_hidden_states=True).hidden_states
        found = ours.encode_and_decode(*batch)
    for state in range(4):
        close(found[state], theirs[state], 1e-5)
    assert (found[4] - theirs[4]).abs().max() > 1e-3


@pytest.mark.parametrize("cls_name", ["FunnelModel", "FunnelForSequenceClassification", "FunnelForPreTraining"])
def test_initialisation_has_the_published_distributions(cls_name):
    """Mean and deviation of every weight of fresh models, over a width that makes them narrow."""
    torch.manual_seed(0)
    size = {"d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 256, "vocab_size": 500, "block_sizes": [1, 1]}
    peer = getattr(transformers, cls_name)(transformers.FunnelConfig(**size))
    from funnel.model.config import FunnelConfig
    from funnel.weights.huggingface import TABLE
    from funnel.weights.key_map import rename

    ours = MODELS[cls_name](FunnelConfig(**size)).state_dict()
    for name, expected in peer.state_dict().items():
        found = ours[rename(name.removeprefix("funnel."), TABLE)]
        margin = 5 / math.sqrt(found.numel()) * max(expected.std().item() if expected.numel() > 1 else 0, 1e-9)
        assert abs(found.mean() - expected.mean()) <= 2 * margin + 1e-9, name
        if found.numel() > 64:
            assert abs(found.std() - expected.std()) <= 2 * margin + 1e-9, name
