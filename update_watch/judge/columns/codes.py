"""Healths and causes as numbers, and what every column of numbers is asked."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from update_watch.report import Cause, Health
from update_watch.thresholds import Thresholds

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.intp]

# the three grades come first, from good to bad
HEALTHS = (
    Health.healthy,
    Health.stalling,
    Health.stalled,
    Health.unknown,
    Health.idle,
    Health.frozen,
    Health.broken,
)
HEALTHY, STALLING, STALLED, UNKNOWN, IDLE, FROZEN, BROKEN = range(len(HEALTHS))
HEALTH_CODES = {health: i for i, health in enumerate(HEALTHS)}
CAUSES = tuple(Cause)
CAUSE_CODES = {cause: i for i, cause in enumerate(CAUSES)}
NONE, UNSAID = -1, -2  # no health, no cause; and that nobody has said which


def cause_of(code: int) -> Cause | None:
    """By its code."""
    return None if code == NONE else CAUSES[code]


def known(values: Array) -> Array:
    """As `efficiency_grade.known`: NaN where it is not a number one can go on with."""
    return np.where(np.abs(values) < 1e30, values, np.nan)


def share(values: Array) -> Array:
    """As `efficiency_grade.share`."""
    found: Array = np.clip(known(values), 0.0, 1.0)
    return found


def grade(values: Array, previous: Codes, limits: Thresholds) -> Codes:
    """As `efficiency_grade.grade`; healthy where the value is NaN."""
    stalled = np.where(previous == STALLED, limits.stalled_exit, limits.stalled)
    stalling = np.where(previous == HEALTHY, limits.stalling, limits.stalling_exit)
    found: Codes = np.where(values < stalled, STALLED, np.where(values < stalling, STALLING, HEALTHY)).astype(np.int8)
    return found
