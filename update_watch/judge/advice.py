"""One sentence per cause: what was seen, what to change, what to mind. Progress bar, alert and report all use it.

Every cause has a function from `Seen` (the numbers) to `Advice` (three parts). `say` joins the parts for one
tensor; a headline uses the finding and the cure only. Numbers that are not known are left out, never guessed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from update_watch.judge import rest_sentences, stall_sentences
from update_watch.judge.seen import Advice, Seen
from update_watch.report import Cause
from update_watch.wording import plural


def advise(cause: Cause, seen: Seen) -> Advice:
    """The advice for a cause."""
    return _ADVICE[cause](seen)


@functools.lru_cache(maxsize=4096)  # thousands of tensors often say the same
def say(cause: Cause, seen: Seen) -> str:
    """The advice for a cause as one sentence."""
    text = "; ".join(part for part in advise(cause, seen) if part)
    return f"{text[:1].upper()}{text[1:]}."


def brief(text: str) -> str:
    """A sentence without its caution and full stop: what a headline has room for."""
    return "; ".join(text.rstrip(".").split("; ")[:2])


def finding(text: str) -> str:
    """A sentence without cure and caution."""
    return text.rstrip(".").split("; ")[0] + "."


def nothing_intended(steps: int) -> str:
    """The sentence for a tensor that is idle without one of the causes."""
    return f"The optimizer intended no change in {plural(steps, 'measured step')}."


_ADVICE: dict[Cause, Callable[[Seen], Advice]] = {
    Cause.weight_rounding: stall_sentences.weight_rounding,
    Cause.state_rounding: stall_sentences.state_rounding,
    Cause.decay_rounding: stall_sentences.decay_rounding,
    Cause.average_rounding: stall_sentences.average_rounding,
    Cause.accumulation_rounding: stall_sentences.accumulation_rounding,
    Cause.overwritten: stall_sentences.overwritten,
    Cause.not_copied_back: stall_sentences.not_copied_back,
    Cause.average_diverges: stall_sentences.average_diverges,
    Cause.average_not_updated: stall_sentences.average_not_updated,
    Cause.negligible_gradient: rest_sentences.negligible_gradient,
    Cause.requires_grad_off: rest_sentences.requires_grad_off,
    Cause.not_in_optimizer: rest_sentences.not_in_optimizer,
    Cause.no_gradient: rest_sentences.no_gradient,
    Cause.zero_gradient: rest_sentences.zero_gradient,
    Cause.zero_learning_rate: rest_sentences.zero_learning_rate,
    Cause.skipped_steps: rest_sentences.skipped_steps,
    Cause.not_written: stall_sentences.not_written,
    Cause.non_finite: rest_sentences.non_finite,
    Cause.replicas_differ: rest_sentences.replicas_differ,
    Cause.not_replayable: rest_sentences.not_replayable,
}
