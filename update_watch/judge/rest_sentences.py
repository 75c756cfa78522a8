"""Sentences of what no signal reaches, of what is broken, and of what cannot be known."""

from __future__ import annotations

from update_watch.judge.reasons import unknown
from update_watch.judge.seen import Advice, Seen
from update_watch.wording import number, percent, plural


def negligible_gradient(seen: Seen) -> Advice:
    size = f" (largest {number(seen.gradient)})" if seen.gradient is not None else ""
    noise = f"; what it moves by, {number(seen.moved)} of its size per step, is noise" if seen.moved else ""
    return Advice(
        f"its gradient is at the level of round-off{size}, far below what the rule needs for a real update: no signal"
        f" reaches it{noise.replace('; what', ', and what')}",
        "look for what cancels its gradient, such as a softmax over a single choice; more precision changes nothing",
    )


def requires_grad_off(seen: Seen) -> Advice:
    if seen.moved:
        return Advice(
            f"it is frozen (requires_grad is False) and yet it moves, {_movement(seen)}",
            "if it should stay as it is, take it out of the optimizer and look for what writes to it: momentum and weight"
            " decay move what has a gradient of zeros (zero_grad(set_to_none=True) leaves none)",
        )
    return Advice(
        "it is frozen: requires_grad is False", "to train it, set requires_grad=True and give it to an optimizer"
    )


_LEFT_BEHIND = "no optimizer holds it: "


def is_left_behind(advice: str) -> bool:
    """Whether what was said of a tensor is that an optimizer was to hold it and holds what it once was."""
    return advice.lower().startswith(_LEFT_BEHIND)


def not_in_optimizer(seen: Seen) -> Advice:
    if seen.reason:
        return Advice(
            f"{_LEFT_BEHIND}{seen.reason}",
            "make the optimizer after the model is wrapped or changed, or give it the new tensor (add_param_group)",
        )
    if seen.moved:
        return Advice(
            f"no optimizer that is watched holds it, and yet it moves, {_movement(seen)}",
            "if an optimizer should train it, add it to a parameter group; if it is an average or a copy of other weights,"
            " set requires_grad=False",
        )
    return Advice(
        "it requires a gradient, but no optimizer holds it",
        "add it to a parameter group, or set requires_grad=False if it should stay as it is",
    )


def no_gradient(seen: Seen) -> Advice:
    if seen.moved:
        return Advice(
            f"its gradient was None in {_looked(seen.steps)}, and yet it moves, {_movement(seen)}",
            "if it should stay as it is, look for what writes to it, such as an optimizer that makes gradients where none are",
        )
    return Advice(
        f"its gradient was None in {_looked(seen.steps)}",
        "check that forward uses it and that nothing detaches it from the loss",
    )


def zero_gradient(seen: Seen) -> Advice:
    looked = f"{seen.looks} steps in which they were looked at" if seen.looks > 1 else "every step"
    if seen.moved:
        return Advice(
            f"all its sampled gradients were 0 in {looked}, and yet it moves, {_movement(seen)}: weight decay and momentum",
            "if it should stay as it is, set its gradient to None (zero_grad(set_to_none=True)) or take it out of the"
            " optimizer",
        )
    return Advice(
        f"all its sampled gradients were 0 in {looked}",
        "check for dead activations, a mask, a zero in front of it, or (an embedding) rows that no token uses",
    )


def zero_learning_rate(seen: Seen) -> Advice:
    if seen.peak_lr:
        return Advice(
            f"its learning rate of {number(seen.lr or 0.0)} has all but run out (peak {number(seen.peak_lr)})",
            "if training should go on, check the schedule",
        )
    if seen.moved:
        return Advice(
            f"its learning rate was 0 in {_all(seen.steps)}, and yet it moves, {_movement(seen)}",
            "look for what else writes to it",
        )
    return Advice(f"its learning rate was 0 in {_all(seen.steps)}", "check the schedule and its parameter group")


def skipped_steps(seen: Seen) -> Advice:
    finding = f"the gradient scaler skipped {seen.skipped} of {plural(seen.steps, 'step')}"
    if not seen.steps:  # no step was seen at all
        finding = (
            f"a gradient scaler or a check of one's own skipped the steps of {seen.skipped} backward passes, whose gradients held"
            " NaN or infinity"
        )
    if seen.moved:
        return Advice(f"{finding}, and yet it moves, {_movement(seen)}", "look for what else writes to it")
    return Advice(
        f"{finding}, and so in the windows before",
        "look for NaN or overflow in the loss, clip the gradients, or use BF16, which needs no scaler",
    )


def non_finite(seen: Seen) -> Advice:
    return Advice(
        "NaN or infinity among its weights, gradients or updates",
        "go back to a checkpoint from before and lower the learning rate, clip the gradients, or look for log(0) and"
        " overflow",
    )


def replicas_differ(seen: Seen) -> Advice:
    return Advice(
        "its stored values differ between ranks that should hold the same",
        "these ranks train different models: check that all load the same checkpoint, that its gradient is reduced over"
        " all of them, and that nothing writes to it on one rank only",
    )


def not_replayable(seen: Seen) -> Advice:
    return Advice(unknown(seen.reason or "its update cannot be replayed").rstrip("."))


def _movement(seen: Seen) -> str:
    return (
        f"by {percent(seen.moved) if (seen.moved or 0) > 0.1 else number(seen.moved or 0.0)} of its size {seen.mover}"
    )


def _looked(steps: int) -> str:
    return "the one step that was looked at" if steps == 1 else f"all {steps} steps that were looked at"


def _all(steps: int) -> str:
    return "the one step of this window" if steps == 1 else f"all {steps} steps of this window"
