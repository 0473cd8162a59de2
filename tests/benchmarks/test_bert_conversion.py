"""Token swapping in the study of BERT conversion."""

import torch

from benchmarks.studies.bert_conversion import swap_tokens
from funnel.data.dataset import Batch


def test_two_different_neighbors_of_the_first_text_are_swapped() -> None:
    ids = torch.tensor([[101, 7, 8, 9, 102, 5, 6, 102], [101, 4, 4, 4, 102, 0, 0, 0]])
    types = torch.tensor([[2, 0, 0, 0, 0, 1, 1, 1], [2, 0, 0, 0, 0, 0, 0, 0]])
    batch = Batch(ids, (ids != 0).long(), types, torch.zeros(2))
    results = {tuple(swap_tokens(batch, torch.Generator().manual_seed(seed))[0].tolist()) for seed in range(20)}
    assert results == {(101, 8, 7, 9, 102, 5, 6, 102), (101, 7, 9, 8, 102, 5, 6, 102)}
    swapped = swap_tokens(batch, torch.Generator().manual_seed(0))
    assert swapped[1].tolist() == ids[1].tolist()  # all tokens are equal
    assert ids[0, 1:4].tolist() == [7, 8, 9]  # the batch itself is unchanged
