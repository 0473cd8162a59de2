"""Resolving a checkpoint, detecting its format, and what is checked when it is read."""

import http.server
import json
import os
import subprocess
import sys
import threading
import types
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import ROOT, run_command, tiny_config
from safetensors.torch import load_file, save_file
from weight_sources import VOCABULARY, are_equal, change_config, make_bert_folder, make_transformers_folder, write_vocabulary

from funnel.cli.convert import convert
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.io import write_checksums
from funnel.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from funnel.model.heads import FunnelBaseModel, FunnelForSequenceClassification
from funnel.weights import load
from funnel.weights.load import open_source, read_source, read_source_config, resolve


def save_base_model(folder: Path) -> Path:
    model = FunnelBaseModel(tiny_config())
    save_checkpoint(folder, Checkpoint(model.config, model.state_dict(), "FunnelBaseModel"), extra=write_vocabulary)
    return folder


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_folder", "name"),
    [(save_base_model, "funnel"), (make_transformers_folder, "transformers"), (make_bert_folder, "BERT")],
)
def test_format_is_detected(make_folder, name, tmp_path):
    make_folder(tmp_path / "source")
    source = read_source(tmp_path / "source")
    assert source.format == name
    assert source.folder == tmp_path / "source"
    assert source.tokenizer.vocab_size == len(VOCABULARY)
    assert read_source_config(tmp_path / "source") == source.config


@pytest.mark.parametrize("make_folder", [save_base_model, make_transformers_folder, make_bert_folder])
def test_config_is_read_once(make_folder, tmp_path, monkeypatch):
    make_folder(tmp_path / "source")
    reads = Counter()
    read_text = Path.read_text

    def counting_read_text(path, *args, **kwargs):
        reads[path.name] += 1
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", counting_read_text)
    read_source(tmp_path / "source")
    assert reads["config.json"] == 1


def test_opening_reads_no_weights(tmp_path):
    folder = save_base_model(tmp_path / "source")
    (folder / "model.safetensors").unlink()
    opened = open_source(folder)
    assert opened.config.layout == "1,2,1"
    with pytest.raises(FunnelError, match=r"source: no weights found; expected model\.safetensors"):
        opened.load()


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        (None, r"source: unknown checkpoint format; expected config\.json \(with a model_type\)"),
        (["bert"], r"source: unknown checkpoint format; expected config\.json \(with a model_type\)"),
        ("gpt2", r"config\.json: model_type 'gpt2' is not supported; choose from funnel, bert, distilbert, "),
        ("t5", r"config\.json: model_type 't5' is not supported: it is an encoder-decoder model; choose from funnel, "),
    ],
)
def test_unknown_model_type_is_an_error(model_type, message, tmp_path):
    change_config(make_transformers_folder(tmp_path / "source"), model_type=model_type)
    with pytest.raises(FunnelError, match=message):
        read_source(tmp_path / "source")


def test_source_without_tokenizer_can_be_read(tmp_path):
    folder = save_base_model(tmp_path / "source")
    (folder / "vocab.txt").unlink()
    source = read_source(folder)
    assert source.tokenizer is None
    with pytest.raises(FunnelError, match=r"source: no tokenizer found; copy the model's tokenizer\.json or vocab\.txt"):
        source.require_tokenizer()


def test_tokenizer_of_another_model_is_an_error(tmp_path):
    folder = make_transformers_folder(tmp_path / "source")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY + [f"w{i}" for i in range(200)]))
    with pytest.raises(FunnelError, match="99"):
        read_source(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda w: w.pop("encoder.blocks.1.0.ffn.linear_1.bias"), "missing encoder.blocks.1.0.ffn.linear_1.bias"),
        (lambda w: w.update({"foo.bar": torch.ones(2)}), "unexpected foo.bar"),
        (lambda w: w.update({"encoder.blocks.1.0.ffn.linear_1.bias": torch.ones(3)}), "[3]"),
        (lambda w: w.update({"encoder.blocks.1.0.ffn.linear_1.bias": torch.ones(32, dtype=torch.int8)}), "int8"),
    ],
)
def test_native_format_is_checked_too(damage, words, tmp_path):
    model = FunnelBaseModel(tiny_config())
    weights = model.state_dict()
    damage(weights)
    save_checkpoint(tmp_path / "source", Checkpoint(model.config, weights, "FunnelBaseModel"), extra=write_vocabulary)
    with pytest.raises(FunnelError) as error:
        convert(str(tmp_path / "source"), tmp_path / "out", "huggingface")
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def test_weights_are_verified_against_their_checksum(tmp_path):
    folder = save_base_model(tmp_path / "source")
    write_checksums(folder)
    read_source(folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(FunnelError, match=r"model\.safetensors: SHA-256 differs"):
        read_source(folder)


@pytest.mark.parametrize("make_folder", [save_base_model, make_transformers_folder, make_bert_folder])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrapped_models_are_ignored(make_folder, prefix, tmp_path):
    make_folder(tmp_path / "source")
    path = tmp_path / "source/model.safetensors"
    expected = read_source(tmp_path / "source").weights
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path)
    assert are_equal(read_source(tmp_path / "source").weights, expected)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("tf_model.h5", r"tf_model\.h5 is a TensorFlow checkpoint: use the model's PyTorch weights, or .*\(from_tf=True\)"),
        ("bert_model.ckpt.index", r"bert_model\.ckpt\.index is a TensorFlow checkpoint"),
        ("model.ckpt-500.index", r"model\.ckpt-500\.index is a TensorFlow checkpoint"),
        ("flax_model.msgpack", r"flax_model\.msgpack is a Flax checkpoint: .*\(from_flax=True\)"),
    ],
)
def test_weights_of_another_framework_are_named(file, words, tmp_path):
    make_bert_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    with pytest.raises(FunnelError, match=f"no weights found; .*{words}"):
        read_source(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FunnelError, match=f"unknown checkpoint format; .*{words}"):
        read_source(tmp_path)


def test_added_tokens_without_an_embedding_are_dropped(tmp_path):
    """transformers' tokenizers add <s> and </s> to a vocabulary without them, and save these."""
    folder = save_base_model(tmp_path)
    tokenizer = FunnelTokenizer.load(folder)
    change_config(folder, vocab_size=tokenizer.vocab_size)
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][: tokenizer.vocab_size]
    save_file(weights, folder / "model.safetensors")
    expected = tokenizer.encode(["<s>the film</s> [SEP]"])
    tokenizer.tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(folder)
    tokenizer = read_source(folder).tokenizer
    assert tokenizer.vocab_size == len(VOCABULARY)
    assert tokenizer.encode(["<s>the film</s> [SEP]"]) == expected


def test_unknown_architecture_is_named(tmp_path):
    model = FunnelBaseModel(tiny_config())
    save_checkpoint(tmp_path / "source", Checkpoint(model.config, model.state_dict(), "FunnelForUnknown"))
    with pytest.raises(FunnelError, match="unknown architecture 'FunnelForUnknown'; expected one of FunnelBaseModel"):
        read_source(tmp_path / "source")


# --- resolving --------------------------------------------------------------------------------------------------------


def test_run_folder_resolves_to_its_best_checkpoint(tmp_path):
    save_base_model(tmp_path / "run/best")
    (tmp_path / "run/run.json").write_text("{}")
    assert resolve(str(tmp_path / "run")) == tmp_path / "run/best"


@pytest.mark.parametrize("source", ["no-such-folder", "a/b/c", "x" * 300, "../elsewhere/no-such-folder"])
def test_name_that_is_neither_folder_nor_hub_id_is_an_error(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FunnelError, match=r"^invalid weights ") as error:
        resolve(source)
    assert error.value.parameter == "weights"


# --- the weights in the package ---------------------------------------------------------------------------------------


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A stand-in for the weights in the package, in fp16."""
    folder = tmp_path / "package/tiny"
    model = FunnelBaseModel(tiny_config())
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_checkpoint(folder, Checkpoint(model.config, weights, "FunnelBaseModel"), extra=write_vocabulary)
    monkeypatch.setattr(load, "TINY_FOLDER", folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_tiny_resolves_to_the_folder_in_the_package(packaged):
    assert resolve("tiny") == packaged


def test_a_folder_named_tiny_takes_precedence_over_the_package(packaged, tmp_path):
    save_base_model(tmp_path / "tiny")
    assert resolve("tiny") == Path("tiny")


def test_a_package_without_weights_is_an_error(packaged):
    (packaged / "model.safetensors").unlink()
    with pytest.raises(FunnelError, match=r"weights 'tiny': .*tiny has no weights; reinstall funnel-transformer") as error:
        resolve("tiny")
    assert error.value.parameter == "weights"


@pytest.mark.filterwarnings("ignore:tiny. newly initialized")
def test_fp16_weights_are_loaded_as_float32(packaged):
    model = FunnelForSequenceClassification.from_pretrained("tiny", blocks="1,2,1,2", num_labels=3)
    weights, stored = model.state_dict(), load_file(packaged / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(torch.equal(weights[name], tensor.float()) for name, tensor in stored.items() if name in weights)


def test_tiny_can_be_converted(packaged, tmp_path, capsys):
    convert("tiny", tmp_path / "out")
    assert are_equal(load_checkpoint(tmp_path / "out").weights, load_checkpoint(packaged).weights)
    assert "wrote" in capsys.readouterr().out


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    """A minimal hub server on localhost with one repository, funnel-transformer/tiny."""
    files = make_transformers_folder(tmp_path / "files", "FunnelModel")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            name = self.path.rsplit("/", 1)[-1]
            if "funnel-transformer/tiny" not in self.path:
                return self.send(404, b'{"error": "Repository not found"}', body, {"X-Error-Code": "RepoNotFound"})
            if "/tree/" in self.path:
                tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "b" * 40} for p in files.iterdir()]
                return self.send(200, json.dumps(tree).encode(), body, {"Content-Type": "application/json"})
            if "/api/models/" in self.path:
                siblings = [{"rfilename": path.name} for path in files.iterdir()]
                listing = {"id": "funnel-transformer/tiny", "sha": "a" * 40, "siblings": siblings}
                return self.send(200, json.dumps(listing).encode(), body, {"Content-Type": "application/json"})
            if not (files / name).is_file():
                return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            data = (files / name).read_bytes()
            return self.send(200, data, body, {"ETag": f'"{len(data)}-{name}"', "X-Repo-Commit": "a" * 40})

        def send(self, status, data, body, headers):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


UNREACHABLE = "http://127.0.0.1:9"


def hub_environment(endpoint: str, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.mark.slow
def test_hub_repository_is_downloaded_once_and_then_read_from_the_cache(hub, tmp_path):
    online = hub_environment(hub, tmp_path / "home")
    done = run_command("convert_weights.py", "funnel-transformer/tiny", "first", cwd=tmp_path, **online)
    assert done.returncode == 0, done.stderr
    offline = hub_environment(UNREACHABLE, tmp_path / "home")
    done = run_command("convert_weights.py", "funnel-transformer/tiny", "second", cwd=tmp_path, **offline)
    assert done.returncode == 0, done.stderr
    first, second = (load_checkpoint(tmp_path / name) for name in ("first", "second"))
    assert are_equal(first.weights, second.weights)
    assert first.architecture == "FunnelModel"
    code = "from funnel import FunnelModel; print(FunnelModel.from_pretrained('funnel-transformer/tiny').config.layout)"
    environment = {**os.environ, **offline, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "1,2\n", done.stderr


def test_unknown_hub_repository_is_named(hub, tmp_path):
    online = hub_environment(hub, tmp_path / "home")
    done = run_command("convert_weights.py", "funnel-transformer/none", "out", cwd=tmp_path, **online)
    assert done.returncode == 2
    assert "funnel-transformer/none" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_hub_repository_without_pytorch_weights_is_named(monkeypatch):
    files = [types.SimpleNamespace(rfilename=name) for name in ("config.json", "tf_model.h5")]
    info = types.SimpleNamespace(siblings=files)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: types.SimpleNamespace(model_info=lambda *_, **__: info))
    with pytest.raises(
        FunnelError, match=r"weights 'some/bert': the repository has no PyTorch weights; tf_model\.h5 is a TensorFlow"
    ):
        resolve("some/bert")


def test_failed_download_says_which_files_to_provide(tmp_path):
    offline = hub_environment(UNREACHABLE, tmp_path / "home")
    done = run_command("convert_weights.py", "funnel-transformer/small", "out", cwd=tmp_path, **offline)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    for words in ("cannot download SOURCE 'funnel-transformer/small'", "config.json", "model.safetensors", "into a folder"):
        assert words in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_failed_download_in_training_names_the_flag(tmp_path):
    offline = hub_environment(UNREACHABLE, tmp_path / "home")
    done = run_command("train.py", "--weights", "funnel-transformer/small", cwd=tmp_path, **offline)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "cannot download --weights 'funnel-transformer/small'" in done.stderr
