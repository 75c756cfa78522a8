"""The time of a training by which its weights move: the sum of the learning rates up to a step."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from update_watch.foresight.schedules import Schedule

Array = npt.NDArray[np.float64]

_POINTS = 512  # of the schedule
_LEAST = 0.5  # steps at the largest rate: time is above 0


class Clock:
    """Time at a step of a schedule, in steps at its largest rate: as long as a step late in a decay is short."""

    def __init__(self, schedule: Schedule) -> None:
        self._steps = np.unique(np.linspace(0, max(schedule.steps, 1), _POINTS).round().astype(np.int64))
        rates = np.array([rate_at(schedule, min(int(step), max(schedule.steps - 1, 0))) for step in self._steps])
        rates /= max(float(rates.max()), 1e-300)
        parts = 0.5 * (rates[1:] + rates[:-1]) * np.diff(self._steps)
        self._times = np.concatenate([[0.0], np.cumsum(parts)])

    def __call__(self, steps: npt.ArrayLike) -> Array:
        """The same shape. Steps beyond the schedule's end are its end."""
        found: Array = np.maximum(np.interp(np.asarray(steps, dtype=np.float64), self._steps, self._times), _LEAST)
        return found


def rate_at(schedule: Schedule, step: int) -> float:
    """The learning rate of a step; 0 where it is none."""
    rate = float(schedule.rate(step))
    return rate if math.isfinite(rate) and rate > 0 else 0.0
