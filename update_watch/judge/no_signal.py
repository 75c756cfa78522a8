"""Verdicts on tensors that no signal reaches: frozen and idle, which do not move, and those that move all the same.

Moving or not comes first: `frozen` and `idle` are only said where nothing changed. Decay and momentum of gradients that are
zero, averages that live in the model, adapters that are merged and unmerged all move what should be at rest; how much,
and by what, is said.
"""

from __future__ import annotations

from typing import NamedTuple

from update_watch.evidence import TensorEvidence, WindowEvidence
from update_watch.judge import reasons
from update_watch.judge.advice import nothing_intended, say
from update_watch.judge.efficiency_grade import known
from update_watch.judge.history import UNKNOWN, TensorHistory
from update_watch.judge.seen import Seen
from update_watch.report import Cause, Health
from update_watch.thresholds import Thresholds

NEARLY_ALL = 0.9  # of the steps, skipped
_OVER_WINDOW = "in this window"
NOISE = 2.0**-18  # a gradient so much smaller than the usual one of the run is what rounding left of it
LARGEST_NOISE = 64 * NOISE  # and its largest element
FAR_BELOW = 0.1  # of the learning rate: what a rule that normalises gives any real gradient is more

Verdict = tuple[Health, Cause | None, str]


class Rest(NamedTuple):
    """Why a tensor should be at rest."""

    cause: Cause
    seen: Seen


def verdict(health: Health, cause: Cause, seen: Seen) -> Verdict:
    """A verdict with its sentence."""
    return health, cause, say(cause, seen)


def movement(e: TensorEvidence) -> tuple[float, str]:
    """How far a tensor moved, as a share of its size, and what moved it; (0, "") where nothing of it did."""
    applied, between, over_window = (
        known(e.applied_ratio) or 0.0,
        known(e.written_between) or 0.0,
        known(e.moved) or 0.0,
    )
    if applied > 0:
        return applied, "per step, by its optimizer"
    if between > 0:
        return between, "per step, written between the steps"
    if over_window > 0:
        return over_window, _OVER_WINDOW
    changed = known(e.changed_fraction) or 0.0
    return changed and 1.0, _OVER_WINDOW if changed else ""


def rest(
    e: TensorEvidence, history: TensorHistory, window: WindowEvidence, limits: Thresholds
) -> Rest | Verdict | None:
    """Why it should be at rest; or a verdict that stands at once; None where there is an update to judge."""
    steps = e.steps or window.window
    skipped = e.skipped_steps if e.steps else window.skipped_steps
    nearly_all = skipped > 0 and skipped >= NEARLY_ALL * max(e.steps, skipped)
    history.skipped_windows = history.skipped_windows + 1 if nearly_all else 0
    is_persistent = history.skipped_windows >= limits.skipped_windows
    if not e.trainable:
        return Rest(Cause.requires_grad_off, Seen())
    if not e.finite:
        if skipped and not is_persistent:
            return UNKNOWN, None, reasons.unknown(reasons.overflow(skipped, max(steps, skipped)))
        return verdict(Health.broken, Cause.non_finite, Seen())
    if e.replicas_differ:
        return verdict(Health.broken, Cause.replicas_differ, Seen())
    if not e.optimizer_group:
        return Rest(Cause.not_in_optimizer, Seen(reason=e.note))
    if nearly_all:
        if is_persistent:
            return Rest(Cause.skipped_steps, Seen(skipped=skipped, steps=max(steps, skipped) if e.steps else 0))
        return UNKNOWN, None, reasons.unknown(reasons.overflow(skipped, max(steps, skipped) if e.steps else 0))
    if not e.steps:
        return UNKNOWN, None, reasons.unknown(reasons.no_step(e.reason, known(e.moved)))
    if e.gradless_steps >= e.steps:
        if e.steps < window.window and movement(e)[1] == _OVER_WINDOW:  # an expert that starves, say
            return UNKNOWN, None, reasons.unknown(reasons.moved_unseen(e.steps, window.window))
        return Rest(Cause.no_gradient, Seen(steps=e.steps))
    return _without_gradient(e, history, limits)


def _without_gradient(e: TensorEvidence, history: TensorHistory, limits: Thresholds) -> Rest | Verdict | None:
    zero, looks = known(e.zero_gradient_fraction), e.gradient_looks or e.measured_steps
    if zero is not None and zero >= 1 and looks:
        history.zero_looks += looks
        seen = Seen(steps=e.steps, looks=looks)
        if not e.requires_grad and not e.is_master:
            return Rest(Cause.requires_grad_off, seen)
        # an expert that starves has a gradient now and then
        if history.zero_looks >= limits.minimum_steps and not e.gradient_blind:
            return Rest(Cause.zero_gradient, seen)
        if not movement(e)[0]:
            return UNKNOWN, None, reasons.unknown(_why_not_idle(e, history, looks, limits))
        return None  # till more is known of its gradients, its movement is judged
    if not e.requires_grad and not e.is_master and looks and known(e.gradient_max) == 0:
        return Rest(Cause.requires_grad_off, Seen(steps=e.steps, looks=looks))  # it had gradients before it was frozen
    if zero is not None:
        history.zero_looks = 0
    if (known(e.lr_max) if e.lr_max is not None else known(e.lr)) == 0:
        return Rest(Cause.zero_learning_rate, Seen(steps=e.steps))
    if not e.reason and e.measured_steps and e.numbers.wanted_fraction == 0 and not movement(e)[0]:
        if e.dtype == "float64":
            return UNKNOWN, None, reasons.unknown(reasons.finer_than_fp32())
        return Health.idle, None, nothing_intended(e.measured_steps)
    return None


def _why_not_idle(e: TensorEvidence, history: TensorHistory, looks: int, limits: Thresholds) -> str:
    if history.zero_looks < limits.minimum_steps:
        return reasons.too_few_looks(history.zero_looks, limits.minimum_steps)
    return reasons.not_always_looked_at(looks, e.gradient_blind)


def negligible(e: TensorEvidence, usual: float | None) -> Verdict | None:
    """A gradient at the level of round-off, of which the rule makes far less than of a real one: no signal.

    Unknown where the rule makes as much of it as of any (Lion): what it makes is measured, and tells nothing of the signal.
    """
    size, lr, ratio, stored = known(e.gradient_rms), known(e.lr), known(e.update_ratio), known(e.stored)
    if size is None or usual is None or not lr or ratio is None or not stored:
        return None
    largest = known(e.gradient_max)
    if largest == 0:  # in the steps that were looked at; others had some, or it would be zero_gradient
        return None
    # rows of an embedding that no sample met have a large gradient all the same
    if size >= NOISE * usual or (largest or 0.0) >= LARGEST_NOISE * usual:
        return None
    made = ratio * stored
    if made >= FAR_BELOW * lr:
        if NOISE * made < lr * size:  # a rule that makes no more of it than it is: others are large
            return None
        return UNKNOWN, Cause.negligible_gradient, reasons.unknown(reasons.no_signal(size / usual))
    amount, _ = movement(e)
    seen = Seen(gradient=largest, usual=usual, moved=amount or None)
    return verdict(Health.idle, Cause.negligible_gradient, seen)
