"""A process ends or splits while watches are open: what was measured is reported, once, by the process that measured it.

- The interpreter ends, also after an exception or Ctrl-C that nobody caught: open watches are closed, within `WAIT`.
- SIGTERM and SIGHUP (a terminal that is closed), where nobody handles them: the same, and the process ends by the signal as
  it would have. The handler compares equal to `SIG_DFL`, so that frameworks which look for an earlier handler (Lightning)
  find none; one that somebody else has set, before or later, is left alone (`nohup` has SIGHUP ignored).
- A process of `multiprocessing` ends by `os._exit` where it was forked: the same, with its other finalizers.
- A fork: the child shares files and connections but has none of the threads. Its copies of the watches are closed
  without a word, and say so if it trains.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, Protocol

from update_watch.worker import warn

logger = logging.getLogger("update_watch")
_SECOND = (
    "update-watch: this {} is watched already, by a watch that is open: each of them looks at every step and costs its time."
    " Close the earlier one (`watch.close()`; `update_watch.close_all()` closes all), or use `with update_watch.watch(...)`,"
    " before the cell or function runs again"
)
_SECOND_IN_RUN = (
    "update-watch: this {} is watched already, by `update-watch run`: both look at every step and cost their time, and each"
    " tells what it sees. Run the script without it, or take `update_watch.watch` out of the script"
)
FORKED = (
    "update-watch: this process was forked from one that watches, and trains. What it trains is not watched: call "
    "update_watch.watch in it"
)
WAIT = 4.0  # seconds for all open watches
_POLL = 0.002  # s
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_FIRST = 100  # of the finalizers of `multiprocessing`: before its managers and queues end


class Ending(Protocol):
    """What an open watch can do."""

    @property
    def is_measuring(self) -> bool:
        """Whether the training thread is inside one of its hooks."""

    def close(self, timeout: float = ...) -> None: ...

    def leave_to_parent(self) -> None:
        """This process is a fork of the one that watches."""


# open watches, and how to ask each whether it looks at an optimizer
_OPEN: weakref.WeakKeyDictionary[Ending, weakref.WeakMethod[Callable[[Any], bool]]] = weakref.WeakKeyDictionary()
OF_COMMAND: weakref.WeakSet[Ending] = weakref.WeakSet()  # those of `update-watch run`
_finalizer: Any = None


def add(watch: Ending, watches: Callable[[Any], bool]) -> None:
    """Close `watch` when the process ends. `watches`: tells whether it looks at an optimizer."""
    _OPEN[watch] = weakref.WeakMethod(watches)  # else it would keep the optimizers alive
    stand_first()
    _add_finalizer()
    _set(signal.SIG_DFL, _TERMINATE)


def stand_first() -> None:
    """Before all that is done at the end so far: a logger that a sink writes to may have begun after the watch."""
    atexit.unregister(close_all)  # who registered last is called first
    atexit.register(close_all)


def _add_finalizer() -> None:
    """In a process of `multiprocessing`; once."""
    global _finalizer
    util, process = sys.modules.get("multiprocessing.util"), sys.modules.get("multiprocessing.process")
    if util is None or process is None or process.parent_process() is None:
        return
    if _finalizer is None or not _finalizer.still_active():  # a fork has none of its parent's
        _finalizer = util.Finalize(None, close_all, exitpriority=_FIRST)


def is_watched(optimizer: Any) -> bool:
    """Whether an open watch of this process looks at an optimizer."""
    return _watchers(optimizer) > 0


def _watchers(optimizer: Any) -> int:
    asked = [watches() for watches in list(_OPEN.values())]
    return sum(watches is not None and watches(optimizer) for watches in asked)


def warn_if_watched(optimizer: Any) -> None:
    """Say once that another open watch looks at an optimizer, as where a notebook's cell is run again."""
    if _watchers(optimizer) == 1:
        text = _SECOND_IN_RUN if any(watch in OF_COMMAND for watch in _OPEN) else _SECOND
        warn(text.format(type(optimizer).__name__))


def close_all(timeout: float = WAIT) -> None:
    """Close every watch that is open in this process, also those that nobody holds any more, within `timeout` seconds.

    In a notebook, where a cell that calls `watch` is run again: put it at the beginning of the cell.
    """
    deadline = time.monotonic() + timeout
    for watch in list(_OPEN):
        watch.close(max(deadline - time.monotonic(), 0.0))


def is_any_open() -> bool:
    """Whether this process has a watch that is not closed."""
    return bool(_OPEN)


def has_several() -> bool:
    """Whether this process has more than one watch that is not closed."""
    return len(_OPEN) > 1


def remove(watch: Ending) -> None:
    """`watch` is closed."""
    _OPEN.pop(watch, None)
    if not _OPEN:
        _set(_TERMINATE, signal.SIG_DFL)


def _set(expected: object, handler: object) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        if signal.getsignal(number) is expected:
            with suppress(ValueError):  # not the main interpreter
                signal.signal(number, handler)  # type: ignore[arg-type]


class _Terminate:
    """The default action of the signal, after the open watches are closed."""

    def __init__(self) -> None:
        self._deadline: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._deadline = self._deadline or time.monotonic() + WAIT / 4
        if any(watch.is_measuring for watch in _OPEN) and time.monotonic() < self._deadline:
            # half a step's sums are no measurement: let the hook end
            again = threading.Thread(target=_send_again, args=(number,), name="update-watch ending", daemon=True)
            again.start()
            return
        # in a thread: the training thread may hold a lock that closing needs, and must not wait for ever
        closing = threading.Thread(target=close_all, name="update-watch ending", daemon=True)
        closing.start()
        closing.join(WAIT)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def __eq__(self, other: object) -> bool:
        return other is self or other is signal.SIG_DFL

    def __hash__(self) -> int:
        return hash(signal.SIG_DFL)


_TERMINATE = _Terminate()


def _send_again(number: int) -> None:
    time.sleep(_POLL)
    os.kill(os.getpid(), number)


def _after_fork() -> None:
    watches = list(_OPEN)
    _OPEN.clear()
    _set(_TERMINATE, signal.SIG_DFL)
    for watch in watches:
        watch.leave_to_parent()


def say_forked(detach: Callable[[], None], optimizer: Any) -> None:
    """A fork of a process that watches trains: `detach` the copy, which does nothing more."""
    detach()
    if not is_watched(optimizer):  # by a watch of its own
        logger.warning(FORKED)
        warn(FORKED)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
