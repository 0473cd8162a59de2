"""convert_weights.py and the readers behind it: every format, both ways, and what is wrong with a source."""

import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import run_command, tiny_config
from safetensors.torch import load_file, save_file

import convert_weights
from funnel.model import checkpoint
from funnel.model.config import FunnelConfig
from funnel.weights import from_bert
from funnel.weights.load import read_weights_from
from funnel.weights.huggingface import TABLE
from funnel.errors import FunnelError
from funnel.model.heads import MODELS, FunnelBaseModel

transformers = pytest.importorskip("transformers", reason="the peer is not installed: pip install funnel[test]")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

CLASSES = [name for name in MODELS if name != "FunnelModel"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "the", "film"]


def add_vocabulary(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")


def peer_folder(folder: Path, cls_name: str = "FunnelForSequenceClassification", **options) -> Path:
    """A random model of transformers, saved as transformers saves it, with a vocabulary."""
    torch.manual_seed(0)
    values = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "vocab_size": 99, "block_sizes": [1, 2]}
    getattr(transformers, cls_name)(transformers.FunnelConfig(**values, **options)).save_pretrained(folder)
    add_vocabulary(folder)
    return folder


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("cls_name", [*CLASSES, "FunnelModel"])
def test_the_way_to_transformers_and_back_is_bit_exact(cls_name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[cls_name](tiny_config(block_repeats=(1, 2, 1), num_decoder_layers=1, id2label={0: "a", 1: "b", 2: "c"}))
    checkpoint.save(tmp_path / "ours", model.config, model.state_dict(), cls_name, extra=add_vocabulary)
    convert_weights.convert(str(tmp_path / "ours"), tmp_path / "theirs", "huggingface")
    convert_weights.convert(str(tmp_path / "theirs"), tmp_path / "back")
    back = checkpoint.load(tmp_path / "back")
    assert back.architecture == cls_name
    assert equal(back.weights, checkpoint.load(tmp_path / "ours").weights)
    expected = model.config.replace(block_repeats=model.config.block_repeats)
    if cls_name == "FunnelBaseModel":  # has no decoder, whatever its config says
        expected = expected.replace(num_decoder_layers=0)
    if cls_name == "FunnelForQuestionAnswering":  # transformers keeps no names of labels beside its two outputs
        expected = expected.replace(id2label=FunnelConfig().id2label)
    assert back.config == expected


@pytest.mark.parametrize("cls_name", [*CLASSES, "FunnelModel"])
def test_from_pretrained_of_transformers_gives_equal_outputs(cls_name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[cls_name](tiny_config(num_decoder_layers=1, id2label={0: "a", 1: "b", 2: "c"})).eval()
    checkpoint.save(tmp_path / "ours", model.config, model.state_dict(), cls_name, extra=add_vocabulary)
    convert_weights.convert(str(tmp_path / "ours"), tmp_path / "theirs", "huggingface")
    peer, report = getattr(transformers, cls_name).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    ids = torch.randint(5, 99, (2, 3, 16) if cls_name == "FunnelForMultipleChoice" else (2, 16))
    with torch.no_grad():
        theirs, ours = peer.eval()(ids), model(ids)
    if cls_name == "FunnelForQuestionAnswering":
        expected = torch.stack([theirs.start_logits, theirs.end_logits], -1)
    else:
        expected = theirs[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    if cls_name == "FunnelForSequenceClassification":
        assert peer.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("kind", ["bin", "sharded safetensors", "sharded bin", "no prefix", "no architectures"])
def test_every_form_of_their_files_reads_the_same(kind, tmp_path):
    folder = peer_folder(tmp_path / "theirs", "FunnelModel")
    expected = read_weights_from(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    elif kind.startswith("sharded"):
        names = list(weights)
        stem, ending = ("model", "safetensors") if "safetensors" in kind else ("pytorch_model", "bin")
        parts = {f"{stem}-{i + 1:05}-of-00003.{ending}": names[i::3] for i in range(3)}
        for file, part in parts.items():
            chosen = {n: weights[n] for n in part}
            save_file(chosen, folder / file) if ending == "safetensors" else torch.save(chosen, folder / file)
        weight_map = {n: file for file, part in parts.items() for n in part}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        if kind == "no prefix":
            weights = {f"funnel.{n}": t for n, t in weights.items()}
        config = json.loads((folder / "config.json").read_text())
        config.pop("architectures")
        (folder / "config.json").write_text(json.dumps(config))
        save_file(weights, folder / "model.safetensors")
    found = read_weights_from(folder)
    assert found.config == expected.config
    assert found.architecture == "FunnelModel"
    assert equal(found.weights, expected.weights)


def test_the_table_has_every_name_of_transformers_and_ours(tmp_path):
    theirs, ours = set(), set()
    for name in MODELS:
        source = read_weights_from(peer_folder(tmp_path / name, name))
        raw = load_file(tmp_path / name / "model.safetensors")
        theirs |= {n.removeprefix("funnel.") for n in raw} - {"lm_head.weight"}
        ours |= set(source.weights)

    def pattern(names):
        return {".".join("{}" if part.isdigit() else part for part in name.split(".")) for name in names}

    assert pattern(theirs) == set(TABLE)
    assert pattern(ours) == set(TABLE.values())


def test_converting_says_what_was_read_left_out_and_written(tmp_path):
    peer_folder(tmp_path / "theirs", "FunnelForMaskedLM")
    weights = load_file(tmp_path / "theirs/model.safetensors")
    weights["lm_head.weight"] = weights["funnel.embeddings.word_embeddings.weight"].clone()
    save_file(weights, tmp_path / "theirs/model.safetensors")
    done = run_command("convert_weights.py", "theirs", "ours", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "read      theirs: transformers format, FunnelForMaskedLM, blocks 1,2" in done.stdout
    assert "left out  lm_head.weight (the same as the word embeddings" in done.stdout
    assert "config.json, model.safetensors, tokenizer.json" in done.stdout
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def damage_names(weights):
    weights["stray"] = weights.pop("funnel.encoder.blocks.0.0.ffn.linear_1.bias")


def damage_shape(weights):
    weights["funnel.encoder.blocks.0.0.ffn.linear_1.bias"] = torch.zeros(7)


def damage_value(weights):
    weights["funnel.encoder.blocks.0.0.ffn.linear_1.bias"][0] = torch.nan


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_names, ["missing encoder.blocks.0.0.ffn.linear_1.bias", "left over stray"]),
        (damage_shape, ["encoder.blocks.0.0.ffn.linear_1.bias", "[7]", "[32]"]),
        (damage_value, ["encoder.blocks.0.0.ffn.linear_1.bias", "not finite"]),
    ],
)
def test_weights_that_do_not_fit_are_one_line_and_nothing_is_written(damage, words, tmp_path):
    folder = peer_folder(tmp_path / "theirs")
    weights = load_file(folder / "model.safetensors")
    damage(weights)
    save_file(weights, folder / "model.safetensors")
    done = run_command("convert_weights.py", "theirs", "ours", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "vocab.txt"])
def test_a_missing_file_is_named(missing, tmp_path):
    folder = peer_folder(tmp_path / "theirs")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / missing).unlink()
    with pytest.raises(FunnelError, match=missing.replace(".", r"\.")):
        convert_weights.convert(str(folder), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_an_output_folder_that_exists_is_left_alone(tmp_path):
    peer_folder(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    with pytest.raises(FunnelError, match="exists already"):
        convert_weights.convert(str(tmp_path / "theirs"), tmp_path / "ours")


def test_a_tokenizer_of_another_model_is_an_error(tmp_path):
    folder = peer_folder(tmp_path / "theirs")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY + [f"w{i}" for i in range(200)]))
    with pytest.raises(FunnelError, match="embeddings for 99"):
        convert_weights.convert(str(folder), tmp_path / "ours")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda w: w.pop("encoder.blocks.1.0.ffn.linear_1.bias"), "missing encoder.blocks.1.0.ffn.linear_1.bias"),
        (lambda w: w.update({"foo.bar": torch.ones(2)}), "left over foo.bar"),
        (lambda w: w.update({"encoder.blocks.1.0.ffn.linear_1.bias": torch.ones(3)}), "[3]"),
        (lambda w: w.update({"encoder.blocks.1.0.ffn.linear_1.bias": torch.ones(32, dtype=torch.int8)}), "int8"),
    ],
)
def test_our_own_format_is_checked_too(damage, words, tmp_path):
    model = FunnelBaseModel(tiny_config())
    weights = model.state_dict()
    damage(weights)
    checkpoint.save(tmp_path / "ours", model.config, weights, "FunnelBaseModel", extra=add_vocabulary)
    with pytest.raises(FunnelError) as error:
        convert_weights.convert(str(tmp_path / "ours"), tmp_path / "out", "huggingface")
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


# --- BERT -------------------------------------------------------------------------------------------------------------


def bert_folder(folder: Path, cls_name: str = "BertModel", layers: int = 4):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=80, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = getattr(transformers, cls_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    add_vocabulary(folder)
    return model


@pytest.mark.parametrize(("layers", "blocks"), [(1, (1,)), (2, (1, 1)), (4, (2, 1, 1)), (6, (2, 2, 2)), (12, (4, 4, 4))])
def test_a_flat_network_becomes_three_blocks(layers, blocks):
    assert from_bert.three_blocks(layers) == blocks


@pytest.mark.parametrize("cls_name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_without_positions_a_bert_is_a_funnel_exactly(cls_name, tmp_path):
    """Where BERT's position embeddings are all alike, nothing is lost: the one-block Funnel computes what BERT does."""
    peer = bert_folder(tmp_path / "bert", cls_name)
    body = peer if cls_name == "BertModel" else peer.bert
    with torch.no_grad():
        body.embeddings.position_embeddings.weight.copy_(body.embeddings.position_embeddings.weight[:1].clone())
    peer.save_pretrained(tmp_path / "bert")
    source = read_weights_from(tmp_path / "bert")
    assert source.config.block_sizes == (2, 1, 1)
    flat = FunnelBaseModel(source.config.replace(block_sizes=(4,))).eval()
    order = ["0.0", "0.1", "1.0", "2.0"]
    renamed = {}
    for name, tensor in source.weights.items():
        for i, at in enumerate(order):
            name = name.replace(f"blocks.{at}.", f"blocks.#.{i}.")
        renamed[name.replace("#", "0")] = tensor
    flat.load_state_dict(renamed)
    ids = torch.randint(5, 99, (3, 20))
    ids[:, 0] = 2
    mask = (torch.arange(20) < torch.tensor([[20], [11], [3]])).long()
    with torch.no_grad():
        expected, found = body(ids, attention_mask=mask).last_hidden_state, flat(ids, mask)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=0, atol=1e-4)


def test_fitted_positions_bring_a_funnel_near_its_source(minilm):
    """MiniLM's own last states, on text, against the unpooled Funnel with and without the fit."""
    source = read_weights_from(minilm)
    peer = transformers.BertModel.from_pretrained(minilm, add_pooling_layer=False).eval()
    from funnel.data.tokenizer import FunnelTokenizer

    text = "the film was not as dull as the trailer , but the ending came late and nobody in the room laughed at it ."
    ids = torch.tensor([FunnelTokenizer.load(minilm).encode([text])[0].input_ids])
    with torch.no_grad():
        expected = peer(ids).last_hidden_state
        similarity = {}
        for kind in ("fitted", "zero"):
            flat = FunnelBaseModel(source.config.replace(block_sizes=(6,))).eval()
            weights = {}
            for name, tensor in source.weights.items():
                for b in range(3):
                    for layer in range(2):
                        name = name.replace(f"blocks.{b}.{layer}.", f"blocks.#.{2 * b + layer}.")
                zero = kind == "zero" and name.endswith(("r_kernel", "r_r_bias"))
                weights[name.replace("#", "0")] = torch.zeros_like(tensor) if zero else tensor
            flat.load_state_dict(weights)
            similarity[kind] = torch.cosine_similarity(flat(ids), expected, dim=-1).mean().item()
    assert 1 - similarity["fitted"] < 0.4 * (1 - similarity["zero"]), similarity


def test_a_bert_with_relative_positions_is_refused(tmp_path):
    bert_folder(tmp_path / "bert")
    values = json.loads((tmp_path / "bert/config.json").read_text())
    (tmp_path / "bert/config.json").write_text(json.dumps({**values, "position_embedding_type": "relative_key"}))
    with pytest.raises(FunnelError, match="relative_key"):
        read_weights_from(tmp_path / "bert")


def test_a_bert_that_is_not_finite_is_named(tmp_path):
    bert_folder(tmp_path / "bert")
    weights = load_file(tmp_path / "bert/model.safetensors")
    weights["encoder.layer.0.output.dense.bias"][0] = torch.nan
    save_file(weights, tmp_path / "bert/model.safetensors")
    with pytest.raises(FunnelError, match=r"encoder\.layer\.0\.output\.dense\.bias is not finite"):
        read_weights_from(tmp_path / "bert")


def test_a_bert_whose_scores_overflow_is_named(tmp_path):
    bert_folder(tmp_path / "bert")
    weights = load_file(tmp_path / "bert/model.safetensors")
    weights["encoder.layer.1.attention.self.query.weight"] *= 1e37
    save_file(weights, tmp_path / "bert/model.safetensors")
    with pytest.raises(FunnelError, match="bert: the attention scores of layer 1 overflow"):
        read_weights_from(tmp_path / "bert")


def test_a_bert_in_half_precision_is_read(tmp_path):
    bert_folder(tmp_path / "bert")
    weights = load_file(tmp_path / "bert/model.safetensors")
    save_file({n: t.half() if t.is_floating_point() else t for n, t in weights.items()}, tmp_path / "bert/model.safetensors")
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in read_weights_from(tmp_path / "bert").weights.values())


def test_old_names_of_layer_norm_are_known(tmp_path):
    bert_folder(tmp_path / "bert")
    expected = read_weights_from(tmp_path / "bert").weights
    weights = load_file(tmp_path / "bert/model.safetensors")
    old = {f"bert.{n}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in weights.items()}
    save_file(old, tmp_path / "bert/model.safetensors")
    assert equal(read_weights_from(tmp_path / "bert").weights, expected)


# --- the original -----------------------------------------------------------------------------------------------------


@pytest.fixture
def original(tmp_path):
    from conftest import shared

    folder = tmp_path / "original"
    shutil.copytree(shared("golden/original/b2-1x2-1x2_shared"), folder, copy_function=shutil.copyfile)
    (folder / "vocab.uncased.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def test_the_original_converts(original, tmp_path):
    convert_weights.convert(str(original), tmp_path / "ours")
    saved = checkpoint.load(tmp_path / "ours")
    assert saved.config.layout == "2,1x2,1x2"
    assert saved.architecture == "FunnelForSequenceClassification"
    assert saved.config.num_labels == 3


def test_an_original_without_its_classifier_is_a_base_model(original, tmp_path):
    weights = torch.load(original / "model.pt", weights_only=True)
    torch.save({n: t for n, t in weights.items() if not n.startswith("cls_head")}, original / "model.pt")
    assert read_weights_from(original).architecture == "FunnelBaseModel"


@pytest.mark.parametrize(("field", "value"), [("pooling_size", 4), ("d_embed", 16), ("block_size", "2_x")])
def test_an_original_that_we_cannot_be_is_refused(original, field, value):
    path = original / "net_config.pytorch.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(FunnelError, match=field):
        read_weights_from(original)


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    """A small stand-in for the hub, on loopback: one repository, funnel-transformer/tiny."""
    files = peer_folder(tmp_path / "files", "FunnelModel")

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
                listing = {"id": "funnel-transformer/tiny", "sha": "a" * 40,
                           "siblings": [{"rfilename": p.name} for p in files.iterdir()]}  # fmt: skip
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


def hub_environment(endpoint, home):
    return {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def test_a_hub_id_is_downloaded_once_and_then_found_in_the_cache(hub, tmp_path):
    online = hub_environment(hub, tmp_path / "home")
    done = run_command("convert_weights.py", "funnel-transformer/tiny", "first", cwd=tmp_path, **online)
    assert done.returncode == 0, done.stderr
    offline = hub_environment("http://127.0.0.1:9", tmp_path / "home")
    done = run_command("convert_weights.py", "funnel-transformer/tiny", "second", cwd=tmp_path, **offline)
    assert done.returncode == 0, done.stderr
    first, second = (checkpoint.load(tmp_path / name) for name in ("first", "second"))
    assert equal(first.weights, second.weights)
    assert first.architecture == "FunnelModel"


def test_an_unknown_repository_is_named(hub, tmp_path):
    online = hub_environment(hub, tmp_path / "home")
    done = run_command("convert_weights.py", "funnel-transformer/none", "out", cwd=tmp_path, **online)
    assert done.returncode == 2
    assert "funnel-transformer/none" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_without_a_network_the_error_names_files_and_the_flag(tmp_path):
    offline = hub_environment("http://127.0.0.1:9", tmp_path / "home")
    done = run_command("convert_weights.py", "funnel-transformer/small", "out", cwd=tmp_path, **offline)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    for word in ("funnel-transformer/small", "config.json", "model.safetensors", "--weights DIR"):
        assert word in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.network
def test_the_released_small_model_gives_its_published_output(tmp_path):
    """The figures are those of transformers' own integration test of funnel-transformer/small."""
    from funnel.model.heads import FunnelModel
    from funnel.data.tokenizer import FunnelTokenizer

    convert_weights.convert("funnel-transformer/small", tmp_path / "small")
    encoding = FunnelTokenizer.load(tmp_path / "small").encode(["Hello! I am the Funnel Transformer model."])[0]
    with torch.no_grad():
        out = FunnelModel.from_pretrained(tmp_path / "small")(
            torch.tensor([encoding.input_ids]), None, torch.tensor([encoding.token_type_ids])
        )
    assert abs(out.sum().item() - 235.7246) < 1e-4 * 235
    assert abs(out.mean().item() - 0.0256) < 1e-4
