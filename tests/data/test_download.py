"""Downloads, against a server on this machine that also misbehaves."""

import hashlib
import io
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from funnel.data import download
from funnel.data.download import Archive, unpack
from funnel.errors import FunnelError

CONTENT = bytes(range(256)) * 2000


class Server(ThreadingHTTPServer):
    """Serves CONTENT. `faults` are taken one a request: "cut" breaks off in the middle, "short" claims and sends half, "wrong"
    sends other bytes, "error" and "missing" are statuses, "no ranges" sends all whatever was asked for."""

    def __init__(self, *faults):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.requests = list(faults), []
        self.address = f"http://127.0.0.1:{self.server_port}/data.tgz"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.requests.append(asked)
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault in ("error", "missing"):
            return self.send_error({"error": 503, "missing": 404}[fault])
        start = int(asked[6:-1]) if asked and fault != "no ranges" else 0
        if start >= len(CONTENT):
            return self.send_error(416)
        body = CONTENT[start:]
        body = bytes(len(body)) if fault == "wrong" else body
        claimed = len(body) // 2 if fault == "short" else len(body)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(claimed))
        self.end_headers()
        self.wfile.write(body[: len(body) // 3 if fault == "cut" else claimed])
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)


def archive(server, kind="sha256", content=CONTENT):
    checksum = str(len(content)) if kind == "size" else hashlib.new(kind, content).hexdigest()
    return Archive(server.address, f"{kind}:{checksum}")


@pytest.mark.parametrize("kind", ["sha256", "md5", "size"])
def test_a_file_is_downloaded_once_and_checked(tmp_path, kind):
    server = Server()
    for _ in range(2):
        assert download.download(archive(server, kind), tmp_path / "new").read_bytes() == CONTENT
    assert server.requests == [None]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data.tgz"]


@pytest.mark.parametrize(
    "faults", [("cut",), ("cut", "cut", "error", "cut"), ("error",), ("cut", "no ranges"), ("cut", "cut", "no ranges", "cut")]
)
def test_a_connection_that_breaks_off_is_taken_up_again(tmp_path, faults):
    server = Server(*faults)
    assert download.download(archive(server), tmp_path).read_bytes() == CONTENT
    if faults == ("cut",):
        assert server.requests == [None, f"bytes={len(CONTENT) // 3}-"]


def test_a_later_call_goes_on_where_an_earlier_one_broke_off(tmp_path):
    with pytest.raises(FunnelError, match=r"cannot be downloaded .*broke off after [\d,]+ of 512,000 bytes"):
        download.download(archive(Server(*["cut"] * 9)), tmp_path)
    have = (tmp_path / "data.tgz.part").stat().st_size
    assert have > len(CONTENT) // 2
    server = Server()
    assert download.download(archive(server), tmp_path).read_bytes() == CONTENT
    assert server.requests == [f"bytes={have}-"]


def test_a_whole_part_file_needs_no_more_bytes(tmp_path):
    (tmp_path / "data.tgz.part").write_bytes(CONTENT)
    assert download.download(archive(Server()), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("fault", ["wrong", "short"])
def test_other_bytes_are_refused_and_removed(tmp_path, fault):
    server = Server(fault)
    with pytest.raises(FunnelError, match=r"damaged or another file .*put the right file into") as error:
        download.download(archive(server), tmp_path)
    assert server.address in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert download.download(archive(server), tmp_path).read_bytes() == CONTENT


def test_without_a_network_the_error_names_address_and_folder(tmp_path):
    server = Server()
    server.shutdown()
    server.server_close()
    with pytest.raises(FunnelError, match=f"{server.address}: cannot be downloaded .*refused.*put it into {tmp_path}"):
        download.download(archive(server), tmp_path)


def test_a_file_that_the_server_does_not_have_is_not_asked_for_again(tmp_path):
    server = Server("missing")
    with pytest.raises(FunnelError, match="404"):
        download.download(archive(server), tmp_path)
    assert len(server.requests) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FunnelError, match=r"file: cannot be written .*FUNNEL_CACHE"):
        download.download(archive(Server()), tmp_path / "file")


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
def test_nothing_is_unpacked_outside_of_the_folder(tmp_path, name, kind):
    (tmp_path / "in").mkdir()
    path = tmp_path / f"in/a.{kind}"
    make_zip(path, ["fine", name]) if kind == "zip" else make_tgz(path, [(n, tarfile.REGTYPE) for n in ("fine", name)])
    with pytest.raises(FunnelError, match="outside of the folder; nothing was unpacked"):
        unpack(path, tmp_path / "in/new")
    assert [p.name for p in tmp_path.rglob("*")] == ["in", f"a.{kind}"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    make_tgz(tmp_path / "a.tgz", [("fine", tarfile.REGTYPE), ("link", kind)])
    with pytest.raises(FunnelError, match="'link' is no plain file"):
        unpack(tmp_path / "a.tgz", tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tgz"]


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_a_damaged_archive_is_an_error(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    make_zip(path, ["x" * 50, "y" * 50]) if kind == "zip" else make_tgz(path, [("x" * 50, tarfile.REGTYPE)] * 3)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FunnelError, match="cannot be unpacked"):
        unpack(path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
