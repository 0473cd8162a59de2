"""Checkpoint folders in the formats of other projects, for the tests of weights."""

import json
from pathlib import Path
from typing import Any

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


# BERT-like models: the family, and what its tiny config has besides BERT_SIZES.
BERT_LIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("Bert", {}),
    "DistilBERT": ("DistilBert", {"n_layers": 4, "dim": 32, "n_heads": 4, "hidden_dim": 64}),
    "RoBERTa": ("Roberta", {"type_vocab_size": 1}),
    "RoBERTa with token types": ("Roberta", {}),
    "XLM-R": ("XLMRoberta", {"type_vocab_size": 1}),
    "CamemBERT": ("Camembert", {"type_vocab_size": 1}),
    "ELECTRA": ("Electra", {"embedding_size": 16}),
    "ELECTRA without projection": ("Electra", {"embedding_size": 32}),
    "ALBERT": ("Albert", {"embedding_size": 16}),
    "ALBERT with groups": ("Albert", {"embedding_size": 32, "num_hidden_groups": 2}),
    "MPNet": ("MPNet", {}),
}
BERT_SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}


def make_bert_folder(folder: Path, head: str = "Model", kind: str = "BERT", **options: Any) -> torch.nn.Module:
    """A BERT-like model as transformers saves it, with random values in all weights, and a vocabulary; returns the model.

    Args:
        head: end of the class name, such as ForSequenceClassification.
        kind: a key of `BERT_LIKE`.
        options: of the config.
    """
    torch.manual_seed(0)
    family, changes = BERT_LIKE[kind]
    sizes = {name: BERT_SIZES[name] for name in ("vocab_size", "max_position_embeddings")} if "dim" in changes else BERT_SIZES
    config = getattr(transformers, f"{family}Config")(**{**sizes, **changes, **options})
    model = getattr(transformers, family + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    write_vocabulary(folder)
    return model


def bert_inputs(batch: tuple[torch.Tensor, ...], config: Any) -> dict[str, torch.Tensor]:
    """A batch from `padded_batch` as arguments of a BERT-like model: its padding, and token types if it has any."""
    ids, mask, types = batch
    inputs = {"input_ids": ids.masked_fill(mask == 0, config.pad_token_id), "attention_mask": mask}
    if getattr(config, "type_vocab_size", 1) > 1:
        inputs["token_type_ids"] = types.masked_fill(types == 2, 0)  # [CLS] has no type of its own
    return inputs


def change_config(folder: Path, **changes) -> None:
    """Sets fields of a folder's config.json; None removes a field."""
    values = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
