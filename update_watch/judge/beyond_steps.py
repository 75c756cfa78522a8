"""What can be wrong with a weight that takes its steps: they are undone between the steps, or the states are at fault."""

from __future__ import annotations

import math

from update_watch.evidence import TensorEvidence
from update_watch.judge import reasons
from update_watch.judge.accumulators import is_state
from update_watch.judge.efficiency_grade import grade, known, share
from update_watch.judge.history import HEALTHY, MOST_WAITED, STALLED, STALLING, UNKNOWN, TensorHistory
from update_watch.judge.no_signal import Verdict, verdict
from update_watch.judge.number_formats import FULL, SIGNIFICANT_BITS
from update_watch.judge.seen import Seen
from update_watch.judge.stall_sentences import AT_ZERO, HELD, NOT_AGAIN, TAKEN_BACK
from update_watch.report import Cause, Health
from update_watch.thresholds import Thresholds
from update_watch.wording import short

_FURTHER = 1.5  # than all steps between two writes in one direction; both ends of a span may lie inside a run
UNDONE = 0.8  # of what the steps applied: Lookahead takes back half by design, ranks that average more
LIKE_LOOKAHEAD = 0.75  # of what the steps applied, the same share everywhere: said, where Lookahead takes 0.8
AGAIN = 2  # times the usual steps between two writes: so long the next is waited for
_SIGNAL = 1 / 16  # of the gradients: the ledger reads so few elements that it may have missed all of these
_TOUCHED = 1 / 4  # of the elements that are read, where gradients are not: as the former
_PATIENCE = 8  # times as many windows as the first copy was waited for


def by_ledger(e: TensorEvidence, history: TensorHistory, limits: Thresholds, step: int) -> Verdict | None:
    """The steps apply their updates, but are they still there at the window's end, after a step of the run?"""
    net, error = known(e.net_efficiency), known(e.net_efficiency_error) or 0.0
    before, history.net_grade = history.net_grade, HEALTHY
    if e.is_put_back and before in (STALLED, STALLING):
        error = 0.0  # what a grid takes comes by the gap: one window may seem to lose less
    health = HEALTHY if net is None else grade(net + 2 * error, before, limits)
    undone = share(e.undone_fraction) or 0.0
    is_still = e.is_master and e.moved == 0  # its net efficiency is not known before the first leap of it is due
    # a few elements that a grid lets go get far, and excuse none of the others
    is_undone = undone >= 1 - limits.stalling if e.is_put_back else undone >= UNDONE and (is_still or not _travels(e))
    is_uncopied = is_still and not is_undone
    before_that, history.written_step = history.written_step, e.written_step or history.written_step
    if (undone >= LIKE_LOOKAHEAD and e.is_alike) or (is_undone and e.may_be_alike):
        return _taken_back(e, history, net)
    if is_undone and e.is_at_zero and not e.is_master:
        return _pruned(e, history)
    if known(e.held_fraction) and not (is_undone or is_uncopied):
        history.lossy_windows = 0
        return verdict(HEALTHY, Cause.overwritten, Seen(dtype=e.dtype, net=e.held_fraction, reason=HELD))
    if is_undone and e.is_put_back and health is HEALTHY and net is not None:
        return UNKNOWN, Cause.overwritten, reasons.unknown(reasons.on_a_grid(net, error))
    if health is HEALTHY or not (is_uncopied or is_undone):
        if (
            e.is_master and before is not HEALTHY and known(e.moved)
        ):  # what one copy brings is no share of its window's updates
            history.lossy_windows = -min(_PATIENCE * max(history.lossy_windows, 1), MOST_WAITED)
            return None
        return _still(e, before, history, step)
    history.lossy_windows += 1
    if not is_undone and history.lossy_windows <= 0:  # copied now and then: the next time is waited for
        history.net_grade = HEALTHY
        return None
    if is_undone and not _is_again(e, history, before_that):  # a checkpoint may have been loaded, or a layer begun anew
        return None
    if is_undone and (reason := _may_be_meant(e)):
        history.net_grade = UNKNOWN
        return UNKNOWN, Cause.overwritten, reasons.unknown(reason)
    history.net_grade, history.was_uncopied = health, not is_undone
    history.written_gap = math.ceil(known(e.written_every) or 0.0)
    cause = Cause.overwritten if is_undone else Cause.not_copied_back
    return verdict(health, cause, Seen(dtype=e.dtype, net=net, written_step=e.written_step))


def _may_be_meant(e: TensorEvidence) -> str:
    """Why what is undone where it was read may be as somebody wants it; "" where that cannot be."""
    zeros, touched = share(e.zero_gradient_fraction), share(e.touched_fraction)
    if zeros is None and touched is not None and touched < _TOUCHED:  # of sparse gradients
        return reasons.few_with_gradients(1 - touched)
    if (zeros or 0.0) > 1 - _SIGNAL:
        return reasons.few_with_gradients(zeros)
    return reasons.held_at_a_bound() if e.is_one_sided and not e.is_master else ""


def _pruned(e: TensorEvidence, history: TensorHistory) -> Verdict:
    """Written by somebody who wants zeros there: frozen where all samples are 0, else the rest of it trains."""
    history.lossy_windows = 0
    if e.may_be_zero and known(e.stored):
        history.net_grade = UNKNOWN
        return UNKNOWN, Cause.overwritten, reasons.unknown(reasons.set_to_zero())
    return verdict(
        HEALTHY if known(e.stored) else Health.frozen, Cause.overwritten, Seen(dtype=e.dtype, reason=AT_ZERO)
    )


def _taken_back(e: TensorEvidence, history: TensorHistory, net: float | None) -> Verdict:
    """What Lookahead does, and hardly anything else."""
    history.lossy_windows = 0
    if e.may_be_alike:
        history.net_grade = UNKNOWN
        reason = reasons.may_be_taken_back(share(e.undone_fraction) or 0.0, short(e.dtype))
        return UNKNOWN, Cause.overwritten, reasons.unknown(reason)
    return verdict(HEALTHY, Cause.overwritten, Seen(dtype=e.dtype, net=net, reason=TAKEN_BACK))


def _is_again(e: TensorEvidence, history: TensorHistory, last: int | None) -> bool:
    """Whether it was written more than once: the sums of many windows remember a single time for long. `last`: step of which one knew."""
    if e.written_steps >= 2:
        return True
    return history.lossy_windows >= 2 and (e.written_step is None or e.written_step != last)


def _still(e: TensorEvidence, before: Health, history: TensorHistory, step: int) -> Verdict | None:
    """An earlier verdict, while nothing speaks against it but that nothing was written of late: it may come again."""
    if before is HEALTHY or not (history.lossy_windows or known(e.net_efficiency) is None):
        history.lossy_windows = 0
        return None
    is_due = step <= (history.written_step or 0) + AGAIN * history.written_gap and e.written_steps < 2
    if known(e.net_efficiency) is not None and not is_due:  # the next window like this acquits
        history.lossy_windows = 0
    history.net_grade = before
    if before is UNKNOWN:
        return UNKNOWN, Cause.overwritten, reasons.unknown(reasons.was_put_back())
    # not by what is known of this window: one that nothing was seen of does not know of masters
    cause = Cause.not_copied_back if history.was_uncopied else Cause.overwritten
    return verdict(before, cause, Seen(dtype=e.dtype, reason=NOT_AGAIN))


def _travels(e: TensorEvidence) -> bool:
    """Whether it gets further than from one write to the next: weights that are normalised after each step do.

    What a normalisation takes is the growth in length, which is most of the summed update; the weights go on turning.
    """
    return (known(e.travelled) or 0.0) > _FURTHER


def by_state(e: TensorEvidence, history: TensorHistory, limits: Thresholds) -> Verdict | None:
    """The weight takes its updates, but are they the right ones?"""
    factor = known(e.state_factor)
    if factor is None or e.state_factor_steps < limits.minimum_steps:
        return None
    inside = 1 + limits.state_margin if history.bad_state_windows >= 2 else 1.0
    margin = 2 * (known(e.state_factor_error) or 0.0)
    if factor + margin >= limits.state_low * inside and factor - margin <= limits.state_high / inside:
        history.bad_state_windows = 0
        return None
    states = [a for a in e.accumulators.values() if is_state(a.name)]
    # FP32 state has nothing to lose: then the shadow differs for another reason (state edited, restored)
    if states and all(a.dtype in FULL for a in states):
        return None
    history.bad_state_windows += 1
    if history.bad_state_windows < 2:
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
            blamed = Seen(dtype=a.dtype, accumulator=a.name, efficiency=decay, rate=known(a.rate), state_factor=factor)
    return verdict(STALLING, Cause.state_rounding, blamed)
