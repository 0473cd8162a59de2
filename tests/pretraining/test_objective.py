"""The base class of objectives."""

import torch

from funnel.model.config import FunnelConfig
from funnel.model.heads import FunnelModel
from funnel.pretraining.objective import Objective


def test_gather_returns_the_states_at_the_positions():
    config = FunnelConfig(vocab_size=9, blocks="1", num_decoder_layers=0, d_model=8, n_head=1, d_head=8, d_inner=8)
    hidden = torch.randn(2, 5, 8)
    gathered = Objective(FunnelModel(config)).gather(hidden, torch.tensor([[4, 0], [1, 1]]))
    expected = torch.stack([torch.stack([hidden[0, 4], hidden[0, 0]]), torch.stack([hidden[1, 1], hidden[1, 1]])])
    assert torch.equal(gathered, expected)
