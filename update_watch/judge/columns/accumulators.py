"""The verdicts on the accumulators of one name of all tensors, as `judge.accumulators` gives them one by one.

States, decay and gradients are judged by their numbers; averages, counters and what carries a note of its own are judged alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum, auto
from typing import Any, cast

import numpy as np

from update_watch.columns.evidence_columns import Columns, Part, View, having
from update_watch.columns.late_fields import quick
from update_watch.evidence import AccumulatorEvidence, Numbers, TensorEvidence
from update_watch.judge import reasons
from update_watch.judge.accumulators import (
    AT_REST,
    HARMLESS_DECAY_RATE,
    MINIMUM_WANTED,
    PASSES,
    Setting,
    judge_accumulator,
    report_of,
    sentence_of,
)
from update_watch.judge.columns.codes import (
    CAUSE_CODES,
    CAUSES,
    HEALTH_CODES,
    HEALTHS,
    HEALTHY,
    IDLE,
    NONE,
    STALLED,
    STALLING,
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
from update_watch.judge.number_formats import SIGNIFICANT_BITS
from update_watch.report import AccumulatorReport, Cause

_TOLD = ("efficiency", "displacement_efficiency", "wanted_fraction", "lost_fraction")
_NUMBERS = {  # of a report, and where they are in the evidence
    "efficiency": "numbers.efficiency",
    "displacement_efficiency": "numbers.displacement_efficiency",
    "lost_fraction": "numbers.lost_fraction",
    "wanted_fraction": "numbers.wanted_fraction",
    "growth_efficiency": "growth.efficiency",
    "decay_efficiency": "decay.efficiency",
}
_AT_REST = [HEALTH_CODES[health] for health in AT_REST]
_OF_NAME = {"weight_decay": Cause.decay_rounding, "grad": Cause.accumulation_rounding}


class _Why(IntEnum):
    """What is said of one."""

    nothing = 0
    cause = auto()
    reason = auto()
    not_measured = auto()
    too_few_steps = auto()
    one_window = auto()


class Verdicts:
    """On the accumulators of one name."""

    def __init__(
        self,
        name: str,
        part: Part,
        columns: Columns,
        of_weight: Codes,
        histories: Histories,
        rows: Rows,
        setting: Setting,
    ) -> None:
        """`of_weight`: [n] the healths of the window's tensors; `rows`: [n] where they are in the histories."""
        self.name, self.places = name, part.rows
        self._setting, self._values = setting, part.values
        self._lists: dict[str, list[Any]] = {}
        self._histories, self._rows = histories.of(name), rows[part.rows]
        self.health: Codes = np.full(len(self.places), HEALTHY, np.int8)
        self.cause: Codes = np.full(len(self.places), NONE, np.int8)
        self._why: Codes = np.zeros(len(self.places), np.int8)
        self.alone: dict[int, AccumulatorReport] = {}  # by place in the part
        is_alone = self._are_alone(histories.odd.get(name, ()))
        steps = columns.column("measured_steps")[self.places]
        self._steps = np.where(steps != 0, steps, columns.column("steps")[self.places])
        is_open = ~is_alone
        is_open &= ~self._rest(of_weight, is_open)
        is_open &= ~self._without_numbers(is_open)
        if name in _OF_NAME:
            self._by_efficiency(columns, is_open)
        else:
            self._state(columns, is_open)
        self._histories.is_there[self._rows[~is_alone]] = True
        for i in np.flatnonzero(is_alone).tolist():
            self._judge_alone(i, columns, int(of_weight[self.places[i]]), histories)

    def report(self, i: int, evidence: AccumulatorEvidence, tensor: TensorEvidence) -> AccumulatorReport:
        """Of one, by its place in the part."""
        if i in self.alone:
            return self.alone[i]
        cause = None if self.cause[i] == NONE else CAUSES[self.cause[i]]
        return report_of(evidence, HEALTHS[self.health[i]], cause, self._text(i, evidence, tensor))

    def report_from_lists(self, i: int, tensor: TensorEvidence) -> AccumulatorReport:
        """The same, by lists that are made for all at once."""
        if i in self.alone:
            return self.alone[i]
        cause = None if self.cause[i] == NONE else CAUSES[self.cause[i]]
        text = "" if self._why[i] == _Why.nothing else self._text(i, self._evidence(i), tensor)
        fields: dict[str, Any] = {
            "name": self.name,
            "dtype": self.raw("dtype")[i],
            "health": HEALTHS[self.health[i]],
            "cause": cause,
            "advice": text,
        }
        return quick(AccumulatorReport, fields | {name: self.raw(of)[i] for name, of in _NUMBERS.items()})

    def _evidence(self, i: int) -> AccumulatorEvidence:
        """What a sentence tells of."""
        numbers, growth, decay = (
            Numbers(**{name: self.raw(f"{part}.{name}")[i] for name in _TOLD})
            for part in ("numbers", "growth", "decay")
        )
        dtype, rate, reason = (self.raw(name)[i] for name in ("dtype", "rate", "reason"))
        return AccumulatorEvidence(self.name, dtype, numbers, growth, decay, reason, rate)

    def raw(self, name: str) -> list[Any]:
        """[m] as they are in the evidence; made once."""
        found = self._lists.get(name)
        if found is None:
            found = self._lists[name] = self._values.raw(name)
        return found

    def _text(self, i: int, evidence: AccumulatorEvidence, tensor: TensorEvidence) -> str:
        why = self._why[i]
        if why == _Why.nothing:
            return ""
        if why == _Why.cause:
            return sentence_of(evidence, tensor, self._setting, CAUSES[self.cause[i]])
        if why == _Why.reason:
            return reasons.unknown(evidence.reason)
        if why == _Why.not_measured:
            return reasons.unknown(reasons.not_measured(0))
        if why == _Why.one_window:
            return reasons.unknown(reasons.one_window())
        return reasons.unknown(reasons.too_few_steps(int(self._bad_steps[i]), self._setting.limits.minimum_steps))

    # --- the lines of `judge_accumulator` ----------------------------------------------------------

    def _are_alone(self, odd: Iterable[int]) -> Mask:
        if self.name.startswith("average:"):
            return np.ones(len(self.places), bool)
        is_odd: Mask = ~np.isnan(self._values.column("value"))
        is_odd |= np.isin(self._rows, list(odd))
        is_odd |= having(self.raw("note"), bool)
        return is_odd

    def _judge_alone(self, i: int, columns: Columns, of_weight: int, histories: Histories) -> None:
        place, row = int(self.places[i]), int(self._rows[i])
        tensor = cast(TensorEvidence, View(columns, place))  # all of it takes ten times as long
        history = histories.accumulator(row, self.name)
        found = judge_accumulator(self._values.member(i), tensor, HEALTHS[of_weight], history, self._setting)
        histories.put_accumulator(row, self.name, history)
        self.alone[i] = found
        self.health[i] = HEALTH_CODES[found.health]
        self.cause[i] = NONE if found.cause is None else CAUSE_CODES[found.cause]

    def _acquit(self, mask: Mask) -> None:
        at = self._rows[mask]
        self._histories.bad_steps[at] = self._histories.bad_windows[at] = 0

    def _say(self, mask: Mask, health: int, why: _Why = _Why.nothing) -> None:
        self.health[mask], self._why[mask] = health, why

    def _rest(self, of_weight: Codes, is_open: Mask) -> Mask:
        """Whether its weight is at rest."""
        of_own = of_weight[self.places]
        found: Mask = is_open & np.isin(of_own, _AT_REST)
        self._acquit(found)
        self.health[found] = of_own[found]
        return found

    def _without_numbers(self, is_open: Mask) -> Mask:
        found: Mask = is_open & having(self.raw("reason"), bool)
        self._say(found, UNKNOWN, _Why.reason)
        return found

    def _nothing_wanted(self, mask: Mask) -> None:
        self._say(mask, IDLE)
        self._say(mask & (self._steps == 0), UNKNOWN, _Why.not_measured)

    def _bits(self) -> Array:
        """[n] significant bits of the format; NaN where that is not known."""
        dtypes = self.raw("dtype")
        bits = {dtype: float(SIGNIFICANT_BITS.get(dtype, np.nan)) for dtype in set(dtypes)}
        return np.fromiter(map(bits.__getitem__, dtypes), float, len(dtypes))

    def _by_efficiency(self, columns: Columns, is_open: Mask) -> None:
        cause, limits = _OF_NAME[self.name], self._setting.limits
        value = known(self._values.column("numbers.efficiency"))
        nothing = is_open & np.isnan(value)
        self._acquit(nothing)
        self._nothing_wanted(nothing)
        displacement = known(self._values.column("numbers.displacement_efficiency"))
        is_later = ~np.isnan(displacement) & ((displacement > value) | (cause is Cause.accumulation_rounding))
        verdict = grade(np.where(is_later, displacement, value), self._histories.grade[self._rows], limits)
        bits = self._bits()
        harmless = bits >= 24
        if cause is Cause.decay_rounding:
            rate = known(columns.column("lr_max")) * known(columns.column("weight_decay"))
            harmless |= rate[self.places] < HARMLESS_DECAY_RATE
        verdict[harmless] = HEALTHY
        self._settle(is_open & ~nothing, verdict, cause, np.ones(len(verdict)))

    def _state(self, columns: Columns, is_open: Mask) -> None:
        # it holds what rounding took from the weight: small changes are its nature
        is_open = is_open & columns.having("scheme", f"carried:{self.name}".__ne__)[self.places]
        bits, rate = self._bits(), known(self._values.column("rate"))
        growth, decay = (self._if_wanted(part) for part in ("growth", "decay"))
        previous = self._histories.grade[self._rows]
        is_short = is_open & (bits < 24) & (np.isnan(rate) | (rate < 2.0**-bits))
        worst = np.fmin(np.where(np.isnan(growth), 1.0, growth), decay)
        of_known = grade(worst, previous, self._setting.limits)
        of_unknown = grade(np.where(np.isnan(decay), 1.0, decay), previous, self._setting.limits)
        of_unknown[of_unknown == STALLING] = HEALTHY
        # once convicted, it need not grow any more to stay so
        is_tried = (previous == STALLED) | (growth >= PASSES)
        verdict = np.where(np.isnan(rate), np.where(is_tried, of_unknown, HEALTHY), of_known)
        verdict = np.where(is_short, verdict, HEALTHY).astype(np.int8)
        is_well = is_open & (verdict == HEALTHY)
        self._acquit(is_well)
        nothing = is_well & np.isnan(self._values.column("numbers.efficiency"))
        nothing &= np.isnan(self._values.column("decay.efficiency"))
        self._nothing_wanted(nothing)
        self._histories.grade[self._rows[is_well & ~nothing]] = HEALTHY
        # where a compensation may hold the rest, a first window can mislead
        is_carried = columns.having("scheme", lambda scheme: scheme.startswith("carried"))[self.places]
        windows = np.where(np.isnan(rate) | is_carried, 2.0, 1.0)
        self._settle(is_open & ~is_well, verdict, Cause.state_rounding, windows)

    def _if_wanted(self, part: str) -> Array:
        wanted = share(self._values.column(f"{part}.wanted_fraction"))
        return np.where(wanted < MINIMUM_WANTED, np.nan, known(self._values.column(f"{part}.efficiency")))

    def _settle(self, mask: Mask, verdict: Codes, cause: Cause, windows: Array) -> None:
        """Believe a bad verdict only once enough steps and windows in a row speak for it."""
        histories, rows = self._histories, self._rows
        is_well = mask & (verdict == HEALTHY)
        self._acquit(is_well)
        histories.grade[rows[is_well]] = HEALTHY
        is_bad = mask & ~is_well
        at = rows[is_bad]
        histories.bad_steps[at] += self._steps[is_bad].astype(np.int64)
        histories.bad_windows[at] += 1
        self._bad_steps = histories.bad_steps[rows]
        few = is_bad & (self._bad_steps < self._setting.limits.minimum_steps)
        early = is_bad & ~few & (histories.bad_windows[rows] < windows)
        self._say(few, UNKNOWN, _Why.too_few_steps)
        self._say(early, UNKNOWN, _Why.one_window)
        sure = is_bad & ~few & ~early
        histories.grade[rows[sure]] = verdict[sure]
        self.health[sure], self.cause[sure], self._why[sure] = verdict[sure], CAUSE_CODES[cause], _Why.cause
