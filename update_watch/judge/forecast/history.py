"""What a forecast keeps of the windows so far: how large updates were, and where they lay. A few dozen windows, however long the run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from update_watch.foresight.schedules import Schedule
from update_watch.judge.forecast.clock import Clock
from update_watch.judge.forecast.curves import are_alike, curves, moved
from update_watch.judge.forecast.drift import Drift, fit, slope_of, wander
from update_watch.report import HEADROOM_BINS, PLACES, Report, TensorReport

Array = npt.NDArray[np.float64]

_MOST = 32  # windows
_POOLED = 5  # latest windows whose histograms are put together
_HALF_LIFE = 0.3  # octaves of time, over which a window's weight among them halves
_SINCE = 0.25  # of the time so far
_POINTS = 8  # of a window at which the schedule is asked
_EVEN = (1.0 / PLACES,) * PLACES


@dataclasses.dataclass
class _Window:
    step: int
    middle: float  # in time
    size_n: Array  # log2 of update over weight, for one unit of the schedule's rate; NaN where not known
    weight_n: Array  # log2 of the weights; NaN where not known
    rate: float  # log2 of the schedule's at its end
    octaves_n: Array  # log2 of the histograms' rate over the schedule's unit
    movement_nB: Array
    places_nQ: Array
    place_n: Array  # where they all lie in an octave, where that is known exactly
    drift: Drift | None = None


@dataclasses.dataclass(frozen=True)
class Position:
    """Where n tensors are as of a window: curves over log2 of the schedule's rate over that of now, and what drifts beside it."""

    curves_nG: Array
    drift: Drift
    alike_n: npt.NDArray[np.bool_]
    wander: float


class Sizes:
    """The windows of a run, in the order they came. Tensors are told apart by their names."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._names: tuple[str, ...] = ()
        self._windows: list[_Window] = []

    def add(self, report: Report, tensors: Sequence[TensorReport], schedule: Schedule) -> Position:
        """Keep a window of these tensors; where they are now."""
        if self._windows and report.step <= self._windows[-1].step:
            self._windows = []  # gone back to an earlier checkpoint
        self._follow(tuple(t.name for t in tensors))
        self._thin()
        self._windows.append(_window(report, tensors, schedule, self.clock))
        return self._position()

    def _follow(self, names: tuple[str, ...]) -> None:
        """Columns for these tensors from now on."""
        if names == self._names:
            return
        places = {name: i for i, name in enumerate(self._names)}
        index = np.array([places.get(name, -1) for name in names], dtype=np.intp)
        is_new = index < 0
        for window in self._windows:
            window.size_n = np.where(is_new, np.nan, window.size_n[index])
            window.weight_n = np.where(is_new, np.nan, window.weight_n[index])
            window.octaves_n = np.where(is_new, 0.0, window.octaves_n[index])
            window.movement_nB = np.where(is_new[:, None], 0.0, window.movement_nB[index])
            window.place_n = np.where(is_new, np.nan, window.place_n[index])
            window.places_nQ = np.where(is_new[:, None], 0.0, window.places_nQ[index])
            window.drift = None
        self._names = names

    def _thin(self) -> None:
        """Every other one of the early windows goes: steps count by their logarithm."""
        if len(self._windows) >= _MOST:
            early, late = self._windows[: _MOST // 2], self._windows[_MOST // 2 :]
            self._windows = early[::2] + late

    def _position(self) -> Position:
        windows, last = self._windows, self._windows[-1]
        now = float(self.clock(last.step))
        middles = np.array([window.middle for window in windows])
        drift = fit(middles, np.stack([window.size_n for window in windows]), now)
        weights = slope_of(middles, np.stack([window.weight_n for window in windows]), now)
        alike = are_alike(last.places_nQ)
        drift = dataclasses.replace(drift, weight_slope_n=weights, walks_n=alike)
        last.drift = drift
        total, shares = np.zeros((len(self._names), 1)), []
        pooled = [window for window in windows[-_POOLED:] if window is last or window.middle >= _SINCE * now]
        for window in pooled:
            is_known = window.movement_nB.sum(1) > 0
            shares.append(0.5 ** (math.log2(now / window.middle) / _HALF_LIFE) * is_known[:, None])
            total = total + shares[-1]
        found = np.zeros(1)
        for window, weight in zip(pooled, shares, strict=True):
            late = np.nan_to_num(drift.level_n - window.size_n)
            curve = moved(
                curves(window.movement_nB, window.places_nQ, window.place_n), last.rate - window.octaves_n, late, alike
            )
            found = found + np.where(weight > 0, weight * curve, 0.0)
        earlier = [window.drift for window in windows[:-1] if window.drift is not None]
        return Position(found / np.where(total > 0, total, np.nan), drift, alike, wander(earlier, drift))


def _window(report: Report, tensors: Sequence[TensorReport], schedule: Schedule, clock: Clock) -> _Window:
    last = max(report.step - 1, 0)  # the last step's number
    steps = np.unique(np.linspace(max(report.step - report.window, 0), last, _POINTS).round().astype(int))
    rates = [float(schedule.rate(int(step))) for step in steps]
    usual = math.sqrt(math.fsum(rate * rate for rate in rates) / len(rates))
    now = rates[-1]
    sizes, octaves = [], []
    for t in tensors:
        is_known = bool(t.movement_histogram and t.movement_lr and t.lr and now > 0)
        unit = math.log2(now / t.lr) if is_known and t.lr else math.nan
        sizes.append(math.log2(t.update_ratio / usual) if is_known and t.update_ratio else math.nan)
        octaves.append(math.log2(t.movement_lr) + unit if is_known and t.movement_lr else 0.0)
    empty = (0.0,) * HEADROOM_BINS
    return _Window(
        report.step,
        float(clock(report.step - report.window / 2)),
        np.array(sizes),
        np.array([math.log2(t.weight_rms) if t.weight_rms and t.weight_rms < math.inf else math.nan for t in tensors]),
        math.log2(now) if now > 0 else 0.0,
        np.array(octaves),
        np.array([t.movement_histogram or empty for t in tensors]),
        np.array([t.movement_places or _EVEN for t in tensors]),
        # to a thousandth of an octave, so that tensors of one rate have one curve
        np.array([round(place, 3) if isinstance(place := t.places, float) else math.nan for t in tensors]),
    )
