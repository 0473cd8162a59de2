"""The HTTP API, without a network: starlette's test client."""

import asyncio
import csv
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served_models import TEXTS, save_classifier, save_regression

pytest.importorskip("fastapi", reason="needs the extra serve")
from fastapi.testclient import TestClient

from funnel.inference.classifier import Classifier
from funnel.serving import files
from funnel.serving.app import create_app
from funnel.serving.engines import ServedModel
from funnel.serving.service import Service
from funnel.serving.settings import Settings

TIMEOUT = 20  # seconds; only reached by a failing test
JSON = {"Content-Type": "application/json"}
LIMITS = Settings(max_texts=8, max_queue=16, max_body=0.01, max_file=0.02)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    home = tmp_path_factory.mktemp("served")
    return [save_classifier(home / "reviews"), save_regression(home / "scores")]


@pytest.fixture(scope="module")
def classifiers(folders) -> dict[str, Classifier]:
    return {folder.name: Classifier.load(folder, "cpu") for folder in folders}


@pytest.fixture
def models(classifiers) -> list[ServedModel]:
    """The models, which a test may change."""
    return [ServedModel(name, classifier) for name, classifier in classifiers.items()]


@pytest.fixture
def service(models) -> Service:
    return Service(models, LIMITS)


@pytest.fixture
def client(service) -> Iterator[TestClient]:
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield client


PREDICT_SCOPE = {"type": "http", "method": "POST", "path": "/v1/predict", "query_string": b"", "root_path": "",
                 "headers": [(b"content-type", b"application/json")]}  # fmt: skip


def predict(client: TestClient, *texts: str, **fields) -> list[dict]:
    response = client.post("/v1/predict", json={"inputs": [{"text": text} for text in texts], **fields})
    assert response.status_code == 200, response.text
    return response.json()["predictions"]


# --- predictions ------------------------------------------------------------------------------------------------------


def test_predictions_are_the_classifiers(client, classifiers):
    for values, expected in zip(predict(client, *TEXTS), classifiers["reviews"](TEXTS), strict=True):
        assert values["label"] == expected.label
        assert values["probability"] == pytest.approx(expected.probability, abs=1e-6)
        assert values["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)


def test_concurrent_requests_get_their_own_predictions(client, service, classifiers):
    texts = [f"{text} {word}" for text in TEXTS for word in ("good", "bad film", "witty " * 20)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: predict(client, text)[0], texts))
    expected = classifiers["reviews"](texts)
    assert [answer["label"] for answer in answers] == [prediction.label for prediction in expected]
    for answer, prediction in zip(answers, expected, strict=True):
        assert answer["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-6)


def test_scores_of_pairs(client, classifiers):
    body = {"model": "scores", "inputs": [{"text": "a good film", "pair": "not dull"}]}
    (values,) = client.post("/v1/predict", json=body).json()["predictions"]
    assert values["label"] == pytest.approx(classifiers["scores"]("a good film", "not dull").label, abs=1e-5)
    assert (values["probability"], values["probabilities"]) == (None, {})


def test_models_are_described_with_the_limits(client, service):
    values = client.get("/v1/models").json()
    assert [model["name"] for model in values["models"]] == ["reviews", "scores"]
    assert values["models"][0]["labels"] == ["negative", "neutral", "positive"]
    assert values["limits"] == {"texts_per_request": 8, "body_bytes": 10485, "file_bytes": 20971}


def test_explanation_covers_the_text(client):
    values = client.post("/v1/explain", json={"text": "a good film"}).json()
    assert [token["start"] for token in values["tokens"]] == [None, 0, 2, 7, None]
    assert sum(token["contribution"] for token in values["tokens"]) == pytest.approx(1)
    assert values["prediction"]["label"] == predict(client, "a good film")[0]["label"]


def test_onnx_models_cannot_be_explained(client, service):
    service.models["reviews"].can_explain = False
    response = client.post("/v1/explain", json={"text": "a good film"})
    assert (response.status_code, "cannot be explained" in response.json()["detail"]) == (400, True)


# --- invalid requests -------------------------------------------------------------------------------------------------

INVALID = [
    (b"{bad", JSON, 422, r"the body is not valid JSON \(character 1"),
    (b"[" * 9000, JSON, 400, "the body is not valid JSON"),
    (b"\xff", JSON, 400, "the body is not valid JSON"),
    (b'{"inputs": []}', {"Content-Type": "text/plain"}, 422, "the header Content-Type: application/json"),
    (b"", JSON, 422, "expected a JSON object"),
    (b"[]", JSON, 422, "expected a JSON object"),
    (b"{}", JSON, 422, "inputs: Field required"),
    (b'{"inputs": []}', JSON, 422, "inputs: List should have at least 1 item"),
    (b'{"inputs": [{"text": 3}]}', JSON, 422, r"inputs\[0\].text: Input should be a valid string"),
    (b'{"inputs": [{"text": "a"}, {"text": "a", "pairs": "b"}]}', JSON, 422, r"inputs\[1\].pairs: Extra inputs"),
    (rb'{"inputs": [{"text": "\ud800"}]}', JSON, 422, "valid"),
    (b'{"model": "other", "inputs": [{"text": "a"}]}', JSON, 404, "unknown model 'other'; choose from reviews, scores"),
    (b'{"model": "scores", "inputs": [{"text": "a"}]}', JSON, 422, "pair is required"),
    (json.dumps({"inputs": [{"text": "a"}] * 9}).encode(), JSON, 413, "9 inputs; send at most 8 per request"),
    (b" " * 10_486, JSON, 413, "larger than 10,485 bytes"),
]


@pytest.mark.parametrize(("body", "headers", "status", "detail"), INVALID, ids=[str(i) for i in range(len(INVALID))])
def test_invalid_request_is_one_line(client, body, headers, status, detail):
    response = client.post("/v1/predict", content=body, headers=headers)
    assert response.status_code == status
    assert list(response.json()) == ["detail"]
    assert re.search(detail, response.json()["detail"])
    assert "\n" not in response.json()["detail"]


def test_size_of_a_body_is_limited_while_it_is_read(models):
    received, sent = [], []

    async def receive():
        received.append(1000)
        return {"type": "http.request", "body": b" " * 1000, "more_body": True}

    async def send(message):
        sent.append(message)

    asyncio.run(create_app(Service(models[:1], Settings(max_body=0.01)))(PREDICT_SCOPE, receive, send))
    assert sent[0]["status"] == 413
    assert 10_485 < sum(received) <= 12_000


@pytest.mark.parametrize(
    ("path", "status"), [("/nope", 404), ("/static/../app.py", 404), ("/static/nope", 404), ("/v1/predict", 405)]
)
def test_unknown_page_is_one_line(client, path, status):
    response = client.get(path)
    assert (response.status_code, list(response.json())) == (status, ["detail"])


def test_failure_of_the_model_is_logged_and_hidden(client, service, caplog):
    service.models["reviews"].logits = lambda _: 1 / 0
    response = client.post("/v1/predict", json={"inputs": [{"text": "a"}]})
    assert (response.status_code, response.json()) == (500, {"detail": "the model failed; the server's log says why"})
    assert "ZeroDivisionError" in caplog.text


def test_unexpected_error_is_logged_and_hidden(client, service, caplog, monkeypatch):
    monkeypatch.setattr(service, "predict", lambda *_: 1 / 0)
    response = client.post("/v1/predict", json={"inputs": [{"text": "a"}]})
    assert (response.status_code, response.json()) == (500, {"detail": "unexpected error; the server's log says why"})
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "ZeroDivisionError" in caplog.text


def test_outputs_that_are_not_finite_are_an_error(client, service):
    logits = service.models["reviews"].logits
    service.models["reviews"].logits = lambda encodings: logits(encodings) * float("nan")
    response = client.post("/v1/predict", json={"inputs": [{"text": "a"}]})
    assert (response.status_code, "not finite" in response.json()["detail"]) == (500, True)


# --- queue, timeouts, disconnects -------------------------------------------------------------------------------------


class Gate:
    """Holds a model's forward passes until it is opened."""

    def __init__(self, model) -> None:
        self.calls: list[int] = []
        self._logits, self._open, self._started = model.logits, threading.Event(), threading.Semaphore(0)
        model.logits = self.run

    def run(self, encodings):
        self.calls.append(len(encodings))
        self._started.release()
        assert self._open.wait(TIMEOUT)
        return self._logits(encodings)

    def wait_for_a_pass(self) -> None:
        assert self._started.acquire(timeout=TIMEOUT)

    def open(self) -> None:
        self._open.set()


def wait_until(condition) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_full_queue_is_503_until_there_is_room(client, service):
    gate = Gate(service.models["reviews"])
    with ThreadPoolExecutor(2) as pool:
        first = [pool.submit(predict, client, *["good"] * 8) for _ in range(2)]
        wait_until(lambda: "funnel_queue_texts 16.0" in client.get("/metrics").text)
        response = client.post("/v1/predict", json={"inputs": [{"text": "a"}]})
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        assert "too many texts are waiting" in response.json()["detail"]
        gate.open()
        assert [len(future.result(TIMEOUT)) for future in first] == [8, 8]
    assert len(predict(client, "good")) == 1


def test_request_that_takes_too_long_is_504_and_leaves_the_queue(models):
    service = Service(models[:1], Settings(timeout=0.05))
    with TestClient(create_app(service)) as client:
        gate = Gate(service.models["reviews"])
        for _ in range(2):
            assert client.post("/v1/predict", json={"inputs": [{"text": "a"}]}).status_code == 504
        gate.open()
        assert "funnel_queue_texts 0.0" in client.get("/metrics").text
        wait_until(lambda: service.batcher._choose_queue() is None)
    assert gate.calls == [1]  # the second request was dropped


async def request_and_disconnect(app, disconnect: asyncio.Event) -> list[dict]:
    """Sends a request for one text; the client disconnects when told to. Returns what was sent to it."""
    body = json.dumps({"inputs": [{"text": "a"}]}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent = []

    async def receive():
        if messages:
            return messages.pop()
        await disconnect.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/predict", "raw_path": b"/v1/predict", "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")], "http_version": "1.1", "scheme": "http",
        "server": ("localhost", 80), "client": ("localhost", 1), "root_path": "",
    }  # fmt: skip
    await app(scope, receive, send)
    return sent


def test_request_of_a_client_that_disconnects_leaves_the_queue(service):
    app = create_app(service)
    service.start()
    gate = Gate(service.models["reviews"])

    async def scenario():
        stay, leave = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(request_and_disconnect(app, stay))
        await asyncio.to_thread(gate.wait_for_a_pass)
        second = asyncio.create_task(request_and_disconnect(app, leave))
        while not service.batcher._interactive:
            await asyncio.sleep(0.005)
        leave.set()
        await second
        gate.open()
        return await first

    sent = asyncio.run(scenario())
    assert sent[0]["status"] == 200
    service.close()
    assert gate.calls == [1]
    assert b'status="499"' in service.metrics.page()


def test_body_that_does_not_arrive_is_408(models):
    service = Service(models[:1], Settings(timeout=0.05))

    async def scenario():
        sent = []

        async def receive():
            await asyncio.sleep(TIMEOUT)

        async def send(message):
            sent.append(message)

        await create_app(service)(PREDICT_SCOPE, receive, send)
        return sent

    start, body = asyncio.run(scenario())
    assert (start["status"], (b"connection", b"close") in start["headers"]) == (408, True)
    assert b"did not arrive in time" in body["body"]


def test_requests_are_refused_while_the_server_is_stopping(client, service):
    service.is_stopping = True
    for response in (client.get("/healthz"), client.post("/v1/predict", json={"inputs": [{"text": "a"}]})):
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")


# --- access -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def secured(models) -> Iterator[TestClient]:
    with TestClient(create_app(Service(models[:1], Settings(), "correct-token"))) as client:
        yield client


@pytest.mark.parametrize(
    "value", [None, "", "Bearer", "Bearer wrong", "Basic correct-token", "Bearer correct-tokens", "Bearer \xe9"]
)
def test_everything_below_v1_needs_the_token(secured, value):
    headers = {} if value is None else {"Authorization": value.encode("latin-1")}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/predict"), ("GET", "/v1/files/x"), ("GET", "/v1/nope")):
        response = secured.request(method, path, headers=headers)
        assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert "Authorization: Bearer TOKEN" in response.json()["detail"]


def test_right_token_gives_access(secured):
    assert secured.get("/v1/models", headers={"Authorization": "Bearer correct-token"}).status_code == 200
    for path in ("/", "/docs", "/healthz", "/metrics"):
        assert secured.get(path).status_code == 200


def test_other_sites_have_no_access(client):
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        assert client.get("/v1/models", headers={"Sec-Fetch-Site": site}).status_code == status
    preflight = {"Origin": "http://other.example", "Access-Control-Request-Method": "POST"}
    response = client.options("/v1/predict", headers=preflight)
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("localhost:8000", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("", 421), ("[", 421),
     ("evil.example", 421), ("localhost.evil.example:8000", 421)],
)  # fmt: skip
def test_local_server_without_a_token_answers_only_to_local_names(models, host, status):
    service = Service(models[:1], Settings(), only_local=True)
    client = TestClient(create_app(service))
    assert client.get("/healthz", headers={"Host": host}).status_code == status


def test_every_response_has_the_security_headers(client):
    for path in ("/", "/docs", "/v1/models", "/nope", "/metrics"):
        headers = client.get(path).headers
        assert headers["Content-Security-Policy"].startswith("default-src 'self';")
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
    assert client.get("/v1/models").headers["Cache-Control"] == "no-store"


# --- pages and metrics ------------------------------------------------------------------------------------------------


def test_docs_page_describes_all_routes_and_loads_nothing_from_elsewhere(client):
    page, described = client.get("/docs").text, client.get("/openapi.json").json()
    for path, methods in described["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in page
    assert set(described["paths"]) >= {"/v1/models", "/v1/predict", "/v1/explain", "/v1/files", "/v1/files/{id}"}
    assert re.findall(r'(?:src|href)="([^"#]+)"', page) == ["/static/docs.css", "/openapi.json", "/metrics", "/"]
    assert not re.search(r"<script|style=|https?://", page)
    assert set(re.findall(r'href="#(\w+)"', page)) <= set(re.findall(r'id="(\w+)"', page))


def test_metrics_count_requests_texts_and_batches(client):
    predict(client, "good", "plot " * 100)
    client.post("/v1/predict", json={})
    client.get("/v1/files/unknown")
    client.get("/unknown/1")
    page = client.get("/metrics").text
    for line in (
        'funnel_requests_total{route="/v1/predict",status="200"} 1.0',
        'funnel_requests_total{route="/v1/predict",status="422"} 1.0',
        'funnel_requests_total{route="/v1/files/{id}",status="404"} 1.0',
        'funnel_requests_total{route="other",status="404"} 1.0',
        'funnel_request_seconds_count{route="/v1/predict"} 2.0',
        'funnel_texts_total{model="reviews"} 2.0',
        'funnel_texts_truncated_total{model="reviews"} 1.0',
        "funnel_queue_texts 0.0",
    ):
        assert line in page.splitlines(), line
    assert 'funnel_batch_texts_bucket{le="1.0",model="reviews"}' in page


# --- files ------------------------------------------------------------------------------------------------------------

ROWS = [text.strip() for text in TEXTS] * 60  # more than a chunk


def upload(client: TestClient, content: str, name: str = "reviews.csv", query: str = "text_column=review") -> str:
    response = client.post(f"/v1/files?{query}", content=content.encode(), headers={"X-Filename": name})
    assert response.status_code == 202, response.text
    return response.json()["id"]


def wait_for_file(client: TestClient, id: str) -> dict:
    wait_until(lambda: client.get(f"/v1/files/{id}").json()["status"] not in ("queued", "running"))
    return client.get(f"/v1/files/{id}").json()


def table(rows: list[str]) -> str:
    return "review\n" + "".join(f'"{row}"\n' for row in rows)


@pytest.fixture
def roomy(models) -> Iterator[TestClient]:
    service = Service(models, Settings())
    with TestClient(create_app(service)) as client:
        client.app_service = service  # type: ignore[attr-defined]
        yield client


def test_predictions_of_a_file_are_the_classifiers(roomy, classifiers):
    id = upload(roomy, table(ROWS), "my%20r%C3%A9views.csv")
    assert wait_for_file(roomy, id) == {"status": "done", "done": len(ROWS), "total": len(ROWS), "detail": None}
    response = roomy.get(f"/v1/files/{id}/predictions")
    assert "my%20r%C3%A9views-predictions.csv" in response.headers["Content-Disposition"]
    rows = list(csv.DictReader(io.StringIO(response.text)))
    assert [row["review"] for row in rows] == ROWS
    for row, expected in zip(rows, classifiers["reviews"](ROWS), strict=True):
        assert row["label"] == expected.label
        assert float(row["probability of positive"]) == pytest.approx(expected.probabilities["positive"], abs=2e-6)


@pytest.mark.parametrize("name", ["predictions.csv", ".predictions.csv", f"{'%F0%9D%92%B3' * 80}.csv", "../a/b.csv"])
def test_name_of_a_file_does_not_matter(roomy, name):
    id = upload(roomy, table(ROWS[:2]), name)
    assert wait_for_file(roomy, id)["status"] == "done"
    assert len(roomy.get(f"/v1/files/{id}/predictions").text.splitlines()) == 3


def test_jsonl_files_of_pairs(roomy, classifiers):
    content = "".join(json.dumps({"a": text, "b": "not dull"}) + "\n" for text in TEXTS)
    id = upload(roomy, content, "pairs.jsonl", "model=scores&text_column=a&pair_column=b")
    assert wait_for_file(roomy, id)["status"] == "done"
    rows = list(csv.DictReader(io.StringIO(roomy.get(f"/v1/files/{id}/predictions").text)))
    expected = classifiers["scores"](TEXTS, ["not dull"] * len(TEXTS))
    assert [float(row["label"]) for row in rows] == pytest.approx([prediction.label for prediction in expected], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "query", "content", "status", "detail"),
    [
        ("a.xls", "", "text\na\n", 422, r"a\.xls: unknown format; expected a name that ends in \.csv, \.tsv, \.jsonl"),
        ("a.csv", "", "", 422, "the body is empty"),
        ("../../a.csv", "text_column=b", "text\na\n", 422, r"^a\.csv: no column 'b'; choose text_column from text"),
        ("a.csv", "pair_column=b", "text\na\n", 422, r"^a\.csv: no column 'b'; choose pair_column from text"),
        ("a.csv", "model=scores", "first\na\n", 422, r"^a\.csv: no column 'second'; choose pair_column"),
        ("a.csv", "model=other", "text\na\n", 404, "unknown model 'other'"),
        ("a.csv", "", "x" * 21_000, 413, "larger than 20,971 bytes"),
    ],
)
def test_invalid_file_is_refused_and_deleted(client, service, name, query, content, status, detail):
    response = client.post(f"/v1/files?{query}", content=content.encode(), headers={"X-Filename": name})
    assert response.status_code == status
    assert re.search(detail, response.json()["detail"])
    assert list(service.files._folder.iterdir()) == []


def test_upload_needs_a_name(client):
    response = client.post("/v1/files", content=b"text\na\n")
    assert (response.status_code, response.json()) == (422, {"detail": "header x-filename: Field required"})


def test_malformed_row_fails_the_file_with_its_line(roomy):
    id = upload(roomy, "review,n\ngood,1\nbad\n")
    values = wait_for_file(roomy, id)
    assert values["status"] == "failed"
    assert values["detail"] == "reviews.csv, line 3: 1 field, but line 1 names 2 columns"
    assert roomy.get(f"/v1/files/{id}/predictions").status_code == 409


def test_file_shows_its_progress_and_can_be_cancelled(roomy):
    service = roomy.app_service
    gate = Gate(service.models["reviews"])
    running, queued = (upload(roomy, table(ROWS)) for _ in range(2))
    gate.wait_for_a_pass()
    assert roomy.get(f"/v1/files/{running}").json() == {"status": "running", "done": 0, "total": len(ROWS), "detail": None}
    assert roomy.get(f"/v1/files/{queued}").json()["status"] == "queued"
    assert roomy.get(f"/v1/files/{queued}/predictions").status_code == 409
    for id in (running, queued):
        assert roomy.delete(f"/v1/files/{id}").status_code == 204
        assert roomy.get(f"/v1/files/{id}").status_code == 404
    wait_until(lambda: not list(service.files._folder.iterdir()))
    gate.open()
    assert sum(gate.calls) <= 2 * 64


def test_files_expire(roomy, monkeypatch):
    id = upload(roomy, table(ROWS[:2]))
    wait_for_file(roomy, id)
    monkeypatch.setattr(files, "LIFETIME", 0.0)
    assert roomy.get(f"/v1/files/{id}").status_code == 404
    assert list(roomy.app_service.files._folder.iterdir()) == []


def test_an_upload_is_counted_before_it_is_complete_and_a_refused_one_removes_no_result(roomy, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILES", 2)
    jobs, model = roomy.app_service.files, roomy.app_service.models["reviews"]
    results = [upload(roomy, table(ROWS[:2])) for _ in range(2)]
    for id in results:
        assert wait_for_file(roomy, id)["status"] == "done"
    uploads = [jobs.create(model, "a.csv") for _ in range(2)]
    with pytest.raises(files.TooManyFilesError):
        jobs.create(model, "a.csv")
    for job in uploads:
        jobs.discard(job)
    response = roomy.post("/v1/files?text_column=nope", content=b"review\na\n", headers={"X-Filename": "a.csv"})
    assert response.status_code == 422
    assert [roomy.get(f"/v1/files/{id}").status_code for id in results] == [200, 200]


def test_outputs_that_are_not_finite_fail_the_file(roomy):
    model = roomy.app_service.models["reviews"]
    logits = model.logits
    model.logits = lambda encodings: logits(encodings) * float("nan")
    values = wait_for_file(roomy, upload(roomy, table(ROWS)))
    assert (values["status"], "not finite" in values["detail"]) == ("failed", True)


def test_oldest_result_makes_room_for_a_new_file(roomy, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILES", 2)
    first = upload(roomy, table(ROWS[:2]))
    wait_for_file(roomy, first)
    gate = Gate(roomy.app_service.models["reviews"])
    upload(roomy, table(ROWS[:2]))
    upload(roomy, table(ROWS[:2]))
    assert roomy.get(f"/v1/files/{first}").status_code == 404
    response = roomy.post("/v1/files?text_column=review", content=b"review\na\n", headers={"X-Filename": "a.csv"})
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    gate.open()


def test_shutdown_deletes_files(models):
    service = Service(models[:1], Settings())
    with TestClient(create_app(service)) as client:
        folder = service.files._folder
        wait_for_file(client, upload(client, table(ROWS[:2])))
        assert list(folder.iterdir())
    assert not folder.exists()
