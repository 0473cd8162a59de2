"""The queue that batches the texts of concurrent requests; the model is a stub that returns the length of each text."""

import concurrent.futures
import threading
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("prometheus_client", reason="needs the extra serve")
from funnel.data.tokenizer import Encoding
from funnel.errors import FunnelError
from funnel.serving import batching
from funnel.serving.batching import Batcher, WorkFailedError, group_by_length
from funnel.serving.metrics import Metrics

TIMEOUT = 20  # seconds; only reached by a failing test


class Stub:
    """A model that returns the length of each text; one text of length 13 makes it fail.

    Attributes:
        batches: the lengths of the texts in each forward pass.
        may_run: forward passes wait for it.
    """

    device_type = "cpu"

    def __init__(self, name: str) -> None:
        self.name = name
        self.batches: list[list[int]] = []
        self.started, self.may_run = threading.Semaphore(0), threading.Event()
        self.may_run.set()

    def logits(self, encodings):
        lengths = [len(encoding.input_ids) for encoding in encodings]
        self.batches.append(lengths)
        self.started.release()
        assert self.may_run.wait(TIMEOUT)
        if 13 in lengths:
            raise RuntimeError("unlucky")
        return torch.tensor(lengths, dtype=torch.float32).unsqueeze(1)


def texts(*lengths: int) -> list[Encoding]:
    return [Encoding([0] * length, [0] * length, length) for length in lengths]


def result(future) -> list[float]:
    return future.result(TIMEOUT)[:, 0].tolist()


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    batcher = Batcher(batch_size=4, batch_wait=0.0, metrics=Metrics())
    batcher.start()
    yield batcher
    batcher.close(TIMEOUT)


@pytest.fixture
def busy(batcher):
    """A stub whose first forward pass is held until `may_run` is set."""
    stub = Stub("stub")
    stub.may_run.clear()
    batcher.submit(stub, texts(1))
    assert stub.started.acquire(timeout=TIMEOUT)
    yield stub
    stub.may_run.set()


def test_requests_that_arrive_during_a_forward_pass_share_the_next_one(batcher, busy):
    futures = [batcher.submit(busy, texts(length)) for length in (5, 3, 4)]
    busy.may_run.set()
    assert [result(future) for future in futures] == [[5], [3], [4]]
    assert busy.batches == [[1], [3, 4, 5]]


def test_results_are_in_the_order_of_each_requests_texts(batcher, busy):
    futures = [batcher.submit(busy, texts(9, 2, 7)), batcher.submit(busy, texts(1, 8, 2, 6, 3, 3))]
    busy.may_run.set()
    assert [result(future) for future in futures] == [[9, 2, 7], [1, 8, 2, 6, 3, 3]]
    assert max(map(len, busy.batches)) == 4


def test_models_have_batches_of_their_own(batcher, busy):
    other = Stub("other")
    futures = [batcher.submit(model, texts(length)) for model, length in ((busy, 2), (other, 3), (busy, 4), (other, 5))]
    busy.may_run.set()
    assert [result(future) for future in futures] == [[2], [3], [4], [5]]
    assert (busy.batches, other.batches) == ([[1], [2, 4]], [[3, 5]])


def test_cancelled_requests_are_not_computed(batcher, busy):
    cancelled, kept = batcher.submit(busy, texts(5, 6)), batcher.submit(busy, texts(7))
    assert cancelled.cancel()
    busy.may_run.set()
    assert result(kept) == [7]
    assert busy.batches == [[1], [7]]


def test_a_request_that_is_cancelled_while_its_batch_is_chosen_does_not_end_the_thread(batcher, busy, monkeypatch):
    cancelled, choose = batcher.submit(busy, texts(5)), batcher._choose_queue

    def choose_then_cancel():
        queue = choose()
        cancelled.cancel()
        return queue

    monkeypatch.setattr(batcher, "_choose_queue", choose_then_cancel)
    busy.may_run.set()
    concurrent.futures.wait([cancelled], TIMEOUT)
    assert cancelled.cancelled()
    assert result(batcher.submit(busy, texts(7))) == [7]
    assert busy.batches == [[1], [7]]


def test_failure_affects_only_the_requests_of_its_batch(batcher, busy, caplog):
    batcher.batch_size = 1
    good, bad, later = (batcher.submit(busy, texts(*lengths)) for lengths in ((2, 3), (4, 13, 5), (6,)))
    busy.may_run.set()
    assert (result(good), result(later)) == ([2, 3], [6])
    with pytest.raises(WorkFailedError, match=r"the model failed; the server's log says why"):
        bad.result(TIMEOUT)
    assert "unlucky" in caplog.text


def test_requests_are_computed_before_files(batcher, busy):
    file = batcher.submit(busy, texts(9, 9, 9, 9, 9), background=True)
    request = batcher.submit(busy, texts(2))
    busy.may_run.set()
    assert (result(file), result(request)) == ([9] * 5, [2])
    assert busy.batches == [[1], [2], [9] * 4, [9]]


def test_files_are_computed_even_if_requests_never_stop(batcher, busy, monkeypatch):
    monkeypatch.setattr(batching, "MAX_BACKGROUND_WAIT", 0.0)
    request = batcher.submit(busy, texts(2))
    file = batcher.submit(busy, texts(9), background=True)
    busy.may_run.set()
    assert (result(file), result(request)) == ([9], [2])
    assert busy.batches == [[1], [9], [2]]


def test_one_batch_of_a_file_that_has_waited_runs_before_the_requests(batcher, busy):
    file = batcher.submit(busy, texts(*[9] * 9), background=True)
    request = batcher.submit(busy, texts(2))
    batcher._background[0].waiting_since -= 2 * batching.MAX_BACKGROUND_WAIT
    busy.may_run.set()
    assert (result(file), result(request)) == ([9] * 9, [2])
    assert busy.batches == [[1], [9] * 4, [2], [9] * 4, [9]]


def test_after_a_batch_of_several_requests_the_next_one_waits_for_more():
    batcher, stub = Batcher(4, TIMEOUT, Metrics()), Stub("stub")
    batcher._n_jobs_before = 2
    batcher.start()
    futures = [batcher.submit(stub, texts(length)) for length in (1, 2, 3, 4)]  # a full batch does not wait any longer
    assert [result(future) for future in futures] == [[1], [2], [3], [4]]
    batcher.close(TIMEOUT)
    assert stub.batches == [[1, 2, 3, 4]]


def test_calls_run_between_forward_passes(batcher, busy):
    future = batcher.call(lambda: threading.current_thread().name)
    assert not future.done()
    busy.may_run.set()
    assert future.result(TIMEOUT) == "predictions"


def test_failed_calls_pass_on_invalid_input_and_hide_other_errors(batcher, caplog):
    def invalid():
        raise FunnelError("invalid text")

    with pytest.raises(FunnelError, match="invalid text"):
        batcher.call(invalid).result(TIMEOUT)
    with pytest.raises(WorkFailedError, match="the explanation failed"):
        batcher.call(lambda: 1 / 0).result(TIMEOUT)
    assert "ZeroDivisionError" in caplog.text


def test_closing_finishes_the_current_batch_and_fails_the_others(batcher, busy):
    waiting = batcher.submit(busy, texts(2))
    batcher.close(0)
    busy.may_run.set()
    for future in (waiting, batcher.submit(busy, texts(3))):
        with pytest.raises(WorkFailedError, match="shutting down"):
            future.result(TIMEOUT)
    assert busy.batches == [[1]]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([7], [[0]]),
        ([7, 7, 7, 7], [[0, 1, 2], [3]]),  # at most three texts
        ([5, 100, 6, 98], [[0, 2], [3, 1]]),  # the two short ones would be padded by 184 tokens
        ([10, 20, 30], [[0, 1], [2]]),  # padding of 10 tokens is allowed, 30 are not
    ],
)
def test_batches_have_texts_of_similar_length(lengths, expected):
    assert group_by_length(lengths, batch_size=3, pass_tokens=16) == expected
