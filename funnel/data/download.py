"""Downloads data archives once, resumes interrupted downloads, verifies checksums, and unpacks safely."""

import contextlib
import hashlib
import http.client
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from tqdm import tqdm

from funnel.errors import FunnelError, error_reason
from funnel.io import os_errors

MAX_ATTEMPTS = 5  # connections per download
CACHE_HINT = "set FUNNEL_CACHE to another folder"
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
ARCHIVE_ERRORS = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, ValueError, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class Archive:
    """A file to download.

    Attributes:
        url: its address.
        checksum: "sha256:...", "md5:...", or, if no digest is published, "size:..." in bytes.
    """

    url: str
    checksum: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[-1]


def fetch(archives: Sequence[Archive], folder: Path, build: Callable[[Path, Path], None] | None = None) -> Path:
    """Downloads files into a folder and unpacks the archives among them, once, even if called by several processes.

    Args:
        build: called with the folder of downloads and the folder of unpacked files, to add files to the latter.

    Returns:
        The folder of unpacked files.

    Raises:
        FunnelError: as in `download` and `unpack`.
    """
    unpacked, staging = folder / "unpacked", folder / "unpacked.part"
    if unpacked.exists():
        return unpacked
    with lock_folder(folder):
        if unpacked.exists():  # another process was faster
            return unpacked
        paths = [download(archive, folder) for archive in archives]
        with os_errors(folder, "write", CACHE_HINT):
            shutil.rmtree(staging, ignore_errors=True)
            for path in paths:
                if path.suffix in (".zip", ".tgz", ".gz"):
                    unpack(path, staging)
            if build is not None:
                build(folder, staging)
            staging.replace(unpacked)
    return unpacked


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Creates a folder and locks it against other processes that lock the same folder.

    Raises:
        FunnelError: the folder is not writable.
    """
    from huggingface_hub.utils import WeakFileLock  # imported here because most runs download nothing

    with os_errors(folder, "write", CACHE_HINT):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    with WeakFileLock(folder / ".lock"):
        yield


def download(archive: Archive, folder: Path) -> Path:
    """Downloads an archive into a folder, unless it is there already, and returns its path.

    Data goes to a .part file first. After an interruption, this call or a later one continues where it stopped.

    Raises:
        FunnelError: the download failed, its checksum is wrong, or the folder is not writable.
    """
    path = folder / archive.name
    if path.is_file():
        return path
    part = path.with_name(path.name + ".part")
    with os_errors(folder, "write", CACHE_HINT):
        folder.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                _receive(archive, part)
                break
            except NETWORK_ERRORS as error:
                is_refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if attempt == MAX_ATTEMPTS or is_refused:
                    raise _download_error(archive, folder, error) from None
                time.sleep(attempt / 4)
        checksum = _checksum(part, archive.checksum.partition(":")[0])
        if checksum != archive.checksum:
            part.unlink()
            raise FunnelError(
                f"{archive.url}: the downloaded file has checksum {checksum}, expected {archive.checksum}; it was deleted. "
                f"Try again, or put the correct file into {folder}"
            )
        part.replace(path)
    return path


def _download_error(archive: Archive, folder: Path, error: Exception) -> FunnelError:
    cause = error
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        cause = error.reason
    return FunnelError(f"{archive.url}: cannot download ({error_reason(cause)}); download it manually and put it into {folder}")


def _receive(archive: Archive, part: Path) -> None:
    """Makes one connection and appends the missing bytes to the .part file."""
    received = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "funnel"} | ({"Range": f"bytes={received}-"} if received else {})
    request = urllib.request.Request(archive.url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and received:  # range not satisfiable: nothing is missing
            return
        raise
    with response:
        if response.status != 206:  # the server ignores ranges and sends the whole file
            received = 0
        length = response.headers.get("Content-Length")
        total = received + int(length) if length else None
        bar = tqdm(
            desc=archive.name, total=total, initial=received, unit="B", unit_scale=True, disable=None, dynamic_ncols=True
        )
        with bar, part.open("r+b" if received else "wb") as file:
            file.seek(received)
            while chunk := _read_chunk(response):
                file.write(chunk)
                bar.update(len(chunk))
                received += len(chunk)
    if total is not None and received < total:
        raise ConnectionError(f"connection closed after {received:,} of {total:,} bytes")


def _read_chunk(response: http.client.HTTPResponse) -> bytes:
    """Reads the next bytes; raises ConnectionError for network failures, to distinguish them from disk errors."""
    try:
        return response.read(2**16)
    except OSError as error:
        raise ConnectionError(error_reason(error)) from None


def _checksum(path: Path, kind: str) -> str:
    if kind == "size":
        return f"size:{path.stat().st_size}"
    digest = hashlib.new(kind)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return f"{kind}:{digest.hexdigest()}"


def unpack(path: Path, folder: Path) -> None:
    """Unpacks a .zip, .tgz or .tar.gz file into a new folder, completely or not at all.

    Raises:
        FunnelError: the archive is damaged, or contains links, devices or paths outside the folder.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        with os_errors(folder, "unpack into"):
            if path.suffix == ".zip":
                _unpack_zip(path, temporary)
            else:
                _unpack_tar(path, temporary)
            temporary.chmod(0o755)
            temporary.replace(folder)
    except FunnelError:
        raise
    except ARCHIVE_ERRORS as error:
        raise FunnelError(f"{path}: cannot unpack ({error_reason(error)}); delete the file and try again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unpack_zip(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            _check_member_name(path, entry.filename)
        archive.extractall(folder)


def _unpack_tar(path: Path, folder: Path) -> None:
    with tarfile.open(path) as archive:
        for member in archive:
            _check_member_name(path, member.name)
            if not (member.isreg() or member.isdir()):
                raise FunnelError(f"{path}: {member.name!r} is neither a file nor a folder; nothing was unpacked")
            archive.extract(member, folder, filter="data")


def _check_member_name(path: Path, name: str) -> None:
    """Raises FunnelError for a name that would be unpacked outside the folder."""
    member = PureWindowsPath(name)  # handles both kinds of slashes
    if member.anchor or ".." in member.parts:
        raise FunnelError(f"{path}: {name!r} points outside the folder; nothing was unpacked")
