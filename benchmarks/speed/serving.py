"""Load test and endurance test of `funnel serve`, on loopback.

    pip install -c constraints.txt -e '.[bench,serve]'
    python -m benchmarks.speed.serving load --run runs/NAME                 # throughput and latency, and those of transformers
    python -m benchmarks.speed.serving soak --run runs/NAME --minutes 10    # valid and invalid requests; checks all answers

load: four servers in separate processes: our model, and the same weights in `transformers.pipeline("text-classification")`,
each with and without batching. Everything but the model is the same. They take turns; the other three are idle. Every client
sends one sentence of the demo task at a time and waits for the answer. The run must classify single texts and have a layout
that transformers supports. The predictions of transformers' Funnel depend on the padding (docs/from-transformers.md), so some
labels differ; those of a BERT in one block do not.

soak: one `funnel serve`, with valid requests of up to 16 texts, invalid requests, clients that disconnect, and files, until a
SIGTERM while it is busy. Fails unless every answer is correct, every status is the expected one, memory and open files do not
grow, uploaded files are deleted, and the exit status is 0.
"""

import argparse
import asyncio
import contextlib
import csv
import io
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from torch import Tensor

from benchmarks.speed.measure import device_name
from funnel.cli.convert import convert
from funnel.data import demo
from funnel.data.tokenizer import Encoding
from funnel.errors import FunnelError
from funnel.inference.classifier import Classifier
from funnel.serving.engines import Input, ServedModel, load_models

CLIENTS = (1, 8, 64)
BATCHING = {"batched": "64", "one text at a time": "1"}  # --batch-size by name
WARM_UP_SECONDS = 1.0
MAX_GROWTH = 0.1  # of the memory after a quarter of the time
MAX_GROWTH_BYTES = 50 * 2**20
KERNEL_CACHE = "64"  # soak: oneDNN kernels, one per shape of a batch. By default 1,024, until which memory would grow


# --- the compared server ----------------------------------------------------------------------------------------------


class RawText(Encoding):
    """A text that transformers tokenizes. Its number of words stands for its length."""

    text = ""


class PipelineModel(ServedModel):
    """The same weights in transformers' pipeline, which tokenizes, too."""

    def __init__(self, name: str, classifier: Classifier, folder: Path) -> None:
        super().__init__(name, classifier)
        from transformers import pipeline

        self.pipeline = pipeline("text-classification", model=str(folder), device=classifier.device)

    def encode(self, inputs: Sequence[Input]) -> list[Encoding]:
        texts: list[Encoding] = []
        for item in inputs:
            zeros = [0] * (len(item.text.split()) + 2)
            texts.append(RawText(zeros, zeros, len(zeros)))
            texts[-1].text = item.text  # type: ignore[attr-defined]
        return texts

    def logits(self, encodings: Sequence[Encoding]) -> Tensor:
        texts = [encoding.text for encoding in encodings]  # type: ignore[attr-defined]
        limit = self.classifier.inputs.max_length
        outputs: Any = self.pipeline(texts, batch_size=len(texts), top_k=None, truncation=True, max_length=limit)
        labels = self.config.id2label.values()
        rows = [{item["label"]: math.log(max(item["score"], 1e-30)) for item in output} for output in outputs]
        return torch.tensor([[row[label] for label in labels] for row in rows])


def serve(run: Path, pipeline: Path | None, batch_size: int) -> None:
    """Runs a server in this process until SIGTERM."""
    from funnel.serving import server
    from funnel.serving.service import Service
    from funnel.serving.settings import Settings

    (model,) = load_models([run])
    if pipeline is not None:
        model = PipelineModel(model.name, model.classifier, pipeline)
    settings = Settings(port=0, batch_size=batch_size)
    with server.bind(settings) as listener:
        service = Service([model], settings)
        service.start()
        listener.listen(server.BACKLOG)
        print(f"serving on {server.url_of(listener)}", flush=True)
        server.run(service, listener)


@contextlib.contextmanager
def running(command: Sequence[str], **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Starts a server; yields the process and its address once it is ready."""
    variables = {**os.environ, **environment}
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, env=variables, text=True)
    assert process.stdout is not None
    try:
        ready = next((line for line in process.stdout if line.startswith("serving on ")), None)
        if ready is None:
            raise SystemExit("the server did not start")
        yield process, ready.split()[2].rstrip(",")
    finally:
        process.terminate()
        process.wait()


# --- client -----------------------------------------------------------------------------------------------------------


class Connection:
    """A connection that is kept open. It does as little work as possible, because the server needs the cores."""

    def __init__(self, url: str) -> None:
        self.host, self.port = urlsplit(url).hostname, urlsplit(url).port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self, method: str, path: str, body: bytes = b"", headers: str = "") -> tuple[int, bytes]:
        """Sends a request; returns the status and the body of the response."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self.host, self.port, limit=2**24)
        reader, writer = self._streams
        kind = "" if "Content-Type" in headers else "Content-Type: application/json\r\n"
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{kind}{headers}\r\n"
        writer.write(head.encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines[1:] if line)
        content = await reader.readexactly(int(fields.get("content-length", 0)))
        if fields.get("connection") == "close":
            self.close()
        return int(lines[0].split()[1]), content

    async def send_and_leave(self, data: bytes, seconds: float) -> None:
        """Sends part of a request and disconnects without reading."""
        _, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(data)
        await asyncio.sleep(seconds)
        writer.close()

    def close(self) -> None:
        """Disconnects."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def predict_body(texts: Sequence[str]) -> bytes:
    """The body of a request for predictions."""
    return json.dumps({"inputs": [{"text": text} for text in texts]}).encode()


# --- load -------------------------------------------------------------------------------------------------------------


async def measure(url: str, clients: int, seconds: float) -> list[float]:
    """Runs some clients at once for some time; returns the latency of each request in seconds."""
    bodies = [predict_body([text]) for text in demo.examples()[1].texts]
    end = time.perf_counter() + WARM_UP_SECONDS + seconds
    latencies: list[float] = []

    async def client(number: int) -> None:
        connection, count = Connection(url), number * 97
        while (started := time.perf_counter()) < end:
            status, content = await connection.request("POST", "/v1/predict", bodies[count % len(bodies)])
            if status != 200:
                raise SystemExit(f"status {status}: {content.decode()}")
            finished = time.perf_counter()
            if end - seconds < finished <= end:
                latencies.append(finished - started)
            count += 1
        connection.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return latencies


async def labels_of(url: str, texts: Sequence[str]) -> list[str]:
    """The predicted labels of some texts."""
    connection = Connection(url)
    _, content = await connection.request("POST", "/v1/predict", predict_body(texts))
    connection.close()
    return [prediction["label"] for prediction in json.loads(content)["predictions"]]


def load(args: argparse.Namespace) -> None:
    """Prints a Markdown table of throughput and latency."""
    with contextlib.ExitStack() as stack:
        exported = Path(stack.enter_context(tempfile.TemporaryDirectory()), "transformers")
        with contextlib.redirect_stdout(sys.stderr):
            convert(str(args.run), exported, "huggingface")
        urls = {}
        for engine, flags in (("funnel", []), ("transformers pipeline", ["--pipeline", str(exported)])):
            for name, size in BATCHING.items():
                command = ["benchmarks.speed.serving", "server", "--run", str(args.run), "--batch-size", size, *flags]
                urls[f"{engine}, {name}"] = stack.enter_context(running(command))[1]
        texts = demo.examples()[1].texts[:200]
        answers = [asyncio.run(labels_of(url, texts)) for url in urls.values()]
        same = sum(len(set(labels)) == 1 for labels in zip(*answers, strict=True))
        results: dict[tuple[str, int], list[list[float]]] = {}
        for _ in range(args.rounds):
            for clients in CLIENTS:
                for name, url in urls.items():
                    latencies = asyncio.run(measure(url, clients, args.seconds))
                    results.setdefault((name, clients), []).append(latencies)
    print(f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, {args.rounds} x {args.seconds:g} s per cell;")
    print(f"all four servers agree on the labels of {same} of {len(texts)} texts\n")
    print("| server | clients | requests/s | p50, ms | p95, ms | p99, ms |\n|---|---|---|---|---|---|")
    for (name, clients), rounds in sorted(results.items(), key=lambda item: item[0][1]):
        rate = statistics.median(len(latencies) / args.seconds for latencies in rounds)
        quantiles = statistics.quantiles([1e3 * latency for latencies in rounds for latency in latencies], n=100)
        print(f"| {name} | {clients} | {rate:.0f} | {' | '.join(f'{quantiles[p - 1]:.1f}' for p in (50, 95, 99))} |")


# --- soak -------------------------------------------------------------------------------------------------------------

BAD_REQUESTS: tuple[tuple[str, str, bytes, str, int], ...] = (
    ("POST", "/v1/predict", b"{bad", "", 422),
    ("POST", "/v1/predict", b"[" * 50_000, "", 400),
    ("POST", "/v1/predict", b"\xff", "", 400),
    ("POST", "/v1/predict", b'{"inputs": [{"text": 1}]}', "", 422),
    ("POST", "/v1/predict", b'{"inputs": []}', "", 422),
    ("POST", "/v1/predict", b'{"inputs": [{"text": "a"}], "model": "unknown"}', "", 404),
    ("POST", "/v1/predict", b'{"inputs": [{"text": "a"}]}', "Content-Type: text/plain\r\n", 422),
    ("POST", "/v1/predict", predict_body(["a"] * 257), "", 413),
    ("POST", "/v1/predict", b" " * (2**20 + 1), "", 413),
    ("POST", "/v1/explain", b"{}", "", 422),
    ("POST", "/v1/files", b"text\na\n", "X-Filename: a.exe\r\n", 422),
    ("POST", "/v1/files?text_column=b", b"text\na\n", "X-Filename: a.csv\r\n", 422),
    ("POST", "/v1/files", b"text\na\n", "", 422),
    ("GET", "/v1/files/unknown", b"", "", 404),
    ("GET", "/v1/predict", b"", "", 405),
    ("GET", "/%2e%2e/etc/passwd", b"", "", 404),
    ("GET", "/v1/models", b"", "Host: evil.example\r\n", 400),  # a second Host header
)


class Example(NamedTuple):
    """A text, and its prediction by `Classifier`."""

    text: str
    label: str
    probability: float


class Soak:
    """Clients of one server, and what they found."""

    def __init__(self, url: str, examples: Sequence[Example], column: str) -> None:
        self.url, self.examples, self.column = url, examples, column
        self.random = random.Random(0)
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.is_stopping = False

    async def forever(self, step: Callable[[Connection], Awaitable[None]]) -> None:
        """Repeats a client's step until the server has been stopped."""
        connection = Connection(self.url)
        while True:
            try:
                await step(connection)
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                if self.is_stopping:  # it no longer accepts requests
                    connection.close()
                    return
                self.problems.append(f"{type(error).__name__} in {step.__name__}")
                connection.close()
                await asyncio.sleep(0.1)

    def check(self, what: str, status: int, content: bytes, expected: int) -> bool:
        """Counts a response, and records a problem unless it has the expected status."""
        self.counts[f"{what} {status}"] += 1
        if status != expected and not (status == 503 and self.is_stopping):
            self.problems.append(f"{what}: status {status} instead of {expected}: {content[:200]!r}")
        if b"Traceback" in content or (status >= 400 and list(json.loads(content)) != ["detail"]):
            self.problems.append(f"{what}: status {status} with the body {content[:200]!r}")
        return status == expected

    def is_right(self, example: Example, label: str, probability: float) -> bool:
        """Whether a prediction is that of `Classifier`; labels may differ where two are equally probable."""
        return abs(probability - example.probability) < 1e-3 and (label == example.label or abs(probability - 0.5) < 1e-3)

    async def good(self, connection: Connection) -> None:
        """Requests predictions and checks them."""
        chosen = self.random.choices(self.examples, k=self.random.randint(1, 16))
        status, content = await connection.request("POST", "/v1/predict", predict_body([example.text for example in chosen]))
        if self.check("predict", status, content, 200):
            for example, values in zip(chosen, json.loads(content)["predictions"], strict=True):
                if not self.is_right(example, values["label"], values["probability"]):
                    self.problems.append(f"wrong prediction for {example.text[:60]!r}: {values}")

    async def explain(self, connection: Connection) -> None:
        """Requests an explanation."""
        example = self.random.choice(self.examples)
        status, content = await connection.request("POST", "/v1/explain", json.dumps({"text": example.text}).encode())
        if self.check("explain", status, content, 200) and json.loads(content)["prediction"]["label"] != example.label:
            self.problems.append(f"wrong explanation of {example.text[:60]!r}")
        await asyncio.sleep(0.2)

    async def bad(self, connection: Connection) -> None:
        """Sends an invalid request."""
        method, path, body, headers, expected = self.random.choice(BAD_REQUESTS)
        if expected == 400 and headers:  # not HTTP: answered before the application, without JSON, and disconnected
            await connection.send_and_leave(f"{method} {path} HTTP/1.1\r\nHost: a\r\n{headers}\r\n".encode(), 0.01)
            return
        status, content = await connection.request(method, path, body, headers)
        self.check(f"{method} {path.split('?')[0]}, invalid", status, content, expected)
        await asyncio.sleep(0.02)

    async def disconnect(self, connection: Connection) -> None:
        """Disconnects in the middle of a request, or before its answer."""
        body = predict_body([example.text for example in self.examples[:40]])
        path = self.random.choice(("/v1/predict", "/v1/predict", "/v1/files?text_column=text"))
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nX-Filename: a.csv\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        cut = self.random.choice((len(request), len(request) // 2, 40))
        await connection.send_and_leave(request[:cut], self.random.random() / 10)
        self.counts["disconnected"] += 1
        await asyncio.sleep(0.1)

    async def file(self, connection: Connection) -> None:
        """Uploads a file; downloads the predictions and checks them, or cancels it."""
        chosen = self.random.choices(self.examples, k=400)
        table = io.StringIO()
        csv.writer(table).writerows([[self.column], *([example.text] for example in chosen)])
        headers = "X-Filename: reviews.csv\r\nContent-Type: text/csv\r\n"
        status, content = await connection.request("POST", "/v1/files", table.getvalue().encode(), headers)
        if not self.check("upload", status, content, 202):
            return
        path, cancel = f"/v1/files/{json.loads(content)['id']}", self.random.random() < 0.3
        while not cancel:
            await asyncio.sleep(0.2)
            status, content = await connection.request("GET", path)
            if not self.check("progress", status, content, 200):
                return
            if (state := json.loads(content)["status"]) not in ("queued", "running"):
                break
        if not cancel:
            if state != "done":
                self.problems.append(f"file: {content!r}")
            status, content = await connection.request("GET", f"{path}/predictions")
            if self.check("download", status, content, 200):
                for example, row in zip(chosen, csv.DictReader(io.StringIO(content.decode())), strict=True):
                    if not self.is_right(example, row["label"], float(row[f"probability of {row['label']}"])):
                        self.problems.append(f"file: wrong prediction for {example.text[:60]!r}")
        status, content = await connection.request("DELETE", path)
        self.check("delete", status, content, 204)

    async def state(self, connection: Connection) -> dict[str, float]:
        """The values of the metrics without labels."""
        _, content = await connection.request("GET", "/metrics")
        lines = [line for line in content.decode().splitlines() if line[0] != "#" and "{" not in line]
        return {name: float(value) for name, value in (line.split() for line in lines)}


async def run_soak(soak: Soak, process: subprocess.Popen[str], seconds: float) -> None:
    """Runs all clients, prints the server's state over time, and stops it while it is busy."""
    steps = [*[soak.good] * 8, soak.explain, soak.bad, soak.bad, soak.disconnect, soak.disconnect, soak.file]
    tasks = [asyncio.create_task(soak.forever(step)) for step in steps]
    connection, memory, files, started = Connection(soak.url), [], [], time.monotonic()
    print("  time, s  memory, MiB  open files  answers", flush=True)
    for number in range(1, 13):
        await asyncio.sleep(max(0.0, started + seconds * number / 12 - time.monotonic()))
        connection.close()  # the server closes idle connections
        state = await soak.state(connection)
        memory.append(state["process_resident_memory_bytes"])
        files.append(int(state["process_open_fds"]))
        answers = sum(soak.counts.values())
        print(f"{time.monotonic() - started:9.0f} {memory[-1] / 2**20:12.1f} {files[-1]:11d} {answers:8,}", flush=True)
    connection.close()
    soak.is_stopping = True
    process.send_signal(signal.SIGTERM)
    await asyncio.gather(*tasks)
    quarter = memory[2]
    if min(memory[-3:]) > max(quarter * (1 + MAX_GROWTH), quarter + MAX_GROWTH_BYTES):
        soak.problems.append(f"memory grew from {quarter / 2**20:.0f} to {memory[-1] / 2**20:.0f} MiB")
    if min(files[-3:]) > max(files[:3]) + 5:
        soak.problems.append(f"open files grew from {files[2]} to {files[-1]}")


def soak(args: argparse.Namespace) -> None:
    """Runs the endurance test; exits with status 1 if something is wrong."""
    classifier = Classifier.load(args.run, "cpu", "fp32")
    texts = [*demo.examples()[1].texts[:600], "", " ".join(["long"] * 300), "ünïcödé 世界"]
    examples = [Example(t, str(p.label), p.probability or 0.0) for t, p in zip(texts, classifier(texts), strict=True)]
    column = (*classifier.inputs.columns, "text")[0]
    with tempfile.TemporaryDirectory() as temporary:
        command = ["funnel", "serve", str(args.run), "--port", "0", "--device", "cpu"]
        with running(command, TMPDIR=temporary, ONEDNN_PRIMITIVE_CACHE_CAPACITY=KERNEL_CACHE) as (process, url):
            test = Soak(url, examples, column)
            asyncio.run(run_soak(test, process, 60 * args.minutes))
            status = process.wait(60)
        left = os.listdir(temporary)
    if status:
        test.problems.append(f"exit status {status}")
    if left:
        test.problems.append(f"temporary files are left: {left}")
    for name, count in sorted(test.counts.items()):
        print(f"{count:9,}  {name}")
    print("\n".join([f"{len(test.problems)} problems, exit status {status}", *test.problems[:20]]))
    sys.exit(bool(test.problems))


def main() -> None:
    """Parses the command line and runs the test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("load", "soak", "server"), help="server is started by load")
    parser.add_argument("--run", type=Path, required=True, help="run of a classifier of single texts")
    parser.add_argument("--seconds", type=float, default=4.0, help="load: per cell and round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="load: rounds over all cells (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="soak: duration (default: %(default)s)")
    parser.add_argument("--pipeline", type=Path, help="server: folder in transformers' format to run with its pipeline")
    parser.add_argument("--batch-size", type=int, default=64, help="server: texts in a forward pass (default: %(default)s)")
    args = parser.parse_args()
    if args.mode != "server":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # stops the servers, too
    try:
        if args.mode == "server":
            serve(args.run, args.pipeline, args.batch_size)
        else:
            {"load": load, "soak": soak}[args.mode](args)
    except FunnelError as error:
        sys.exit(f"serving: error: {error}")


if __name__ == "__main__":
    main()
