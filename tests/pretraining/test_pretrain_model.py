"""The model to pretrain: sizes of a new one, and word embeddings from a teacher."""

import numpy as np
import pytest
import torch
from conftest import tiny_config

from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model.heads import FunnelModel
from funnel.pretraining.build import ModelArgs, build_model, principal_components


@pytest.fixture
def teacher(tmp_path):
    """Folder of a BERT-like model of width 24."""
    tokenizer = FunnelTokenizer.train(["the cat sees the dog ."] * 5)
    torch.manual_seed(0)
    bert = {"blocks": "2", "relative_attention": False, "position_embeddings": 32, "num_decoder_layers": 0}
    FunnelModel(tiny_config(vocab_size=tokenizer.vocab_size, d_model=24, **bert)).save_pretrained(tmp_path / "teacher")
    tokenizer.save(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize("width", [3, 8, 11])
def test_principal_components_are_the_coordinates_of_largest_variance(width):
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    found = principal_components(table, width).double().numpy()
    centered = table.double().numpy() - table.double().numpy().mean(0)
    variances, directions = np.linalg.eigh(centered.T @ centered)
    expected = np.zeros((50, width))
    expected[:, :8] = (centered @ directions[:, ::-1])[:, :width]
    np.testing.assert_allclose(abs(found), abs(expected), atol=1e-3)  # directions have no sign
    assert variances.min() > 0


def test_a_new_student_has_the_principal_components_of_the_teachers_embeddings(teacher):
    args = ModelArgs(objective="distill", teacher=str(teacher), d_model=8, blocks="1,1")
    built = build_model(args, pytest.fail)
    table = FunnelModel.from_pretrained(teacher).embeddings.word_embeddings.weight
    expected = principal_components(table.detach(), 8)
    assert torch.equal(built.model.embeddings.word_embeddings.weight, expected)
    assert "the teacher's word embeddings" in built.origin


@pytest.mark.parametrize(("n_head", "expected"), [(None, (2, 64)), (4, (4, 32))])
def test_the_heads_of_a_new_model_share_its_width(n_head, expected, teacher):
    args = ModelArgs(objective="mlm", tokenizer=teacher, d_model=128, n_head=n_head, blocks="1,1")
    config = build_model(args, pytest.fail).model.config
    assert (config.n_head, config.d_head, config.d_inner) == (*expected, 512)


def test_a_student_in_another_layout_keeps_the_teachers_layers(teacher):
    args = ModelArgs(objective="distill", teacher=str(teacher), blocks="1,1")
    built = build_model(args, pytest.fail)
    source = FunnelModel.from_pretrained(teacher)
    for old, new in zip([source.encoder.layers(0)[0], source.encoder.layers(0)[1]],
                        [built.model.encoder.layers(0)[0], built.model.encoder.layers(1)[0]], strict=True):  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    assert built.model.config.num_decoder_layers == 2


def test_a_new_model_can_treat_the_names_of_special_tokens_as_text(teacher):
    def encode(escape):
        args = ModelArgs(objective="mlm", tokenizer=teacher, d_model=8, blocks="1,1", escape_special_tokens=escape)
        tokenizer = build_model(args, pytest.fail).tokenizer
        return tokenizer.encode_plain(["the <sep> cat"])[0], tokenizer.ids["sep"]

    ids, sep = encode(False)
    assert sep in ids
    ids, sep = encode(True)
    assert sep not in ids


def test_an_error_about_the_teacher_names_its_folder(teacher):
    (teacher / "model.safetensors").unlink()
    args = ModelArgs(objective="distill", teacher=str(teacher), d_model=8)
    with pytest.raises(FunnelError, match=f"^teacher: {teacher}: no weights found") as error:
        build_model(args, pytest.fail)
    assert error.value.parameter == "teacher"
