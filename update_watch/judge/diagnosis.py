"""From the numbers of a window to verdicts: health, cause and advice of every tensor, with hysteresis over windows.

A tensor is judged by the first line that fits:

|    | what was seen | health | cause |
|----|---|---|---|
| 1  | requires_grad is False | frozen | requires_grad_off |
| 2  | NaN or infinity; with skipped steps, once they persist as in 4 | broken | non_finite |
|    | replicas of it differ between ranks | broken | replicas_differ |
| 3  | no optimizer holds it | idle | not_in_optimizer |
| 4  | nearly all steps skipped, several windows in a row; till then unknown | idle | skipped_steps |
| 5  | its optimizer took no step | unknown | |
| 6  | its gradient was None in every step | idle | no_gradient |
| 7  | every sampled gradient was 0; what momentum and decay do is no signal | idle | zero_gradient |
| 8  | learning rate 0 in every step | idle | zero_learning_rate |
| 9  | the update cannot be replayed | unknown | not_replayable |
|    | and no bit of any tensor of its optimizer has moved in many steps | stalled | weight_rounding |
| 10 | measured, and no update intended | idle | |
| 11 | fewer measured steps or more noise than a verdict allows, even pooled | unknown | |
| 12 | score not healthy, but not by rounding: hardly any lost, or backwards | unknown | |
| 13 | score not healthy, but the learning rate has run out | idle | zero_learning_rate |
| 14 | score not healthy, but the learning rate has just risen threefold | unknown | |
| 15 | score not healthy, and updates well above half a gap are lost too | stalled, stalling | not_written |
| 16 | score not healthy | stalled, stalling | weight_rounding |
| 17 | what the steps applied is undone before the next, often or in two windows running | stalled, stalling | overwritten |
|    | the master moves, and not one bit of the model's tensor does | stalled | not_copied_back |
| 18 | state factor outside its band in two windows running | stalling | state_rounding |
| 19 | none of these | healthy | |

The score is explained in `update_watch.judge.efficiency_grade`, the accumulators in `update_watch.judge.accumulators`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from update_watch.evidence import TensorEvidence, WindowEvidence
from update_watch.judge import advice, reasons
from update_watch.judge.accumulators import alert_level, is_state, judge_accumulator
from update_watch.judge.advice import Seen, say
from update_watch.judge.efficiency_grade import Score, grade, known, score, share
from update_watch.judge.history import GRADES, HEALTHY, STALLING, UNKNOWN, TensorHistory, check_state
from update_watch.judge.number_formats import SIGNIFICANT_BITS
from update_watch.judge.run_summary import by_layer, headline, run_health
from update_watch.report import HEADROOM_LOW, AccumulatorReport, Cause, Health, Report, TensorReport, quick
from update_watch.thresholds import Thresholds

_VERSION = 1
_NEARLY_ALL = 0.9  # of the steps, skipped
_UNDONE = 0.5  # of what the steps applied: less may come again, as in an outer step
_STILL = 48  # steps in which no tensor of an optimizer moved by one bit, though it has gradients and a learning rate
_STEEP = 3.0  # rise of the learning rate within a window, or since the one before, that makes it a warm-up
_WELL_ABOVE = 2 - HEADROOM_LOW  # first bin of the headroom histogram at four half gaps or more

_GOOD = (HEALTHY, None, "")
_Verdict = tuple[Health, Cause | None, str]


class Diagnosis:
    """Judges window after window; remembers per tensor what hysteresis and pooling need."""

    def __init__(self, thresholds: Thresholds) -> None:
        self._limits = thresholds
        self._memories: dict[str, TensorHistory] = {}
        self._last_step: int | None = None
        self._moving: set[str] = set()  # optimizers of which any tensor moved in this window

    def judge(self, evidence: WindowEvidence) -> Report:
        """The report of a window, without alerts. Never raises on missing or non-finite numbers."""
        first_step = max(evidence.step - evidence.window + 1, 0)
        if self._last_step is not None and first_step <= self._last_step < evidence.step:
            first_step = self._last_step + 1
        self._last_step = evidence.step
        self._moving = {_owner(tensor) for tensor in evidence.tensors if tensor.moved}
        tensors = tuple(self._tensor(tensor, evidence, first_step) for tensor in evidence.tensors)
        return Report(
            step=evidence.step,
            window=evidence.window,
            health=run_health(tensors),
            headline=headline(tensors),
            tensors=tensors,
            layers=by_layer(tensors),
            time=evidence.time,
            cost_ms=evidence.cost_ms,
            skipped_steps=evidence.skipped_steps,
            observed_steps=evidence.observed_steps,
            cost_share=evidence.cost_share,
        )

    # --- resume ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain data (str, int, float, bool, None, list, dict), safe to load weights-only."""
        return {
            "version": _VERSION,
            "last_step": self._last_step,
            "tensors": {name: memory.to_plain() for name, memory in self._memories.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned. A tensor whose entry cannot be read starts anew, with a log line.

        Raises:
            TypeError, ValueError: `state` as a whole is not such data; nothing is changed then.
        """
        check_state("Diagnosis", state, _VERSION, {"tensors": Mapping})
        last_step = state.get("last_step")
        if last_step is not None and (not isinstance(last_step, int) or isinstance(last_step, bool)):
            raise ValueError(
                f"Diagnosis.load_state_dict: last_step={last_step!r} is not a step; pass what state_dict() gave."
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
        self._memories, self._last_step = memories, last_step

    # --- one tensor --------------------------------------------------------------------------------

    def _tensor(self, e: TensorEvidence, window: WindowEvidence, first_step: int) -> TensorReport:
        memory = self._memories.get(e.name)
        if memory is None:
            memory = self._memories[e.name] = TensorHistory()
        verdict = self._without_signal(e, memory, window)
        if verdict is None:
            verdict = self._by_score(e, memory)
            if verdict[0] is HEALTHY:
                verdict = self._by_ledger(e, memory) or self._by_state(e, memory) or verdict
        else:
            memory.forget_evidence()
        health, cause, text = verdict
        lr, lr_max = known(e.lr), known(e.lr_max)
        if lr is not None:
            memory.lr = lr
            memory.peak_lr = max(memory.peak_lr, lr, lr_max or 0.0)
        accumulators: dict[str, AccumulatorReport] = {}
        for name, accumulator in e.accumulators.items():
            judged = judge_accumulator(accumulator, e, health, memory.accumulator(name), self._limits)
            accumulators[name] = judged
            if health is HEALTHY and not text and alert_level(judged) is not None:
                text = judged.advice
        return quick(
            TensorReport,
            name=e.name,
            health=health,
            cause=cause,
            advice=text,
            names=e.names,
            layer=e.layer,
            optimizer_group=e.optimizer_group,
            dtype=e.dtype,
            shape=e.shape,
            numel=e.numel,
            trainable=e.trainable,
            efficiency=e.numbers.efficiency,
            efficiency_error=e.numbers.efficiency_error,
            net_efficiency=e.net_efficiency,
            net_efficiency_error=e.net_efficiency_error,
            displacement_efficiency=e.numbers.displacement_efficiency,
            lost_fraction=e.numbers.lost_fraction,
            lost_fraction_error=e.numbers.lost_fraction_error,
            wanted_fraction=e.numbers.wanted_fraction,
            update_ratio=e.update_ratio,
            update_ratio_error=e.update_ratio_error,
            applied_ratio=e.applied_ratio,
            written_between=e.written_between,
            gradient_rms=e.gradient_rms,
            gradient_max=e.gradient_max,
            gradient_zeros=e.zero_gradient_fraction,
            copy_changed=e.copy_changed,
            copy_changed_window=e.copy_changed_window,
            headroom_histogram=e.headroom_histogram,
            lr=e.lr,
            critical_lr=e.critical_lr,
            state_factor=e.state_factor,
            state_factor_error=e.state_factor_error,
            since_step=_since(memory, health, first_step),
            accumulators=accumulators,
            what_if=e.what_if,
            scheme=e.scheme,
        )

    def _without_signal(self, e: TensorEvidence, memory: TensorHistory, window: WindowEvidence) -> _Verdict | None:
        """Lines 1 to 10 of the table; None when there is an update to judge."""
        if not e.trainable:
            return _verdict(Health.frozen, Cause.requires_grad_off, Seen(moved=known(e.moved) or None))
        skipped = e.skipped_steps if e.steps else window.skipped_steps
        steps = max(e.steps, skipped)
        nearly_all = skipped > 0 and skipped >= _NEARLY_ALL * steps
        memory.skipped_windows = memory.skipped_windows + 1 if nearly_all else 0
        is_persistent = memory.skipped_windows >= self._limits.skipped_windows
        if not e.finite:
            if skipped and not is_persistent:
                return UNKNOWN, None, reasons.unknown(reasons.overflow(skipped, steps))
            return _verdict(Health.broken, Cause.non_finite, Seen())
        if e.replicas_differ:
            return _verdict(Health.broken, Cause.replicas_differ, Seen())
        if not e.optimizer_group:
            return _verdict(Health.idle, Cause.not_in_optimizer, Seen(reason=e.note))
        if nearly_all:
            if is_persistent:
                return _verdict(Health.idle, Cause.skipped_steps, Seen(skipped=skipped, steps=steps))
            return UNKNOWN, None, reasons.unknown(reasons.overflow(skipped, steps))
        if not e.steps:
            return UNKNOWN, None, reasons.unknown(e.reason or reasons.not_measured(0))
        if e.gradless_steps >= e.steps:
            return _verdict(Health.idle, Cause.no_gradient, Seen(steps=e.steps))
        zero = known(e.zero_gradient_fraction)
        if zero is not None and zero >= 1 and e.measured_steps:
            return _verdict(Health.idle, Cause.zero_gradient, Seen(steps=e.steps, moved=known(e.moved) or None))
        if (known(e.lr_max) if e.lr_max is not None else known(e.lr)) == 0:
            return _verdict(Health.idle, Cause.zero_learning_rate, Seen(steps=e.steps))
        if e.reason:
            return self._without_rule(e, memory)
        if e.measured_steps and e.numbers.wanted_fraction == 0:
            if e.dtype == "float64":
                return UNKNOWN, None, reasons.unknown(reasons.finer_than_fp32())
            return Health.idle, None, advice.nothing_intended(e.measured_steps)
        return None

    def _without_rule(self, e: TensorEvidence, memory: TensorHistory) -> _Verdict:
        """Line 9 of the table. Where one tensor moves, updates of others may be kept until they are large enough."""
        is_still = e.moved == 0 and bool(known(e.gradient_rms)) and not e.is_master and _owner(e) not in self._moving
        memory.still_steps = memory.still_steps + e.steps if is_still else 0
        if memory.still_steps < _STILL:
            return _verdict(UNKNOWN, Cause.not_replayable, Seen(reason=e.reason))
        seen = Seen(dtype=e.dtype, steps=memory.still_steps, lr=known(e.lr))
        return _verdict(Health.stalled, Cause.weight_rounding, seen)

    def _by_score(self, e: TensorEvidence, memory: TensorHistory) -> _Verdict:
        """Lines 11 to 16 of the table."""
        found = score(e, memory, self._limits)
        if found.health is UNKNOWN:
            return UNKNOWN, None, reasons.unknown(found.reason)
        if found.health is HEALTHY:
            memory.grade = HEALTHY
            return _GOOD
        return self._accuse(e, memory, found)

    def _accuse(self, e: TensorEvidence, memory: TensorHistory, found: Score) -> _Verdict:
        lr, start = known(e.lr), known(e.lr_min)
        lr_max = known(e.lr_max) if e.lr_max is not None else lr
        if lr_max is not None and lr_max <= self._limits.negligible_lr * memory.peak_lr:
            return _verdict(Health.idle, Cause.zero_learning_rate, Seen(lr=lr_max, peak_lr=memory.peak_lr))
        if memory.lr is not None and (start is None or memory.lr < start):
            start = memory.lr
        if lr and lr == lr_max and start is not None and lr >= _STEEP * start:
            return UNKNOWN, None, reasons.unknown(reasons.rising_lr(lr))
        memory.grade = found.health
        above = _share_well_above(e.headroom_histogram)
        # rounding loses none of the updates well above half a gap; a tenth for the histogram's coarser sample
        is_unwritten = found.drift is None and above is not None and found.lost > 1 - above + 0.1
        seen = Seen(
            dtype=e.dtype,
            efficiency=found.efficiency,
            displacement=found.drift,
            lost=found.lost,
            lr=lr,
            critical_lr=known(e.critical_lr),
            headroom=above,
        )
        return _verdict(found.health, Cause.not_written if is_unwritten else Cause.weight_rounding, seen)

    def _by_ledger(self, e: TensorEvidence, memory: TensorHistory) -> _Verdict | None:
        """Line 17 of the table: the steps apply their updates, but are they still there at the window's end?"""
        net, error = known(e.net_efficiency), known(e.net_efficiency_error) or 0.0
        before, memory.net_grade = memory.net_grade, HEALTHY
        health = HEALTHY if net is None else grade(net + 2 * error, before, self._limits)
        undone = share(e.undone_fraction) or 0.0
        is_uncopied = e.is_master and e.moved == 0  # its net efficiency is not known before the first leap of it is due
        is_undone = not e.is_master and undone >= _UNDONE
        if health is HEALTHY or not (is_uncopied or is_undone):
            memory.lossy_windows = 0
            return None
        memory.lossy_windows += 1
        if is_undone and e.written_steps < 2 and memory.lossy_windows < 2:  # a checkpoint may have been loaded
            return None
        memory.net_grade = health
        cause = Cause.not_copied_back if is_uncopied else Cause.overwritten
        return _verdict(health, cause, Seen(dtype=e.dtype, net=net, written_step=e.written_step))

    def _by_state(self, e: TensorEvidence, memory: TensorHistory) -> _Verdict | None:
        """Line 18 of the table: the weight takes its updates, but are they the right ones?"""
        limits, factor = self._limits, known(e.state_factor)
        if factor is None or e.state_factor_steps < limits.minimum_steps:
            return None
        inside = 1 + limits.state_margin if memory.bad_state_windows >= 2 else 1.0
        if limits.state_low * inside <= factor <= limits.state_high / inside:
            memory.bad_state_windows = 0
            return None
        states = [a for a in e.accumulators.values() if is_state(a.name)]
        # FP32 state has nothing to lose: then the shadow differs for another reason (state edited, restored)
        if states and all(a.dtype in ("float32", "float64") for a in states):
            return None
        memory.bad_state_windows += 1
        if memory.bad_state_windows < 2:
            return None
        blamed = Seen(state_factor=factor)
        worst = math.inf
        for a in states:
            decay, value, bits = known(a.decay.efficiency), known(a.value), SIGNIFICANT_BITS.get(a.dtype)
            if value is not None and bits is not None and value == 2.0**bits:
                blamed = Seen(dtype=a.dtype, accumulator=a.name, counter=value, state_factor=factor)
                break
            if decay is not None and decay < min(worst, limits.stalling):
                worst = decay
                blamed = Seen(
                    dtype=a.dtype, accumulator=a.name, efficiency=decay, rate=known(a.rate), state_factor=factor
                )
        return _verdict(STALLING, Cause.state_rounding, blamed)


def _owner(e: TensorEvidence) -> str:
    return e.optimizer_group.partition("/")[0]


def _verdict(health: Health, cause: Cause, seen: Seen) -> _Verdict:
    return health, cause, say(cause, seen)


def _since(memory: TensorHistory, health: Health, first_step: int) -> int:
    """First step of the window in which this health began; a verdict that was unknown in between goes on."""
    if health is memory.health:
        return memory.since
    if health in GRADES:
        memory.since = memory.graded_since if health is memory.graded else first_step
        memory.graded, memory.graded_since = health, memory.since
    else:
        memory.since = first_step
        if health is not UNKNOWN:
            memory.graded = None
    memory.health = health
    return memory.since


def _share_well_above(histogram: tuple[float, ...] | None) -> float | None:
    if not histogram:
        return None
    total = sum(histogram)
    return share(sum(histogram[_WELL_ABOVE:]) / total) if total > 0 else None
