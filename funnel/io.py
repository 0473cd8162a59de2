"""Files: JSON, atomic writes of files and folders, checksums, the cache.

Readers see either the old content or the new, never a partial write. Errors name the file.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from funnel.errors import FunnelError, error_reason

CHECKSUMS = "checksums.json"
RUN_FILE, LOG_FILE = "run.json", "metrics.jsonl"  # of a run folder: its settings and arguments, and its log


@contextlib.contextmanager
def os_errors(path: str | Path, action: str = "read", hint: str = "") -> Iterator[None]:
    """Turns an OSError in the body into "cannot read PATH (reason)".

    Args:
        action: "read", "write", or whatever the body does with the file.
        hint: what to do about it, appended to the message.
    """
    try:
        yield
    except OSError as error:
        reason = error_reason(error)
    except RuntimeError as error:  # torch.save wraps the OSError
        if not isinstance(error.__context__, OSError):
            raise
        reason = error_reason(error.__context__)
    else:
        return
    raise FunnelError(f"cannot {action} {path} ({reason}){hint and f'; {hint}'}")


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FunnelError: the file is missing or does not contain a JSON object.
    """
    try:
        with os_errors(path):
            values = json.loads(path.read_text(encoding="utf-8"))
    except FunnelError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number with thousands of digits
        raise FunnelError(f"{path}: invalid JSON ({error_reason(error)})") from None
    if not isinstance(values, dict):
        raise FunnelError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically, one field per line."""
    with atomic_write(path) as temporary:
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # lone surrogates as JSON escapes


# --- atomic writes ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; moves the file into place when the body succeeds, removes it otherwise.

    Raises:
        FunnelError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        with os_errors(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: str | Path, keep: int = 1) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`; moves it into place when the body succeeds, removes it otherwise.

    The swap takes two renames. If the process dies between them, `existing_folder` finds the old folder.

    Args:
        folder: replaced if it exists.
        keep: number of versions to keep, including the new one. Older ones become NAME-1 (the newest), NAME-2, ...

    Raises:
        FunnelError: the folder cannot be written; the previous versions are intact.
    """
    folder = Path(folder)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise FunnelError(f"{folder}: expected a folder, found a file")
    new, old = _sibling(folder, "new"), _sibling(folder, "old")
    try:
        with os_errors(folder, "write"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            if old.exists():  # an earlier call was interrupted
                _rotate(folder, old, keep) if folder.exists() else old.rename(folder)
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            yield new
            for path in [*new.iterdir(), new]:
                _sync(path)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
            _sync(folder.parent)
            _rotate(folder, old, keep)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def folder_versions(folder: str | Path) -> list[Path]:
    """A folder and the older versions that `atomic_folder` kept, newest first; only those that exist."""
    folder = Path(folder)
    numbered = {}
    for path in folder.parent.glob(f"{glob.escape(folder.name)}-*"):
        number = path.name.removeprefix(f"{folder.name}-")
        if number.isdecimal() and number.isascii():
            numbered[int(number)] = path
    candidates = [folder, _sibling(folder, "old"), *(numbered[number] for number in sorted(numbered))]
    return [path for path in candidates if path.is_dir()]


def existing_folder(folder: str | Path) -> Path:
    """The folder, or the version of it that an interrupted `atomic_folder` had moved aside.

    Raises:
        FunnelError: neither exists.
    """
    folder = Path(folder)
    if os.path.isdir(folder):  # Path.is_dir raises for a name that is too long before Python 3.14
        return folder
    if os.path.exists(folder):
        raise FunnelError(f"{folder}: expected a checkpoint folder, found a file")
    if os.path.isdir(_sibling(folder, "old")):
        return _sibling(folder, "old")
    raise FunnelError(f"{folder}: no such folder")


def _rotate(folder: Path, old: Path, keep: int) -> None:
    """Renames the replaced folder to NAME-1 and the older versions accordingly; deletes those beyond `keep`."""
    if keep > 1 and old.exists():
        names = [old, *(folder.with_name(f"{folder.name}-{number}") for number in range(1, keep))]
        shutil.rmtree(names[-1], ignore_errors=True)
        for newer, older in reversed(list(itertools.pairwise(names))):
            if newer.exists():
                newer.rename(older)
        for path in folder_versions(folder)[keep:]:  # an earlier run kept more
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _sibling(folder: Path, suffix: str) -> Path:
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}.{suffix}")


def _sync(path: Path) -> None:
    """Flushes to disk, so that a power failure after the rename loses nothing."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- checksums --------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hex digits."""
    with os_errors(path), path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def json_digest(values: Any) -> str:
    """The SHA-256 of values as JSON."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def write_checksums(folder: Path) -> None:
    """Writes the SHA-256 of every file in a folder and its subfolders to its checksums.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(folder / CHECKSUMS, {path.relative_to(folder).as_posix(): sha256(path) for path in files})


def verify_checksums(folder: Path, names: Iterable[str] | None = None, skip: str | None = None) -> None:
    """Compares files with the folder's checksums.json; a folder without one passes.

    Args:
        names: files to check; None for all listed files.
        skip: a file that is not checked.

    Raises:
        FunnelError: a file is missing or its content has changed.
    """
    if not (folder / CHECKSUMS).is_file():
        return
    sums = read_json(folder / CHECKSUMS)
    for name in sums if names is None else names:
        if name == skip:
            continue
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or (name in sums and not path.is_file()):
            raise FunnelError(f"{path}: missing; the checkpoint is damaged")
        if name in sums and sha256(path) != sums[name]:
            raise FunnelError(
                f"{path}: SHA-256 differs from {CHECKSUMS}, so the file is damaged; use another checkpoint, "
                f"or delete {CHECKSUMS} if you edited the file yourself"
            )


# --- cache ------------------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """The folder for downloads and encoded datasets: $FUNNEL_CACHE, or funnel/ in the user's cache directory."""
    if chosen := os.environ.get("FUNNEL_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "funnel"


def write_cache_entry(folder: Path, write: Callable[[Path], None]) -> tuple[Path, bool]:
    """Creates a folder in the cache. It appears when it is complete, also if several processes create it at once.

    Args:
        folder: the entry; must not exist, unless another process was faster.
        write: writes the files into the folder that it is called with.

    Returns:
        The entry and True; if the cache is not writable (which gives a warning), a temporary folder, which the caller
        removes, and False.

    Raises:
        FunnelError: the disk is full.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary, is_cached = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent)), True
    except OSError as error:
        message = f"cannot write {folder.parent} ({error_reason(error)}); texts will be encoded again in every run"
        warnings.warn(message, stacklevel=3)
        temporary, is_cached = Path(tempfile.mkdtemp(prefix="funnel-")), False
    try:
        with os_errors(temporary, "write", hint="set FUNNEL_CACHE to a folder with more space"):
            write(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if not is_cached:
        return temporary, False
    try:
        temporary.replace(folder)
    except OSError:  # another process was faster
        shutil.rmtree(temporary, ignore_errors=True)
    return folder, True
