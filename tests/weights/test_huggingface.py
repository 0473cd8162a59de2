"""transformers' format: reading every kind of file, writing, and the name table."""

import json

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from weight_sources import are_equal, change_config, make_transformers_folder, transformers, write_vocabulary

from funnel.cli.convert import convert
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from funnel.model.config import FunnelConfig
from funnel.model.heads import MODELS, FunnelForSequenceClassification
from funnel.weights.export import write_transformers
from funnel.weights.huggingface import TABLE
from funnel.weights.load import read_source


@pytest.mark.parametrize("cls_name", MODELS)
def test_conversion_to_transformers_and_back_is_bit_exact(cls_name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[cls_name](tiny_config(blocks="1,2x2,1", num_decoder_layers=1, id2label={0: "a", 1: "b", 2: "c"}))
    original = Checkpoint(model.config, model.state_dict(), cls_name)
    save_checkpoint(tmp_path / "original", original, extra=write_vocabulary)
    convert(str(tmp_path / "original"), tmp_path / "huggingface", "huggingface")
    convert(str(tmp_path / "huggingface"), tmp_path / "back")
    back = load_checkpoint(tmp_path / "back")
    assert back.architecture == cls_name
    assert are_equal(back.weights, load_checkpoint(tmp_path / "original").weights)
    expected = model.config
    if cls_name == "FunnelBaseModel":  # has no decoder, whatever its config says
        expected = expected.replace(num_decoder_layers=0)
    if cls_name == "FunnelForQuestionAnswering":  # transformers derives the two outputs from the number of labels
        expected = expected.replace(id2label=FunnelConfig().id2label)
    assert back.config == expected


@pytest.mark.parametrize("cls_name", MODELS)
def test_transformers_gives_the_same_output_from_a_converted_checkpoint(cls_name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[cls_name](tiny_config(num_decoder_layers=1, id2label={0: "a", 1: "b", 2: "c"})).eval()
    checkpoint = Checkpoint(model.config, model.state_dict(), cls_name)
    save_checkpoint(tmp_path / "original", checkpoint, extra=write_vocabulary)
    convert(str(tmp_path / "original"), tmp_path / "huggingface", "huggingface")
    peer, report = getattr(transformers, cls_name).from_pretrained(tmp_path / "huggingface", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    ids = torch.randint(5, 99, (2, 3, 16) if cls_name == "FunnelForMultipleChoice" else (2, 16))
    with torch.no_grad():
        peer_output, output = peer.eval()(ids), model(ids)
    if cls_name == "FunnelForQuestionAnswering":
        expected = torch.stack([peer_output.start_logits, peer_output.end_logits], -1)
    else:
        expected = peer_output[0]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    if cls_name == "FunnelForSequenceClassification":
        assert peer.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("special", ["<>", "[]"])
@pytest.mark.parametrize("problem_type", ["single_label_classification", "regression"])
def test_transformers_reproduces_our_logits_for_texts_and_pairs(special, problem_type, tmp_path):
    """Through transformers' tokenizer, with texts that are truncated, and with token types."""
    names = ["pad", "unk", "cls", "sep", "mask"]
    tokens = [f"<{name}>" if special == "<>" else f"[{name.upper()}]" for name in names] + "the film was good < > s [ ]".split()
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    tokenizer = FunnelTokenizer.load(tmp_path)
    torch.manual_seed(0)
    labels = {0: "score"} if problem_type == "regression" else {0: "bad", 1: "good"}
    units = {"label_mean": 50_000.0, "label_std": 20_000.0} if problem_type == "regression" else {}
    inputs = {"model_max_length": 10, "text_columns": ("first", "second")}
    config = tiny_config(vocab_size=len(tokens), num_decoder_layers=0, id2label=labels, problem_type=problem_type)
    config = config.replace(**units, **inputs)
    model = FunnelForSequenceClassification(config).eval()
    checkpoint = Checkpoint(config, model.state_dict(), type(model).__name__)
    save_checkpoint(tmp_path / "original", checkpoint, extra=tokenizer.save)
    convert(str(tmp_path / "original"), tmp_path / "huggingface", "huggingface")

    peer_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "huggingface")
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "huggingface").eval()
    assert len(peer_tokenizer) == peer.config.vocab_size
    texts = ["<s>the film</s>", "the film was good " * 5, "[SEP] <sep>"]
    for pairs in (None, texts[::-1]):
        encodings = peer_tokenizer(texts, pairs, truncation=True)
        batch = peer_tokenizer.pad(encodings, pad_to_multiple_of=8, return_tensors="pt")
        with torch.no_grad():
            expected = model(**tokenizer(texts, pairs, max_length=10))
            torch.testing.assert_close(peer(**batch).logits, expected, rtol=1e-6, atol=1e-5)

    peer.save_pretrained(tmp_path / "again")
    peer_tokenizer.save_pretrained(tmp_path / "again")
    source = read_source(tmp_path / "again")
    assert (source.config.label_mean, source.config.label_std) == (config.label_mean, config.label_std)
    assert (source.config.model_max_length, source.config.text_columns) == (10, ("first", "second"))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(source.weights[name], tensor, rtol=1e-5, atol=1e-6)
    assert (source.config.problem_type, source.config.id2label) == (problem_type, labels)
    assert source.tokenizer.encode(texts) == tokenizer.encode(texts)


def test_single_label_without_a_problem_type_means_regression(tmp_path):
    folder = make_transformers_folder(tmp_path / "source", num_labels=1)
    change_config(folder, problem_type=None)
    assert read_source(folder).config.problem_type == "regression"


@pytest.mark.parametrize("kind", ["bin", "sharded safetensors", "sharded bin", "prefix", "no architectures"])
def test_all_file_layouts_give_the_same_source(kind, tmp_path):
    folder = make_transformers_folder(tmp_path / "source", "FunnelModel")
    expected = read_source(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    elif kind.startswith("sharded"):
        names = list(weights)
        stem, suffix = ("model", "safetensors") if "safetensors" in kind else ("pytorch_model", "bin")
        shards = {f"{stem}-{i + 1:05}-of-00003.{suffix}": names[i::3] for i in range(3)}
        for file, shard in shards.items():
            tensors = {name: weights[name] for name in shard}
            save_file(tensors, folder / file) if suffix == "safetensors" else torch.save(tensors, folder / file)
        weight_map = {name: file for file, shard in shards.items() for name in shard}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        if kind == "prefix":
            weights = {f"funnel.{name}": tensor for name, tensor in weights.items()}
        change_config(folder, architectures=None)
        save_file(weights, folder / "model.safetensors")
    source = read_source(folder)
    assert source.config == expected.config
    assert source.architecture == "FunnelModel"
    assert are_equal(source.weights, expected.weights)


def test_a_masked_lm_head_with_a_transform_cannot_be_exported(tmp_path):
    config = tiny_config(lm_head_transform=True)
    model = MODELS["FunnelForMaskedLM"](config)
    with pytest.raises(FunnelError, match="no Funnel-Transformer with lm_head_transform True in the masked-LM head"):
        write_transformers(tmp_path, Checkpoint(config, model.state_dict(), "FunnelForMaskedLM"))
    discriminator = MODELS["FunnelForPreTraining"](config)
    write_transformers(tmp_path, Checkpoint(config, discriminator.state_dict(), "FunnelForPreTraining"))
    assert read_source(tmp_path).config == config


def test_table_covers_every_weight_name_of_both_projects(tmp_path):
    peer_names, own_names = set(), set()
    for cls_name in MODELS:
        source = read_source(make_transformers_folder(tmp_path / cls_name, cls_name))
        tensors = load_file(tmp_path / cls_name / "model.safetensors")
        peer_names |= {name.removeprefix("funnel.") for name in tensors} - {"lm_head.weight"}
        own_names |= set(source.weights)

    def without_numbers(names):
        return {".".join("{}" if part.isdigit() else part for part in name.split(".")) for name in names}

    assert without_numbers(peer_names) == set(TABLE)
    assert without_numbers(own_names) == set(TABLE.values())


def test_untied_lm_head_is_an_error(tmp_path):
    folder = make_transformers_folder(tmp_path / "source", "FunnelForMaskedLM")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["funnel.embeddings.word_embeddings.weight"] + 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(FunnelError, match=r"lm_head\.weight is not tied to the word embeddings"):
        read_source(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"relative_attention": False}, "relative_attention False"),
        ({"distance_buckets": 8}, "distance_buckets 8"),
        ({"position_embeddings": 20}, "position_embeddings 20"),
        ({"token_type_embeddings": 2}, "token_type_embeddings 2"),
        ({"embedding_size": 8}, "embedding_size 8"),
        ({"classifier_act": "relu"}, "classifier_act 'relu'"),
    ],
)
def test_funnels_that_transformers_does_not_have_are_errors(changes, words, tmp_path):
    config = tiny_config(**changes)
    for cls_name, advice in (("FunnelModel", ""), ("FunnelForSequenceClassification", "; export it to ONNX instead")):
        saved = Checkpoint(config, MODELS[cls_name](config).state_dict(), cls_name)
        with pytest.raises(FunnelError, match=f"^transformers has no Funnel-Transformer with {words}{advice}$"):
            write_transformers(tmp_path, saved)
    assert not list(tmp_path.iterdir())


@pytest.mark.network
def test_released_small_model_gives_the_published_output(tmp_path):
    """The numbers are those of transformers' integration test of funnel-transformer/small."""
    from funnel.model.heads import FunnelModel

    convert("funnel-transformer/small", tmp_path / "small")
    encoding = FunnelTokenizer.load(tmp_path / "small").encode(["Hello! I am the Funnel Transformer model."])[0]
    model = FunnelModel.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        output = model(torch.tensor([encoding.input_ids]), None, torch.tensor([encoding.token_type_ids]))
    assert abs(output.sum().item() - 235.7246) < 1e-4 * 235
    assert abs(output.mean().item() - 0.0256) < 1e-4
