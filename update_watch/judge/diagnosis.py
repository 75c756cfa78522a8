"""From the numbers of a window to verdicts: health, cause and advice of every tensor, with hysteresis over windows.

A tensor is judged by the first line that fits. "At rest" is idle (frozen for requires_grad_off) where nothing of it moved;
one that moves is judged by its numbers and keeps the cause, and what moves it is said (`no_signal`).

|    | what was seen | health | cause |
|----|---|---|---|
| 1  | requires_grad is False | at rest | requires_grad_off |
| 2  | NaN or infinity; with skipped steps, once they persist as in 4 | broken | non_finite |
|    | replicas of it differ between ranks | broken | replicas_differ |
| 3  | no optimizer holds it | at rest | not_in_optimizer |
| 4  | nearly all steps skipped, or none taken after gradients that are not finite, in several windows; till then unknown | at rest | skipped_steps |
| 5  | its optimizer took no step | unknown | |
| 6  | its gradient was None in every step | at rest | no_gradient |
| 7  | its gradient was 0 in every step, seen in six or more; till that is known of all steps unknown | at rest | zero_gradient |
|    | and what is left of its momentum gets lost | unknown | zero_gradient |
| 8  | learning rate 0 in every step | at rest | zero_learning_rate |
|    | and rounding had stalled it at a tenth of its peak or more | stalled | weight_rounding |
| 9  | the update cannot be replayed | unknown | not_replayable |
|    | and no bit of any tensor of its optimizer has moved in many steps | stalled | weight_rounding |
| 10 | measured, and no update intended | idle | |
| 11 | gradient at the level of round-off, and far less made of it than of a real one | idle | negligible_gradient |
|    | and the rule makes as much of it as of any | unknown | negligible_gradient |
| 12 | fewer measured steps or more noise than a verdict allows, even pooled | unknown | |
| 13 | score not healthy, but not by rounding: hardly any lost, or backwards | unknown | |
| 14 | score not healthy, but the learning rate has run out; unknown if it still moves, as in 8 | idle | zero_learning_rate |
| 15 | score not healthy, but the learning rate has just risen threefold | unknown | |
| 16 | score not healthy, and updates well above half a gap are lost too | stalled, stalling | not_written |
| 17 | score not healthy | stalled, stalling | weight_rounding |
| 18 | what the steps applied is undone before the next, more than once; told while another is due | stalled, stalling | overwritten |
|    | the same share of each element is, as Lookahead does (unknown where gaps may hide that), or a part of it | healthy | overwritten |
|    | the same by setting it to exactly 0, as pruning does; frozen where all samples are 0 | healthy, frozen | overwritten |
|    | and all that is stored may be applied since; or undone where read, few gradients, or always from one side | unknown | overwritten |
|    | the master moves, and not one bit of the model's tensor does | stalled | not_copied_back |
| 19 | state factor outside its band in two windows running | stalling | state_rounding |
| 20 | none of these | healthy | |

The score is explained in `efficiency_grade`, lines 18 and 19 in `beyond_steps`, the accumulators in `accumulators`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from update_watch.columns.evidence_columns import Columns, columns_of
from update_watch.columns.late_fields import made
from update_watch.evidence import TensorEvidence, WindowEvidence
from update_watch.judge import reasons
from update_watch.judge.accumulators import Setting
from update_watch.judge.advice import say
from update_watch.judge.beyond_steps import by_ledger, by_state
from update_watch.judge.columns.accumulators import Verdicts as AccumulatorVerdicts
from update_watch.judge.columns.codes import CAUSE_CODES, HEALTH_CODES, IDLE, NONE, Rows
from update_watch.judge.columns.codes import known as known_values
from update_watch.judge.columns.histories import Histories
from update_watch.judge.columns.last_look import LastLook
from update_watch.judge.columns.reports import LateReport, OfWindow
from update_watch.judge.columns.resting import Resting
from update_watch.judge.columns.rests import sort, usual_gradient
from update_watch.judge.columns.standing import Standing
from update_watch.judge.columns.verdicts import judge, since
from update_watch.judge.efficiency_grade import Score, known, score
from update_watch.judge.headline import headline
from update_watch.judge.history import HEALTHY, UNKNOWN, TensorHistory, check_state
from update_watch.judge.no_signal import Rest, Verdict, movement, negligible, rest, verdict
from update_watch.judge.run_summary import run_health
from update_watch.judge.seen import Seen
from update_watch.judge.stall_signs import STEEP, is_norm_near_one, most_lost, share_well_above
from update_watch.report import Cause, Health, Report
from update_watch.thresholds import Thresholds
from update_watch.worker import unhurried

_VERSION = 2
_STILL = 48  # steps in which no tensor of an optimizer moved by one bit, though it has gradients and a learning rate
_EARNEST = 0.1  # of the peak learning rate: what stalls only below that is the end of a schedule, and not the run

_FAR_LOWER = 0.1  # than under the optimizer before: schedules over optimizers that are made anew go on smoothly
_GOOD = (HEALTHY, None, "")
_LATE = ("tensors", "layers")  # fields of a report that are made when somebody asks for them


class Diagnosis:
    """Judges window after window; remembers per tensor what hysteresis and pooling need."""

    def __init__(self, thresholds: Thresholds) -> None:
        self._limits = thresholds
        self.trainer = "torch"  # in whose words cures are told: a key of `cures.TRAINERS`
        self._histories = Histories(thresholds)
        self._standing, self._resting, self._last_look = Standing(), Resting(), LastLook()
        self._last_step: int | None = None
        self._owned: tuple[list[str], list[str]] = [], []  # names of the last window, and the groups that held them
        self._moving: set[str] = set()  # optimizers of which any tensor moved in this window

    def judge(self, evidence: WindowEvidence, trainer: str = "torch") -> Report:
        """The report of a window, without alerts. Never raises on missing or non-finite numbers.

        `trainer`: in whose words cures are told, a key of `cures.TRAINERS`.
        """
        self.trainer = trainer
        first_step = max(evidence.step - evidence.window + 1, 0)
        if self._last_step is not None and first_step <= self._last_step < evidence.step:
            first_step = self._last_step + 1
        self._last_step = evidence.step
        looked = None if evidence.observed_steps is None else (evidence.observed_steps, evidence.window)
        is_seen = evidence.observed_steps != 0
        judged = self._judge(evidence, first_step, is_seen)
        said = run_health(judged), headline(judged, evidence.step, self.trainer, looked, self._resting.count)
        health, text = self._last_look.told(evidence.step, judged, *said, is_seen)
        fields = {field.name: field.default for field in dataclasses.fields(Report) if field.name not in _LATE}
        fields |= {
            "step": evidence.step,
            "window": evidence.window,
            "health": health,
            "headline": text,
            "time": evidence.time,
            "cost_ms": evidence.cost_ms,
            "skipped_steps": evidence.skipped_steps,
            "observed_steps": evidence.observed_steps,
            "cost_share": evidence.cost_share,
            "observed_at": self._last_look.step,
        }
        return made(Report, fields, LateReport(judged), 0)

    # --- resume ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain data (str, int, float, bool, None, list, dict), safe to load weights-only."""
        return {
            "version": _VERSION,
            "last_step": self._last_step,
            "observed_at": self._last_look.step,
            "tensors": self._histories.to_plain(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned. A tensor whose entry cannot be read starts anew, with a log line.

        Raises:
            TypeError, ValueError: `state` as a whole is not such data; nothing is changed then.
        """
        check_state("Diagnosis", state, _VERSION, {"tensors": Mapping})
        for name in ("last_step", "observed_at"):
            if (step := state.get(name)) is not None and type(step) is not int:
                raise ValueError(
                    f"Diagnosis.load_state_dict: {name}={step!r} is not a step; pass what state_dict() gave."
                )
        memories: dict[str, TensorHistory] = {}
        for name, data in state["tensors"].items():
            try:
                memories[str(name)] = TensorHistory.from_plain(data)
            except (KeyError, TypeError, ValueError) as error:
                logging.getLogger("update_watch").warning(
                    "Diagnosis.load_state_dict: the entry of %r cannot be read (%s: %s); it starts anew.",
                    name,
                    type(error).__name__,
                    error,
                )
        self._histories, self._resting = Histories(self._limits), Resting()
        self._last_step, self._last_look = state.get("last_step"), LastLook(state.get("observed_at"))
        self._histories.take(memories)

    # --- the tensors -------------------------------------------------------------------------------

    def _judge(self, evidence: WindowEvidence, first_step: int, is_seen: bool) -> OfWindow:
        columns, histories, limits = columns_of(evidence.tensors), self._histories, self._limits
        rows = histories.rows_of(tuple(columns.raw("name")))
        self._begin_anew(columns, rows)
        usual = usual_gradient(columns)
        sorts = sort(columns, histories, rows, usual, evidence.skipped_steps, limits)
        rest_now = self._resting.take(columns, sorts, histories, rows, limits, is_seen)
        standing = self._standing.take(columns, sorts, rest_now)
        found = judge(columns, sorts, histories, rows, self.trainer, limits)
        found.health[rest_now], found.cause[rest_now] = (
            of[rows[rest_now]] for of in (histories.health, histories.cause)
        )
        texts = dict(self._resting.texts(columns, rest_now, found.health, found.cause))
        alone = np.flatnonzero(~(sorts.rests | sorts.scored | rest_now)).tolist()
        if alone:
            pairs = zip(columns.raw("optimizer_group"), columns.raw("moved"), strict=True)
            self._moving = {_owner(group) for group, moved in pairs if moved}
        for place in unhurried(alone):
            history = histories.get(int(rows[place]))
            health, cause, texts[place] = standing.get(place) or self._verdict(
                columns.tensor(place), history, evidence, usual
            )
            histories.put(int(rows[place]), history)
            found.health[place] = HEALTH_CODES[health]
            found.cause[place] = NONE if cause is None else CAUSE_CODES[cause]
        self._standing.keep(columns, found, texts)
        _remember_rates(columns, histories, rows)
        # where a weight moves without a signal, what its states lose harms nobody
        is_silent = (found.cause != NONE) & (found.cause != CAUSE_CODES[Cause.overwritten])
        of_weight = np.where((found.health == HEALTH_CODES[HEALTHY]) & is_silent, IDLE, found.health)
        setting = Setting(limits, self.trainer)
        parts = [
            AccumulatorVerdicts(name, part, columns, of_weight.astype(np.int8), histories, rows, setting)
            for name, part in columns.parts().items()
        ]
        since_step = since(histories, rows, found.health, first_step)
        histories.cause[rows] = found.cause

        def text(place: int, e: TensorEvidence) -> str:
            return texts[place] if place in texts else "" if rest_now[place] else found.text(place, e)

        judged = OfWindow(columns, found.health, found.cause, text, parts, since_step, first_step)
        self._resting.keep(rest_now, judged)
        return judged

    def _begin_anew(self, columns: Columns, rows: Rows) -> None:
        """Under another optimizer a far lower rate is that of what begins now, and not the end of a schedule."""
        names, groups = list(columns.raw("name")), list(columns.raw("optimizer_group"))
        if (names, groups) == self._owned:
            return
        before = dict(zip(*self._owned, strict=True))
        known_groups = [group or before.get(name, "") for name, group in zip(names, groups, strict=True)]
        self._owned = names, known_groups
        pairs = [(before.get(name, ""), group) for name, group in zip(names, known_groups, strict=True)]
        is_other = np.array([bool(old) and _owner(old) != _owner(new) for old, new in pairs], dtype=bool)
        lr_max = known_values(columns.column("lr_max"))
        at = rows[is_other & (lr_max < _FAR_LOWER * self._histories.lr[rows])]
        self._histories.peak_lr[at] = self._histories.stalled_lr[at] = 0.0
        self._histories.lr[at] = np.nan

    def _verdict(
        self, e: TensorEvidence, history: TensorHistory, window: WindowEvidence, usual: float | None
    ) -> Verdict:
        limits = self._limits
        found = rest(e, history, window, limits)
        if isinstance(found, Rest):
            amount, how = movement(e)
            if not amount:
                if found.cause is Cause.zero_learning_rate and (stalled := self._ran_out(e, history)):
                    return stalled
                history.forget_evidence()
                health = Health.frozen if found.cause is Cause.requires_grad_off else Health.idle
                return verdict(health, found.cause, found.seen)
            return self._unasked(e, history, found, found.seen._replace(moved=amount, mover=how))
        if found is None and e.reason:
            found = self._without_rule(e, history, window.step)
        if found is None:
            found = negligible(e, usual)
        if found is not None:
            history.forget_evidence()
            return found
        scored = self._by_score(e, history)
        if scored[0] is not HEALTHY:
            return scored
        return by_ledger(e, history, limits, window.step) or by_state(e, history, limits) or scored

    def _without_rule(self, e: TensorEvidence, history: TensorHistory, step: int) -> Verdict:
        """Line 9 of the table, but for what needs no rule. Where one tensor moves, updates of others may be kept till they are large."""
        undone = by_ledger(e, history, self._limits, step)
        if undone is not None and undone[0] is not HEALTHY and undone[1] is Cause.overwritten:
            return undone
        is_still = e.moved == 0 and bool(known(e.gradient_rms)) and not e.is_master
        is_still = is_still and _owner(e.optimizer_group) not in self._moving
        history.still_steps = history.still_steps + e.steps if is_still else 0
        if history.still_steps < _STILL:
            return verdict(UNKNOWN, Cause.not_replayable, Seen(reason=e.reason))
        seen = Seen(dtype=e.dtype, steps=history.still_steps, lr=known(e.lr), options=e.options, trainer=self.trainer)
        cause = Cause.not_copied_back if e.steps_copy else Cause.weight_rounding
        return verdict(Health.stalled, cause, seen)

    def _unasked(self, e: TensorEvidence, history: TensorHistory, found: Rest, seen: Seen) -> Verdict:
        """The verdict on a tensor that should be at rest and moves: healthy only where its steps do what they should."""
        text = say(found.cause, seen)
        if (
            e.optimizer_group
            and not e.reason
            and e.measured_steps
            and score(e, history, self._limits).health is HEALTHY
        ):
            history.grade = HEALTHY
            return HEALTHY, found.cause, text
        return UNKNOWN, found.cause, reasons.unknown(text[:1].lower() + text[1:].rstrip("."))

    def _by_score(self, e: TensorEvidence, history: TensorHistory) -> Verdict:
        """Lines 11 to 16 of the table."""
        found = score(e, history, self._limits)
        if found.health is UNKNOWN:
            return UNKNOWN, None, reasons.unknown(found.reason)
        if found.health is HEALTHY:
            history.grade, history.stalled_lr = HEALTHY, 0.0
            return _GOOD
        return self._accuse(e, history, found)

    def _accuse(self, e: TensorEvidence, history: TensorHistory, found: Score) -> Verdict:
        looks = e.gradient_looks or e.measured_steps
        if (
            looks and (known(e.zero_gradient_fraction) or 0.0) >= 1
        ):  # what is left of momentum gets lost: that is no stall
            amount, how = movement(e)
            text = say(Cause.zero_gradient, Seen(steps=e.steps, looks=looks, moved=amount, mover=how))
            return UNKNOWN, Cause.zero_gradient, reasons.unknown(text[:1].lower() + text[1:].rstrip("."))
        lr, start = known(e.lr), known(e.lr_min)
        lr_max = known(e.lr_max) if e.lr_max is not None else lr
        if lr_max is not None and lr_max <= self._limits.negligible_lr * history.peak_lr:
            if movement(e)[0]:
                return UNKNOWN, Cause.zero_learning_rate, reasons.unknown(reasons.rate_ran_out(lr_max, history.peak_lr))
            idle = verdict(Health.idle, Cause.zero_learning_rate, Seen(lr=lr_max, peak_lr=history.peak_lr))
            return self._ran_out(e, history) or idle
        if history.lr is not None and (start is None or history.lr < start):
            start = history.lr
        if lr and lr == lr_max and start is not None and lr >= STEEP * start:
            return UNKNOWN, None, reasons.unknown(reasons.rising_lr(lr))
        history.grade = found.health
        above = share_well_above(e.headroom_histogram)
        is_unwritten = found.drift is None and above is not None and found.lost > most_lost(above, e.numel)
        seen = Seen(
            dtype=e.dtype,
            efficiency=found.efficiency,
            displacement=found.drift,
            lost=found.lost,
            lr=lr,
            critical_lr=known(e.critical_lr),
            headroom=above,
            near_one=is_norm_near_one(e),
            options=e.options,
            trainer=self.trainer,
        )
        cause = Cause.not_written if is_unwritten else Cause.weight_rounding
        is_stalled = found.health is Health.stalled and cause is Cause.weight_rounding
        history.stalled_lr = max(history.stalled_lr, lr_max or 0.0) if is_stalled else 0.0
        return verdict(found.health, cause, seen)

    def _ran_out(self, e: TensorEvidence, history: TensorHistory) -> Verdict | None:
        """What was stalled in most of a schedule stays so at its end, which is no all-clear: there, nothing arrives anywhere."""
        if not history.stalled_lr or history.stalled_lr < _EARNEST * history.peak_lr:
            return None
        seen = Seen(dtype=e.dtype, peak_lr=history.peak_lr, near_one=is_norm_near_one(e), options=e.options)
        seen = seen._replace(trainer=self.trainer)
        return verdict(Health.stalled, Cause.weight_rounding, seen)


def _owner(group: str) -> str:
    return group.partition("/")[0]


def _remember_rates(columns: Columns, histories: Histories, rows: Rows) -> None:
    """The learning rates of this window, and the largest there ever was."""
    lr, lr_max = known_values(columns.column("lr")), known_values(columns.column("lr_max"))
    is_known = ~np.isnan(lr)
    at, lr, lr_max = rows[is_known], lr[is_known], np.nan_to_num(lr_max[is_known])
    histories.lr[at] = lr
    histories.peak_lr[at] = np.maximum(histories.peak_lr[at], np.maximum(lr, lr_max))
