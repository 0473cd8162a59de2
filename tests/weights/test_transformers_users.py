"""Exported models in the hands of transformers' users: pipeline, Trainer, sentence-transformers, and the page about them."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from trained_runs import write_trained_run

from funnel.analysis.card import render_card
from funnel.analysis.runs import read_run
from funnel.cli.convert import convert
from funnel.inference.classifier import Classifier
from funnel.model.heads import FunnelForSequenceClassification
from funnel.options import option_types
from train import TrainArgs

PAGE = (ROOT / "docs/from-transformers.md").read_text(encoding="utf-8")
TEXTS = ["it", "a text", "who wrote it ? it was written by ada lovelace .", "another text , another text " * 9, "bob wrote"]
FUNNEL: dict[str, Any] = {"blocks": "1,2,1"}
BERT: dict[str, Any] = {
    "family": "bert",
    "blocks": "2",
    "relative_attention": False,
    "position_embeddings": 40,
    "token_type_embeddings": 2,
    "num_decoder_layers": 0,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "lm_head_transform": True,
}


def export(folder: Path, kind: str = "classification", changes: dict[str, Any] = FUNNEL) -> Path:
    """A run and its export; the latter's folder is folder/hf."""
    write_trained_run(folder / "run", kind, changes)
    convert(str(folder / "run"), folder / "hf", "huggingface")
    return folder / "hf"


# --- the page ---------------------------------------------------------------------------------------------------------


def table_rows(heading: str) -> list[tuple[str, str]]:
    """The two columns of the table in a section, without its head."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ", 1) for line in section.splitlines() if line.startswith("|")]
    return [(first, second) for first, second in rows[2:]] if len(rows[1]) == 2 else [tuple(row) for row in rows[2:]]


FLAG_ROWS = table_rows("TrainingArguments and the flags of train.py")


def test_every_flag_in_the_table_exists():
    flags = {"--" + name.replace("_", "-") for name in option_types(TrainArgs)}
    found = [flag for _, right in FLAG_ROWS for flag in re.findall(r"`(--[a-z-]+)", right)]
    assert len(found) > 20
    assert set(found) <= flags


def test_every_line_of_the_loop_in_the_table_exists():
    script = (ROOT / "train.py").read_text(encoding="utf-8")
    rows = table_rows("Callbacks and the lines of the loop")
    lines = [text for _, right in rows for text in re.findall(r"`([^`]+)`", right) if "(" in text]
    assert len(lines) >= 9
    assert [line for line in lines if line not in script] == []
    paths = [text for _, right in rows for text in re.findall(r"`(funnel/[^`]+)`", right)]
    assert paths
    assert all((ROOT / path).exists() for path in paths)


@pytest.mark.slow
def test_every_training_argument_in_the_table_exists():
    transformers = pytest.importorskip("transformers", reason="needs the extra test")
    names = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    section = PAGE.split("## Callbacks")[0]
    found = [name for left, _ in FLAG_ROWS for name in re.findall(r"`(\w+)`", left)]
    found += re.findall(r"\(`(\w+)`\)", section.split("Fixed:")[1])
    assert len(found) > 25
    assert set(found) <= names
    callbacks = [name for left, _ in table_rows("Callbacks and the lines of the loop") for name in re.findall(r"`(\w+)`", left)]
    owners = (transformers.TrainerCallback, transformers.Trainer)
    assert [
        name for name in callbacks if not any(hasattr(owner, name) for owner in owners) and not hasattr(transformers, name)
    ] == [
        "compute_metrics"  # an argument
    ]


# --- pipeline ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("changes", [FUNNEL, BERT], ids=["funnel", "bert"])
@pytest.mark.parametrize("kind", ["classification", "regression", "multi-label"])
def test_the_pipeline_gives_the_classifiers_probabilities(kind, changes, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra test")
    folder = export(tmp_path, kind, changes)
    classify = Classifier.load(tmp_path / "run", device="cpu", dtype="fp32")
    padding = {"padding": True, "pad_to_multiple_of": 8} if changes is FUNNEL else {}
    pipe = transformers.pipeline("text-classification", str(folder), truncation=True, device="cpu", **padding)
    pairs = TEXTS[::-1] if kind == "regression" else None
    inputs = TEXTS if pairs is None else [{"text": a, "text_pair": b} for a, b in zip(TEXTS, pairs, strict=True)]
    for prediction, found in zip(classify(TEXTS, pairs), pipe(inputs, top_k=None), strict=True):
        scores = {item["label"]: item["score"] for item in found}
        assert scores == pytest.approx(prediction.probabilities or {"score": prediction.label}, abs=1e-5)
    if kind != "regression":
        for ours, theirs in zip(classify(TEXTS, top_k=2), pipe(inputs, top_k=2), strict=True):
            assert [label for label, _ in ours] == [item["label"] for item in theirs]
            assert [p for _, p in ours] == pytest.approx([item["score"] for item in theirs], abs=1e-5)


@pytest.mark.slow
def test_without_padding_transformers_rejects_short_texts(tmp_path):
    """As the page says; if this fails, transformers has become better."""
    transformers = pytest.importorskip("transformers", reason="needs the extra test")
    pipe = transformers.pipeline("text-classification", str(export(tmp_path)), device="cpu")
    with pytest.raises(RuntimeError):
        pipe("it")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["token-labels", "answer-spans", "multiple-choice"])
def test_the_models_code_in_a_card_gives_our_logits(kind, tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers", reason="needs the extra test")
    folder = export(tmp_path, kind)
    run = read_run(tmp_path / "run")
    blocks = re.findall(r"^```python\n(.*?)^```$", render_card(run), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(next(block for block in blocks if "from transformers" in block).replace("OWNER/NAME", str(folder)), names)
    assert capsys.readouterr().out
    inputs = {name: tensor[None] if kind == "multiple-choice" else tensor for name, tensor in names["inputs"].items()}
    from funnel.model import heads

    ours = (
        getattr(heads, transformers.AutoConfig.from_pretrained(folder).architectures[0])
        .from_pretrained(tmp_path / "run")
        .eval()
    )
    with torch.no_grad():
        theirs = names["model"].eval()(**inputs)
        expected = ours(**inputs)
    logits = torch.stack([theirs.start_logits, theirs.end_logits], -1) if kind == "answer-spans" else theirs.logits
    if kind != "multiple-choice":
        is_token = inputs["attention_mask"] == 1
        logits, expected = logits[is_token], expected[is_token]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    if kind == "token-labels":  # as the page says, not with more padding
        padded = {name: torch.nn.functional.pad(tensor, (0, 4)) for name, tensor in inputs.items()}
        with torch.no_grad():
            logits, same = names["model"](**padded).logits[:, : is_token.shape[1]], ours(**padded)[:, : is_token.shape[1]]
        torch.testing.assert_close(same[is_token], expected, rtol=1e-5, atol=1e-5)
        assert float((logits[is_token] - expected).abs().max()) > 1e-3


# --- Trainer ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("changes", [FUNNEL, BERT], ids=["funnel", "bert"])
def test_the_trainer_trains_an_export_and_the_result_is_read_again(changes, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra test")
    pytest.importorskip("accelerate", reason="needs the extra test")
    folder = export(tmp_path, changes=changes)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    examples = [{**tokenizer(text, truncation=True), "label": i % 3} for i, text in enumerate(TEXTS)]
    options = {"max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(tmp_path / "trainer"), **options),
        data_collator=transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        train_dataset=examples,
        eval_dataset=examples,
    )
    trainer.train()
    after = model.state_dict()
    assert not torch.equal(after["classifier.weight" if changes is BERT else "classifier.linear_out.weight"],
                           before["classifier.weight" if changes is BERT else "classifier.linear_out.weight"])  # fmt: skip
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "trained"))
    tokenizer.save_pretrained(str(tmp_path / "trained"))
    convert(str(tmp_path / "trained"), tmp_path / "back")
    classify = Classifier.load(tmp_path / "back", device="cpu", dtype="fp32")
    ours = torch.nn.functional.cross_entropy(classify.logits(TEXTS), torch.arange(len(TEXTS)) % 3)
    assert float(ours) == pytest.approx(loss, abs=1e-4)


# --- sentence-transformers --------------------------------------------------------------------------------------------


def encoder(folder: Path, pooling: str, architecture: str = "", multiple: int = 8) -> Any:
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6", reason="needs the extra test")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    module = Transformer(
        str(folder),
        config_kwargs={"architectures": [architecture]} if architecture else {},
        processing_kwargs={"text": {"pad_to_multiple_of": multiple}} if multiple else {},
    )
    modules = [module, Pooling(module.get_embedding_dimension(), pooling)]
    return sentence_transformers.SentenceTransformer(modules=modules, device="cpu")


def embed(model: Any, batch_size: int) -> torch.Tensor:
    return model.encode(TEXTS, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)


def cls_states(folder: Path) -> torch.Tensor:
    """The states that funnel's classifier reads."""
    classify, states = Classifier.load(folder, device="cpu", dtype="fp32"), []
    model = classify.model
    assert isinstance(model, FunnelForSequenceClassification)
    model.classifier.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    for text in TEXTS:
        classify(text)
    return torch.cat(states)


@pytest.mark.slow
def test_cls_pooling_in_sentence_transformers_gives_the_state_that_the_classifier_reads(tmp_path):
    embeddings = embed(encoder(export(tmp_path), "cls", "FunnelBaseModel"), 5)
    torch.testing.assert_close(embeddings, cls_states(tmp_path / "run"), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pooling", "architecture", "is_independent"),
    [("cls", "FunnelBaseModel", True), ("mean", "FunnelBaseModel", False), ("cls", "", True), ("mean", "", True)],
)
def test_poolings_of_a_funnel_that_do_not_depend_on_the_batch(pooling, architecture, is_independent, tmp_path):
    model = encoder(export(tmp_path), pooling, architecture)
    difference = float((embed(model, 1) - embed(model, 5)).abs().max())
    assert (difference < 1e-5) == is_independent


@pytest.mark.slow
def test_a_bert_export_in_sentence_transformers_needs_no_arguments(tmp_path):
    folder = export(tmp_path, changes=BERT)
    embeddings = embed(encoder(folder, "cls", multiple=0), 5)
    torch.testing.assert_close(embeddings, cls_states(tmp_path / "run"), rtol=1e-5, atol=1e-5)
    means = encoder(folder, "mean", multiple=0)
    torch.testing.assert_close(embed(means, 1), embed(means, 5), rtol=1e-5, atol=1e-5)
