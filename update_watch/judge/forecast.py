"""When it will stall at the run's schedule: each tensor's movement by octave of headroom, moved along the learning rate.

A tensor's updates scale with the learning rate, so its efficiency at any step to come is that of its movement histogram, moved by
the log2 of the ratio of the rates (`rounding_curve`). What drifts beside the rate (gradients that fall, moments) is not known
beforehand: how far earlier forecasts of this run were off by now is said with each new one.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from update_watch.foresight.forecasts import Forecast, TensorForecast
from update_watch.foresight.rounding_curve import efficiency_of
from update_watch.foresight.schedules import Schedule
from update_watch.report import HEADROOM_LOW, Report, TensorReport
from update_watch.thresholds import Thresholds
from update_watch.wording import number, percent

logger = logging.getLogger("update_watch")
_POINTS = 96  # of the schedule that is left
_COURSE = 3  # every so many of them are kept for a chart
_FINE = 16  # shifts are rounded to this part of an octave

Array = npt.NDArray[np.float64]


class Forecaster:
    """Makes a forecast of each report; keeps a few earlier windows to tell how well forecasts hold in this run."""

    def __init__(self, schedule: Schedule | None, thresholds: Thresholds) -> None:
        self._schedule, self._limits = schedule, thresholds
        self._windows = 0
        self._kept: list[tuple[int, Mapping[str, TensorReport]]] = []  # (step, tensors) of windows 1, 2, 4, 8, ...

    def add(self, report: Report) -> Report:
        """The report with its forecast; as it is where no schedule is known, or all of it has passed."""
        if self._schedule is None:
            return report
        try:
            made = forecast(report, self._schedule, self._limits)
        except Exception as error:  # the user's function
            logger.warning("update-watch: no more forecasts, the schedule cannot be asked: %r", error)
            self._schedule = None
            return report
        if made is None:
            return report
        errors = self._errors(report)
        self._windows += 1
        if self._windows & (self._windows - 1) == 0:
            self._kept.append((report.step, {t.name: t for t in report.tensors}))
        off = float(np.quantile(errors, 0.9)) if errors else None
        headline = report.headline if made.from_step is None else f"{report.headline} {made.headline}"
        return dataclasses.replace(report, headline=headline, forecast=dataclasses.replace(made, error=off))

    def _errors(self, report: Report) -> list[float]:
        """What the forecast of a window at half of the run so far said of this window, held against it."""
        past = [tensors for step, tensors in self._kept if step <= report.step / 2] or [t for _, t in self._kept[:1]]
        if not past:
            return []
        found = []
        for t in report.tensors:
            before = past[-1].get(t.name)
            if before is None or t.efficiency is None or not t.movement_lr:
                continue
            said = before.efficiency_at(t.movement_lr)
            if said is not None:
                found.append(abs(min(said, 1.0) - min(t.efficiency, 1.0)))
        return found


def forecast(report: Report, schedule: Schedule, limits: Thresholds) -> Forecast | None:
    """What is to come for the tensors of a window; None where none can be forecast, or the schedule has ended."""
    known = [t for t in report.tensors if t.movement_histogram is not None and t.movement_lr and t.lr]
    now = _rate(schedule, report.step)
    if not known or not now or report.step >= schedule.steps:
        return None
    steps = sorted({round(s) for s in np.linspace(report.step, schedule.steps, _POINTS)})
    rates = [_rate(schedule, step) / now for step in steps]
    # the last part of a decay to nothing is the end of a schedule, not a stall
    lasts = [i for i, rate in enumerate(rates) if rate > limits.negligible_lr * max(rates)]
    steps, rates = [steps[i] for i in lasts], [rates[i] for i in lasts]
    if len(steps) < 2:
        return None
    tensors, lost, moved, stall = [], 0.0, 0.0, 0
    run = np.zeros(len(steps))
    floors: list[float] = []
    for t, curve in zip(known, _curves(known, rates), strict=True):
        arriving = min(1.0, float(np.minimum(curve, 1.0) @ np.array(rates)) / sum(rates))
        one = TensorForecast(
            t.name,
            _passing(steps, curve, limits.stalling),
            _passing(steps, curve, limits.stalled),
            float(curve[-1]),
            arriving,
        )
        tensors.append(one)
        run += t.numel * np.minimum(curve, 1.0)
        lost += (1 - arriving) * t.numel
        moved += t.numel
        if curve[-1] < limits.stalling:
            stall += t.numel
            if curve[0] >= limits.stalling and t.lr and (floor := t.learning_rate_for(limits.stalling)):
                floors.append(floor / t.lr * now)
    starts = [one.stalling_step for one in tensors if one.stalling_step is not None and one.stalling_step > report.step]
    return Forecast(
        step=report.step,
        until=schedule.steps,
        tensors=tuple(tensors),
        stalling_share=stall / moved if moved else 0.0,
        lost_share=lost / moved if moved else 0.0,
        from_step=min(starts) if starts else None,
        floor=max(floors) if floors else None,
        course=tuple(zip(steps, (run / moved).tolist(), rates, strict=True))[::_COURSE] if moved else (),
        headline=_headline(stall / moved if moved else 0.0, starts, schedule.steps, max(floors, default=None)),
    )


def _rate(schedule: Schedule, step: int) -> float:
    rate = float(schedule.rate(step))
    return rate if math.isfinite(rate) and rate > 0 else 0.0


def _curves(tensors: Sequence[TensorReport], rates: Sequence[float]) -> list[Array]:
    """Efficiency of each tensor at each of the rates, which are ratios to now."""
    shifts = [math.log2(rate) for rate in rates]
    curves = []
    memo: dict[int, Array] = {}
    for t in tensors:
        assert t.movement_histogram is not None and t.movement_lr and t.lr
        if t.efficiency_at(t.lr) == 1.0 and t.scheme not in ("", "plain", "unknown"):
            curves.append(np.ones(len(rates)))
            continue
        base = math.log2(t.lr / t.movement_lr)
        rows = [round((base + shift) * _FINE) for shift in shifts]
        for row in rows:
            if row not in memo:
                memo[row] = _bins(row / _FINE, len(t.movement_histogram))
        curves.append(np.stack([memo[row] for row in rows]) @ np.array(t.movement_histogram))
    return curves


def _bins(shift: float, count: int) -> Array:
    """The efficiency of each bin alone, when all updates are 2^shift as large."""
    alone = np.eye(count).tolist()
    return np.array([efficiency_of(alone[i], HEADROOM_LOW + shift) or 0.0 for i in range(count)])


def _passing(steps: Sequence[int], curve: Array, limit: float) -> int | None:
    """The step from which on the efficiency stays below `limit` to the end; None if it does not."""
    if curve[-1] >= limit:
        return None
    for (a, x), (b, y) in pairwise(reversed(list(zip(steps, curve.tolist(), strict=True)))):
        if y >= limit:  # between b and a
            passed: float = b + (a - b) * (y - limit) / (y - x)
            return round(passed)
    return steps[0]


def _headline(share: float, starts: Sequence[int], until: int, floor: float | None) -> str:
    if not share:
        return "At this schedule all tensors go on receiving their updates."
    if not starts:
        return f"At this schedule {percent(share)} of the parameters go on losing updates to its end, step {until:,}."
    cure = (
        f"; a floor of {number(floor)} would keep all of them moving, FP32 master weights whatever the rate"
        if floor
        else ""
    )
    return (
        f"At this schedule {percent(share)} of the parameters stall, from step {min(starts):,} of {until:,} on{cure}."
    )
