"""Uploading to the hub, against a small server on loopback: what it receives, and errors in one line without the token."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import ROOT
from trained_runs import write_trained_run

import convert_weights
from funnel.cli.main import main

TOKEN = "hf_secretsecretsecret"
REGULAR_SIZE = 1000  # larger files are uploaded beside the commit


class FakeHub(ThreadingHTTPServer):
    """The endpoints of the hub that an upload uses.

    Attributes:
        files: contents by repository and path, as committed.
        visibility: "private" or None by repository.
        requests: method, path, headers and body of all requests.
        failures: status and message by a part of the path, for requests that fail.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, Any] = {}
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.failures: dict[str, tuple[int, str]] = {}
        self.objects: dict[str, bytes] = {}


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, values: Any, status: int = 200) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def handle_any(self) -> None:
        body, hub = self.read_body(), self.server
        hub.requests.append((self.command, self.path, dict(self.headers.items()), body))
        for part, (status, message) in hub.failures.items():
            if part in self.path:
                return self.answer({"error": message}, status)
        if self.command == "PUT":  # the address has its own authorization
            hub.objects[self.path.rpartition("/")[2]] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": f"Invalid credentials {self.headers.get('Authorization')}"}, 401)
        repo = re.sub(r"^/(?:api/models/)?([^/]+/[^/.]+).*", r"\1", self.path)
        values = json.loads(body) if body and "commit" not in self.path else {}
        if self.path == "/api/repos/create":
            repo = f"{values['organization'] or 'me'}/{values['name']}"
            status = 409 if repo in hub.files else 200
            hub.files.setdefault(repo, {})
            hub.visibility.setdefault(repo, values.get("visibility"))
            return self.answer({"url": f"{hub.url}/{repo}"}, status)
        if self.path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if "/preupload/" in self.path:
            modes = {file["path"]: "lfs" if file["size"] > REGULAR_SIZE else "regular" for file in values["files"]}
            return self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        if self.path.endswith("/objects/batch"):
            actions = {o["oid"]: {"upload": {"href": f"{hub.url}/store/{o['oid']}"}} for o in values["objects"]}
            return self.answer({"objects": [{**o, "actions": actions[o["oid"]]} for o in values["objects"]]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    hub.files[repo][line["value"]["path"]] = hub.objects[line["value"]["oid"]]
            return self.answer({"commitUrl": f"{hub.url}/{repo}/commit/1", "commitOid": "1" * 40})
        return self.answer({"error": "not found"}, 404)

    do_GET = do_POST = do_PUT = handle_any


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def connected(hub, monkeypatch, tmp_path) -> FakeHub:
    """huggingface_hub in this process talks to the server."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # files go to the server itself
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    return hub


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = write_trained_run(tmp_path_factory.mktemp("runs") / "mine")
    assert main(["card", str(folder)]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("to", ["funnel", "huggingface"])
def test_the_hub_receives_the_files(to, run, connected, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert_weights.main([str(run), str(out), "--to", to, "--push-to-hub", "someone/mine", "--private"]) == 0
    assert connected.files == {"someone/mine": contents(out)}
    assert connected.visibility == {"someone/mine": "private"}
    assert b"someone/mine" in connected.files["someone/mine"]["README.md"]
    assert b"OWNER/NAME" not in connected.files["someone/mine"]["README.md"]
    assert f"uploaded  {connected.url}/someone/mine" in capsys.readouterr().out
    large = connected.files["someone/mine"]["model.safetensors"]
    assert hashlib.sha256(large).hexdigest() in connected.objects


def test_an_existing_repository_is_updated_and_keeps_its_visibility(run, connected, tmp_path):
    connected.files["me/mine"] = {"other.txt": b"kept"}
    connected.visibility["me/mine"] = None
    assert main(["convert", str(run), str(tmp_path / "out"), "--push-to-hub", "me/mine", "--private"]) == 0
    assert connected.files["me/mine"] == {"other.txt": b"kept", **contents(tmp_path / "out")}
    assert connected.visibility == {"me/mine": None}


def test_the_token_is_only_in_the_authorization_header(run, connected, tmp_path, capsys):
    assert main(["convert", str(run), str(tmp_path / "out"), "--push-to-hub", "mine"]) == 0
    assert set(connected.files) == {"me/mine"}
    for method, path, headers, body in connected.requests:
        found = [name.lower() for name, value in headers.items() if TOKEN in value]
        assert found == ([] if method == "PUT" else ["authorization"])
        assert TOKEN not in path
        assert TOKEN.encode() not in body
    assert TOKEN not in "".join(capsys.readouterr())
    assert all(TOKEN.encode() not in content for content in contents(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("part", "status", "words"),
    [
        ("create", 401, "the hub does not accept the token; log in again with hf auth login, or set HF_TOKEN (401"),
        ("create", 403, "the token does not permit it; create one with write access at https://huggingface.co/settings/tokens"),
        ("commit", 403, "the token does not permit it"),
        ("store", 413, "a file is larger than the hub accepts (413"),
        ("batch", 400, "the hub refused (400: said hf"),
    ],
)
def test_what_the_hub_refuses_is_one_line_without_the_token(part, status, words, run, connected, tmp_path, capsys):
    connected.failures[part] = (status, f"said hf\nBearer {TOKEN}")
    out = tmp_path / "out"
    assert main(["convert", str(run), str(out), "--push-to-hub", "someone/mine"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.splitlines()[-1].startswith(f"funnel: error: cannot upload {out} to someone/mine: ")
    assert words in error.splitlines()[-1]
    assert error.endswith(f"to retry, run hf upload someone/mine {out}")
    assert TOKEN not in error
    assert (out / "model.safetensors").is_file()


def test_a_wrong_token_is_named_as_such(run, connected, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert main(["convert", str(run), str(tmp_path / "out"), "--push-to-hub", "someone/mine"]) == 2
    error = capsys.readouterr().err
    assert "the hub does not accept the token" in error
    assert "hf_another" not in error


@pytest.mark.parametrize(
    ("arguments", "token", "words"),
    [
        (["--push-to-hub", "a/b"], None, "no Hugging Face token: run hf auth login, or set HF_TOKEN"),
        (["--push-to-hub", "a/b"], "hf_secrét", "the Hugging Face token contains characters that no token has"),
        (["--push-to-hub", "a/b/c"], TOKEN, "invalid --push-to-hub 'a/b/c': expected OWNER/NAME"),
        (["--push-to-hub", "a b"], TOKEN, "invalid --push-to-hub 'a b': expected OWNER/NAME"),
        (["--private"], TOKEN, "--private has no effect without push_to_hub"),
    ],
)
def test_mistakes_are_found_before_the_conversion(arguments, token, words, run, connected, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token or "")
    assert main(["convert", str(run), str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert token is None or token not in error
    assert not (tmp_path / "out").exists()
    assert connected.requests == []


def test_an_unreachable_hub_is_one_line(run, connected, tmp_path, capsys):
    connected.shutdown()
    connected.server_close()
    assert main(["convert", str(run), str(tmp_path / "out"), "--push-to-hub", "someone/mine"]) == 2
    assert f"cannot reach {connected.url} (" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_without_a_card_is_uploaded_with_a_warning(connected, tmp_path, capsys):
    folder = write_trained_run(tmp_path / "mine")
    assert main(["convert", str(folder), str(tmp_path / "out"), "--push-to-hub", "someone/mine"]) == 0
    assert "the repository gets no model card; write one with funnel card RUN" in capsys.readouterr().err
    assert connected.files["someone/mine"] == contents(tmp_path / "out")


@pytest.mark.slow
def test_a_process_uploads_to_the_endpoint_in_its_environment(run, hub, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1",
                   "HF_HOME": str(tmp_path / "home")}  # fmt: skip
    command = [sys.executable, str(ROOT / "convert_weights.py"), str(run), "out", "--to", "huggingface", "--push-to-hub", "a/b"]
    done = subprocess.run([*command, "--debug"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert hub.files == {"a/b": contents(tmp_path / "out")}
    assert TOKEN not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert written == []
