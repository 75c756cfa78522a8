"""What is kept of a run's windows to see where it is heading: the sizes of all that is trained, as a few dozen points.

Sizes are log2, of all tensors together (root of the mean square over elements). What begins at zero, as adapters do, is left out: it
grows without end at first. A tensor that was not measured in a window counts as it was last seen.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from update_watch.columns.products import total
from update_watch.judge.columns.codes import BROKEN, Array, Mask
from update_watch.judge.columns.judged import Judged
from update_watch.report import Report

_MOST = 64  # windows
_MADE_OF_UPDATES = 1.5  # update / weight times steps, in its first window: of what began at zero, 1.7 or more
_NEW, _FROM_ZERO = -1, -2
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
    """The windows so far. Goes on where a run returns to an earlier step, from there.

    Legend: m tensors that were ever measured, n of a window.
    """

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._places: dict[str, int] = {}  # among the m; _FROM_ZERO: left out
        self._sizes_3m: Array = np.zeros((3, 0))  # elements, rms of weights, of gradients
        self._names: list[str] = []
        self._place_n = np.zeros(0, np.intp)

    def add(self, report: Report, judged: Judged) -> list[Point]:
        """Take a window in, with its tensors; the points so far, this one last."""
        trained = judged.trainable & judged.having("optimizer_group", bool)
        before = self._sizes_3m.shape[1]
        self._take_in(judged, trained, report.window)
        is_back = bool(self.points) and report.step <= self.points[-1].step
        if is_back or self._sizes_3m.shape[1] != before:  # other tensors are another size
            self.points = [p for p in self.points if p.step < report.step] if self._sizes_3m.shape[1] == before else []
        if len(self.points) >= _MOST:
            early, late = self.points[: _MOST // 2], self.points[_MOST // 2 :]
            self.points = early[::2] + late
        self.points.append(self._point(report, judged, trained))
        return self.points

    def _take_in(self, judged: Judged, trained: Mask, window: int) -> None:
        names = judged.names
        if names != self._names:
            self._names = names
            self._place_n = np.array([self._places.get(name, _NEW) for name in names], np.intp)
        sizes_3n = np.stack([judged.column(field) for field in ("numel", "weight_rms", "gradient_rms")])
        is_measured = trained & np.isfinite(sizes_3n[1:]).all(0)
        is_grown = np.nan_to_num(judged.column("update_ratio")) * window > _MADE_OF_UPDATES
        count = self._sizes_3m.shape[1]
        for i in np.flatnonzero(is_measured & (self._place_n == _NEW)).tolist():
            self._place_n[i] = self._places[names[i]] = _FROM_ZERO if is_grown[i] else count
            count += not is_grown[i]
        self._sizes_3m = np.concatenate([self._sizes_3m, np.zeros((3, count - self._sizes_3m.shape[1]))], 1)
        known = np.flatnonzero(is_measured & (self._place_n >= 0))
        self._sizes_3m[:, self._place_n[known]] = sizes_3n[:, known]

    def _point(self, report: Report, judged: Judged, trained: Mask) -> Point:
        lr, first, ratio, factor, largest = (
            np.nan_to_num(judged.column(field)[trained])
            for field in ("lr", "movement_lr", "update_ratio", "state_factor", "gradient_max")
        )
        first = np.where(first > 0, first, lr)
        usual = np.sqrt((lr * lr + lr * first + first * first) / 3)  # a schedule may end at 0 in the window
        names = [name for name, is_one in zip(judged.names, trained.tolist(), strict=True) if is_one]
        in_fp16 = np.where(judged.having("dtype", "float16".__eq__)[trained], largest, 0.0)
        highest = int(in_fp16.argmax()) if in_fp16.any() else None
        numel_m, weight_m, gradient_m = self._sizes_3m
        return Point(
            *(report.step, report.window),
            _log_rms(numel_m, weight_m),
            _log_rms(numel_m, gradient_m),
            math.log2(lr.max()) if (lr > 0).any() else math.nan,
            _median(ratio[usual > 0] / usual[usual > 0]),
            _median(factor),
            math.nan if highest is None else math.log2(FP16_MAX / in_fp16[highest]),
            report.skipped_steps,
            tuple(names[i] for i in np.flatnonzero(judged.health[trained] == BROKEN).tolist()),
            "" if highest is None else names[highest],
        )


def _log_rms(numel_m: Array, rms_m: Array) -> float:
    count, square = total(numel_m), total(numel_m * rms_m * rms_m)
    return 0.5 * math.log2(square / count) if count and 0 < square < math.inf else math.nan


def _median(values: Array) -> float:
    """Its log2."""
    found = np.sort(values[(values > 0) & (values < math.inf)])
    middle = len(found) // 2
    return math.log2((found[middle] + found[~middle]) / 2) if len(found) else math.nan
