"""Verdicts on what accumulates beside the weight: optimizer states, the decay, averages, summed gradients.

An accumulator is judged by its own numbers; the tensor's health stays with its weight. What counts depends on its kind.

| kind | name | stalled when | cause |
|---|---|---|---|
| state | any other name | its decay is lost, or its growth (both in one would hide it) | state_rounding |
| counter | any other name, with a `value` | it stands at 2^bits of its dtype | state_rounding |
| decay | weight_decay | efficiency | decay_rounding |
| average | average:... | efficiency, or a finding of its own (`note`) | average_rounding |
| gradient | grad | displacement efficiency of the whole sum | accumulation_rounding |

Lost changes are not always harm. `x <- (1 - c) x + c y` in a format of b bits stops where |y - x| is less than
2^-(b+1)..2^-b |x| / c: at c = 0.1 that is within 3% of the goal and nobody minds. So a state is only accused where c is
below 2^-b, or, where c is not known, where growth passes while decay does not; an average is never accused from c = 0.1
on, a weight decay never below 1e-7 per step, and nothing that is kept in FP32, where what is lost is as small.
"""

from __future__ import annotations

from typing import NamedTuple

from update_watch.columns.late_fields import quick
from update_watch.evidence import AccumulatorEvidence, Numbers, TensorEvidence
from update_watch.judge.advice import say
from update_watch.judge.efficiency_grade import grade, known, share
from update_watch.judge.history import HEALTHY, STALLED, STALLING, UNKNOWN, AccumulatorHistory
from update_watch.judge.number_formats import SIGNIFICANT_BITS
from update_watch.judge.reasons import faster_than_said, not_measured, one_window, too_few_steps, unknown
from update_watch.judge.seen import Seen
from update_watch.report import AccumulatorReport, Cause, Health, Level
from update_watch.thresholds import Thresholds
from update_watch.wording import plural

LOSSES = (Cause.average_rounding, Cause.average_diverges, Cause.average_not_updated, Cause.accumulation_rounding)
_STAYS = 8  # windows in a row that an average's bad verdict outlives without a number of its own
_STAYS_WELL = 4  # and a good one
_AWAY = -0.1  # efficiency of an average from which on it moves away from the weights
_MOST = 1.5  # and up to which its decay can be what was said
_ROUNDED_SHARE = 0.5  # of what did not arrive, that lost elements must account for, to call it rounding
AT_REST = (Health.frozen, Health.idle, Health.broken)
_HARMLESS_AVERAGE_RATE = 0.1
HARMLESS_DECAY_RATE = 1e-7  # 1% in 100,000 steps
MINIMUM_WANTED = 0.05  # share of a state's elements that want to shrink (or to grow), for it to say something
PASSES = 0.5  # efficiency of a growth that passes


class Setting(NamedTuple):
    """With what it is judged."""

    limits: Thresholds
    trainer: str = "torch"  # in whose words cures are told: a key of `cures.TRAINERS`


def judge_accumulator(
    evidence: AccumulatorEvidence,
    tensor: TensorEvidence,
    health: Health,
    history: AccumulatorHistory,
    setting: Setting,
) -> AccumulatorReport:
    """The verdict on one accumulator of a tensor whose own health is `health`."""
    name = evidence.name
    if health in AT_REST:
        history.acquit()
        return report_of(evidence, health)
    if evidence.reason:
        if evidence.is_updated:  # though by how much is not known
            history.update()
        return _or_as_before(
            report_of(evidence, UNKNOWN, advice=unknown(evidence.reason)), evidence, tensor, history, setting
        )
    steps = tensor.measured_steps or tensor.steps
    if name == "weight_decay":
        return _by_efficiency(evidence, tensor, history, setting, steps, Cause.decay_rounding)
    if name == "grad":
        return _by_efficiency(evidence, tensor, history, setting, steps, Cause.accumulation_rounding)
    if name.startswith("average:"):
        return _or_as_before(_average(evidence, tensor, history, setting, steps), evidence, tensor, history, setting)
    if tensor.scheme == f"carried:{name}":  # it holds what rounding took from the weight: small changes are its nature
        return report_of(evidence, HEALTHY)
    if evidence.value is not None:
        return _counter(evidence, tensor, history, setting)
    return _state(evidence, tensor, history, setting, steps)


def is_state(name: str) -> bool:
    """Whether an accumulator of this name is an optimizer state."""
    return name not in ("weight_decay", "grad") and not name.startswith("average:")


def alert_level(health: Health, cause: Cause | None) -> Level | None:
    """How loud an accumulator's verdict is; None when nobody needs to hear of it.

    A lost decay of state or weight is an early warning. A lost average or gradient is the loss itself.
    """
    if health is not STALLED and health is not STALLING:
        return Level.warn if cause is Cause.average_not_updated else None
    is_loss = cause in LOSSES
    if health is STALLED:
        return Level.error if is_loss else Level.warn
    return Level.warn if is_loss else None


def _by_efficiency(
    evidence: AccumulatorEvidence,
    tensor: TensorEvidence,
    history: AccumulatorHistory,
    setting: Setting,
    steps: int,
    cause: Cause,
) -> AccumulatorReport:
    efficiency = known(evidence.numbers.efficiency)
    if efficiency is None and not evidence.note:
        history.acquit()
        return _nothing_wanted(evidence, steps)
    displacement = known(evidence.numbers.displacement_efficiency)
    value = efficiency if efficiency is not None else 1.0
    if displacement is not None and (displacement > value or cause is Cause.accumulation_rounding):
        value = displacement  # the rest arrived later: it is carried somewhere. Of gradients only the whole sum is used
    verdict = grade(value, history.grade, setting.limits)
    if verdict is not HEALTHY and not _can_matter(evidence, tensor, cause):
        verdict = HEALTHY
    if evidence.note and verdict is HEALTHY:
        verdict = STALLING
    return _settle(evidence, tensor, history, setting, steps, verdict, cause)


def _average(
    evidence: AccumulatorEvidence, tensor: TensorEvidence, history: AccumulatorHistory, setting: Setting, steps: int
) -> AccumulatorReport:
    """An average is judged by its numbers, whatever its format: it may run away, or never be updated, in FP32 too."""
    efficiency, lost = known(evidence.numbers.efficiency), share(evidence.numbers.lost_fraction)
    if efficiency is None and not evidence.note:
        return _quiet(evidence, tensor, history)
    history.update()
    if evidence.note:  # found by other means than its numbers
        return _by_efficiency(evidence, tensor, history, setting, steps, Cause.average_rounding)
    if efficiency is not None and efficiency > _MOST:
        history.acquit()
        return report_of(evidence, UNKNOWN, advice=unknown(faster_than_said(efficiency)))
    if efficiency is not None and efficiency < _AWAY:
        return _settle(evidence, tensor, history, setting, steps, STALLED, Cause.average_diverges)
    if efficiency is not None and (lost or 0.0) < _ROUNDED_SHARE * (1 - efficiency):
        verdict = grade(efficiency, history.grade, setting.limits)
        if verdict is not HEALTHY:
            return _settle(evidence, tensor, history, setting, steps, verdict, Cause.average_not_updated)
    return _by_efficiency(evidence, tensor, history, setting, steps, Cause.average_rounding)


def _or_as_before(
    found: AccumulatorReport,
    evidence: AccumulatorEvidence,
    tensor: TensorEvidence,
    history: AccumulatorHistory,
    setting: Setting,
) -> AccumulatorReport:
    """The verdict on an average; where no update was looked at in this window, that of before stays for a while."""
    if found.health is not UNKNOWN:
        history.is_well = found.health is HEALTHY
        history.bad_cause = found.cause if found.health in (STALLED, STALLING) else None
        history.bad_efficiency, history.bad_lost = known(found.efficiency), known(found.lost_fraction)
        history.unseen = 0
        return found
    if history.is_well and history.unseen < _STAYS_WELL and known(evidence.numbers.efficiency) is None:
        history.unseen += 1
        return report_of(evidence, HEALTHY, advice=f"Measured {plural(history.unseen, 'window')} ago.")
    history.is_well = False
    cause = history.bad_cause
    if cause is None or history.unseen >= _STAYS or not evidence.name.startswith("average:"):
        history.bad_cause = None
        return found
    history.unseen += 1
    seen = _seen(evidence, tensor, setting, cause)._replace(efficiency=history.bad_efficiency, lost=history.bad_lost)
    text = f"{say(cause, seen).rstrip('.')}; measured {plural(history.unseen, 'window')} ago."
    return report_of(evidence, history.grade, cause, text)


def _quiet(evidence: AccumulatorEvidence, tensor: TensorEvidence, history: AccumulatorHistory) -> AccumulatorReport:
    if evidence.is_updated is not False:  # it was written, and next to nothing was to be averaged
        if evidence.is_updated:
            history.update()
        return _nothing_wanted(evidence, tensor.measured_steps or tensor.steps)
    history.quiet_windows += 1
    history.quiet_steps += tensor.steps
    if not history.is_overdue:
        return report_of(evidence, UNKNOWN, advice=unknown("no update of it was seen in this window"))
    seen = Seen(accumulator=evidence.name, steps=history.quiet_steps, reason="stopped" if history.was_updated else "")
    return report_of(evidence, Health.idle, Cause.average_not_updated, say(Cause.average_not_updated, seen))


def _can_matter(evidence: AccumulatorEvidence, tensor: TensorEvidence, cause: Cause) -> bool:
    """Whether what is lost could ever be missed."""
    if SIGNIFICANT_BITS.get(evidence.dtype, 0) >= 24:
        return False
    if cause is Cause.average_rounding:
        rate = known(evidence.rate)
        return rate is None or rate < _HARMLESS_AVERAGE_RATE
    if cause is Cause.decay_rounding:
        rate = _decay_rate(tensor)
        return rate is None or rate >= HARMLESS_DECAY_RATE
    return True


def _decay_rate(tensor: TensorEvidence) -> float | None:
    lr, weight_decay = known(tensor.lr_max), known(tensor.weight_decay)
    return lr * weight_decay if lr is not None and weight_decay is not None else None


def _state(
    evidence: AccumulatorEvidence, tensor: TensorEvidence, history: AccumulatorHistory, setting: Setting, steps: int
) -> AccumulatorReport:
    bits = SIGNIFICANT_BITS.get(evidence.dtype)
    rate = known(evidence.rate)
    verdict = HEALTHY
    if bits is not None and bits < 24 and (rate is None or rate < 2.0**-bits):
        growth, decay = _if_wanted(evidence.growth), _if_wanted(evidence.decay)
        if rate is not None:
            worst = 1.0 if growth is None else growth
            worst = worst if decay is None or decay > worst else decay
            verdict = grade(worst, history.grade, setting.limits)
        # once convicted, it need not grow any more to stay so
        elif history.grade is STALLED or (growth is not None and growth >= PASSES):
            verdict = grade(1.0 if decay is None else decay, history.grade, setting.limits)
            verdict = HEALTHY if verdict is STALLING else verdict
    if verdict is HEALTHY:
        history.acquit()
        if evidence.numbers.efficiency is None and evidence.decay.efficiency is None:
            return _nothing_wanted(evidence, steps)
        history.grade = HEALTHY
        return report_of(evidence, HEALTHY)
    # where a compensation may hold the rest, a first window can mislead
    windows = 2 if rate is None or tensor.scheme.startswith("carried") else 1
    return _settle(evidence, tensor, history, setting, steps, verdict, Cause.state_rounding, windows)


def _if_wanted(part: Numbers) -> float | None:
    """The efficiency of growth or decay, if enough elements were to grow or decay for it to say something."""
    wanted = share(part.wanted_fraction)
    return None if wanted is not None and wanted < MINIMUM_WANTED else known(part.efficiency)


def _counter(
    evidence: AccumulatorEvidence, tensor: TensorEvidence, history: AccumulatorHistory, setting: Setting
) -> AccumulatorReport:
    value, before = known(evidence.value), history.value
    history.value = value
    bits = SIGNIFICANT_BITS.get(evidence.dtype)
    has_stopped = bits is not None and value is not None and value == before and value == 2.0**bits and tensor.steps > 0
    history.grade = STALLED if has_stopped else HEALTHY
    if not has_stopped:
        return report_of(evidence, HEALTHY)
    factor = _factor(tensor, setting)
    seen = Seen(dtype=evidence.dtype, accumulator=evidence.name, counter=value, state_factor=factor)
    advice = say(Cause.state_rounding, seen)
    return report_of(evidence, STALLED, Cause.state_rounding, advice)


def _settle(
    evidence: AccumulatorEvidence,
    tensor: TensorEvidence,
    history: AccumulatorHistory,
    setting: Setting,
    steps: int,
    verdict: Health,
    cause: Cause,
    windows: int = 1,
) -> AccumulatorReport:
    """Believe a bad verdict only once enough steps and windows in a row speak for it."""
    if verdict is HEALTHY:
        history.acquit()
        history.grade = verdict
        return report_of(evidence, verdict)
    history.bad_steps += steps
    history.bad_windows += 1
    if history.bad_steps < setting.limits.minimum_steps:
        return report_of(
            evidence, UNKNOWN, advice=unknown(too_few_steps(history.bad_steps, setting.limits.minimum_steps))
        )
    if history.bad_windows < windows:
        return report_of(evidence, UNKNOWN, advice=unknown(one_window()))
    history.grade = verdict
    return report_of(evidence, verdict, cause, sentence_of(evidence, tensor, setting, cause))


def sentence_of(evidence: AccumulatorEvidence, tensor: TensorEvidence, setting: Setting, cause: Cause) -> str:
    """What is said of an accumulator that is not well."""
    return say(cause, _seen(evidence, tensor, setting, cause))


def _seen(evidence: AccumulatorEvidence, tensor: TensorEvidence, setting: Setting, cause: Cause) -> Seen:
    """The numbers an accumulator's advice speaks of."""
    numbers, is_growth = evidence.numbers, False
    if cause is Cause.state_rounding:
        growth, decay = _if_wanted(evidence.growth), _if_wanted(evidence.decay)
        is_growth = growth is not None and (decay is None or growth < decay)
        numbers = evidence.growth if is_growth else evidence.decay
    efficiency = known(numbers.efficiency)
    if cause is Cause.accumulation_rounding and (of_the_sum := known(numbers.displacement_efficiency)) is not None:
        efficiency = of_the_sum
    return Seen(
        dtype=evidence.dtype,
        efficiency=efficiency,
        lost=share(numbers.lost_fraction),
        accumulator=evidence.name,
        rate=known(evidence.rate),
        decay_rate=_decay_rate(tensor),
        is_growth=is_growth,
        state_factor=_factor(tensor, setting) if cause is Cause.state_rounding else None,
        reason=evidence.note,
        options=tensor.options,
        trainer=setting.trainer,
    )


def _factor(tensor: TensorEvidence, setting: Setting) -> float | None:
    """What the states' rounding does to the update, once enough steps speak for it."""
    return known(tensor.state_factor) if tensor.state_factor_steps >= setting.limits.minimum_steps else None


def _nothing_wanted(evidence: AccumulatorEvidence, steps: int) -> AccumulatorReport:
    if not steps:
        return report_of(evidence, UNKNOWN, advice=unknown(not_measured(0)))
    return report_of(evidence, Health.idle)


def report_of(
    evidence: AccumulatorEvidence, health: Health, cause: Cause | None = None, advice: str = ""
) -> AccumulatorReport:
    """The verdict and the numbers behind it."""
    numbers = evidence.numbers
    return quick(
        AccumulatorReport,
        {
            "name": evidence.name,
            "dtype": evidence.dtype,
            "health": health,
            "cause": cause,
            "advice": advice,
            "efficiency": numbers.efficiency,
            "displacement_efficiency": numbers.displacement_efficiency,
            "lost_fraction": numbers.lost_fraction,
            "wanted_fraction": numbers.wanted_fraction,
            "growth_efficiency": evidence.growth.efficiency,
            "decay_efficiency": evidence.decay.efficiency,
        },
    )
