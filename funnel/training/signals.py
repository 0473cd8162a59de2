"""Ends a run after the current step on SIGTERM or Ctrl-C."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from funnel.errors import StoppedBySignal
from funnel.training.distributed import Distributed


class GracefulStop:
    """A context in which the first SIGTERM or SIGINT is recorded, and a second one ends the process.

    In a thread other than the main one, where Python cannot install handlers, it records nothing.
    """

    def __init__(self, dist: Distributed) -> None:
        self.dist = dist
        self.signum = 0  # the signal that all ranks have agreed to stop for
        self._received = 0  # the first signal that this process has received
        self._received_at = 0.0
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            self._old_handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # torchrun may forward a terminal's Ctrl-C to processes that have already received it.
        is_forwarded = self.dist.world_size > 1 and time.monotonic() - self._received_at < 1
        if self._received and not is_forwarded:
            os._exit(128 + signum)
        if not self._received and self.dist.is_main:
            again = "press Ctrl-C" if signum == signal.SIGINT else f"send {signal.Signals(signum).name}"
            os.write(2, f"\nstopping after this step; {again} again to exit immediately\n".encode())
        self._received, self._received_at = self._received or signum, time.monotonic()

    def requested(self) -> bool:
        """Whether any process has received a signal. All ranks must call it."""
        self.signum = int(self.dist.max(self._received))
        return self.signum > 0

    def poll(self) -> None:
        """Raises StoppedBySignal during an evaluation in a single process; several processes finish theirs."""
        if self.dist.world_size == 1 and self._received:
            self.signum = self._received
            raise StoppedBySignal(self.signum)

    def exit(self, message: str) -> NoReturn:
        """Ends a stopped run: raises StoppedBySignal on rank 0, ends the others silently."""
        self.dist.max(0)  # a barrier: if a rank exits early, torchrun ends the others, and rank 0 may still be saving
        if not self.dist.is_main:
            raise SystemExit(128 + self.signum)
        raise StoppedBySignal(self.signum, message)
