"""What the routes share: models, queue, file jobs, metrics, and the limits of a request."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from torch import Tensor

from funnel.data.tokenizer import Encoding
from funnel.errors import FunnelError
from funnel.serving.batching import Batcher, WorkFailedError
from funnel.serving.engines import NOT_FINITE, Input, ServedModel
from funnel.serving.files import FileJobs
from funnel.serving.guard import CLIENT_DISCONNECTED, RETRY_SECONDS
from funnel.serving.metrics import Metrics
from funnel.serving.settings import Settings

CLOSE_SECONDS = 5.0  # for the current batch
TOKENIZER_THREADS = 2

Result = TypeVar("Result")


class Service:
    """The state of a server.

    Args:
        models: with unique names, the default one first.
        token: None to serve anyone.
        only_local: accept only requests for localhost.

    Attributes:
        is_stopping: set by a signal.
    """

    def __init__(
        self, models: Sequence[ServedModel], settings: Settings, token: str | None = None, only_local: bool = False
    ) -> None:
        self.models = {model.name: model for model in models}
        self.settings, self.token, self.only_local = settings, token, only_local
        self.is_stopping = False
        self.metrics = Metrics()
        self.batcher = Batcher(settings.batch_size, settings.batch_wait / 1000, self.metrics)
        self.files = FileJobs(self.batcher, self.metrics)
        self._pool = ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizer")
        self._n_admitted = 0
        self._is_started = False
        self.metrics.queue.set_function(lambda: self._n_admitted)

    def start(self) -> None:
        """Starts the threads and warms up each model, unless this has been done.

        Raises:
            FunnelError: a model fails.
        """
        if self._is_started:
            return
        self._is_started = True
        self.batcher.start()
        self.files.start()
        for model in self.models.values():
            inputs = model.warm_up_inputs()
            try:
                for count in (1, len(inputs)):
                    self.batcher.submit(model, model.encode(inputs[:count])).result()
            except WorkFailedError:
                raise FunnelError(f"{model.name}: the model fails on a test text, for the reason above") from None

    def close(self) -> None:
        """Ends the threads and deletes uploaded files."""
        self.is_stopping = True
        self.batcher.close(CLOSE_SECONDS)
        self.files.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # --- requests -----------------------------------------------------------------------------------------------------

    def model(self, name: str | None) -> ServedModel:
        """The named model, or the first one.

        Raises:
            HTTPException: 404, there is no such model.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise HTTPException(404, f"unknown model {name[:100]!r}; choose from {', '.join(self.models)}")
        return self.models[name]

    @contextlib.contextmanager
    def _admit(self, n_texts: int) -> Iterator[None]:
        """Counts the texts of a request as queued; refuses it if there are too many."""
        if n_texts > self.settings.max_texts:
            detail = f"{n_texts:,} inputs; send at most {self.settings.max_texts:,} per request"
            raise HTTPException(413, detail)
        if self._n_admitted + n_texts > self.settings.max_queue:
            raise HTTPException(503, "too many texts are waiting; try again later", {"Retry-After": RETRY_SECONDS})
        self._n_admitted += n_texts
        try:
            yield
        finally:
            self._n_admitted -= n_texts

    async def predict(self, model: ServedModel, inputs: Sequence[Input]) -> dict[str, Any]:
        """The response to a request for predictions.

        Raises:
            FunnelError: a text cannot be encoded, or the model needs pairs, or does not take them.
            HTTPException: too many texts.
            WorkFailedError: the model failed.
        """
        started = time.perf_counter()
        with self._admit(len(inputs)):
            encodings = await self.in_pool(model.encode, inputs)
            logits = await asyncio.wrap_future(self.batcher.submit(model, encodings))
        if not logits.isfinite().all():
            raise HTTPException(500, NOT_FINITE)
        predictions = await self.in_pool(_format, model, logits, encodings)
        self.metrics.count(model.name, encodings)
        return {"model": model.name, "milliseconds": _milliseconds_since(started), "predictions": predictions}

    async def explain(self, model: ServedModel, item: Input) -> dict[str, Any]:
        """The response to a request for an explanation; errors as in `predict`."""
        if not model.can_explain:
            raise HTTPException(400, f"{model.name}: an {model.engine} model cannot be explained; serve the run itself")
        started = time.perf_counter()
        with self._admit(1):
            explanation = await asyncio.wrap_future(self.batcher.call(lambda: model.explain(item)))
        return {"model": model.name, "milliseconds": _milliseconds_since(started), **explanation}

    async def in_pool(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs a function in a thread, so that the event loop can serve other requests."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def answer(self, request: Request, work: Coroutine[Any, Any, Result]) -> Result:
        """Waits for the response to a request; cancels the work if it takes too long, or the client disconnects.

        Raises:
            HTTPException: 504, it took too long; or the client has disconnected.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({task, gone}, timeout=self.settings.timeout, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise HTTPException(CLIENT_DISCONNECTED, "the client has disconnected")
            raise HTTPException(504, f"no result within {self.settings.timeout:g} seconds; send fewer texts")
        finally:
            task.cancel()
            gone.cancel()


async def _disconnected(request: Request) -> None:
    """Waits until the client has disconnected; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _format(model: ServedModel, logits: Tensor, encodings: Sequence[Encoding]) -> list[dict[str, Any]]:
    return [
        model.to_json(model.classifier.to_prediction(row), encoding) for row, encoding in zip(logits, encodings, strict=True)
    ]


def _milliseconds_since(started: float) -> float:
    return round(1000 * (time.perf_counter() - started), 3)
