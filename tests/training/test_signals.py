"""SIGTERM and SIGINT during training."""

import os
import signal
import time

import pytest
import torch

from funnel.errors import StoppedBySignal
from funnel.training import signals
from funnel.training.distributed import Distributed
from funnel.training.signals import GracefulStop

DIST = Distributed(torch.device("cpu"))


def send(signum):
    os.kill(os.getpid(), signum)
    time.sleep(0.01)


def test_a_signal_is_recorded_until_it_is_requested():
    with GracefulStop(DIST) as stop:
        assert not stop.requested()
        send(signal.SIGINT)
        assert stop.requested()
        with pytest.raises(StoppedBySignal) as stopped:
            stop.poll()
        assert stopped.value.signum == signal.SIGINT


def test_a_second_signal_exits_immediately(monkeypatch):
    statuses = []
    monkeypatch.setattr(signals.os, "_exit", statuses.append)
    with GracefulStop(DIST):
        send(signal.SIGINT)
        send(signal.SIGTERM)
    assert statuses == [128 + signal.SIGTERM]


@pytest.mark.parametrize(("signum", "again"), [(signal.SIGINT, "press Ctrl-C again"), (signal.SIGTERM, "send SIGTERM again")])
def test_the_message_names_the_signal_to_exit_immediately(signum, again, capfd):
    with GracefulStop(DIST):
        send(signum)
    assert capfd.readouterr().err == f"\nstopping after this step; {again} to exit immediately\n"


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with GracefulStop(DIST):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_exit_raises_with_the_message():
    with GracefulStop(DIST) as stop:
        send(signal.SIGTERM)
        assert stop.requested()
        with pytest.raises(StoppedBySignal, match="rerun"):
            stop.exit("rerun")
    assert stop.signum == signal.SIGTERM


class TwoRanks(Distributed):
    """One of two ranks; the other one has received `other` (0: nothing)."""

    other = 0

    def max(self, value):
        return max(value, self.other)


def test_a_signal_of_another_rank_is_not_a_first_signal_here(monkeypatch):
    statuses = []
    monkeypatch.setattr(signals.os, "_exit", statuses.append)
    dist = TwoRanks(torch.device("cpu"), rank=0, world_size=2)
    dist.other = signal.SIGTERM
    with GracefulStop(dist) as stop:
        assert stop.requested()
        send(signal.SIGTERM)  # as from torchrun, while this rank saves
    assert statuses == []


def test_ranks_wait_for_each_other_before_they_exit(monkeypatch):
    dist = TwoRanks(torch.device("cpu"), rank=1, world_size=2)
    calls = []
    monkeypatch.setattr(dist, "max", lambda value: calls.append(value) or signal.SIGTERM)
    with GracefulStop(dist) as stop:
        assert stop.requested()
        with pytest.raises(SystemExit):
            stop.exit("rerun")
    assert len(calls) == 2
