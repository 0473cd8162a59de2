"""`funnel serve`: options, errors at the start, and a real process that is stopped while it is busy."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from conftest import ROOT
from served_models import save_classifier

from funnel.cli.main import main
from funnel.errors import FunnelError
from funnel.serving.settings import TOKEN_VARIABLE, Settings, read_token

TIMEOUT = 60  # seconds; only reached by a failing test


# --- options and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nope"], "/nope: no such folder"),
        (["/nope", "--port", "70000"], "invalid --port 70000: expected an integer in [0, 65535]"),
        (["/nope", "--batch-size", "65"], "invalid --batch-size 65"),
        (["/nope", "--max-queue", "9"], "--max-texts 256 exceeds max_queue 9; no such request could be queued"),
        (["/nope", "--host", "nowhere.invalid"], "--host nowhere.invalid: "),
        (["/nope", "--token-file", "/nope"], "cannot read /nope"),
    ],
)
def test_invalid_arguments_are_one_line(arguments, message, capsys):
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    port = [] if "--port" in arguments else ["--port", "0"]
    assert main(["serve", *arguments, *port]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_port_in_use_is_one_line(capsys):
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", "/nope", "--port", port]) == 2
    expected = f"--port {port}: cannot listen on 127.0.0.1 (Address already in use); choose another one"
    assert capsys.readouterr().err == f"funnel: error: {expected}\n"


def test_server_that_others_can_reach_without_a_token_is_a_warning(capsys):
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    assert main(["serve", "/nope", "--port", "0", "--host", "0.0.0.0"]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("funnel: warning: anyone who can reach http://0.0.0.0:")
    assert warning.endswith(" can use this server; set FUNNEL_SERVE_TOKEN or --token-file")
    assert error == "funnel: error: /nope: no such folder"


def test_missing_package_names_the_extra(monkeypatch, capsys):
    for module in [name for name in sys.modules if name.startswith("funnel.serving.")]:
        if not module.endswith(".settings"):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("funnel.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "/nope"]) == 2
    error = capsys.readouterr().err
    assert "the server needs the extra serve (import of uvicorn" in error
    assert error.endswith("; run pip install 'funnel-transformer[serve]'\n")


def test_the_printed_address_accepts_connections(tmp_path, monkeypatch):
    server = pytest.importorskip("funnel.serving.server", reason="needs the extra serve", exc_type=ImportError)
    monkeypatch.setattr(server, "run", lambda service, listener: service.close())
    urls = []

    def connect(*lines: str, **_: bool) -> None:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", lines[0]):
            socket.create_connection(("127.0.0.1", int(found[1])), TIMEOUT).close()
            urls.append(found[0])

    monkeypatch.setattr("builtins.print", connect)
    assert main(["serve", str(save_classifier(tmp_path / "reviews")), "--port", "0", "--device", "cpu"]) == 0
    assert len(urls) == 1


def test_token_is_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, "from-the-environment")
    assert read_token(None) == "from-the-environment"
    (tmp_path / "token").write_text("from-a-file\n")
    assert read_token(tmp_path / "token") == "from-a-file"


@pytest.mark.parametrize("token", ["", "short", "with a space", "ümläute-ümläute", "two\nlines-of-it"])
def test_unusable_token_is_an_error_that_does_not_show_it(token, tmp_path):
    (tmp_path / "file").write_text(token)
    with pytest.raises(FunnelError, match="expected at least 8 printable ASCII characters") as caught:
        read_token(tmp_path / "file")
    assert not token or token not in str(caught.value)


def test_token_is_no_option():
    assert [name for name in vars(Settings()) if "token" in name] == ["token_file"]


# --- a process --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running_server(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Starts `funnel serve` on a free port; yields the process and its address."""
    command = [sys.executable, "-m", "funnel", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if line.startswith("serving on ")), None)
        assert line is not None, process.communicate()
        yield process, line.split()[2].rstrip(",")
    finally:
        process.kill()
        process.communicate()


def post(url: str, values: dict, token: str) -> dict:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{url}/v1/predict", json.dumps(values).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        return json.load(response)


@pytest.mark.slow
def test_sigterm_finishes_the_requests_being_processed(tmp_path):
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    folder, token = save_classifier(tmp_path / "reviews", d_model=64, d_inner=256), "secret-token"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with running_server(str(folder), FUNNEL_SERVE_TOKEN=token, TMPDIR=str(temporary)) as (process, url):
        assert list(temporary.iterdir()) != []
        body = {"inputs": [{"text": "the very bad film " * 20}] * 256}
        assert len(post(url, body, token)["predictions"]) == 256  # also connects everything that is loaded lazily
        with pytest.raises(urllib.error.HTTPError, match="401"):
            post(url, body, "wrong-token")
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(len(post(url, body, token)["predictions"]))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        metrics = f"{url}/metrics"
        while b"funnel_queue_texts 768.0" not in urllib.request.urlopen(metrics, timeout=TIMEOUT).read() and not answers:
            pass
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(TIMEOUT)
        assert process.wait(TIMEOUT) == 0
        assert answers == [256] * 3
        assert process.communicate() == ("", "")  # no message contains the token
    assert list(temporary.iterdir()) == []
