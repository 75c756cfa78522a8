"""The latest windows of many tensors pooled, as `efficiency_grade` does it for one.

Legend: n tensors, F fields of a pooled window, W windows, the latest last.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from update_watch.columns.products import summed
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
    found = np.zeros((len(PooledColumns._fields), len(rows)))
    open_n = np.flatnonzero(histories.pooled[rows] > 0)
    for used in range(1, limits.pool_windows + 1):
        if not len(open_n):
            break
        at = rows[open_n]
        joined = _joined(histories.pool_FWm[:, -used:, at])
        found[:, open_n] = np.stack(joined)
        is_enough: Mask = (
            ~(joined.steps < limits.minimum_steps)
            & ~(joined.error > limits.maximum_error)
            & ~(joined.expected < EXPECTED_CHANGES)
        )
        margin = np.where(exact[open_n], SURE, SURER) * joined.error
        is_known: Mask = is_decided(joined.efficiency, joined.error, margin, exact[open_n], previous[open_n], limits)
        has_more: Mask = histories.pooled[at] > used
        open_n = open_n[has_more & ~(is_enough & is_known)]
    windows = found[-1]
    histories.pooled[rows] = np.minimum(histories.pooled[rows], windows.astype(np.int64))
    return PooledColumns(*found)


def _joined(windows_FWn: Array) -> PooledColumns:
    """Some windows of each as one; summed up in the order in which they came."""
    steps_Wn, error_Wn, movement_Wn = (windows_FWn[kind] for kind in (STEPS, ERROR, MOVEMENT))
    is_lone_Wn = np.isnan(error_Wn)
    are_weighed_1n = (is_lone_Wn & (movement_Wn > 0)).all(0, keepdims=True)
    weight_Wn = steps_Wn * np.where(are_weighed_1n, movement_Wn, 1.0)
    total = summed(weight_Wn)
    with np.errstate(all="ignore"):
        efficiency_Wn = windows_FWn[EFFICIENCY]
        efficiency = summed(weight_Wn * efficiency_Wn) / total
        common_Wn = windows_FWn[IN_COMMON]
        in_common = summed(weight_Wn * common_Wn)
        square = summed(np.where(is_lone_Wn, 0.0, weight_Wn**2 * (error_Wn**2 - common_Wn**2)))
        lone = is_lone_Wn.sum(0)
        lone_Wn = np.where(is_lone_Wn, weight_Wn, 0.0)
        least = (UNDEFINED * summed(lone_Wn)) ** 2 / np.maximum(lone, 1)
        apart_Wn = np.where(is_lone_Wn, (efficiency_Wn - efficiency) ** 2, 0.0)
        spread = summed(apart_Wn) / np.maximum(lone - 1, 1)
        square = square + np.where(lone > 0, np.maximum(least, spread * summed(lone_Wn**2)), 0.0)
        return PooledColumns(
            summed(steps_Wn),
            efficiency,
            np.sqrt(np.maximum(square, 0.0) + in_common**2) / total,
            summed(weight_Wn * windows_FWn[LOST]) / total,
            summed(windows_FWn[EXPECTED]),
            np.full(len(total), float(windows_FWn.shape[1])),
        )


def is_decided(
    efficiency: Array, error: Array, margin: Array, exact: Mask, previous: Codes, limits: Thresholds
) -> Mask:
    """[n] whether the interval is on one side of every limit, or narrow."""
    low, high = (grade(efficiency + sign * margin, previous, limits) for sign in (-1.0, 1.0))
    found: Mask = (exact & (error <= limits.narrow_error)) | (low == high)
    return found


def lost_drift(histories: Histories, rows: Rows, previous: Codes, limits: Thresholds) -> Array:
    """[n] mean displacement efficiency of the latest windows, where it is certainly low; else NaN."""
    count, drift_Dn = histories.drifts[rows], histories.drift_Dm[:, rows]
    most = len(drift_Dn)
    is_used_Dn = np.arange(most)[:, None] >= most - count
    n = np.maximum(count, 1)
    mean = summed(np.where(is_used_Dn, drift_Dn, 0.0)) / n
    squares = summed(np.where(is_used_Dn, (drift_Dn - mean) ** 2, 0.0))
    spread = np.sqrt(squares / np.maximum(n - 1, 1))
    was_healthy = previous == HEALTHY
    limit = np.where(was_healthy, limits.stalling, limits.stalling_exit)
    is_low = mean + SURER * np.maximum(spread, WINDOW_NOISE) / np.sqrt(n) < limit
    is_low &= (count >= limits.drift_windows) & ~(was_healthy & (drift_Dn[-1] >= limit))
    return np.where(is_low, mean, np.nan)
