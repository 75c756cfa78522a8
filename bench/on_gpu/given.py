"""What the sections share: the device, the time that is left, small helpers."""

from __future__ import annotations

import contextlib
import gc
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import torch


class Given:
    """Set by bench/gpu.py before any section runs."""

    device = "cuda"
    quick = False
    seconds = 300.0
    started = time.monotonic()

    def left(self) -> float:
        """Seconds until no section may begin."""
        return self.seconds - (time.monotonic() - self.started)


given = Given()


def is_cuda() -> bool:
    return given.device.startswith("cuda")


def sync() -> None:
    if is_cuda():
        torch.cuda.synchronize()


def quiet_watch() -> Any:
    import update_watch as uw

    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    return uw


def first_watched(watch: Any) -> Any:
    """What is known of a watch's first optimizer; None when it has let go of it."""
    return next(iter(watch._model.watched.values()), None)


def kind_of_step(watched: Any) -> str:
    """Of the step that was just taken: "close" ends a window, "adding" adds what has waited, any other is "ordinary"."""
    if watched is not None and watched.window_steps == 0:
        return "close"
    return "adding" if watched is not None and not watched.is_waiting else "ordinary"


def error_of(watch: Any) -> str:
    """What ended the watch; "" while it runs."""
    error = watch._tap.error
    if error is not None:
        return f"{type(error).__name__}: {error}"[:300]
    return "" if watch._model.watched else "the watch has detached itself"


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def fold(values: list[float], cut: float = 0.05) -> float:
    """The mean without the outermost values."""
    k = int(len(values) * cut)
    kept = sorted(values)[k : len(values) - k] if k else values
    return statistics.fmean(kept) if kept else float("nan")


def free() -> None:
    gc.collect()
    if is_cuda():
        torch.cuda.empty_cache()


def resident_bytes() -> float:
    with contextlib.suppress(Exception):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return float(line.split()[1]) * 1024
    return 0.0
