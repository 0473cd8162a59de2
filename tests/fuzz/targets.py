"""Files that come from strangers, and what this project does with them: for the fuzzer and the hypothesis tests.

A target makes a folder with a good file in it, and uses the folder as a user would. Whatever is done to the file, using it
must end in a result or in a FunnelError.
"""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from funnel.data.dataset import encode
from funnel.data.tasks import load_custom_task
from funnel.data.tokenizer import FunnelTokenizer
from funnel.inference import Classifier
from funnel.model import checkpoint
from funnel.model.config import FunnelConfig, parse_blocks
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training.run_dir import RunDir, TrainState
from funnel.weights import huggingface, surgery
from funnel.weights.load import read_weights_from

CONFIG = FunnelConfig(vocab_size=60, block_sizes=(1, 2, 1), num_decoder_layers=0, d_model=8, n_head=2, d_head=4, d_inner=8)
BERT = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
}
TEXTS = ["a good film, é not bad\x07!", "so\u200bbad 是 it was", ""]


class Target(NamedTuple):
    """A file of a folder, and what is done with the folder."""

    file: str
    make: Callable[[Path], None]
    use: Callable[[Path], object]


def tokenizer() -> FunnelTokenizer:
    return FunnelTokenizer.train(["a good film is not a bad film", "so it was"] * 5, vocab_size=60)


def make_checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(CONFIG)
    made = tokenizer()

    def extra(target: Path) -> None:
        made.save(target)
        torch.save(
            vars(TrainState(step=3, best={"f1": 0.5}, optimizer={"state": {}, "param_groups": []})),
            target / "training_state.pt",
        )

    checkpoint.save(folder / "last", CONFIG, model.state_dict(), "FunnelForSequenceClassification", extra)
    (folder / "run.json").write_text(json.dumps({"command": "x", "settings": {"lr": 1e-5, "max_length": 32}}))
    lines = [{"step": step, "split": "train", "loss": 0.5} for step in range(9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def predict(folder: Path) -> object:
    return Classifier.load(folder / "last")(TEXTS)


def resume(folder: Path) -> object:
    run = RunDir(folder)
    run.check({"lr": 1e-5})
    found = run.load()
    run.forget_after(TrainState() if found is None else found[1])
    return found


def make_huggingface(folder: Path) -> None:
    torch.manual_seed(0)
    model = FunnelForSequenceClassification(CONFIG)
    huggingface.write(folder, checkpoint.Checkpoint(CONFIG, model.state_dict(), "FunnelForSequenceClassification"))
    tokenizer().save_for_transformers(folder)


def make_pickle(folder: Path) -> None:
    make_huggingface(folder)
    weights = checkpoint.read_weights(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def make_bert(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"word_embeddings": (60, 8), "position_embeddings": (16, 8), "token_type_embeddings": (2, 8)}
    weights = {f"embeddings.{name}.weight": shape for name, shape in shapes.items()}
    for part in ("weight", "bias"):
        weights[f"embeddings.LayerNorm.{part}"] = (8,)
        for n in range(2):
            at = f"encoder.layer.{n}."
            weights |= {at + f"attention.self.{x}.{part}": (8, 8)[: 2 - (part == "bias")] for x in ("query", "key", "value")}
            weights[at + f"attention.output.dense.{part}"] = (8, 8)[: 2 - (part == "bias")]
            weights |= {at + f"{x}.LayerNorm.{part}": (8,) for x in ("attention.output", "output")}
            weights[at + f"intermediate.dense.{part}"] = (16, 8)[: 2 - (part == "bias")]
            weights[at + f"output.dense.{part}"] = (8, 16)[: 2 - (part == "bias")]
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in weights.items()}
    checkpoint.save_weights(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(BERT))
    vocabulary = tokenizer().tokenizer.get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n")


def make_original(folder: Path) -> None:
    """The original's smallest golden model, where it is there."""
    from conftest import shared

    for file in shared("golden/original/b2-2_pool_qkv").iterdir():
        shutil.copy(file, folder)
        (folder / file.name).chmod(0o644)


def make_shards(folder: Path) -> None:
    make_huggingface(folder)
    weights = checkpoint.read_weights(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_data(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        rows = [("a good film", "pos"), ("it was, a bad one", "neg"), ("é 是", "pos"), ("so \u2028 it goes", "neg")] * 3
        kind = name.split(".")[1]
        if kind == "jsonl":
            text = "".join(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text, label in rows)
        else:
            mark = {"csv": ",", "tsv": "\t"}[kind]
            quoted = [(f'"{text}"' if kind == "csv" else text, label) for text, label in rows]
            text = f"text{mark}label\n" + "".join(f"{text}{mark}{label}\n" for text, label in quoted)
        content = text.encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    return make


def read_data(name: str) -> Callable[[Path], object]:
    def use(folder: Path) -> object:
        task, _ = load_custom_task(folder / name, None, None, None, None, None)
        return encode(task.files["train"], task.label_ids, tokenizer(), 32)

    return use


def use_tokenizer(folder: Path) -> object:
    found = FunnelTokenizer.load(folder)
    found.encode(TEXTS, max_length=16)
    found.encode(TEXTS, TEXTS, 16)
    return found.fitting(10**6, folder)


def make_vocabulary(folder: Path) -> None:
    vocabulary = tokenizer().tokenizer.get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n")


GROWN = CONFIG.replace(block_sizes=(2, 2, 1, 1))


def make_plan(folder: Path) -> None:
    surgery.write_plan(folder / "plan.json", surgery.make_plan(CONFIG, GROWN, "identity"))


def use_plan(folder: Path) -> object:
    plan = surgery.read_plan(folder / "plan.json", CONFIG, GROWN)
    torch.manual_seed(0)
    old, new = (FunnelForSequenceClassification(config).state_dict() for config in (CONFIG, GROWN))
    return surgery.apply_plan(old, plan, new)


def use_layout(folder: Path) -> object:
    sizes, repeats = parse_blocks((folder / "layout.txt").read_bytes().decode("utf-8", "replace"))
    return FunnelConfig(block_sizes=sizes, block_repeats=repeats)


def read_only(folder: Path) -> object:
    return read_weights_from(folder)


TARGETS = {
    "config.json": Target("last/config.json", make_checkpoint, predict),
    "safetensors": Target("last/model.safetensors", make_checkpoint, predict),
    "tokenizer.json in a checkpoint": Target("last/tokenizer.json", make_checkpoint, predict),
    "training_state.pt": Target("last/training_state.pt", make_checkpoint, resume),
    "run.json": Target("run.json", make_checkpoint, resume),
    "run.json of a prediction": Target("run.json", make_checkpoint, predict),
    "metrics.jsonl": Target("metrics.jsonl", make_checkpoint, resume),
    "transformers' config.json": Target("config.json", make_huggingface, read_only),
    "transformers' safetensors": Target("model.safetensors", make_huggingface, read_only),
    "transformers' pickle": Target("pytorch_model.bin", make_pickle, read_only),
    "transformers' index of shards": Target("model.safetensors.index.json", make_shards, read_only),
    "BERT's config.json": Target("config.json", make_bert, read_only),
    "BERT's safetensors": Target("model.safetensors", make_bert, read_only),
    "BERT's vocab.txt": Target("vocab.txt", make_bert, read_only),
    "net_config.json": Target("net_config.pytorch.json", make_original, read_only),
    "the original's model.pt": Target("model.pt", make_original, read_only),
    "tokenizer.json": Target("tokenizer.json", lambda folder: tokenizer().save(folder), use_tokenizer),
    "vocab.txt": Target("vocab.txt", make_vocabulary, use_tokenizer),
    "layout": Target("layout.txt", lambda folder: (folder / "layout.txt").write_text("6,3x2,3x2") and None, use_layout),
    "plan": Target("plan.json", make_plan, use_plan),
    **{
        name: Target(name, make_data(name), read_data(name))
        for name in ("data.tsv", "data.csv", "data.jsonl", "data.csv.gz", "data.jsonl.gz")
    },
}
