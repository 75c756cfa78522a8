"""Ctrl-C waits for a measurement that is under way: half a step's sums are none, and the open window would be lost with them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

try:  # without the enumerations that `signal` makes of all it is given: 12 us a step, many times that in cold caches
    from _signal import getsignal  # type: ignore[import-not-found]
    from _signal import signal as set_handler
except ImportError:
    from signal import getsignal
    from signal import signal as set_handler

_NUMBER = int(signal.SIGINT)


class Waiting:
    """Between `begin` and `end` the first SIGINT waits, whoever handles it; `tell` hands it on. A second one does not wait.

    Only in the main thread, as handlers run there.
    """

    __slots__ = ("_came", "_handler", "_ours")

    def __init__(self) -> None:
        self._came = False
        self._handler: Any = None  # whose place is taken
        self._ours: Callable[[int, FrameType | None], None] | None = None

    def begin(self) -> None:
        """Take the place of a handler, if there is one: the system's own ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            return
        handler = getsignal(_NUMBER)
        if callable(handler):
            self._handler = handler  # before ours is there: whatever comes in between, `end` puts it back
            self._ours = self._note  # one object, to be told from others
            with suppress(ValueError):  # not the main interpreter
                set_handler(_NUMBER, self._ours)

    def end(self) -> None:
        """Put the handler back; may be called again."""
        if self._ours is not None and getsignal(_NUMBER) is self._ours:
            set_handler(_NUMBER, self._handler)
        self._ours = None  # else each step would leave a cycle to the garbage collector

    def tell(self) -> None:
        """Let the handler have what came, when all is as it was."""
        if self._came:
            self._came = False
            signal.raise_signal(signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._came:  # whoever sends another does not want to wait
            self._came = False
            self._handler(number, frame)
        self._came = True
