"""Downloads from a local server that injects faults, and unpacking."""

import hashlib
import io
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from funnel.data import download
from funnel.data.download import Archive, fetch, unpack
from funnel.errors import FunnelError

CONTENT = bytes(range(256)) * 2000


class Server(ThreadingHTTPServer):
    """Serves CONTENT.

    Args:
        faults: one per request. "cut": the connection closes midway; "short": announces and sends half; "wrong": sends other
            bytes; "error", "missing": status 503, 404; "no ranges": ignores the Range header.
    """

    def __init__(self, *faults):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.requests = list(faults), []
        self.url = f"http://127.0.0.1:{self.server_port}/data.tgz"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        range_header = self.headers.get("Range")
        self.server.requests.append(range_header)
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault in ("error", "missing"):
            return self.send_error({"error": 503, "missing": 404}[fault])
        start = int(range_header[6:-1]) if range_header and fault != "no ranges" else 0
        if start >= len(CONTENT):
            return self.send_error(416)
        body = CONTENT[start:]
        body = bytes(len(body)) if fault == "wrong" else body
        announced = len(body) // 2 if fault == "short" else len(body)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(body[: len(body) // 3 if fault == "cut" else announced])
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture(autouse=True)
def no_delay(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)


def archive(server, kind="sha256", content=CONTENT):
    checksum = str(len(content)) if kind == "size" else hashlib.new(kind, content).hexdigest()
    return Archive(server.url, f"{kind}:{checksum}")


@pytest.mark.parametrize("kind", ["sha256", "md5", "size"])
def test_file_is_downloaded_once_and_verified(tmp_path, kind):
    server = Server()
    for _ in range(2):
        assert download.download(archive(server, kind), tmp_path / "new").read_bytes() == CONTENT
    assert server.requests == [None]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data.tgz"]


@pytest.mark.parametrize(
    "faults", [("cut",), ("cut", "cut", "error", "cut"), ("error",), ("cut", "no ranges"), ("cut", "cut", "no ranges", "cut")]
)
def test_interrupted_connection_is_resumed(tmp_path, faults):
    server = Server(*faults)
    assert download.download(archive(server), tmp_path).read_bytes() == CONTENT
    if faults == ("cut",):
        assert server.requests == [None, f"bytes={len(CONTENT) // 3}-"]


def test_later_call_resumes_an_interrupted_download(tmp_path):
    with pytest.raises(FunnelError, match=r"cannot download .*connection closed after [\d,]+ of 512,000 bytes"):
        download.download(archive(Server(*["cut"] * 9)), tmp_path)
    received = (tmp_path / "data.tgz.part").stat().st_size
    assert received > len(CONTENT) // 2
    server = Server()
    assert download.download(archive(server), tmp_path).read_bytes() == CONTENT
    assert server.requests == [f"bytes={received}-"]


def test_complete_part_file_is_accepted(tmp_path):
    (tmp_path / "data.tgz.part").write_bytes(CONTENT)
    assert download.download(archive(Server()), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("fault", ["wrong", "short"])
def test_file_with_wrong_checksum_is_deleted(tmp_path, fault):
    server = Server(fault)
    with pytest.raises(FunnelError, match=r"has checksum .* expected .*it was deleted.*put the correct file into") as error:
        download.download(archive(server), tmp_path)
    assert server.url in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert download.download(archive(server), tmp_path).read_bytes() == CONTENT


def test_error_without_network_names_url_and_folder(tmp_path):
    server = Server()
    server.shutdown()
    server.server_close()
    with pytest.raises(FunnelError, match=f"{server.url}: cannot download .*refused.*put it into {tmp_path}"):
        download.download(archive(server), tmp_path)


def test_missing_file_is_requested_only_once(tmp_path):
    server = Server("missing")
    with pytest.raises(FunnelError, match="404"):
        download.download(archive(server), tmp_path)
    assert len(server.requests) == 1


def test_error_names_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FunnelError, match=r"cannot write .*file .*FUNNEL_CACHE"):
        download.download(archive(Server()), tmp_path / "file")


def test_interrupted_fetch_is_repeated(tmp_path):
    make_zip(tmp_path / "data.zip", ["train.tsv"])
    archives = [Archive("https://example.com/data.zip", "size:0")]  # already downloaded

    def interrupt(downloads, unpacked):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(archives, tmp_path, interrupt)
    assert not (tmp_path / "unpacked").exists()
    fetch(archives, tmp_path, lambda downloads, unpacked: (unpacked / "dev.tsv").write_text("dev") and None)
    assert sorted(path.name for path in (tmp_path / "unpacked").iterdir()) == ["dev.tsv", "train.tsv"]


def make_zip(path, names):
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "text")


def make_tgz(path, members):
    with tarfile.open(path, "w:gz") as file:
        for name, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, 4 if kind == tarfile.REGTYPE else 0, "/etc/passwd"
            file.addfile(member, io.BytesIO(b"text"))


def test_archives_are_unpacked_into_a_new_folder(tmp_path):
    make_zip(tmp_path / "a.zip", ["SST-2/train.tsv", "SST-2/original/x"])
    make_tgz(tmp_path / "a.tgz", [("ag", tarfile.DIRTYPE), ("ag/train.csv", tarfile.REGTYPE)])
    unpack(tmp_path / "a.zip", tmp_path / "zip")
    unpack(tmp_path / "a.tgz", tmp_path / "tgz")
    assert (tmp_path / "zip/SST-2/train.tsv").read_text() == (tmp_path / "tgz/ag/train.csv").read_text() == "text"


@pytest.mark.parametrize("name", ["../out", "/tmp/funnel-out", "a/../../out", "..\\out", "C:\\out"])
@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_members_outside_the_folder_are_rejected(tmp_path, name, kind):
    (tmp_path / "in").mkdir()
    path = tmp_path / f"in/a.{kind}"
    make_zip(path, ["fine", name]) if kind == "zip" else make_tgz(path, [(n, tarfile.REGTYPE) for n in ("fine", name)])
    with pytest.raises(FunnelError, match="points outside the folder; nothing was unpacked"):
        unpack(path, tmp_path / "in/new")
    assert [p.name for p in tmp_path.rglob("*")] == ["in", f"a.{kind}"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_rejected(tmp_path, kind):
    make_tgz(tmp_path / "a.tgz", [("fine", tarfile.REGTYPE), ("link", kind)])
    with pytest.raises(FunnelError, match="'link' is neither a file nor a folder"):
        unpack(tmp_path / "a.tgz", tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tgz"]


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_damaged_archive_raises_an_error(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    make_zip(path, ["x" * 50, "y" * 50]) if kind == "zip" else make_tgz(path, [("x" * 50, tarfile.REGTYPE)] * 3)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FunnelError, match="cannot unpack"):
        unpack(path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
