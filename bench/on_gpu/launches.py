"""Launches per step: alone, and what the watch adds."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Callable
from typing import Any

from bench.on_gpu.given import error_of, first_watched, free, given, is_cuda, kind_of_step, median, quiet_watch
from bench.on_gpu.models import CONFIGS, Bare, Shapes
from bench.on_gpu.profiles import activities, marked

# cudaEventSynchronize and the like are not called by the watch at all; these would make a step wait
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cudaHostAlloc", "cudaFree", "cudaFreeHost")


def launches() -> dict[str, Any]:
    """Launches per step: alone, and what the watch adds in ordinary steps, adding steps and at the window's end."""
    found: dict[str, Any] = {}
    window = 16 if given.quick else 128
    for label, shapes in CONFIGS.items():
        if given.left() < 25:
            found[label] = {"skipped": "no time"}
            continue
        found[label] = _launches(shapes(), window)
        free()
    return found


def _launches(shapes: Shapes, window: int) -> dict[str, Any]:
    """Of one model."""
    uw = quiet_watch()
    bare = Bare(shapes)
    for _ in range(3):
        bare.step()

    def alone() -> str:
        bare.step()
        return "alone"

    def one_by_one(
        step: Callable[[], str], count: int
    ) -> tuple[list[tuple[str, int, float]], collections.Counter[str]]:
        steps, total = [], collections.Counter()
        for _ in range(count):
            kind: list[str] = []
            calls, count_here, ms = activities(lambda kind=kind: kind.append(step()))
            n = count_here if is_cuda() else calls.total()
            steps.append((kind[0], n, ms))
            total.update(calls)
            if given.left() < 20:
                break
        return steps, total

    profiled_alone = marked(alone, 6)
    steps, base_calls = one_by_one(alone, 3) if profiled_alone is None else profiled_alone
    base_count, base_ms = median([n for _, n, _ in steps]), median([ms for _, _, ms in steps])
    with uw.watch(bare.named, bare.optimizer, window=window, budget=None) as watch:
        watched = first_watched(watch)

        def seen() -> str:
            bare.step()
            return kind_of_step(watched)

        for _ in range(window):
            seen()
        profiled = None if profiled_alone is None else marked(seen, window)
        steps, calls = one_by_one(seen, window if given.quick else 24) if profiled is None else profiled
        error = error_of(watch)
    kinds: dict[str, list[tuple[float, float]]] = {"ordinary": [], "adding": [], "close": []}
    for kind, n, ms in steps:
        kinds[kind].append((n - base_count, ms - base_ms))
    every = [pair for pairs in kinds.values() for pair in pairs]
    return {
        "alone": {"launches": base_count, "device_ms": base_ms},
        **{
            kind: {
                "launches_median": median([n for n, _ in pairs]),
                "launches_max": max((n for n, _ in pairs), default=0),
                "device_ms": median([ms for _, ms in pairs]),
                "steps": len(pairs),
            }
            for kind, pairs in kinds.items()
        },
        "mean_launches": statistics.fmean([n for n, _ in every]),
        "mean_device_ms": statistics.fmean([ms for _, ms in every]),
        "in_one_profile": profiled is not None,
        "waiting_calls": {n: calls[n] - base_calls[n] for n in WAITS if calls[n] > base_calls[n]}
        if profiled is not None
        else {},
        "runtime_calls": dict(calls.most_common(12)),
        "error": error,
    }
