"""Background threads: windows are judged and reports handed to sinks away from the training thread."""

from __future__ import annotations

import logging
import queue
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from update_watch.report import Report

logger = logging.getLogger("update_watch")

Sink = Callable[[Report], Any]


class Worker:
    """One daemon thread that calls a function with items in order. Started with the first item.

    `put` never blocks: when `capacity` items wait, the new item is dropped, counted in `dropped` and warned of once.
    """

    def __init__(self, name: str, handle: Callable[[Any], None], capacity: int = 64) -> None:
        self._name, self._handle = name, handle
        self._queue: queue.Queue[Any] = queue.Queue(capacity)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.dropped = 0

    def put(self, item: Any) -> bool:
        """Hand over an item; False when it had to be dropped."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name=f"update-watch {self._name}", daemon=True)
                self._thread.start()
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                warnings.warn(
                    f"update-watch: its {self._name} thread is {self._queue.maxsize} windows behind; "
                    "windows are dropped until it catches up. Use faster sinks or a longer window.",
                    stacklevel=2,
                )
            return False
        return True

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything handed over was handled; False when `timeout` (s) ran out first."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._queue.all_tasks_done:
            while self._queue.unfinished_tasks:
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    return False
                self._queue.all_tasks_done.wait(remaining)
        return True

    def stop(self) -> None:
        """End the thread once it has handled what was put before."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None and thread.is_alive():
            try:
                self._queue.put_nowait(None)
            except queue.Full:
                pass  # a daemon thread: it ends with the process

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            try:
                if item is None:
                    return
                self._handle(item)
            finally:
                self._queue.task_done()


class Sinks:
    """Calls every sink with every report. A sink that raises is warned of once and dropped; the others go on."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = list(sinks)

    def __call__(self, report: Report) -> None:
        for sink in list(self._sinks):
            try:
                sink(report)
            except Exception as error:
                self._sinks.remove(sink)
                message = f"update-watch: sink {describe(sink)} failed and is dropped: {error!r}"
                logger.warning(message, exc_info=True)
                # a warning turned into an error by the user's filters must not end this thread
                try:
                    warnings.warn(message, stacklevel=2)
                except Warning:
                    pass


def describe(sink: Any) -> str:
    return getattr(sink, "__qualname__", None) or type(sink).__qualname__
