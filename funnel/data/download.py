"""Archives of data: downloaded once, resumed when cut off, checked, and unpacked without leaving their folder."""

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from tqdm import tqdm

from funnel.errors import FunnelError, error_reason

ATTEMPTS = 5  # connections that may break off before a download counts as failed


@dataclass(frozen=True)
class Archive:
    """A file to download.

    Attributes:
        address: where it is.
        checksum: "sha256:…" or "md5:…" of it, or "size:…", its bytes, where nothing better is published.
    """

    address: str
    checksum: str

    @property
    def name(self) -> str:
        return self.address.rsplit("/", 1)[-1]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder, and within it lets no other process at it that asks for the same.

    Raises:
        FunnelError: the folder cannot be written.
    """
    from huggingface_hub.utils import WeakFileLock  # here, because most runs download nothing

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise FunnelError(f"{folder}: cannot be written ({error_reason(error)}); $FUNNEL_CACHE names another folder") from None
    with WeakFileLock(folder / ".lock"):
        yield


def download(archive: Archive, folder: Path) -> Path:
    """Puts an archive into a folder, unless it is there, and returns its path.

    What arrives is written to a .part file first; a download that breaks off goes on from there, in this call or a later one.

    Raises:
        FunnelError: the address cannot be reached, what arrived is not what was expected, or the folder cannot be written.
    """
    path = folder / archive.name
    if path.is_file():
        return path
    part = path.with_name(path.name + ".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _receive(archive, part)
                break
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                if attempt == ATTEMPTS or (isinstance(error, urllib.error.HTTPError) and error.code < 500):
                    reason = error_reason(
                        getattr(error, "reason", error) if not isinstance(error, urllib.error.HTTPError) else error
                    )
                    raise FunnelError(
                        f"{archive.address}: cannot be downloaded ({reason}); resolve it elsewhere and put it into {folder}"
                    ) from None
                time.sleep(attempt / 4)
    except OSError as error:
        raise FunnelError(f"{folder}: cannot be written ({error_reason(error)}); $FUNNEL_CACHE names another folder") from None
    if (found := _checksum(part, archive.checksum.partition(":")[0])) != archive.checksum:
        part.unlink()
        raise FunnelError(
            f"{archive.address}: what arrived is damaged or another file ({found}, not {archive.checksum}); "
            f"it was removed; try again, or put the right file into {folder}"
        )
    part.replace(path)
    return path


def _receive(archive: Archive, part: Path) -> None:
    """One connection: fetches what is still missing."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "funnel"} | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(archive.address, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is missing
            return
        raise
    with response:
        if response.status != 206:  # the server begins anew
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(desc=archive.name, total=total, initial=have, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)
        with bar, part.open("r+b" if have else "wb") as file:
            file.seek(have)
            while piece := _read(response):
                file.write(piece)
                bar.update(len(piece))
                have += len(piece)
    if total is not None and have < total:
        raise ConnectionError(f"the connection broke off after {have:,} of {total:,} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
    """The next bytes; whatever the network does is a ConnectionError, unlike what the disk does."""
    try:
        return response.read(2**16)
    except OSError as error:
        raise ConnectionError(error_reason(error)) from None


def _checksum(path: Path, kind: str) -> str:
    if kind == "size":
        return f"size:{path.stat().st_size}"
    with path.open("rb") as file:
        digest = hashlib.new(kind)
        while piece := file.read(2**20):
            digest.update(piece)
    return f"{kind}:{digest.hexdigest()}"


def unpack(path: Path, folder: Path) -> None:
    """Unpacks a .zip, .tgz or .tar.gz file into a new folder, all of it or nothing.

    Raises:
        FunnelError: it is damaged, or holds something that would lie outside of the folder, or is no plain file or folder.
    """
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    _check_name(path, entry.filename)
                archive.extractall(part)
        else:
            with tarfile.open(path) as archive:
                for member in archive:
                    _check_name(path, member.name)
                    if not (member.isreg() or member.isdir()):
                        raise FunnelError(f"{path}: {member.name!r} is no plain file; nothing was unpacked")
                    archive.extract(member, part, filter="data")
        part.chmod(0o755)
        part.replace(folder)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, ValueError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, FunnelError):
            raise
        raise FunnelError(f"{path}: cannot be unpacked ({error_reason(error)}); remove it and start again") from None
    except OSError as error:
        raise FunnelError(f"{folder}: cannot be unpacked into ({error_reason(error)})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_name(path: Path, name: str) -> None:
    """Stops at a name that leaves the folder."""
    parts = PureWindowsPath(name)  # knows both kinds of slashes
    if parts.anchor or ".." in parts.parts:
        raise FunnelError(f"{path}: {name!r} would lie outside of the folder; nothing was unpacked")
