"""Maps between the token ids of two tokenizers."""

import pytest
import torch

from funnel.data.token_map import is_identity, token_map
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError

WORDS = "the film was good bad not".split()


def make_tokenizer(folder, tokens, cased=False):
    folder.mkdir()
    path = folder / ("vocab.cased.txt" if cased else "vocab.txt")
    path.write_text("\n".join(tokens))
    return FunnelTokenizer.load(folder)


BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_tokens_are_matched_by_name_and_special_tokens_by_role(tmp_path):
    student = make_tokenizer(tmp_path / "a", [*BERT, *WORDS])
    teacher = make_tokenizer(tmp_path / "b", ["<s>", "</s>", "<pad>", "<unk>", "<mask>", *reversed(WORDS), "more"])
    assert token_map(student, teacher).tolist() == [2, 3, 0, 1, 4, 10, 9, 8, 7, 6, 5]


def test_the_map_of_a_tokenizer_to_itself_is_the_identity(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "a", [*BERT, *WORDS])
    assert is_identity(token_map(tokenizer, tokenizer))
    assert not is_identity(torch.tensor([0, 2, 1]))


def test_missing_tokens_are_named(tmp_path):
    student = make_tokenizer(tmp_path / "a", [*BERT, *WORDS, "##ly"])
    teacher = make_tokenizer(tmp_path / "b", [*BERT, *WORDS[:4]])
    with pytest.raises(FunnelError, match=r"lacks 3 of the student's 12 tokens: 'bad', 'not', '##ly'; use"):
        token_map(student, teacher)


LETTERS = ["quick", "QUICK", "The", "the", *map(chr, range(33, 127)), *(f"##{chr(i)}" for i in range(97, 123))]


@pytest.mark.parametrize("more", [[], ["brown", "fox"]])
def test_other_rules_are_an_error(more, tmp_path):
    student = make_tokenizer(tmp_path / "a", [*BERT, *LETTERS])
    teacher = make_tokenizer(tmp_path / "b", [*BERT, *LETTERS, *more], cased=True)
    with pytest.raises(FunnelError, match=r"splits texts differently: 'The', .* instead of 'the'"):
        token_map(student, teacher)


def test_a_student_may_have_a_part_of_the_vocabulary(tmp_path):
    student = make_tokenizer(tmp_path / "a", [*BERT, *LETTERS])
    teacher = make_tokenizer(tmp_path / "b", [*BERT, "brown", "fox", *LETTERS])
    ids = token_map(student, teacher)
    assert ids[:5].tolist() == [0, 1, 2, 3, 4]
    assert (ids[5:] == torch.arange(7, 7 + len(LETTERS))).all()


@pytest.mark.slow
def test_mpnet_has_berts_ids_plus_4(minilm, mpnet):
    bert = FunnelTokenizer.load(minilm)
    ids = token_map(bert, FunnelTokenizer.load(mpnet))
    names = {name: int(ids[token_id]) for name, token_id in bert.ids.items()}
    assert names == {"pad": 1, "unk": 104, "cls": 0, "sep": 2, "mask": 30526}
    ordinary = torch.tensor([i for i in range(len(ids)) if i not in bert.ids.values()])
    assert torch.equal(ids[ordinary], ordinary + 4)
