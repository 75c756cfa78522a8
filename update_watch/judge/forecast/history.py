"""What a forecast keeps of the windows so far: how large updates were, and where they lay. A few dozen windows, however long the run."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from update_watch.foresight.rounding_curve import ALIKE, place_of
from update_watch.foresight.schedules import Schedule
from update_watch.judge.columns.judged import Judged
from update_watch.judge.forecast.clock import Clock
from update_watch.judge.forecast.curves import are_alike, curves, moved
from update_watch.judge.forecast.drift import Drift, fit, slope_of, wander
from update_watch.report import HEADROOM_BINS, PLACES, Report

Array = npt.NDArray[np.float64]

_MOST = 32  # windows
_POOLED = 5  # latest windows whose histograms are put together
_HALF_LIFE = 0.3  # octaves of time, over which a window's weight among them halves
_SINCE = 0.25  # of the time so far
_POINTS = 8  # of a window at which the schedule is asked


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
        self._names: list[str] = []
        self._windows: list[_Window] = []

    def add(self, report: Report, judged: Judged, schedule: Schedule) -> Position:
        """Keep a window of these tensors; where they are now."""
        if self._windows and report.step <= self._windows[-1].step:
            self._windows = []  # gone back to an earlier checkpoint
        self._follow(judged.names)
        self._thin()
        self._windows.append(_window(report, judged, schedule, self.clock))
        return self._position()

    def _follow(self, names: list[str]) -> None:
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


def _window(report: Report, judged: Judged, schedule: Schedule, clock: Clock) -> _Window:
    last = max(report.step - 1, 0)  # the last step's number
    steps = np.unique(np.linspace(max(report.step - report.window, 0), last, _POINTS).round().astype(int))
    rates = [float(schedule.rate(int(step))) for step in steps]
    usual = math.sqrt(math.fsum(rate * rate for rate in rates) / len(rates))
    now = rates[-1]
    lr, movement_lr, ratio, weight = (
        np.nan_to_num(judged.column(field), posinf=np.inf)
        for field in ("lr", "movement_lr", "update_ratio", "weight_rms")
    )
    movement_nB = judged.histogram("movement_histogram", HEADROOM_BINS)
    places_nQ = judged.histogram("movement_places", PLACES)
    is_known = ~np.isnan(movement_nB[:, 0]) & (movement_lr != 0) & (lr != 0) & (now > 0)
    octaves_n = np.zeros(len(lr))
    octaves_n[is_known] = _log2(movement_lr[is_known]) + _log2(now / lr[is_known])
    size_n, weight_n = np.full(len(lr), np.nan), np.full(len(lr), np.nan)
    moves, is_there = is_known & (ratio != 0), (weight != 0) & (weight < math.inf)
    size_n[moves], weight_n[is_there] = _log2(ratio[moves] / usual), _log2(weight[is_there])
    return _Window(
        report.step,
        float(clock(report.step - report.window / 2)),
        size_n,
        weight_n,
        math.log2(now) if now > 0 else 0.0,
        octaves_n,
        np.where(np.isnan(movement_nB), 0.0, movement_nB),
        np.where(np.isnan(places_nQ), 1.0 / PLACES, places_nQ),
        _place(judged, places_nQ),
    )


def _log2(values: Array) -> Array:
    return np.fromiter(map(math.log2, values.tolist()), float, len(values))


def _place(judged: Judged, places_nQ: Array) -> Array:
    """[n] where in an octave all updates lie, where that is known exactly; else NaN."""
    found = np.full(len(places_nQ), np.nan)
    sizes = [judged.raw(field) for field in ("update_ratio", "weight_rms", "wanted_fraction", "lr", "movement_lr")]
    for i in np.flatnonzero(places_nQ.max(1, initial=0.0) > ALIKE).tolist():
        place = place_of(places_nQ[i].tolist(), *(of_size[i] for of_size in sizes))
        if isinstance(place, float):
            found[i] = round(place, 3)  # to a thousandth of an octave, so that tensors of one rate have one curve
    return found
