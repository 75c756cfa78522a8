"""Background threads: windows are judged and reports handed to sinks away from the training thread."""

from __future__ import annotations

import logging
import queue
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from update_watch.report import Report

logger = logging.getLogger("update_watch")

Sink = Callable[[Report], Any]
# an item and what handles it; what is set when everything before it was handled; None: end when nothing is left to do
_Job = tuple[Callable[[Any], None], Any] | threading.Event | None


class Worker:
    """One daemon thread that calls a function with items in order. Started with the first item.

    `put` never blocks: when `capacity` items wait, the new item is dropped, counted in `dropped` and warned of once.
    While the thread has nothing to do it refers to nobody: a worker that is let go of takes its thread with it.
    """

    def __init__(self, name: str, handle: Callable[[Any], None], capacity: int = 64) -> None:
        self._name, self._handle, self._capacity = name, handle, capacity
        self._line = _Line()
        self.dropped = 0
        end = weakref.finalize(self, self._line.jobs.put, None)
        end.atexit = False

    def put(self, item: Any) -> bool:
        """Hand over an item; False when it had to be dropped."""
        line = self._line
        with line.lock:
            is_full = line.waiting >= self._capacity
            if not is_full:
                line.waiting += 1
                line.jobs.put((self._handle, item))
        if is_full:
            self.dropped += 1
            if self.dropped == 1:
                warn(
                    f"update-watch: its {self._name} thread is {self._capacity} windows behind; "
                    "windows are dropped until it catches up. Use faster sinks or a longer window."
                )
            return False
        self._start()
        return True

    def _start(self) -> None:
        """Let a thread serve the line, if none does."""
        line = self._line
        with line.lock:
            if line.thread is not None and line.thread.is_alive():
                return
            line.thread = threading.Thread(target=_serve, args=(line,), name=f"update-watch {self._name}", daemon=True)
            try:
                line.thread.start()
                return
            except RuntimeError:  # the interpreter is ending: no more threads
                line.thread = None
        line.jobs.put(None)
        _serve(line)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything handed over was handled; False when `timeout` (s) ran out first."""
        line, reached = self._line, threading.Event()
        with line.lock:
            if line.waiting == 0:
                return True
            line.jobs.put(reached)
        self._start()  # an interrupt may have come between handing over and this
        return reached.wait(timeout)

    def stop(self, *last: Any) -> None:
        """End the thread once it has handled what was put before, and `last`."""
        for item in last:
            self.put(item)
        self._line.jobs.put(None)


class _Line:
    """What waits for a worker's thread; all that the thread itself holds."""

    def __init__(self) -> None:
        # of the queues the one whose `put` may be called while garbage is collected
        self.jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        # items not handled; the thread counts anew, as an interrupt may come between one and its count
        self.waiting = 0
        self.thread: threading.Thread | None = None  # the one that serves
        self.lock = threading.Lock()  # of both


def _serve(line: _Line) -> None:
    is_ending = False
    while True:
        job = line.jobs.get()
        is_ending |= job is None
        if isinstance(job, tuple):
            handle, item = job
            try:
                handle(item)
            except BaseException as error:  # one lost item, not a lost thread
                logger.error("update-watch: a background thread met an error: %r", error, exc_info=error)
            del handle, item
        with line.lock:
            line.waiting = line.jobs.qsize()
            if isinstance(job, threading.Event):
                job.set()
            if is_ending and not line.waiting:
                line.thread = None  # whoever puts an item from here on starts another
                return
        del job


class Sinks:
    """Calls every sink with every report. A sink that raises is warned of once and dropped; the others go on.

    Where ranks join, only the first calls its sinks, whoever was given some: all have the same report, and nobody wants an
    alert as often as there are ranks. A sink whose `on_every_rank` is true is called on all of them.
    """

    def __init__(self, sinks: list[Sink], is_first_rank: Callable[[], bool] = lambda: True) -> None:
        self._sinks, self._is_first_rank = list(sinks), is_first_rank

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
        is_first = self._is_first_rank()
        for sink in list(self._sinks):
            if not is_first and not getattr(sink, "on_every_rank", False):
                continue
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
