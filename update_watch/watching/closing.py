"""Closing a window from outside of the training thread, while that may be in a hook of ours."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE = 1.0  # seconds


@contextmanager
def alone(lock: threading.RLock, timeout: float | None = None) -> Iterator[None]:  # type: ignore[valid-type]  # a function
    """While no hook of ours runs in another thread.

    One that holds on for longer than `timeout` (s) is not waited for: it may be this process's main thread, which waits
    for us in the handler of a signal.
    """
    patience = _PATIENCE if timeout is None else min(timeout, _PATIENCE)
    has_lock = lock.acquire(timeout=patience)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if has_lock:
            lock.release()  # type: ignore[attr-defined]
