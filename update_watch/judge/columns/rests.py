"""Which tensors of a window are at rest, which are judged by their numbers, and which alone: masks over `judge.no_signal`.

Nothing is remembered here: a tensor that turns out to be a case of its own finds its history as it was.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from update_watch.columns.evidence_columns import Columns
from update_watch.judge.beyond_steps import LIKE_LOOKAHEAD, UNDONE
from update_watch.judge.columns.codes import CAUSE_CODES, HEALTHY, NONE, Array, Codes, Mask, Rows, grade, known, share
from update_watch.judge.columns.histories import Histories
from update_watch.judge.efficiency_grade import is_exact
from update_watch.judge.no_signal import LARGEST_NOISE, NEARLY_ALL, NOISE
from update_watch.report import Cause
from update_watch.thresholds import Thresholds


class Sorted(NamedTuple):
    """[n] the tensors of a window by how they are judged."""

    rests: Mask  # by `cause`, and nothing of it moved
    cause: Codes
    looked: Mask  # those at rest that were seen to have gradients of zero
    scored: Mask  # by their numbers
    exact: Mask  # of these: rounding is not at random
    is_moving: Mask


def sort(
    columns: Columns, histories: Histories, rows: Rows, usual: float | None, skipped: int, limits: Thresholds
) -> Sorted:
    """Neither at rest nor scored: a case of its own.

    `usual`: the median rms of the gradients; `skipped`: steps of the window that the scaler skipped.
    """
    column = columns.column
    steps = column("steps")
    is_moving = np.zeros(len(rows), bool)
    for name in ("applied_ratio", "written_between", "moved"):
        is_moving |= known(column(name)) > 0
    is_moving |= np.nan_to_num(known(column("changed_fraction"))) != 0

    cause = np.full(len(rows), NONE, np.int8)
    trainable, held = column("trainable") != 0, columns.having("optimizer_group", bool)
    own = np.where(steps > 0, column("skipped_steps"), skipped)
    is_odd = (own > 0) & (own >= NEARLY_ALL * np.maximum(steps, own))
    is_odd |= trainable & (column("finite") == 0)
    is_odd |= trainable & (column("replicas_differ") != 0)
    trains = trainable & held
    is_odd |= trains & (steps == 0)
    cause[~trainable] = CAUSE_CODES[Cause.requires_grad_off]
    cause[trainable & ~held] = CAUSE_CODES[Cause.not_in_optimizer]
    is_open = trains & ~is_odd
    gradless = is_open & (column("gradless_steps") >= steps)
    cause[gradless] = CAUSE_CODES[Cause.no_gradient]
    is_open &= ~gradless

    zero, looks = known(column("zero_gradient_fraction")), gradient_looks(columns)
    is_given = (column("requires_grad") != 0) | (column("is_master") != 0)
    is_zero = is_open & (zero >= 1) & (looks > 0)
    enough = histories.zero_looks[rows] + looks >= limits.minimum_steps
    looked = is_zero & is_given & enough & ~(column("gradient_blind") > 0)
    cause[looked] = CAUSE_CODES[Cause.zero_gradient]
    is_odd |= is_zero & ~looked
    is_open &= ~is_zero
    gradient_max = known(column("gradient_max"))
    is_odd |= is_open & ~is_given & (looks > 0) & (gradient_max == 0)
    lr = known(column("lr"))
    lr_max = np.where(np.isnan(column("lr_max")), lr, known(column("lr_max")))
    is_off = is_open & (lr_max == 0)
    cause[is_off] = CAUSE_CODES[Cause.zero_learning_rate]
    is_odd |= is_off & (histories.stalled_lr[rows] != 0)
    is_open &= ~is_off
    is_odd |= is_open & (column("numbers.wanted_fraction") == 0) & ~is_moving
    is_odd |= is_open & columns.having("reason", bool)

    # what is left is judged by its numbers, unless more than they speak
    size, stored = known(column("gradient_rms")), known(column("stored"))
    if usual is not None:
        is_noise = (size < NOISE * usual) & ~(gradient_max >= LARGEST_NOISE * usual) & (gradient_max != 0)
        is_odd |= is_open & is_noise & (lr != 0) & ~np.isnan(known(column("update_ratio"))) & (stored != 0)
    exact = columns.having("scheme", is_exact)
    is_odd |= is_open & ~(exact | columns.having("scheme", "stochastic".__eq__))
    is_odd |= is_open & columns.having("dtype", "float64".__eq__)
    peak = histories.peak_lr[rows]
    is_odd |= is_open & (lr_max <= limits.negligible_lr * peak)
    is_odd |= is_open & (_is_undone(columns, histories, rows, limits) | is_state_off(columns, histories, rows, limits))
    is_resting = (cause != NONE) & ~is_odd & ~is_moving
    return Sorted(is_resting, cause, looked, is_open & ~is_odd, exact, is_moving)


def _is_undone(columns: Columns, histories: Histories, rows: Rows, limits: Thresholds) -> Mask:
    """[n] whether `beyond_steps.by_ledger` has anything to say."""
    net, error = known(columns.column("net_efficiency")), known(columns.column("net_efficiency_error"))
    health = grade(net + 2 * np.nan_to_num(error), histories.net_grade[rows], limits)
    undone = np.nan_to_num(share(columns.column("undone_fraction")))
    is_uncopied = (columns.column("is_master") != 0) & (columns.column("moved") == 0)
    found: Mask = (health != HEALTHY) & (is_uncopied | (undone >= UNDONE))
    found |= (columns.column("is_put_back") != 0) & (undone >= 1 - limits.stalling)
    found |= known(columns.column("held_fraction")) > 0
    found |= (columns.column("is_alike") != 0) & (undone >= LIKE_LOOKAHEAD)
    found |= histories.net_grade[rows] != HEALTHY  # what was said of it before may stand
    return found


def is_state_off(columns: Columns, histories: Histories, rows: Rows, limits: Thresholds) -> Mask:
    """[n] whether `beyond_steps.by_state` has anything to say."""
    factor, error = known(columns.column("state_factor")), known(columns.column("state_factor_error"))
    inside = np.where(histories.bad_state_windows[rows] >= 2, 1 + limits.state_margin, 1.0)
    margin = 2 * np.nan_to_num(error)
    enough = columns.column("state_factor_steps") >= limits.minimum_steps
    is_inside = (factor + margin >= limits.state_low * inside) & (factor - margin <= limits.state_high / inside)
    found: Mask = ~np.isnan(factor) & enough & ~is_inside
    return found


def has_state_factor(columns: Columns, limits: Thresholds) -> Mask:
    """[n] whether there is one that counts."""
    found: Mask = ~np.isnan(known(columns.column("state_factor"))) & (
        columns.column("state_factor_steps") >= limits.minimum_steps
    )
    return found


def gradient_looks(columns: Columns) -> Array:
    """[n] steps in which a gradient was looked at."""
    looks = columns.column("gradient_looks")
    return np.where(looks != 0, looks, columns.column("measured_steps"))


def usual_gradient(columns: Columns) -> float | None:
    """The median rms of the gradients of a window's tensors, of those that have any."""
    size = known(columns.column("gradient_rms"))
    sizes = np.sort(size[(size > 0) & (columns.column("trainable") != 0)])
    return float(sizes[len(sizes) // 2]) if len(sizes) else None
