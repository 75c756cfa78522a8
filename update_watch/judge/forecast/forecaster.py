"""When it will stall at the run's schedule: each tensor's movement by octave of headroom, moved along the learning rate.

A tensor's updates scale with the learning rate, so its efficiency at any step to come is that of its movement histogram, moved by
the log2 of the ratio of the rates (`foresight.rounding_curve`), and by what drifts beside the rate (`drift`). Every statement has
its range, which nine of ten keep to: from how single windows scatter, and from how far earlier trends of this run were off.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from update_watch.columns.late_fields import changed, made, maker_of
from update_watch.foresight.forecasts import Forecast, TensorForecast
from update_watch.foresight.rounding_curve import keeps_all
from update_watch.foresight.schedules import Schedule
from update_watch.judge.columns.judged import Judged, judged_of
from update_watch.judge.forecast.clock import Clock, rate_at
from update_watch.judge.forecast.curves import first_octave, read_drifted
from update_watch.judge.forecast.history import Position, Sizes
from update_watch.report import Report
from update_watch.thresholds import Thresholds
from update_watch.wording import number, percent

logger = logging.getLogger("update_watch")
_POINTS = 96  # of the schedule that is left
_COURSE = 3  # every so many of them are kept for a chart
_NINE_OF_TEN = 1.645  # standard errors
_BEYOND = 0.9  # of the scatter of single windows, by which the last of them above a limit lies beyond the mean
_END = 0.05  # of the run, its last part
_CURVE = 0.03  # error of the curves themselves, in efficiency
_CURVE_OF_ONE = 0.3  # of a tensor of one element; of n, over the root of n
_CURVE_ALIKE = 0.06  # of updates alike: between the points of a curve that falls in jumps
_SURE = 0.4  # of the steps that are left: a stall's step whose range is as wide is known
# a wider one also where most of what may come is near to it: standard errors in the middle of each tenth of that, how near (of the steps
# left) two steps are the same, and the share of the tenths that must come to it. Where updates are alike, efficiency falls in jumps and
# the step is one of several: there the share alone tells
_TENTHS = (-1.645, -1.036, -0.674, -0.385, -0.126, 0.126, 0.385, 0.674, 1.036, 1.645)
_NEAR, _MOST_OF = 0.1, 0.7
_NEVER = np.iinfo(np.int64).max

Array = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]


class Forecaster:
    """Makes a forecast of each report, from it and from the windows before."""

    def __init__(self, schedule: Schedule | None, thresholds: Thresholds) -> None:
        self._schedule, self._limits = schedule, thresholds
        self._sizes: Sizes | None = None
        self._windows = 0
        self._said: list[_Course] = []  # as of windows 1, 2, 4, 8, ...

    def add(self, report: Report) -> Report:
        """The report with its forecast; as it is where no schedule is known, or all of it has passed."""
        if self._schedule is None:
            return report
        try:
            found = self._forecast(report, self._schedule)
        except Exception as error:  # most likely of the user's function
            logger.warning("update-watch: no more forecasts, since one failed, or its schedule: %r", error)
            self._schedule = None
            return report
        if found is None:
            return report
        headline = report.headline if found.from_step is None else f"{report.headline} {found.headline}"
        return changed(report, headline=headline, forecast=found)

    def _forecast(self, report: Report, schedule: Schedule) -> Forecast | None:
        now = rate_at(schedule, max(report.step - 1, 0))
        if not now or report.step >= schedule.steps:
            return None
        if self._sizes is None:
            self._sizes = Sizes(Clock(schedule))
        judged = judged_of(report)
        position = self._sizes.add(report, judged, schedule)
        course = _course(report, judged, position, schedule, self._sizes.clock, self._limits, now)
        if course is None:
            return None
        earlier = [one for one in self._said if one.step <= report.step / 2] or self._said[:1]
        errors = np.zeros(0) if not earlier else earlier[-1].off(report, judged)
        self._windows += 1
        if self._windows & (self._windows - 1) == 0:
            self._said.append(course)
        error = float(np.quantile(errors, 0.9)) if len(errors) else None
        return _told(course, report, schedule, self._limits, now, error)


def forecast(report: Report, schedule: Schedule, limits: Thresholds) -> Forecast | None:
    """What is to come for the tensors of a single window; None where none can be forecast, or the schedule has ended."""
    return Forecaster(schedule, limits).add(report).forecast


@dataclasses.dataclass(frozen=True)
class _Course:
    """Of n tensors, at S steps to come: efficiencies, what they are between, and the steps of passing a limit."""

    step: int
    names: list[str]
    numel_n: Array
    steps_S: Steps
    rates_S: Array  # over that of now
    middle_nS: Array
    end_3n: Array  # low, most likely and high, over the last part of the run
    stalling_3n: Steps  # from which on it is below the limit, to the end: earliest, most likely, latest; _NEVER
    stalled_n: Steps
    is_sure_n: npt.NDArray[np.bool_]  # of the most likely step
    floors_n: Array  # rate, over that of now, that keeps a tensor moving at the end

    def off(self, report: Report, judged: Judged) -> Array:
        """How far this window's efficiencies are from what was said of them, where both are known."""
        place_of = {name: place for place, name in enumerate(judged.names)}
        places = np.array([place_of.get(name, -1) for name in self.names], dtype=np.intp)
        efficiency_n = np.where(places < 0, np.nan, judged.column("efficiency")[places])
        said_n = _between(report.step - report.window / 2, self.steps_S, self.middle_nS)
        found: Array = np.abs(np.minimum(said_n, 1.0) - np.minimum(efficiency_n, 1.0))
        return found[~np.isnan(efficiency_n)]


def _between(step: float, steps_S: Steps, values_nS: Array) -> Array:
    """[n] as `np.interp` of each row."""
    i = int(np.searchsorted(steps_S, step, "right")) - 1
    if i < 0 or i >= len(steps_S) - 1 or steps_S[i] == step:
        return values_nS[:, max(i, 0)]
    slope_n = (values_nS[:, i + 1] - values_nS[:, i]) / float(steps_S[i + 1] - steps_S[i])
    found: Array = slope_n * (step - steps_S[i]) + values_nS[:, i]
    return found


def _course(
    report: Report,
    judged: Judged,
    position: Position,
    schedule: Schedule,
    clock: Clock,
    limits: Thresholds,
    now: float,
) -> _Course | None:
    is_known = np.isfinite(position.curves_nG[:, 0]) & (np.nan_to_num(judged.column("lr")) != 0)
    steps = np.unique(np.linspace(report.step, schedule.steps - 1, _POINTS).round().astype(np.int64))
    rates = np.array([rate_at(schedule, int(step)) for step in steps]) / now
    # the last part of a decay to nothing is the end of a schedule, not a stall
    counts = rates > limits.negligible_lr * rates.max()
    steps, rates = steps[counts], rates[counts]
    if not is_known.any() or len(steps) < 2:
        return None
    keeps_n = judged.having("scheme", keeps_all)[is_known]
    numel_n = judged.column("numel")[is_known]
    curves_nG, drift = position.curves_nG[is_known], position.drift
    times = clock(steps)
    change_nS = drift.change(times)[is_known]
    error_nS, noise_nS = drift.error(times, position.wander)[is_known], _BEYOND * drift.noise_n[is_known][:, None]
    octaves_nS = np.broadcast_to(np.log2(rates), change_nS.shape)

    lasts = slice(min(int(np.searchsorted(steps, (1 - _END) * schedule.steps)), len(steps) - 1), None)
    weights_S = rates[lasts] ** 2 / (rates[lasts] ** 2).sum()

    def at(drift_nS: Array, part: slice = slice(None)) -> Array:
        found = read_drifted(curves_nG, octaves_nS[:, part], drift_nS[:, part], position.alike_n[is_known])
        found[keeps_n] = 1.0
        return found

    middle_nS, later_nS = at(change_nS), at(change_nS + noise_nS)
    # single windows scatter, so the last one above a limit lies beyond the step at which their mean passes it
    early_nS, late_nS = (at(change_nS + noise_nS + part * _NINE_OF_TEN * error_nS) for part in (-1.0, 1.0))
    few_n = _CURVE_OF_ONE / np.sqrt(np.maximum(numel_n, 1))
    curve_n = np.hypot(np.where(position.alike_n[is_known], _CURVE_ALIKE, _CURVE), few_n)
    curve_n1 = np.where(keeps_n, 0.0, curve_n)[:, None]
    early_nS -= curve_n1
    late_nS += curve_n1
    early_n, likely_n, late_n = (_passing(steps, course, limits.stalling) for course in (early_nS, later_nS, late_nS))
    end, left = schedule.steps, schedule.steps - report.step
    width_n = np.minimum(late_n, end) - np.minimum(early_n, end)
    is_sure_n = width_n <= _SURE * left
    jumps_n = position.alike_n[is_known]
    wide_n = width_n > np.where(jumps_n, _NEAR, _SURE) * left
    if wide_n.any():
        tenths = (
            read_drifted(
                *(curves_nG[wide_n], octaves_nS[wide_n]),
                *((change_nS + noise_nS + part * error_nS)[wide_n], jumps_n[wide_n]),
            )
            + part / _NINE_OF_TEN * curve_n1[wide_n]
            for part in _TENTHS
        )
        steps_Zn = np.stack([_passing(steps, course_nS, limits.stalling) for course_nS in tenths])
        likely_n[wide_n], share_n = _most_likely(steps_Zn, likely_n[wide_n], jumps_n[wide_n], end, _NEAR * left)
        is_sure_n[wide_n] = share_n >= _MOST_OF - 1e-9
        likely_n = np.clip(likely_n, early_n, late_n)
    both_nS = _NINE_OF_TEN * np.sqrt(error_nS**2 + noise_nS**2)
    ends = np.stack([at(change_nS + part * both_nS, lasts) @ weights_S for part in (-1.0, -0.5, 0.0, 0.5, 1.0)])
    floor = first_octave(curves_nG, limits.stalling)
    return _Course(
        report.step,
        [name for name, known in zip(judged.names, is_known.tolist(), strict=True) if known],
        numel_n,
        steps,
        rates,
        middle_nS,
        np.stack([np.maximum(ends.min(0) - curve_n1[:, 0], 0.0), ends[2], ends.max(0) + curve_n1[:, 0]]),
        np.stack([early_n, likely_n, late_n]),
        _passing(steps, later_nS, limits.stalled),
        is_sure_n,
        np.where(keeps_n, 0.0, 2.0 ** (floor - change_nS[:, -1])),
    )


def _most_likely(
    steps_Zn: Steps, middle_n: Steps, jumps_n: npt.NDArray[np.bool_], end: int, near: float
) -> tuple[Steps, Array]:
    """[n] the middle or, of what jumps, the one of these steps that most are near to; and the share that is near to it.

    Among equals the nearest to the middle.
    """
    tried_Cn = np.concatenate([middle_n[None], np.where(jumps_n, steps_Zn, middle_n)])
    known_Zn, known_Cn = np.minimum(steps_Zn, end), np.minimum(tried_Cn, end)
    share_Cn = (np.abs(known_Zn[None] - known_Cn[:, None]) <= near).mean(1)
    aside_Cn = np.abs(known_Cn - known_Cn[0]) / (end + 1.0)
    best_n = (share_Cn - aside_Cn / 10 / len(_TENTHS)).argmax(0)
    rows_n = np.arange(len(best_n))
    found: Steps = tried_Cn[best_n, rows_n]
    return found, share_Cn[best_n, rows_n]


def _passing(steps_S: Steps, course_nS: Array, limit: float) -> Steps:
    """[n] the step from which on the efficiency stays below `limit` to the end; _NEVER where it does not."""
    above_nS = course_nS >= limit
    last_n = above_nS.shape[1] - 1 - above_nS[:, ::-1].argmax(1)  # the last point above
    last_n = np.where(above_nS.any(1), last_n, -1)
    before, after = np.clip(last_n, 0, None), np.clip(last_n + 1, None, above_nS.shape[1] - 1)
    rows = np.arange(len(course_nS))
    high, low = course_nS[rows, before], course_nS[rows, after]
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.where(high > low, (high - limit) / (high - low), 0.0)
    found = np.rint(steps_S[before] + part * (steps_S[after] - steps_S[before])).astype(np.int64)
    found = np.where(last_n < 0, steps_S[0], found)
    never: Steps = np.where(last_n == above_nS.shape[1] - 1, _NEVER, found)
    return never


class Tensors:
    """What is told of each of a forecast's tensors: made when somebody asks for it."""

    def __init__(self, course: _Course, until: int) -> None:
        self._course, self._until = course, until
        self.names = course.names
        self.is_stalling_n = course.stalling_3n[1] != _NEVER
        self.latest_n = course.stalling_3n[2]  # _NEVER: not before the end
        middle_nS = np.minimum(course.middle_nS, 1.0)
        self.lost_n = (1 - middle_nS) @ course.rates_S / course.rates_S.sum()

    def __call__(self, place: int) -> Mapping[str, Any]:
        return {"tensors": tuple(map(self.tensor, range(len(self.names))))}

    def tensor(self, i: int) -> TensorForecast:
        """That of one."""
        course = self._course
        early, likely, late = (None if step == _NEVER else int(step) for step in course.stalling_3n[:, i])
        stalled = None if course.stalled_n[i] == _NEVER else int(course.stalled_n[i])
        return TensorForecast(
            *(self.names[i], likely, stalled, float(course.end_3n[1, i]), float(1 - self.lost_n[i])),
            *(early, late, float(course.end_3n[0, i]), float(course.end_3n[2, i])),
            "" if course.is_sure_n[i] else _doubt(early, late, self._until),
        )


def _told(
    course: _Course, report: Report, schedule: Schedule, limits: Thresholds, now: float, error: float | None
) -> Forecast:
    """The course of each tensor and of the run, in numbers for people."""
    tensors, sizes_n = Tensors(course, schedule.steps), course.numel_n
    total = max(float(sizes_n.sum()), 1.0)
    likely_n = course.stalling_3n[1]
    starts_n = np.where(likely_n > report.step, likely_n, _NEVER)
    start = int(starts_n.min())
    # of those that begin together the last
    first = None if start == _NEVER else tensors.tensor(int(np.flatnonzero(starts_n == start)[-1]))
    is_stall = tensors.is_stalling_n
    floors_n = course.floors_n[is_stall & (course.middle_nS[:, 0] >= limits.stalling) & np.isfinite(course.floors_n)]
    floor = float(floors_n.max()) * now if len(floors_n) else None
    share = float(sizes_n[is_stall].sum()) / total
    run_S = sizes_n @ np.minimum(course.middle_nS, 1.0) / total
    fields = {
        "step": report.step,
        "until": schedule.steps,
        "stalling_share": share,
        "lost_share": float(sizes_n @ tensors.lost_n) / total,
        "from_step": None if first is None else start,
        "floor": floor,
        "headline": _headline(share, first, schedule.steps, floor),
        "error": error,
        "course": tuple(zip(course.steps_S.tolist(), run_S.tolist(), course.rates_S.tolist(), strict=True))[::_COURSE],
    }
    return made(Forecast, fields, tensors, 0)


def will_stall(forecast: Forecast, latest: float) -> tuple[Sequence[str], npt.NDArray[np.bool_]]:
    """The names of its tensors, and whether each stalls, for certain, after it was made and up to a step."""
    tensors = maker_of(forecast)
    if isinstance(tensors, Tensors):
        latest_n, is_stalling_n = tensors.latest_n, tensors.is_stalling_n
        return tensors.names, is_stalling_n & (forecast.step < latest_n) & (latest_n <= latest)
    return [one.name for one in forecast.tensors], np.array(
        [
            one.stalling_step is not None and one.latest is not None and forecast.step < one.latest <= latest
            for one in forecast.tensors
        ],
        bool,
    )


def _doubt(early: int | None, late: int | None, until: int) -> str:
    """Why it is not certain when."""
    end = "not before the end" if late is None else f"at step {late:,}"
    return (
        f"it may fall below as early as step {early:,} or {end} of {until:,}: the size of its updates changes beside the learning"
        " rate, and the windows so far do not tell how it goes on"
    )


def _headline(share: float, first: TensorForecast | None, until: int, floor: float | None) -> str:
    if not share:
        return "At this schedule all tensors go on receiving their updates."
    if first is None:
        return f"At this schedule {percent(share)} of the parameters go on losing updates to its end, step {until:,}."
    cure = (
        f"; a floor of {number(floor)} would keep all of them moving, FP32 master weights whatever the rate"
        if floor
        else ""
    )
    late = "not at all" if first.latest is None else f"{first.latest:,}"
    between = f" (the first between {first.earliest or 0:,} and {late})" if first.earliest != first.latest else ""
    return f"At this schedule {percent(share)} of the parameters stall, from step {first.stalling_step:,} of {until:,} on{between}{cure}."
