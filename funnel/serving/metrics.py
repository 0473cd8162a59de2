"""Prometheus metrics of one server, in a registry of their own."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from funnel.data.tokenizer import Encoding

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
TEXTS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The metrics, and the page that shows them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("funnel_requests", "Requests by route and status", ("route", "status"), registry=self.registry)
        self.seconds = Histogram(
            "funnel_request_seconds", "Time from request to response", ("route",), buckets=SECONDS, registry=self.registry
        )
        self.batches = Histogram(
            "funnel_batch_texts", "Texts in a forward pass", ("model",), buckets=TEXTS, registry=self.registry
        )
        self.texts = Counter("funnel_texts", "Texts predicted", ("model",), registry=self.registry)
        self.truncated = Counter("funnel_texts_truncated", "Texts that were truncated", ("model",), registry=self.registry)
        self.queue = Gauge("funnel_queue_texts", "Texts of requests waiting for their prediction", registry=self.registry)
        self.files = Gauge("funnel_files", "Uploaded files that are kept", registry=self.registry)
        ProcessCollector(registry=self.registry)  # memory, processor time and open files; only on Linux

    def count(self, model: str, encodings: Sequence[Encoding]) -> None:
        """Counts texts that were predicted."""
        self.texts.labels(model).inc(len(encodings))
        self.truncated.labels(model).inc(sum(encoding.full_length > len(encoding.input_ids) for encoding in encodings))

    def page(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
