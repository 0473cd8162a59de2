"""Checkpoint folders in the formats of other projects, for the tests of weights."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra test: pip install -e '.[test]'")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "the", "film"]


def write_vocabulary(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")


def make_transformers_folder(folder: Path, cls_name: str = "FunnelForSequenceClassification", **options) -> Path:
    """A random Funnel model as transformers saves it, with a vocabulary."""
    torch.manual_seed(0)
    values = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "vocab_size": 99, "block_sizes": [1, 2]}
    getattr(transformers, cls_name)(transformers.FunnelConfig(**values, **options)).save_pretrained(folder)
    write_vocabulary(folder)
    return folder


def make_bert_folder(folder: Path, cls_name: str = "BertModel", layers: int = 4) -> torch.nn.Module:
    """A random BERT as transformers saves it, with a vocabulary; returns the model."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=80,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = getattr(transformers, cls_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    write_vocabulary(folder)
    return model


def change_config(folder: Path, **changes) -> None:
    """Sets fields of a folder's config.json; None removes a field."""
    values = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
