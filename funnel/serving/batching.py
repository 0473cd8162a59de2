"""Batches the texts of concurrent requests.

One thread runs all models: a forward pass uses all cores anyway, and an explanation must run alone. It takes the waiting texts
of one model, groups them by length, and runs one forward pass per group. Texts of files run only when no request is waiting;
otherwise one batch of them after every `MAX_BACKGROUND_WAIT`.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funnel.data.tokenizer import Encoding
from funnel.errors import FunnelError
from funnel.serving.engines import ServedModel
from funnel.serving.metrics import Metrics

MAX_BACKGROUND_WAIT = 1.0  # seconds
# Fixed cost of a forward pass, in tokens: if there would be more padding than this, another forward pass is cheaper. Measured
# with six layers on one core: 35 to 50 tokens for a d_model of 384 and 768, 200 for 128.
PASS_TOKENS_CPU = 64
PASS_TOKENS_ACCELERATOR = 4096

logger = logging.getLogger(__name__)


class WorkFailedError(Exception):
    """A forward pass failed, or the server was closed before it; the reason has been logged."""


class _Work:
    """What the worker thread does for a caller.

    Attributes:
        future: of its result.
        waiting_since: when it was queued, or when a batch was last taken from a file.
    """

    def __init__(self) -> None:
        self.future: Future[Any] = Future()
        self.waiting_since = time.monotonic()

    def finish(self, result: Any) -> None:
        with contextlib.suppress(InvalidStateError):  # cancelled in the meantime
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


class _Call(_Work):
    """A function to call."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self.function = function


class _Job(_Work):
    """Texts to predict; the result is their logits, [n, k].

    Attributes:
        n_taken: number of texts that are in a batch, or done.
    """

    def __init__(self, model: ServedModel, encodings: Sequence[Encoding]) -> None:
        super().__init__()
        self.model, self.encodings = model, encodings
        self.n_taken = 0
        self._rows: dict[int, Tensor] = {}

    @property
    def n_waiting(self) -> int:
        return len(self.encodings) - self.n_taken

    def put(self, number: int, row: Tensor) -> None:
        """Stores the logits of a text, [k]; the last one completes the job."""
        self._rows[number] = row
        if len(self._rows) == len(self.encodings):
            self.finish(torch.stack([self._rows[i] for i in range(len(self.encodings))]))


class _Text(NamedTuple):
    """One text of a job."""

    job: _Job
    number: int

    @property
    def encoding(self) -> Encoding:
        return self.job.encodings[self.number]


class Batcher:
    """The queue of texts and the thread that works on it.

    Args:
        batch_size: maximum number of texts in a forward pass.
        batch_wait: seconds to wait for more texts, if the previous batch had texts of several requests.
    """

    def __init__(self, batch_size: int, batch_wait: float, metrics: Metrics) -> None:
        self.batch_size, self.batch_wait, self.metrics = batch_size, batch_wait, metrics
        self._interactive: deque[_Call | _Job] = deque()
        self._background: deque[_Call | _Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._n_jobs_before = 1
        self._thread = threading.Thread(target=self._work, name="predictions", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Ends the thread after its current batch; waiting jobs fail."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def submit(self, model: ServedModel, encodings: Sequence[Encoding], *, background: bool = False) -> "Future[Tensor]":
        """Queues texts; cancelling the future drops those that are not in a forward pass yet.

        Returns:
            The future of their logits, [n, k]. It raises WorkFailedError if the model fails.
        """
        return self._add(_Job(model, encodings), self._background if background else self._interactive)

    def call(self, function: Callable[[], Any]) -> "Future[Any]":
        """Queues a function that runs while no model does.

        Returns:
            The future of its result. It raises WorkFailedError if the function fails; a FunnelError is passed on.
        """
        return self._add(_Call(function), self._interactive)

    def _add(self, work: _Call | _Job, queue: deque[_Call | _Job]) -> "Future[Any]":
        with self._changed:
            if self._is_closed:
                work.fail(WorkFailedError("the server is shutting down"))
            else:
                queue.append(work)
                self._changed.notify()
        return work.future

    # --- the worker thread --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while work := self._next():
            if isinstance(work, _Call):
                self._run_call(work)
                continue
            pass_tokens = PASS_TOKENS_CPU if work[0].job.model.device_type == "cpu" else PASS_TOKENS_ACCELERATOR
            for group in group_by_length([len(text.encoding.input_ids) for text in work], self.batch_size, pass_tokens):
                self._run_batch([text for text in (work[i] for i in group) if not text.job.future.done()])
        for left in (*self._interactive, *self._background):
            left.fail(WorkFailedError("the server is shutting down"))

    def _next(self) -> _Call | list[_Text] | None:
        """Waits for work; None when the batcher is closed."""
        with self._changed:
            while not self._is_closed:
                queue = self._choose_queue()
                if not queue:
                    self._changed.wait()
                    continue
                first = queue[0]
                if isinstance(first, _Call):
                    queue.popleft()
                    return first
                remaining = first.waiting_since + self.batch_wait - time.monotonic()
                is_alone = self._n_jobs_before <= 1 or queue is self._background
                if is_alone or remaining <= 0 or self._count_waiting(queue, first.model) >= self.batch_size:
                    # A request never waits for more than one batch of a file.
                    if texts := self._take(queue, first.model, self.batch_size * (1 if queue is self._background else 2)):
                        if queue is self._background:
                            first.waiting_since = time.monotonic()
                        return texts
                    continue  # the jobs have been cancelled in the meantime
                self._changed.wait(remaining)
            return None

    def _choose_queue(self) -> deque[_Call | _Job] | None:
        """The queue to take work from; removes cancelled jobs."""
        for queue in (self._interactive, self._background):
            while queue and queue[0].future.done():
                queue.popleft()
        if self._background:
            waited = time.monotonic() - self._background[0].waiting_since
            if not self._interactive or waited > MAX_BACKGROUND_WAIT:
                return self._background
        return self._interactive or None

    def _count_waiting(self, queue: deque[_Call | _Job], model: ServedModel) -> int:
        return sum(job.n_waiting for job in queue if isinstance(job, _Job) and job.model is model)

    def _take(self, queue: deque[_Call | _Job], model: ServedModel, limit: int) -> list[_Text]:
        """Takes up to `limit` texts for a model, in the order of arrival."""
        texts: list[_Text] = []
        jobs = 0
        for job in list(queue):
            if not isinstance(job, _Job) or job.model is not model or job.future.done():
                continue
            end = min(len(job.encodings), job.n_taken + limit - len(texts))
            texts += [_Text(job, number) for number in range(job.n_taken, end)]
            job.n_taken, jobs = end, jobs + 1
            if not job.n_waiting:
                queue.remove(job)
            if len(texts) == limit:
                break
        self._n_jobs_before = jobs
        return texts

    def _run_batch(self, texts: Sequence[_Text]) -> None:
        if not texts:
            return
        model = texts[0].job.model
        try:
            rows = list(zip(texts, model.logits([text.encoding for text in texts]), strict=True))
        except Exception:
            logger.exception("model %s failed on a batch of %d texts", model.name, len(texts))
            for text in texts:
                text.job.fail(WorkFailedError("the model failed; the server's log says why"))
            return
        self.metrics.batches.labels(model.name).observe(len(texts))
        for text, row in rows:
            text.job.put(text.number, row)

    def _run_call(self, call: _Call) -> None:
        try:
            call.finish(call.function())
        except FunnelError as error:
            call.fail(error)
        except Exception:
            logger.exception("an explanation failed")
            call.fail(WorkFailedError("the explanation failed; the server's log says why"))


def group_by_length(lengths: Sequence[int], batch_size: int, pass_tokens: int) -> list[list[int]]:
    """Divides texts into batches of similar length.

    Args:
        lengths: number of tokens of each text.
        batch_size: maximum number of texts in a batch.
        pass_tokens: maximum number of padding tokens in a batch.

    Returns:
        The positions of the texts in each batch, shortest texts first.
    """
    batches: list[list[int]] = []
    padding = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and len(batches[-1]) < batch_size:
            added = len(batches[-1]) * (lengths[i] - lengths[batches[-1][-1]])
            if padding + added <= pass_tokens:
                batches[-1].append(i)
                padding += added
                continue
        batches.append([i])
        padding = 0
    return batches
