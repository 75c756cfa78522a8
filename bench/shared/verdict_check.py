"""Is a verdict right? Against the efficiency of all elements, with the margin and the memory that verdicts may have.

A verdict may rest on this window or, where samples are few, on several: it is wrong only if the truth of none of them
allows it. Windows that together are longer than two windows or 128 steps, whichever is more, do not excuse it.
"""

from __future__ import annotations

from bench.shared.full_comparison import Exact
from update_watch.report import Cause, Health, TensorReport
from update_watch.thresholds import Thresholds

MARGIN = 0.05
BAD = (Health.stalling, Health.stalled, Health.broken)
OF_WEIGHTS = (Cause.weight_rounding, Cause.not_written, Cause.non_finite)  # causes that this comparison can judge


class VerdictCheck:
    """Of one run; windows are given in order."""

    def __init__(self, window: int, thresholds: Thresholds | None = None) -> None:
        self._most = max(2, 128 // window)
        self._limits = thresholds or Thresholds()
        self._past: dict[str, list[Exact]] = {}
        self._health: dict[str, Health] = {}

    def add(self, tensor: TensorReport, exact: Exact) -> str:
        """What is wrong with the verdict on this window: "healthy", "accused", "idle", or "" if nothing."""
        past = self._past.setdefault(tensor.name, [])
        past.append(exact)
        del past[: -self._most]
        before, self._health[tensor.name] = self._health.get(tensor.name), tensor.health
        pooled = [sum(past[-n:], Exact()) for n in range(1, len(past) + 1)]
        known = [e.efficiency for e in pooled if e.efficiency is not None]
        if tensor.health is Health.idle:
            # a gradient that never moved anything, because the rate is 0, is idle
            return "idle" if exact.nonzero and exact.want > 0 and tensor.cause is Cause.zero_gradient else ""
        if not known:
            return ""
        limits = self._limits
        if tensor.health is Health.healthy:
            return "healthy" if max(known) < limits.stalling - MARGIN else ""
        if tensor.health not in BAD or tensor.cause not in OF_WEIGHTS:
            return ""
        net = [e.displacement_efficiency for e in pooled if e.displacement_efficiency is not None]
        least = min([*known, *net])  # what is lost in the end is lost, whatever single steps say
        # a verdict stays until the exit is passed
        limit = limits.stalling_exit if before in BAD else limits.stalling
        if tensor.health is Health.stalled:
            is_still = before is Health.stalled
            limit = min(limit, limits.stalled_exit if is_still else limits.stalled)
        return "accused" if least > limit + MARGIN else ""
