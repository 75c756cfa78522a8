"""The verdicts on all tensors of a window that are no case of their own, by the table in `diagnosis`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from update_watch.columns.evidence_columns import Columns
from update_watch.columns.products import summed
from update_watch.evidence import TensorEvidence
from update_watch.judge import reasons
from update_watch.judge.advice import say
from update_watch.judge.columns.codes import (
    CAUSE_CODES,
    CAUSES,
    FROZEN,
    HEALTHY,
    IDLE,
    NONE,
    STALLED,
    UNKNOWN,
    Array,
    Codes,
    Mask,
    Rows,
    known,
    share,
)
from update_watch.judge.columns.histories import Histories
from update_watch.judge.columns.rests import Sorted, gradient_looks, has_state_factor
from update_watch.judge.columns.scores import Why, score
from update_watch.judge.efficiency_grade import known as known_value
from update_watch.judge.seen import Seen
from update_watch.judge.stall_signs import STEEP, WELL_ABOVE, is_norm_near_one, most_lost
from update_watch.report import HEADROOM_BINS, Cause
from update_watch.thresholds import Thresholds


@dataclasses.dataclass
class Verdicts:
    """[n] of all tensors of a window; UNKNOWN of those that are judged alone, till they are."""

    health: Codes
    cause: Codes
    text: Callable[[int, TensorEvidence], str]  # place in the window -> the sentence


def judge(
    columns: Columns, found: Sorted, histories: Histories, rows: Rows, trainer: str, limits: Thresholds
) -> Verdicts:
    """Judge those that are at rest, and those that are scored."""
    health = np.full(len(rows), UNKNOWN, np.int8)
    cause = np.where(found.rests, found.cause, NONE).astype(np.int8)
    _rest(columns, found, histories, rows, health)
    scored = np.flatnonzero(found.scored)
    of_scored = _Scored(columns, scored, histories, rows[scored], found.exact[scored], trainer, limits)
    health[scored], cause[scored] = of_scored.health, of_scored.cause
    index_n = np.full(len(rows), -1)
    index_n[scored] = np.arange(len(scored))

    def text(place: int, e: TensorEvidence) -> str:
        if found.rests[place]:
            return _of_rest(CAUSES[cause[place]], e)
        return of_scored.text(int(index_n[place]), e)

    return Verdicts(health, cause, text)


def _rest(columns: Columns, found: Sorted, histories: Histories, rows: Rows, health: Codes) -> None:
    frozen = found.cause == CAUSE_CODES[Cause.requires_grad_off]
    health[found.rests] = np.where(frozen, FROZEN, IDLE)[found.rests]
    histories.forget_evidence(rows[found.rests])
    histories.skipped_windows[rows[found.rests | found.scored]] = 0
    looks = gradient_looks(columns)
    histories.zero_looks[rows[found.looked & found.rests]] += looks[found.looked & found.rests].astype(np.int64)
    is_off = found.rests & (found.cause == CAUSE_CODES[Cause.zero_learning_rate])
    was_seen = (is_off | found.scored) & ~np.isnan(known(columns.column("zero_gradient_fraction")))
    histories.zero_looks[rows[was_seen]] = 0


def _of_rest(cause: Cause, e: TensorEvidence) -> str:
    if not e.trainable:
        return say(cause, Seen())
    if cause is Cause.not_in_optimizer:
        return say(cause, Seen(reason=e.note))
    looks = e.gradient_looks or e.measured_steps if cause is Cause.zero_gradient else 0
    return say(cause, Seen(steps=e.steps, looks=looks))


class _Scored:
    """Verdicts by the numbers alone: healthy, stalled, stalling and unknown."""

    def __init__(
        self,
        columns: Columns,
        places: Rows,
        histories: Histories,
        rows: Rows,
        exact: Mask,
        trainer: str,
        limits: Thresholds,
    ) -> None:
        self._limits, self._trainer = limits, trainer
        self._scores = score(columns, places, histories, rows, exact, limits)
        lr, start = (known(columns.column(name)[places]) for name in ("lr", "lr_min"))
        lr_max = columns.column("lr_max")[places]
        lr_max = np.where(np.isnan(lr_max), lr, known(lr_max))
        before = histories.lr[rows]
        start = np.where((before < start) | (np.isnan(start) & ~np.isnan(before)), before, start)
        is_bad = (self._scores.health != HEALTHY) & (self._scores.health != UNKNOWN)
        self._rises: Mask = is_bad & (lr != 0) & (lr == lr_max) & (lr >= STEEP * start)
        self._above: Array = np.full(len(rows), np.nan)
        self._accuse(columns, places, histories, rows, is_bad & ~self._rises, lr_max)
        is_healthy = self.health == HEALTHY
        self._clear(columns, places, histories, rows, is_healthy)

    def _accuse(
        self, columns: Columns, places: Rows, histories: Histories, rows: Rows, is_bad: Mask, lr_max: Array
    ) -> None:
        scores = self._scores
        self.health: Codes = np.where(self._rises, UNKNOWN, scores.health).astype(np.int8)
        self.cause: Codes = np.where(is_bad, CAUSE_CODES[Cause.weight_rounding], NONE).astype(np.int8)
        bad = np.flatnonzero(is_bad)
        if not len(bad):
            return
        histories.grade[rows[bad]] = scores.health[bad]
        self._above[bad] = _share_well_above(columns.histogram("headroom_histogram", HEADROOM_BINS)[places[bad]])
        most = most_lost(self._above[bad], columns.column("numel")[places[bad]])
        is_unwritten = np.zeros_like(is_bad)
        is_unwritten[bad] = np.isnan(scores.drift[bad]) & (scores.lost[bad] > most)
        self.cause[is_unwritten] = CAUSE_CODES[Cause.not_written]
        is_stalled = is_bad & (scores.health == STALLED) & ~is_unwritten
        highest = np.maximum(histories.stalled_lr[rows], np.nan_to_num(lr_max))
        histories.stalled_lr[rows[bad]] = np.where(is_stalled, highest, 0.0)[bad]

    def _clear(self, columns: Columns, places: Rows, histories: Histories, rows: Rows, is_healthy: Mask) -> None:
        at = rows[is_healthy]
        histories.grade[at], histories.stalled_lr[at] = HEALTHY, 0.0
        histories.net_grade[at] = HEALTHY
        histories.lossy_windows[at] = np.minimum(histories.lossy_windows[at], 0)  # below 0 what is waited for goes on
        histories.bad_state_windows[rows[is_healthy & has_state_factor(columns, self._limits)[places]]] = 0

    def text(self, i: int, e: TensorEvidence) -> str:
        """The sentence on one of them."""
        scores = self._scores
        if self.health[i] == HEALTHY:
            return ""
        if self._rises[i]:
            return reasons.unknown(reasons.rising_lr(known_value(e.lr) or 0.0))
        if scores.why[i] != Why.nothing:
            return reasons.unknown(scores.reason(i, e.steps, self._limits))
        seen = Seen(
            dtype=e.dtype,
            efficiency=float(scores.efficiency[i]),
            displacement=_or_none(scores.drift[i]),
            lost=float(scores.lost[i]),
            lr=known_value(e.lr),
            critical_lr=known_value(e.critical_lr),
            headroom=_or_none(self._above[i]),
            near_one=is_norm_near_one(e),
            options=e.options,
            trainer=self._trainer,
        )
        return say(CAUSES[self.cause[i]], seen)


def _or_none(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)


def _share_well_above(histogram_nB: Array) -> Array:
    """As `stall_signs` has it for one; NaN where there is none."""
    with np.errstate(all="ignore"):
        bins_Bn = np.ascontiguousarray(histogram_nB.T)
        sums, above = summed(bins_Bn), summed(bins_Bn[WELL_ABOVE:])
        return np.where(sums > 0, share(above / sums), np.nan)


def since(histories: Histories, rows: Rows, health: Codes, first_step: int) -> npt.NDArray[np.int64]:
    """[n] first step of the window in which this health began; a verdict that was unknown in between goes on."""
    changed = health != histories.health[rows]
    is_grade = changed & (health < UNKNOWN)
    again = is_grade & (health == histories.graded[rows])
    found = np.where(changed, np.where(again, histories.graded_since[rows], first_step), histories.since[rows])
    at = rows[is_grade]
    histories.graded[at], histories.graded_since[at] = health[is_grade], found[is_grade]
    histories.graded[rows[changed & (health > UNKNOWN)]] = NONE
    histories.since[rows], histories.health[rows] = found, health
    return found
