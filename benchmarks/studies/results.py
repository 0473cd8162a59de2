"""Runs of a benchmark that are kept as they end: a line of a .jsonl file each."""

import json
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

Key = TypeVar("Key")


def run_all(run: Callable[[Key], Any], keys: Iterable[Key], jobs: int, path: Path) -> list[Any]:
    """What `run`, which gives a named tuple, came to for every key, `jobs` of them at a time.

    When one fails, or after Ctrl-C, no other one starts; those that are going come to their end and are kept.
    """
    lock, stop = threading.Lock(), threading.Event()

    def kept(key: Key) -> Any:
        if stop.is_set():
            return None
        try:
            result = run(key)
        except BaseException:
            stop.set()
            raise
        with lock, path.open("a") as file:
            file.write(json.dumps(result._asdict()) + "\n")
        print(result, file=sys.stderr, flush=True)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(kept, key) for key in keys]
        try:
            return [future.result() for future in as_completed(running)]
        finally:
            stop.set()
