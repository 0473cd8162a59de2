"""Untrusted files and how they are read, for the fuzzer and the property tests.

A target writes a valid file into a folder, and reads the folder as a user would. However the file is damaged, reading must
end in a result or a FunnelError.
"""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from squad_files import squad, write

from funnel.data.tokenizer import FunnelTokenizer
from funnel.inference.classifier import Classifier
from funnel.model.checkpoint import Checkpoint, read_weight_file, save_checkpoint
from funnel.model.config import FunnelConfig
from funnel.model.heads import FunnelForSequenceClassification
from funnel.problems.registry import encode_split
from funnel.problems.task_args import TaskArgs, load_task
from funnel.training.run_dir import STATE, RunDir, read_arguments
from funnel.training.state import TrainState
from funnel.weights.bert_family import write_bert
from funnel.weights.huggingface import write_huggingface
from funnel.weights.load import read_source
from funnel.weights.surgery import apply_plan, make_plan, read_plan, write_plan
from train import TrainArgs

CONFIG = FunnelConfig(vocab_size=60, blocks="1,2,1", num_decoder_layers=0, d_model=8, n_head=2, d_head=4, d_inner=8)
LARGER_CONFIG = CONFIG.replace(blocks="2,2,1,1")
BERT_CONFIG = CONFIG.replace(
    **{"blocks": "2", "family": "bert", "relative_attention": False, "position_embeddings": 16, "token_type_embeddings": 2}
)
TEXTS = ["a good film, é not bad\x07!", "so\u200bbad 是 it was", ""]
ROWS = [("a good film", "pos"), ("it was, a bad one", "neg"), ("é 是", "pos"), ("so \u2028 it goes", "neg")] * 3


class Target(NamedTuple):
    """An untrusted file.

    Attributes:
        file: its path in the folder.
        make: writes it, and the files that it needs, into the folder.
        read: reads the folder.
    """

    file: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]


def make_tokenizer() -> FunnelTokenizer:
    return FunnelTokenizer.train(["a good film is not a bad film", "so it was"] * 5, vocab_size=60)


def make_model(config: FunnelConfig = CONFIG) -> FunnelForSequenceClassification:
    torch.manual_seed(0)
    return FunnelForSequenceClassification(config)


# --- runs and our own checkpoints -------------------------------------------------------------------------------------


def write_run_files(folder: Path) -> None:
    """Adds tokenizer and training state to a checkpoint."""
    make_tokenizer().save(folder)
    state = TrainState(step=3, best={"f1": 0.5})
    torch.save(state.to_dict({"state": {}, "param_groups": []}, {}), folder / STATE)


def make_run(folder: Path) -> None:
    checkpoint = Checkpoint(CONFIG, make_model().state_dict(), "FunnelForSequenceClassification")
    save_checkpoint(folder / "last", checkpoint, write_run_files)
    settings = {"lr": 1e-5, "max_length": 32, "steps": 9}
    record = {"version": 3, "command": "x", "settings": settings, "arguments": {"lr": 1e-5, "data": "x", "blocks": "1"}}
    (folder / "run.json").write_text(json.dumps(record))
    lines = [{"step": step, "split": "train", "loss": 0.5} for step in range(9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def predict(folder: Path) -> object:
    return Classifier.load(folder / "last")(TEXTS)


def resume(folder: Path) -> object:
    run = RunDir(folder)
    arguments = read_arguments(folder, TrainArgs)
    loaded = run.load_last()
    run.truncate_log(TrainState() if loaded is None else loaded[2])
    return TrainArgs(**arguments), loaded


# --- other formats ----------------------------------------------------------------------------------------------------


def make_huggingface(folder: Path) -> None:
    write_huggingface(folder, Checkpoint(CONFIG, make_model().state_dict(), "FunnelForSequenceClassification"))
    make_tokenizer().save_for_transformers(folder)


def make_pickle(folder: Path) -> None:
    make_huggingface(folder)
    torch.save(read_weight_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def make_shards(folder: Path) -> None:
    make_huggingface(folder)
    weights = read_weight_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_bert(folder: Path) -> None:
    write_bert(folder, Checkpoint(BERT_CONFIG, make_model(BERT_CONFIG).state_dict(), "FunnelForSequenceClassification"))
    make_vocabulary(folder)


def make_original(folder: Path) -> None:
    """Copies the original implementation's smallest golden model, if this machine has it."""
    from conftest import shared

    for file in shared("golden/original/b2-2_pool_qkv").iterdir():
        shutil.copy(file, folder)
        (folder / file.name).chmod(0o644)


# --- tokenizers, layouts, data ----------------------------------------------------------------------------------------


def make_vocabulary(folder: Path) -> None:
    vocabulary = make_tokenizer().tokenizer.get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n")


def make_exported_tokenizer(folder: Path) -> None:
    make_tokenizer().save_for_transformers(folder)


def read_tokenizer(folder: Path) -> object:
    tokenizer = FunnelTokenizer.load(folder)
    tokenizer.check_vocab_size(10**6, folder)
    return tokenizer.encode(TEXTS, max_length=16), tokenizer.encode(TEXTS, TEXTS, 16)


def make_layout(folder: Path) -> None:
    (folder / "layout.txt").write_text("6,3x2,3x2")


def read_layout(folder: Path) -> object:
    return FunnelConfig(blocks=(folder / "layout.txt").read_bytes().decode("utf-8", "replace"))


def make_layout_plan(folder: Path) -> None:
    write_plan(folder / "plan.json", make_plan(CONFIG, LARGER_CONFIG, "identity"))


def read_layout_plan(folder: Path) -> object:
    plan = read_plan(folder / "plan.json", CONFIG, LARGER_CONFIG)
    return apply_plan(make_model().state_dict(), plan, make_model(LARGER_CONFIG).state_dict())


def write_data(path: Path) -> None:
    """Writes examples in the format that the file's name indicates."""
    format_name = path.name.split(".")[1]
    if format_name == "jsonl":
        lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in ROWS]
    elif format_name == "json":
        lines = [json.dumps([{"text": text, "label": label} for text, label in ROWS], ensure_ascii=False)]
    elif format_name == "csv":
        lines = ["text,label", *(f'"{text}",{label}' for text, label in ROWS)]
    else:
        lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in ROWS)]
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def read_data(path: Path) -> object:
    task = load_task(TaskArgs(data=path))
    return encode_split(task, "train", make_tokenizer(), 32)


def data_target(name: str) -> Target:
    return Target(name, lambda folder: write_data(folder / name), lambda folder: read_data(folder / name))


def make_squad(folder: Path) -> None:
    content = write(folder / "squad.json", squad(4, unanswerable=True)).read_bytes()
    (folder / "squad.json.gz").write_bytes(gzip.compress(content))


def read_squad(path: Path) -> object:
    task = load_task(TaskArgs(data=path, problem="answer-spans", max_query_length=8))
    return encode_split(task, "train", make_tokenizer(), 32)


def write_tags(path: Path) -> None:
    """Writes tagged sentences in the format that the file's name indicates."""
    sentences = [[("so", "O"), ("é 是", "B-x"), ("\x07", "I-x")], [("it", "B-y")], [("was", "O"), ("a", "I-y")]] * 3
    if path.suffix == ".jsonl":
        rows = ({"tokens": [word for word, _ in s], "tags": [tag for _, tag in s]} for s in sentences)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        path.write_text("-DOCSTART-\tO\n\n" + "\n".join("".join(f"{word}\t{tag}\n" for word, tag in s) for s in sentences))


def read_tags(path: Path) -> object:
    task = load_task(TaskArgs(data=path, problem="token-labels"))
    return encode_split(task, "train", make_tokenizer(), 6)


def tags_target(name: str) -> Target:
    return Target(name, lambda folder: write_tags(folder / name), lambda folder: read_tags(folder / name))


TAG_FILES = ("tags.conll", "tags.jsonl")
DATA_FILES = ("data.tsv", "data.csv", "data.jsonl", "data.json", "data.csv.gz", "data.jsonl.gz")
TARGETS = {
    "config.json": Target("last/config.json", make_run, predict),
    "safetensors": Target("last/model.safetensors", make_run, predict),
    "tokenizer.json in a checkpoint": Target("last/tokenizer.json", make_run, predict),
    "training_state.pt": Target("last/training_state.pt", make_run, resume),
    "run.json": Target("run.json", make_run, resume),
    "run.json in prediction": Target("run.json", make_run, predict),
    "metrics.jsonl": Target("metrics.jsonl", make_run, resume),
    "transformers config.json": Target("config.json", make_huggingface, read_source),
    "transformers safetensors": Target("model.safetensors", make_huggingface, read_source),
    "transformers pickle": Target("pytorch_model.bin", make_pickle, read_source),
    "transformers shard index": Target("model.safetensors.index.json", make_shards, read_source),
    "BERT config.json": Target("config.json", make_bert, read_source),
    "BERT safetensors": Target("model.safetensors", make_bert, read_source),
    "BERT vocab.txt": Target("vocab.txt", make_bert, read_source),
    "original net_config.json": Target("net_config.pytorch.json", make_original, read_source),
    "original model.pt": Target("model.pt", make_original, read_source),
    "tokenizer.json": Target("tokenizer.json", lambda folder: make_tokenizer().save(folder), read_tokenizer),
    "vocab.txt": Target("vocab.txt", make_vocabulary, read_tokenizer),
    "tokenizer_config.json": Target("tokenizer_config.json", make_exported_tokenizer, read_tokenizer),
    "layout": Target("layout.txt", make_layout, read_layout),
    "layout plan": Target("plan.json", make_layout_plan, read_layout_plan),
    "SQuAD": Target("squad.json", make_squad, lambda folder: read_squad(folder / "squad.json")),
    "SQuAD, compressed": Target("squad.json.gz", make_squad, lambda folder: read_squad(folder / "squad.json.gz")),
    **{name: data_target(name) for name in DATA_FILES},
    **{name: tags_target(name) for name in TAG_FILES},
}
