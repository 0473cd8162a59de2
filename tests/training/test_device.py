"""Choice of device and number format; seeds."""

import pytest
import torch

from funnel.errors import FunnelError
from funnel.training.device import choose_device, choose_dtype, seed_step, step_seed

CPU = torch.device("cpu")


def test_an_unavailable_device_is_an_error():
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(FunnelError, match=f"device {missing}: not available; choose from cpu"):
        choose_device(missing)


def test_narrow_models_default_to_fp32_on_a_cpu():
    assert choose_dtype(None, CPU, 128) == "fp32"
    assert choose_dtype("bf16", CPU, 128) == "bf16"


def test_every_step_and_rank_has_its_own_seed():
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(4)}
    assert len(seeds) == 600


def test_seeding_a_step_repeats_its_random_numbers():
    seed_step(1, 7)
    first = torch.rand(3)
    torch.rand(5)
    seed_step(1, 7)
    assert torch.equal(torch.rand(3), first)


def test_an_unknown_dtype_is_an_error():
    with pytest.raises(FunnelError, match="unknown dtype 'fp64'; choose from fp32, bf16, fp16"):
        choose_dtype("fp64", torch.device("cpu"), 64)


def test_a_device_may_be_a_torch_device():
    assert choose_device(torch.device("cpu")).type == "cpu"
