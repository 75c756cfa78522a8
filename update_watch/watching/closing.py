"""Closing a window from outside of the training thread, while that may be in a step; what a closed watch has instead of a trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from update_watch.measure.hooks.tap import StepTap

_PATIENCE = 1.0  # seconds
_PAUSE = 1e-3


@contextmanager
def alone(tap: StepTap, timeout: float | None = None) -> Iterator[None]:
    """While no other thread is in a hook of ours, nor between the two of a step: what it applies would be seen as written
    between the steps of the next window.

    One that holds on for longer than `timeout` (s) is not waited for: it may be this process's main thread, which waits
    for us in the handler of a signal.
    """
    patience = _PATIENCE if timeout is None else min(timeout, _PATIENCE)
    end = time.monotonic() + patience
    has_lock = tap.lock.acquire(timeout=patience)
    while has_lock and tap.is_mid_step() and time.monotonic() < end:
        tap.lock.release()
        time.sleep(_PAUSE)
        has_lock = tap.lock.acquire(timeout=max(end - time.monotonic(), _PAUSE))
    try:
        yield
    finally:
        if has_lock:
            tap.lock.release()


def stopped(step: Callable[[], int] | None) -> Callable[[], int] | None:
    """The same step for ever, of nobody: a trainer's function holds the trainer, and that the model."""
    if step is None:
        return None
    try:
        now = int(step())
    except Exception:  # what raises here did so in the last window, which said so
        now = 0
    return lambda: now
