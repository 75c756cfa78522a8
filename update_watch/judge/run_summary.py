"""Of all tensors of a run: its health, and what of it is measured, moves unasked, or trains at all."""

from __future__ import annotations

import numpy as np

from update_watch.judge.columns.codes import (
    BROKEN,
    HEALTH_CODES,
    HEALTHS,
    HEALTHY,
    IDLE,
    NONE,
    STALLED,
    STALLING,
    UNKNOWN,
    Codes,
    Mask,
)
from update_watch.judge.columns.judged import Judged, levels_of
from update_watch.report import SEVERITY, Cause, Health

BAD = (BROKEN, STALLED, STALLING)  # worst first
_REST = (
    Cause.requires_grad_off,
    Cause.not_in_optimizer,
    Cause.no_gradient,
    Cause.zero_gradient,
    Cause.zero_learning_rate,
    Cause.skipped_steps,
)


def run_health(judged: Judged) -> Health:
    """The worst of broken, stalled and stalling; `healthy` only when next to nobody is worse or unknown.

    What is frozen or idle does not make a run frozen or idle while something else trains. An accumulator somebody
    is alerted about makes a run stalling.
    """
    counts = counts_of(judged.health)
    for code in BAD:
        if counts[code]:
            return HEALTHS[code]
    if any(((levels_of(part) > 0) & (part.health != IDLE)).any() for part in judged.parts):
        return Health.stalling
    if counts[HEALTHY] and counts[HEALTHY] >= counts[UNKNOWN]:
        return Health.healthy
    return next((health for health in SEVERITY if counts[HEALTH_CODES[health]]), Health.unknown)


def counts_of(health: Codes) -> list[int]:
    """How many have each health, by its code."""
    found: list[int] = np.bincount(health, minlength=len(HEALTHS)).tolist()
    return found


def most_common(codes: Codes) -> list[tuple[int, int]]:
    """The different ones with how many there are of each, the most first; of as many, the one that comes first."""
    found, first, counts = np.unique(codes, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))
    return list(zip(found[order].tolist(), counts[order].tolist(), strict=True))


def is_bad(health: Codes) -> Mask:
    """[n] broken, stalled or stalling."""
    found: Mask = np.isin(health, BAD)
    return found


def is_measurable(judged: Judged) -> Mask:
    """[n] whether its updates should be measured: it requires a gradient, an optimizer holds it, and there is something of it."""
    found: Mask = judged.trainable & (judged.column("numel") > 0) & ~judged.is_caused(Cause.not_in_optimizer)
    return found


def is_unmeasured(judged: Judged) -> Mask:
    """[n] those that should be measured and cannot be: not for want of steps, but for a reason that stays."""
    found: Mask = (judged.health == UNKNOWN) & judged.is_caused(Cause.not_replayable) & is_measurable(judged)
    return found


def is_moving_unasked(judged: Judged) -> Mask:
    """[n] whether it moves although it should rest, or no signal reaches it."""
    found: Mask = judged.is_caused(*_REST) & ((judged.health == HEALTHY) | (judged.health == UNKNOWN))
    return found


def is_training_nothing(judged: Judged) -> bool:
    """Whether nothing that requires a gradient is trained: at rest, or moved by decay and momentum alone.

    The end of a schedule that still has a rate is none.
    """
    trained = judged.trainable
    has_rate = np.nan_to_num(judged.column("lr")) != 0
    is_at_rest = (judged.health == IDLE) & (judged.cause != NONE)
    is_at_rest &= ~(judged.is_caused(Cause.zero_learning_rate) & has_rate)
    is_at_rest |= judged.is_caused(Cause.zero_gradient)
    return bool(trained.any() and is_at_rest[trained].all())
