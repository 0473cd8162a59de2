"""The web application: routes, error messages, and the pages."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from funnel.errors import FunnelError
from funnel.serving import schemas
from funnel.serving.batching import WorkFailedError
from funnel.serving.engines import Input
from funnel.serving.files import FileJob, TooManyFilesError
from funnel.serving.guard import RETRY_SECONDS, Guard, error_response
from funnel.serving.openapi_page import render_openapi
from funnel.serving.service import Service
from funnel.training.device import release_freed_memory

STATIC = Path(__file__).parent / "static"
RELEASE_SECONDS = 30.0
WRITE_BYTES = 2**20  # size of the parts in which an upload is written to disk
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": schemas.ErrorResponse}, "5XX": {"model": schemas.ErrorResponse}}

FILE_BODY = {"requestBody": {"content": {"text/csv": {"schema": {"type": "string"}}}, "required": True}}


def create_app(service: Service) -> FastAPI:
    """The application that serves a service's models; it starts and closes the service."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        release = asyncio.create_task(_release(service))
        try:
            yield
        finally:
            release.cancel()
            await asyncio.to_thread(service.close)

    app = FastAPI(
        title="funnel serve",
        description='Predictions of text classifiers. Errors have the body {"detail": "..."}.',
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Guard, service=service)
    _add_error_handlers(app)
    _add_pages(app, service)
    secured = [] if service.token is None else [Depends(HTTPBearer(auto_error=False))]  # Guard checks it; this documents it
    _add_predictions(app, service, secured)
    _add_files(app, service, secured)
    return app


async def _release(service: Service) -> None:
    """Deletes expired files and returns unused memory, now and then: batches of ever new sizes fragment it."""
    while True:
        await asyncio.sleep(RELEASE_SECONDS)
        await service.in_pool(service.files.purge)
        await service.in_pool(release_freed_memory)


# --- errors -----------------------------------------------------------------------------------------------------------


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(422, _describe_invalid(error))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        detail = error.detail
        if detail == "Not Found":
            detail = f"unknown route {request.url.path[:100]}; see /docs"
        elif detail == "There was an error parsing the body":
            detail = "the body is not valid JSON"
        elif detail == "Method Not Allowed":
            detail = f"{request.url.path[:100]} does not support {request.method}; see /docs"
        return error_response(error.status_code, detail, error.headers)

    @app.exception_handler(FunnelError)
    async def invalid_text(request: Request, error: FunnelError) -> JSONResponse:
        return error_response(422, str(error))

    @app.exception_handler(WorkFailedError)
    async def failed(request: Request, error: WorkFailedError) -> JSONResponse:
        return error_response(500, str(error))


def _describe_invalid(error: RequestValidationError) -> str:
    """The first problem of a request, with its place: "inputs[0].text: Input should be a valid string"."""
    first = error.errors()[0]
    where, *path = first["loc"]
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON (character {path[0]}: {first['ctx']['error']})"
    if where == "body" and not path:
        return "expected a JSON object as the body, and the header Content-Type: application/json"
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    return f"{'' if where == 'body' else f'{where} '}{name[:100]}: {first['msg']}"


# --- pages ------------------------------------------------------------------------------------------------------------


def _add_pages(app: FastAPI, service: Service) -> None:
    app.mount("/static", StaticFiles(directory=STATIC), "static")

    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon() -> Response:
        return Response(status_code=204)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render_openapi(app.openapi()))

    @app.get("/healthz", summary="Whether the server is running", tags=["server"])
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", summary="Metrics in Prometheus' format", tags=["server"], response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)


# --- predictions ------------------------------------------------------------------------------------------------------


def _add_predictions(app: FastAPI, service: Service, secured: list[Any]) -> None:
    described = {
        "models": [model.describe() for model in service.models.values()],
        "limits": {
            "texts_per_request": service.settings.max_texts,
            "body_bytes": service.settings.body_bytes,
            "file_bytes": service.settings.file_bytes,
        },
    }

    @app.get("/v1/models", summary="The models", tags=["models"], dependencies=secured, responses=ERRORS,
             response_model=schemas.ModelsResponse)  # fmt: skip
    async def models() -> JSONResponse:
        return JSONResponse(described)

    @app.post("/v1/predict", summary="Predict texts", tags=["models"], dependencies=secured, responses=ERRORS,
              response_model=schemas.PredictResponse)  # fmt: skip
    async def predict(request: Request, body: schemas.PredictRequest) -> JSONResponse:
        inputs = [Input(item.text, item.pair) for item in body.inputs]
        return JSONResponse(await service.answer(request, service.predict(service.model(body.model), inputs)))

    @app.post("/v1/explain", summary="Explain a prediction by attention rollout", tags=["models"], dependencies=secured,
              responses=ERRORS, response_model=schemas.ExplainResponse)  # fmt: skip
    async def explain(request: Request, body: schemas.ExplainRequest) -> JSONResponse:
        item = Input(body.text, body.pair)
        return JSONResponse(await service.answer(request, service.explain(service.model(body.model), item)))


# --- files ------------------------------------------------------------------------------------------------------------


def _add_files(app: FastAPI, service: Service, secured: list[Any]) -> None:
    def find(id: str) -> FileJob:
        job = service.files.get(id)
        if job is None:
            raise HTTPException(404, "no such file; it may have expired")
        return job

    @app.post("/v1/files", summary="Upload a csv, tsv or jsonl file", tags=["files"], dependencies=secured, responses=ERRORS,
              status_code=202, response_model=schemas.FileCreated,
              openapi_extra=FILE_BODY)  # fmt: skip
    async def upload(
        request: Request,
        x_filename: Annotated[str, Header(description="the file's name, percent-encoded", max_length=1000)],
        model: Annotated[str | None, Query(description="name of a model; default: the first one")] = None,
        text_column: Annotated[str | None, Query(description="column of the texts; default: that of training")] = None,
        pair_column: Annotated[str | None, Query(description="column of the second texts")] = None,
    ) -> JSONResponse:
        try:
            job = service.files.create(service.model(model), unquote(x_filename))
        except TooManyFilesError:
            raise HTTPException(503, "too many files are waiting; try again later", {"Retry-After": RETRY_SECONDS}) from None
        try:
            await _save_body(request, job.path, service)
            await service.in_pool(service.files.enqueue, job, text_column or None, pair_column or None)
        except BaseException:
            service.files.discard(job)
            raise
        return JSONResponse({"id": job.id}, 202)

    @app.get("/v1/files/{id}", summary="Progress of a file", tags=["files"], dependencies=secured, responses=ERRORS,
             response_model=schemas.FileStatus)  # fmt: skip
    async def status(id: str) -> JSONResponse:
        return JSONResponse(find(id).describe())

    @app.get("/v1/files/{id}/predictions", summary="Predictions of a file, as csv", tags=["files"], dependencies=secured,
             responses=ERRORS, response_class=FileResponse)  # fmt: skip
    async def predictions(id: str) -> FileResponse:
        job = find(id)
        if job.status != "done":
            raise HTTPException(409, f"the file is {job.status}; there are no predictions{' yet' * (job.ended_at is None)}")
        return FileResponse(job.output, media_type="text/csv", filename=job.download_name)

    @app.delete("/v1/files/{id}", summary="Cancel and delete a file", tags=["files"], dependencies=secured, responses=ERRORS,
                status_code=204)  # fmt: skip
    async def delete(id: str) -> Response:
        service.files.forget(find(id))
        return Response(status_code=204)


async def _save_body(request: Request, path: Path, service: Service) -> None:
    """Writes the body to a file; Guard limits its size."""
    buffer = bytearray()
    with path.open("wb") as file:
        async for part in request.stream():
            buffer += part
            if len(buffer) >= WRITE_BYTES:
                await service.in_pool(file.write, bytes(buffer))
                buffer.clear()
        file.write(buffer)
    if not path.stat().st_size:
        raise FunnelError("the body is empty; send the file's content")
