"""Predictions for uploaded files, in the background.

One file at a time is read, chunk by chunk; its texts go through the same batches as those of requests, at a lower priority.
"""

import contextlib
import itertools
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

from funnel.data.files import Example, ExampleFile
from funnel.errors import FunnelError
from funnel.inference.classifier import Prediction
from funnel.inference.predictions import write_predictions
from funnel.serving.batching import Batcher, WorkFailedError
from funnel.serving.engines import NOT_FINITE, Input, ServedModel
from funnel.serving.metrics import Metrics

FORMATS = (".csv", ".tsv", ".jsonl")
MAX_FILES = 16  # kept at a time, including processed ones
LIFETIME = 3600.0  # seconds for which a processed file is kept
CHUNK_SIZE = 256  # texts that are read, tokenized and queued at a time
POLL_SECONDS = 0.5  # between checks whether a file was cancelled
OUTPUT = ".predictions.csv"  # no uploaded file has a name that starts with a dot
MAX_NAME_LENGTH = 60  # characters; file systems allow 255 bytes

logger = logging.getLogger(__name__)


class TooManyFilesError(Exception):
    """`MAX_FILES` files are being uploaded or waiting for their predictions."""


class _CancelledError(Exception):
    """A file was cancelled while it was processed."""


class FileJob:
    """An uploaded file.

    Attributes:
        id: unguessable.
        path: the uploaded file, in a folder of its own.
        status: as in `funnel.serving.schemas.FileStatus`, as are done, total and detail.
    """

    def __init__(self, model: ServedModel, folder: Path, name: str) -> None:
        self.id = secrets.token_urlsafe(16)
        self.model, self.path = model, folder / self.id / name
        self.source: ExampleFile | None = None
        self.status, self.done, self.total = "queued", 0, 0
        self.detail: str | None = None
        self.cancelled = threading.Event()
        self.ended_at: float | None = None

    @property
    def output(self) -> Path:
        """The file of predictions."""
        return self.path.parent / OUTPUT

    @property
    def download_name(self) -> str:
        """The name under which the predictions are downloaded."""
        return f"{self.path.stem}-predictions.csv"

    def describe(self) -> dict[str, Any]:
        """What the API says about the file."""
        return {"status": self.status, "done": self.done, "total": self.total, "detail": self.detail}

    def end(self, status: str, detail: str | None = None) -> None:
        """Records the final status."""
        self.status, self.detail, self.ended_at = status, detail, time.monotonic()

    def message(self, error: FunnelError) -> str:
        """An error's message with the names that the client knows instead of paths and parameters."""
        text = str(error).replace(f"{self.path.parent}{os.sep}", "").replace("text_pair_column", "pair_column")
        return " ".join(text.removeprefix("file ").split())


class FileJobs:
    """All uploaded files, in a temporary folder. `start` must be called before other methods."""

    def __init__(self, batcher: Batcher, metrics: Metrics) -> None:
        self.batcher, self.metrics = batcher, metrics
        self._jobs: dict[str, FileJob] = {}
        self._worker = ThreadPoolExecutor(1, "files")
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._folder = Path()

    def start(self) -> None:
        """Creates the folder."""
        self._temporary = tempfile.TemporaryDirectory(prefix="funnel-serve-", ignore_cleanup_errors=True)
        self._folder = Path(self._temporary.name)
        self.metrics.files.set_function(lambda: len(self._jobs))

    def close(self) -> None:
        """Cancels all files and deletes them."""
        for job in list(self._jobs.values()):
            job.cancelled.set()
        self._worker.shutdown(wait=True, cancel_futures=True)
        if self._temporary is not None:
            self._temporary.cleanup()
        self._jobs.clear()

    def create(self, model: ServedModel, name: str) -> FileJob:
        """Creates the folder of a file that is being uploaded. Must be followed by `enqueue` or `discard`.

        Args:
            name: the client's name of the file.

        Raises:
            FunnelError: the format is not supported.
            TooManyFilesError: `MAX_FILES` files are being uploaded or waiting for their predictions.
        """
        name = re.sub(r"[^\w.() -]", "_", re.split(r"[/\\]", name)[-1])[-MAX_NAME_LENGTH:].strip(". ")
        if not name.lower().endswith(FORMATS):
            raise FunnelError(f"{name or 'the file'}: unknown format; expected a name that ends in {', '.join(FORMATS)}")
        self.purge()
        if sum(job.ended_at is None for job in self._jobs.values()) >= MAX_FILES:
            raise TooManyFilesError
        job = FileJob(model, self._folder, name)
        job.path.parent.mkdir()
        self._jobs[job.id] = job
        return job

    def enqueue(self, job: FileJob, text_column: str | None, pair_column: str | None) -> None:
        """Checks the columns of an uploaded file and queues it; the oldest processed file may have to make room for it.

        Raises:
            FunnelError: a column is missing, or the model does not take pairs, or needs them.
        """
        try:
            job.source = job.model.open_file(job.path, text_column, pair_column)
        except FunnelError as error:
            raise FunnelError(job.message(error)) from None
        ended = [job for job in self._jobs.values() if job.ended_at is not None]
        if ended and len(self._jobs) > MAX_FILES:
            self.forget(ended[0])
        self._worker.submit(self._process, job)

    def discard(self, job: FileJob) -> None:
        """Deletes a file that is neither queued nor being processed."""
        self._jobs.pop(job.id, None)
        shutil.rmtree(job.path.parent, ignore_errors=True)

    def get(self, id: str) -> FileJob | None:
        """A file; None if there is none, or it has expired."""
        self.purge()
        return self._jobs.get(id)

    def forget(self, job: FileJob) -> None:
        """Cancels a file and deletes it; while it is being processed, its thread deletes it."""
        self._jobs.pop(job.id, None)
        job.cancelled.set()
        if job.status != "running":
            self.discard(job)

    def purge(self) -> None:
        """Deletes files that have expired."""
        oldest = time.monotonic() - LIFETIME
        for job in list(self._jobs.values()):
            if job.ended_at is not None and job.ended_at < oldest:
                self.forget(job)

    # --- the thread of the files --------------------------------------------------------------------------------------

    def _process(self, job: FileJob) -> None:
        assert job.source is not None, "enqueue opened it"
        try:
            job.status = "running"
            total = 0
            for _ in job.source.rows():  # also finds malformed rows
                if job.cancelled.is_set():
                    raise _CancelledError
                total += 1
            job.total = total
            write_predictions(self._predict(job, job.source), job.source, job.output)
            job.end("done")
        except _CancelledError:
            pass  # no client can see the file any more
        except FunnelError as error:
            job.end("failed", job.message(error))
        except WorkFailedError as error:
            job.end("failed", str(error))
        except Exception:
            logger.exception("the predictions for a file failed")
            job.end("failed", "unexpected error; the server's log says why")
        finally:
            if job.cancelled.is_set():
                self.discard(job)
            else:
                job.path.unlink(missing_ok=True)  # only the predictions are needed

    def _predict(self, job: FileJob, source: ExampleFile) -> Iterator[tuple[Example, Prediction]]:
        rows = source.rows()
        while chunk := list(itertools.islice(rows, CHUNK_SIZE)):
            encodings = job.model.encode([Input(row.text, row.pair) for row in chunk])
            logits = _wait(self.batcher.submit(job.model, encodings, background=True), job)
            if not logits.isfinite().all():
                raise FunnelError(NOT_FINITE)
            self.metrics.count(job.model.name, encodings)
            for row, values in zip(chunk, logits, strict=True):
                yield row, job.model.classifier.to_prediction(values)
            job.done += len(chunk)


def _wait(future: "Future[Any]", job: FileJob) -> Any:
    """The result of a future; raises _CancelledError if the file is cancelled before."""
    while True:
        if job.cancelled.is_set():
            future.cancel()
            raise _CancelledError
        with contextlib.suppress(FutureTimeoutError):
            return future.result(timeout=POLL_SECONDS)
