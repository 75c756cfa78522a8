"""What is kept of a run's windows to see where it is heading: the sizes of all that is trained, as a few dozen points.

Sizes are log2, of all tensors together (root of the mean square over elements). What begins at zero, as adapters do, is left out: it
grows without end at first. A tensor that was not measured in a window counts as it was last seen.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable

from update_watch.report import Health, Report, TensorReport
from update_watch.worker import unhurried

_MOST = 64  # windows
_MADE_OF_UPDATES = 1.5  # update / weight times steps, in its first window: of what began at zero, 1.7 or more
FP16_MAX = 65504.0


@dataclasses.dataclass(frozen=True)
class Point:
    """One window. NaN is what is not known."""

    step: int
    window: int
    weight: float  # log2 rms
    gradient: float
    rate: float  # log2 of the largest learning rate
    update: float  # log2 of update / weight / learning rate, the median over tensors
    state: float  # log2 of the state factor, the median
    headroom: float  # doublings up to the top of FP16, of the largest gradient in it
    skipped: int
    broken: tuple[str, ...]  # tensors that are no numbers
    highest: str  # the tensor with the least headroom

    @property
    def middle(self) -> float:
        return max(self.step - self.window / 2, 0.5)


class Course:
    """The windows so far. Goes on where a run returns to an earlier step, from there."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._seen: dict[str, tuple[float, float, float]] = {}  # name -> elements, rms of weights, of gradients
        self._from_zero: set[str] = set()

    def add(self, report: Report) -> list[Point]:
        """Take a window in; the points so far, this one last."""
        trained = [t for t in report.tensors if t.trainable and t.optimizer_group]
        before = len(self._seen)
        for t in unhurried(trained):
            if t.name in self._from_zero or not _is_number(t.weight_rms) or not _is_number(t.gradient_rms):
                continue
            if t.name not in self._seen and (t.update_ratio or 0.0) * report.window > _MADE_OF_UPDATES:
                self._from_zero.add(t.name)
                continue
            self._seen[t.name] = float(t.numel), t.weight_rms or 0.0, t.gradient_rms or 0.0
        is_back = bool(self.points) and report.step <= self.points[-1].step
        if is_back or len(self._seen) != before:  # other tensors are another size
            self.points = [p for p in self.points if p.step < report.step] if len(self._seen) == before else []
        if len(self.points) >= _MOST:
            early, late = self.points[: _MOST // 2], self.points[_MOST // 2 :]
            self.points = early[::2] + late
        self.points.append(self._point(report, trained))
        return self.points

    def _point(self, report: Report, trained: list[TensorReport]) -> Point:
        sizes = self._seen.values()
        gradients = [t for t in trained if t.dtype == "float16" and t.gradient_max]
        highest = max(gradients, key=lambda t: t.gradient_max or 0.0, default=None)
        return Point(
            *(report.step, report.window),
            _log_rms((n, weight) for n, weight, _ in sizes),
            _log_rms((n, gradient) for n, _, gradient in sizes),
            math.log2(max((t.lr for t in trained if t.lr), default=math.nan)),
            _median(t.update_ratio / t.lr for t in trained if t.update_ratio and t.lr),
            _median(t.state_factor for t in trained if t.state_factor and t.state_factor > 0),
            math.log2(FP16_MAX / highest.gradient_max) if highest and highest.gradient_max else math.nan,
            report.skipped_steps,
            tuple(t.name for t in trained if t.health is Health.broken),
            "" if highest is None else highest.name,
        )


def _log_rms(parts: Iterable[tuple[float, float]]) -> float:
    total = square = 0.0
    for n, rms in parts:
        total, square = total + n, square + n * rms * rms
    return 0.5 * math.log2(square / total) if total and 0 < square < math.inf else math.nan


def _median(values: Iterable[float]) -> float:
    """Its log2."""
    found = [value for value in values if 0 < value < math.inf]
    return math.log2(statistics.median(found)) if found else math.nan


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
