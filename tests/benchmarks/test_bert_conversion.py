"""The study of BERT conversion: token swapping, and the table cells."""

import torch
from conftest import padded_batch, tiny_config

from benchmarks.studies.bert_conversion import (
    ClsStates,
    cls_states,
    distance,
    order_effect,
    swap_tokens,
    token_similarity,
    token_states,
)
from funnel.data.batches import text_batch
from funnel.model.heads import FunnelBaseModel, FunnelModel


def test_two_different_neighbors_of_the_first_text_are_swapped() -> None:
    ids = torch.tensor([[101, 7, 8, 9, 102, 5, 6, 102], [101, 4, 4, 4, 102, 0, 0, 0]])
    types = torch.tensor([[2, 0, 0, 0, 0, 1, 1, 1], [2, 0, 0, 0, 0, 0, 0, 0]])
    batch = text_batch(ids, (ids != 0).long(), types, torch.zeros(2))
    results = {tuple(swap_tokens(batch, torch.Generator().manual_seed(seed))[0].tolist()) for seed in range(20)}
    assert results == {(101, 8, 7, 9, 102, 5, 6, 102), (101, 7, 9, 8, 102, 5, 6, 102)}
    swapped = swap_tokens(batch, torch.Generator().manual_seed(0))
    assert swapped[1].tolist() == ids[1].tolist()  # all tokens are equal
    assert ids[0, 1:4].tolist() == [7, 8, 9]  # the batch itself is unchanged


def test_the_separator_is_not_swapped_if_there_are_two() -> None:
    ids = torch.tensor([[0, 7, 8, 2, 2, 5, 6, 2]])
    batch = text_batch(ids, torch.ones_like(ids), torch.zeros_like(ids), torch.zeros(1))
    assert swap_tokens(batch, torch.Generator().manual_seed(0)).tolist() == [[0, 8, 7, 2, 2, 5, 6, 2]]


def test_a_model_has_no_distance_from_itself_and_a_pooled_one_does() -> None:
    config = tiny_config(num_decoder_layers=0, relative_attention=False, position_embeddings=20)
    torch.manual_seed(0)
    bert, pooled = (FunnelBaseModel(config.replace(blocks=blocks)).eval() for blocks in ("4", "2,2"))
    batch = text_batch(*padded_batch([20, 11, 7]), torch.zeros(3))
    states = cls_states([batch], bert)
    assert states.states.shape == states.changes.shape == (3, 16)
    assert (distance(states, states), order_effect(states, states)) == ("0.00", "1.00, 1.00")
    assert float(distance(cls_states([batch], pooled), states)) > 0.1


def test_table_cells_are_relative_to_bert() -> None:
    bert = ClsStates(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    funnel = ClsStates(torch.tensor([[6.5, 5.0], [3.5, 5.0]]), torch.tensor([[0.0, 6.0], [0.0, 0.0]]))
    assert distance(funnel, bert) == "0.50"  # centered: 1.5 and -1.5 instead of 1 and -1
    assert order_effect(funnel, bert) == "0.00, 2.00"


def test_token_states_exclude_padding_and_resemble_themselves() -> None:
    config = tiny_config(num_decoder_layers=0, relative_attention=False, position_embeddings=20)
    torch.manual_seed(0)
    bert, pooled = (FunnelModel(config.replace(blocks=blocks)).eval() for blocks in ("4", "2,2"))
    batch = text_batch(*padded_batch([20, 11, 7]), torch.zeros(3))
    states = token_states([batch], bert)
    assert states.shape == (38, 16)
    assert token_similarity(3 * states + 1, states) == "1.00"
    assert float(token_similarity(token_states([batch], pooled), states)) < 0.99
