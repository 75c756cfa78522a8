"""The latest windows of many tensors pooled, as `efficiency_grade` does it for one.

Legend: n tensors, F fields of a pooled window, W windows, the latest last.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from update_watch.judge.columns.codes import HEALTHY, Array, Codes, Mask, Rows, grade
from update_watch.judge.columns.histories import (
    EFFICIENCY,
    ERROR,
    EXPECTED,
    IN_COMMON,
    LOST,
    MOVEMENT,
    STEPS,
    Histories,
)
from update_watch.judge.efficiency_grade import (
    EXPECTED_CHANGES,
    SURE,
    SURER,
    UNDEFINED,
    WINDOW_NOISE,
)
from update_watch.thresholds import Thresholds


class PooledColumns(NamedTuple):
    """[n] as `efficiency_grade.Pooled`."""

    steps: Array
    efficiency: Array
    error: Array
    lost: Array
    expected: Array
    windows: Array


def pool(histories: Histories, rows: Rows, exact: Mask, previous: Codes, limits: Thresholds) -> PooledColumns:
    """As few of the latest windows as give enough evidence; older ones are forgotten.

    `exact`: of rounding that is not at random. `previous`: what hysteresis starts from.
    """
    found = np.zeros((len(rows), len(PooledColumns._fields)))
    open_n = np.flatnonzero(histories.pooled[rows] > 0)
    for used in range(1, limits.pool_windows + 1):
        if not len(open_n):
            break
        at = rows[open_n]
        joined = _joined(histories.pool_mFW[at, :, -used:])
        found[open_n] = np.stack(joined, 1)
        is_enough: Mask = (
            ~(joined.steps < limits.minimum_steps)
            & ~(joined.error > limits.maximum_error)
            & ~(joined.expected < EXPECTED_CHANGES)
        )
        margin = np.where(exact[open_n], SURE, SURER) * joined.error
        is_known: Mask = is_decided(joined.efficiency, joined.error, margin, exact[open_n], previous[open_n], limits)
        has_more: Mask = histories.pooled[at] > used
        open_n = open_n[has_more & ~(is_enough & is_known)]
    windows = found[:, -1]
    histories.pooled[rows] = np.minimum(histories.pooled[rows], windows.astype(np.int64))
    return PooledColumns(*found.T)


def _joined(windows_nFW: Array) -> PooledColumns:
    """Some windows of each as one; summed up in the order in which they came."""
    steps_nW, error_nW, movement_nW = (windows_nFW[:, kind] for kind in (STEPS, ERROR, MOVEMENT))
    is_lone_nW = np.isnan(error_nW)
    are_weighed_n1 = (is_lone_nW & (movement_nW > 0)).all(1, keepdims=True)
    weight_nW = steps_nW * np.where(are_weighed_n1, movement_nW, 1.0)
    total = _sum(weight_nW)
    with np.errstate(all="ignore"):
        efficiency_nW = windows_nFW[:, EFFICIENCY]
        efficiency = _sum(weight_nW * efficiency_nW) / total
        common_nW = windows_nFW[:, IN_COMMON]
        in_common = _sum(weight_nW * common_nW)
        square = _sum(np.where(is_lone_nW, 0.0, weight_nW**2 * (error_nW**2 - common_nW**2)))
        lone = is_lone_nW.sum(1)
        lone_nW = np.where(is_lone_nW, weight_nW, 0.0)
        least = (UNDEFINED * _sum(lone_nW)) ** 2 / np.maximum(lone, 1)
        apart_nW = np.where(is_lone_nW, (efficiency_nW - efficiency[:, None]) ** 2, 0.0)
        spread = _sum(apart_nW) / np.maximum(lone - 1, 1)
        square = square + np.where(lone > 0, np.maximum(least, spread * _sum(lone_nW**2)), 0.0)
        return PooledColumns(
            _sum(steps_nW),
            efficiency,
            np.sqrt(np.maximum(square, 0.0) + in_common**2) / total,
            _sum(weight_nW * windows_nFW[:, LOST]) / total,
            _sum(windows_nFW[:, EXPECTED]),
            np.full(len(total), float(windows_nFW.shape[2])),
        )


def _sum(values_nW: Array) -> Array:
    """[n] one after the other: as numbers are added that come one by one."""
    found = values_nW[:, 0]
    for w in range(1, values_nW.shape[1]):
        found = found + values_nW[:, w]
    return found


def is_decided(
    efficiency: Array, error: Array, margin: Array, exact: Mask, previous: Codes, limits: Thresholds
) -> Mask:
    """[n] whether the interval is on one side of every limit, or narrow."""
    low, high = (grade(efficiency + sign * margin, previous, limits) for sign in (-1.0, 1.0))
    found: Mask = (exact & (error <= limits.narrow_error)) | (low == high)
    return found


def lost_drift(histories: Histories, rows: Rows, previous: Codes, limits: Thresholds) -> Array:
    """[n] mean displacement efficiency of the latest windows, where it is certainly low; else NaN."""
    count, drift_nD = histories.drifts[rows], histories.drift_mD[rows]
    most = drift_nD.shape[1]
    is_used_nD = np.arange(most) >= most - count[:, None]
    n = np.maximum(count, 1)
    mean = _sum(np.where(is_used_nD, drift_nD, 0.0)) / n
    squares = _sum(np.where(is_used_nD, (drift_nD - mean[:, None]) ** 2, 0.0))
    spread = np.sqrt(squares / np.maximum(n - 1, 1))
    was_healthy = previous == HEALTHY
    limit = np.where(was_healthy, limits.stalling, limits.stalling_exit)
    is_low = mean + SURER * np.maximum(spread, WINDOW_NOISE) / np.sqrt(n) < limit
    is_low &= (count >= limits.drift_windows) & ~(was_healthy & (drift_nD[:, -1] >= limit))
    return np.where(is_low, mean, np.nan)
