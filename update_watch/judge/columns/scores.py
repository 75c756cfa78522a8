"""How well the updates of many tensors arrive, as `efficiency_grade.score` does it for one.

Only where single steps are evidence: rounding to nearest, at random, or with what it takes counted in. The others are judged alone.
"""

from __future__ import annotations

from enum import IntEnum, auto
from typing import NamedTuple

import numpy as np

from update_watch.columns.evidence_columns import Columns
from update_watch.judge import reasons
from update_watch.judge.columns.codes import (
    HEALTHY,
    UNKNOWN,
    Array,
    Codes,
    Mask,
    Rows,
    grade,
    known,
    share,
)
from update_watch.judge.columns.histories import Histories
from update_watch.judge.columns.pools import PooledColumns, is_decided, lost_drift, pool
from update_watch.judge.efficiency_grade import (
    ALWAYS,
    BACKWARDS,
    CARRIED_MOST,
    CHANGE_CHANCE,
    EXPECTED_CHANGES,
    NOTHING,
    ROUNDED_LEAST,
    ROUNDED_MOST,
    SURE,
    SURER,
    UNLOST,
)
from update_watch.report import HEADROOM_BINS
from update_watch.thresholds import Thresholds


class Why(IntEnum):
    """Why a score is not known."""

    nothing = 0
    not_measured = auto()
    too_few_steps = auto()
    too_noisy = auto()
    unexplained = auto()
    unexplained_loss = auto()
    too_small = auto()


class Scores(NamedTuple):
    """[n] as `efficiency_grade.Score`."""

    health: Codes
    why: Codes
    efficiency: Array
    lost: Array
    drift: Array  # NaN: it is not the finding
    pooled: PooledColumns

    def reason(self, i: int, steps: int, limits: Thresholds) -> str:
        """Why the score of one is not known. `steps`: its optimizer's in the window."""
        why, efficiency, lost = self.why[i], float(self.efficiency[i]), float(self.lost[i])
        if why == Why.not_measured:
            return reasons.not_measured(steps)
        if why == Why.too_few_steps:
            return reasons.too_few_steps(int(self.pooled.steps[i]), limits.minimum_steps)
        if why == Why.too_noisy:
            return reasons.too_noisy(efficiency, float(self.pooled.error[i]), int(self.pooled.windows[i]))
        return (
            reasons.too_small()
            if why == Why.too_small
            else reasons.unexplained(efficiency, lost if why == Why.unexplained_loss else None)
        )


def score(columns: Columns, places: Rows, histories: Histories, rows: Rows, exact: Mask, limits: Thresholds) -> Scores:
    """Add a window's evidence to the histories and say what all of it shows.

    `places`: of these tensors in the window; `rows`: in the histories; `exact`: whether their rounding is not at random.
    """
    efficiency = known(columns.column("numbers.efficiency")[places])
    measured = columns.column("measured_steps")[places]
    is_seen = (measured > 0) & ~np.isnan(efficiency)
    seen = np.flatnonzero(is_seen)
    pooled_Fn = _pooled(columns, places[seen], efficiency[seen], measured[seen], exact[seen])
    histories.age[rows[seen]] = 0
    histories.remember(rows[seen], pooled_Fn)
    unseen = rows[~is_seen & (columns.column("is_resting")[places] == 0)]  # evidence does not age while nobody looks
    histories.age[unseen] += 1
    histories.forget_evidence(unseen[histories.age[unseen] > limits.pool_windows])
    evidence = np.nan_to_num(known(columns.column("displacement_evidence")[places]))
    displacement = known(columns.column("numbers.displacement_efficiency")[places])
    displacement = np.where(is_seen & (evidence >= limits.displacement_evidence), displacement, np.nan)
    shown = np.flatnonzero(~np.isnan(displacement))
    if len(shown):
        at, value = rows[shown], displacement[shown]
        histories.add_drift(at, value)
        histories.proven[at] = (value >= limits.stalling) | (histories.proven[at] & (value >= limits.stalling / 2))
    previous = histories.grade[rows]
    is_empty = ~is_seen & (histories.pooled[rows] == 0)
    found = pool(histories, rows, exact, previous, limits)
    # rounding to nearest: what was lost cannot arrive later, whatever the displacement of a few steps says
    plain = columns.having("scheme", "plain".__eq__)[places]
    health, why = _by_steps(
        found,
        np.where(plain, np.nan, displacement),
        previous,
        histories.graded[rows],
        exact,
        np.where(plain, ROUNDED_MOST, CARRIED_MOST),
        limits,
    )
    drift = np.where(health == HEALTHY, lost_drift(histories, rows, previous, limits), np.nan)
    health = np.where(np.isnan(drift), health, grade(drift, previous, limits)).astype(np.int8)
    too_few = found.steps < limits.minimum_steps
    for mask, reason in ((too_few, Why.too_few_steps), (is_empty, Why.not_measured)):
        health[mask], why[mask], drift[mask] = UNKNOWN, reason, np.nan
    return Scores(health, why, found.efficiency, found.lost, drift, found)


def _pooled(columns: Columns, places: Rows, efficiency: Array, measured: Array, exact: Mask) -> Array:
    """[F, n] what the window has shown of each."""

    def of(name: str) -> Array:
        return columns.column(name)[places]

    stated = np.abs(known(of("numbers.efficiency_error")))
    error = np.where(np.isnan(stated), np.inf, stated)
    expected = np.full(len(places), ALWAYS)
    at_random = np.flatnonzero(~exact)
    if len(at_random):
        histogram_nB = columns.histogram("headroom_histogram", HEADROOM_BINS)[places[at_random]]
        counts_nB = np.where((histogram_nB > 0) & (histogram_nB <= 1), histogram_nB, 0.0)
        wanted = share(of("numbers.wanted_fraction")[at_random])
        chance = counts_nB @ np.array(CHANGE_CHANCE[:HEADROOM_BINS])
        looked = measured[at_random] * np.minimum(of("numel")[at_random], 64)
        expected[at_random] = looked * chance * np.where(np.isnan(wanted), 1.0, wanted)
    in_common = np.minimum(np.abs(np.nan_to_num(known(of("numbers.unseen_error")))), error)
    lr_max = of("lr_max")
    size, lr = known(of("numbers.weight")), known(np.where(np.isnan(lr_max), of("lr"), lr_max))
    with np.errstate(all="ignore"):
        movement = np.where((size != 0) & (lr != 0), size / lr**2, 0.0)
    movement = np.where((movement > 0) & (movement < ALWAYS**2), movement, 0.0)
    lost = np.nan_to_num(share(of("numbers.lost_fraction")))
    return np.stack([measured, efficiency, stated, lost, expected, in_common, movement])


def _by_steps(
    pooled: PooledColumns,
    displacement: Array,
    previous: Codes,
    graded: Codes,
    exact: Mask,
    most: Array,
    limits: Thresholds,
) -> tuple[Codes, Codes]:
    """[n] the health, and why it is not known. The lines of `efficiency_grade`, the last of them first."""
    efficiency, error, lost = pooled.efficiency, pooled.error, pooled.lost
    margin = np.where(exact, SURE, SURER) * error
    health = grade(efficiency, previous, limits)
    mildest = grade(efficiency + margin, previous, limits)
    undecided = ~is_decided(efficiency, error, margin, exact, previous, limits)
    has_all = pooled.windows >= limits.pool_windows
    too_noisy = undecided & has_all & (error > limits.maximum_error)
    may_be_well = undecided & ~has_all & (mildest == HEALTHY)
    agree = may_be_well & (displacement >= limits.stalling)  # two numbers that agree
    too_noisy |= may_be_well & ~agree & (graded < 0)
    # till more is known, the earlier verdict stands
    health = np.where(may_be_well & ~agree, previous, health)
    # only how bad it is is not certain; where nothing arrived, it is
    least = np.where(efficiency + margin > limits.stalled_exit, NOTHING, limits.stalled / 2)
    health = np.where(undecided & ~has_all & (mildest != HEALTHY) & (efficiency > least), mildest, health)
    too_much = exact & (efficiency - margin > most)
    arrived_later = (health != HEALTHY) & (displacement > efficiency)
    health = np.where(arrived_later, grade(displacement, previous, limits), health).astype(np.int8)
    is_bad = health != HEALTHY
    too_small = is_bad & ~exact & (pooled.expected < EXPECTED_CHANGES)
    backwards = is_bad & exact & ((efficiency < BACKWARDS) | ((efficiency < ROUNDED_LEAST) & (lost < UNLOST)))
    why = np.zeros(len(health), np.int8)
    for mask, reason in (
        (backwards, Why.unexplained_loss),
        (too_small, Why.too_small),
        (too_much, Why.unexplained),
        (too_noisy, Why.too_noisy),
    ):
        why[mask] = reason
    why[agree] = Why.nothing
    health[why != Why.nothing] = UNKNOWN
    health[agree] = HEALTHY
    return health, why
