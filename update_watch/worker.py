"""Background threads: windows are judged and reports handed to sinks away from the training thread."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from update_watch.report import Report

logger = logging.getLogger("update_watch")

_LOOK = 0.25  # s between two looks at whether there is anything to wait for

Sink = Callable[[Report], Any]
_Job = tuple[Callable[[Any], None], Any]


class Worker:
    """One daemon thread that calls a function with items in order. Started with the first item.

    `put` never blocks: when `capacity` items wait, the new item is dropped, counted in `dropped` and warned of once.
    While the thread has nothing to do it refers to nobody: a worker that is let go of takes its thread with it.
    """

    def __init__(self, name: str, handle: Callable[[Any], None], capacity: int = 64) -> None:
        self._name, self._handle, self._capacity = name, handle, capacity
        self._line = _Line()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.dropped = 0
        end = weakref.finalize(self, self._line.jobs.put, None)
        end.atexit = False

    def put(self, item: Any) -> bool:
        """Hand over an item; False when it had to be dropped."""
        with self._line.changed:
            is_full = self._line.waiting >= self._capacity
            if not is_full:
                self._line.waiting += 1
        if is_full:
            self.dropped += 1
            if self.dropped == 1:
                warn(
                    f"update-watch: its {self._name} thread is {self._capacity} windows behind; "
                    "windows are dropped until it catches up. Use faster sinks or a longer window."
                )
            return False
        self._line.jobs.put((self._handle, item))
        self._start()
        return True

    def _start(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(
                    target=_serve, args=(self._line,), name=f"update-watch {self._name}", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # the interpreter is ending: no more threads
                    _serve(self._line, is_waiting=False)
                    return
                self._thread = thread

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything handed over was handled; False when `timeout` (s) ran out first."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        line, idle = self._line, 0
        if not line.jobs.empty():
            self._start()  # an interrupt may have come between handing over and this
        with line.changed:
            while line.waiting > 0:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                line.changed.wait(min(remaining, _LOOK))
                idle = idle + 1 if line.jobs.empty() and not line.is_busy else 0
                if idle == 2:  # or between counting an item and handing it over: it will never be handled
                    line.waiting = 0
        return True

    def stop(self, *last: Any) -> None:
        """End the thread once it has handled what was put before, and `last`."""
        for item in last:
            self.put(item)
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None and thread.is_alive():
            self._line.jobs.put(None)


class _Line:
    """What waits for a worker's thread; all that the thread itself holds."""

    def __init__(self) -> None:
        # of the queues the one whose `put` may be called while garbage is collected
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.waiting = 0  # jobs not finished
        self.is_busy = False  # with one of them
        self.changed = threading.Condition()


def _serve(line: _Line, is_waiting: bool = True) -> None:
    while is_waiting or not line.jobs.empty():
        job = line.jobs.get()
        if job is None:
            return
        line.is_busy = True
        handle, item = job
        try:
            handle(item)
        except BaseException as error:  # one lost item, not a lost thread
            logger.error("update-watch: a background thread met an error: %r", error, exc_info=error)
        del job, handle, item
        with line.changed:
            line.is_busy = False
            line.waiting -= 1
            line.changed.notify_all()


class Sinks:
    """Calls every sink with every report. A sink that raises is warned of once and dropped; the others go on."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = list(sinks)

    def close(self) -> None:
        """Close the sinks that say so (`closes_with_watch`): the file of a journal, which a later report opens again."""
        for sink in self._sinks:
            if getattr(sink, "closes_with_watch", False):
                sink.close()  # type: ignore[attr-defined]

    def __call__(self, report: Report | None) -> None:
        """Hand a report to all of them; None closes them."""
        if report is None:
            self.close()
            return
        for sink in list(self._sinks):
            try:
                sink(report)
            except BaseException as error:  # SystemExit too: it would end this thread and no process
                self._sinks.remove(sink)
                path = getattr(sink, "path", None)
                place = "" if path is None else f" ({path})"
                message = f"update-watch: sink {describe(sink)} failed and is dropped: {error!r}{place}"
                logger.warning(message, exc_info=True)
                warn(message)


def warn(message: str) -> None:
    """A warning that stays one where the user's filters turn warnings into errors: it must not end a thread or a step."""
    try:
        warnings.warn(message, stacklevel=3)
    except Warning:
        pass


def describe(sink: Any) -> str:
    return getattr(sink, "__qualname__", None) or type(sink).__qualname__
