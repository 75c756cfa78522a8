"""Background threads: windows are judged and reports handed to sinks away from the training thread.

A thread that computes in Python keeps the interpreter's lock for its switch interval (5 ms). Training lets go of the lock with every
operator, so while a window of thousands of tensors is judged, each of a step's hundreds of operators would wait that long, and a GPU would
run out of work. With rests between pieces of 2 ms a step loses some of what the host is ahead of the device, and nothing of its
time (`bench/verdicts/held_lock.py`). Nobody rests while somebody waits for the thread, or more work does.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from update_watch.report import Report

logger = logging.getLogger("update_watch")

_T = TypeVar("_T")
Sink = Callable[[Report], Any]
# an item and what handles it; what is set when everything before it was handled; None: end when nothing is left to do
_Job = tuple[Callable[[Any], None], Any] | threading.Event | None


_WORK, _REST = 0.002, 0.008  # s: at work (by the cheapest clock there is), and asleep after it


class _Pace(threading.local):
    """Of one thread."""

    may_rest: Callable[[], bool] | None = None  # None: it is nobody's background thread
    since = 0.0  # when its last rest ended


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

    def stop(self, *last: Any, timeout: float = 0.0) -> None:
        """End the thread once it has handled what was put before, and `last`.

        `last` is waited for `timeout` seconds, where it has its turn at once: who has waited for what is before it knows enough.
        """
        is_next = self._line.waiting == 0
        for item in last:
            self.put(item)
        if timeout and is_next:
            self.wait(timeout)
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
    if threading.current_thread() is line.thread:
        _set_pace(line.jobs.empty)  # whoever waits has put something into it
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

    One that may work again, by the kinds of errors it names (`tries_again_after`), is kept, and what it missed is said at the end.

    Where ranks join, only the first calls its sinks, whoever was given some: all have the same report, and nobody wants an
    alert as often as there are ranks. A sink whose `on_every_rank` is true is called on all of them.
    """

    def __init__(self, sinks: list[Sink], is_first_rank: Callable[[], bool] = lambda: True) -> None:
        self._sinks, self._is_first_rank = list(sinks), is_first_rank
        self._missed: dict[int, int] = {}  # id of a sink -> reports that it could not take
        self._failing: set[int] = set()  # those that could not take the last one

    def close(self) -> None:
        """Close the sinks that say so (`closes_with_watch`): the file of a journal, which a later report opens again."""
        for sink in self._sinks:
            if id(sink) in self._missed:
                count = self._missed.pop(id(sink))
                missing = "1 window" if count == 1 else f"{count:,} windows"
                last = ", the last one too" if id(sink) in self._failing else ""
                _say(f"update-watch: {missing} could not be handed to {describe(sink)}{_place(sink)}{last}")
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
                self._failed(sink, error)
            else:
                if id(sink) in self._failing:
                    self._failing.remove(id(sink))
                    logger.info("update-watch: sink %s works again%s", describe(sink), _place(sink))

    def _failed(self, sink: Sink, error: BaseException) -> None:
        if not isinstance(error, getattr(sink, "tries_again_after", ())):
            self._sinks.remove(sink)
            _say(f"update-watch: sink {describe(sink)} failed and is dropped: {error!r}{_place(sink)}", exc_info=True)
            return
        if id(sink) not in self._missed:
            tries = "failed and is tried again with every window"
            _say(f"update-watch: sink {describe(sink)} {tries}: {error!r}{_place(sink)}")
        self._failing.add(id(sink))
        self._missed[id(sink)] = self._missed.get(id(sink), 0) + 1


def warn(message: str) -> None:
    """A warning that stays one where the user's filters turn warnings into errors: it must not end a thread or a step."""
    try:
        warnings.warn(message, stacklevel=3)
    except Warning:
        pass


def _say(message: str, exc_info: bool = False) -> None:
    """To who reads the log and to who reads warnings."""
    logger.warning(message, exc_info=exc_info)
    warn(message)


def _place(sink: Sink) -> str:
    """Which file a sink writes, in brackets."""
    path = getattr(sink, "path", None)
    return "" if path is None else f" ({path})"


def describe(sink: Any) -> str:
    return getattr(sink, "__qualname__", None) or type(sink).__qualname__


_PACE = _Pace()


def _set_pace(may_rest: Callable[[], bool]) -> None:
    """This thread works in the background, and may rest while that says so."""
    _PACE.may_rest, _PACE.since = may_rest, time.perf_counter()


def rest() -> None:
    """Sleep for a moment if this thread has worked long enough since it last did, in the background."""
    pace = _PACE
    if pace.may_rest is None or time.perf_counter() - pace.since < _WORK:
        return
    if pace.may_rest():
        time.sleep(_REST)
    pace.since = time.perf_counter()


def unhurried(items: Iterable[_T]) -> Iterator[_T]:
    """The same items, with rests in between where a background thread goes through them."""
    return iter(items) if _PACE.may_rest is None else _with_rests(items)


def _with_rests(items: Iterable[_T]) -> Iterator[_T]:
    for item in items:
        yield item
        rest()
