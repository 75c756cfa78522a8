"""One sentence per cause: what was seen, what to change, what to mind. Progress bar, alert and report all use it.

Every cause has a function from `Seen` (the numbers) to `Advice` (three parts). `say` joins the parts for one
tensor; a headline uses the finding and the cure only. Numbers that are not known are left out, never guessed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from update_watch.judge.number_formats import FULL, smallest_rate
from update_watch.judge.reasons import unknown
from update_watch.report import Cause
from update_watch.wording import fixed, number, percent, plural, short


class Seen(NamedTuple):
    """What was seen of one tensor or accumulator, or on average of a group of them."""

    dtype: str = ""
    steps: int = 0  # optimizer steps the finding rests on
    efficiency: float | None = None
    displacement: float | None = None  # given when it, and not the efficiency, is the finding
    lost: float | None = None  # lost / wanted
    lr: float | None = None
    critical_lr: float | None = None
    peak_lr: float | None = None  # given when the rate has run out
    decay_rate: float | None = None  # lr * weight_decay
    state_factor: float | None = None
    accumulator: str = ""
    rate: float | None = None  # 1 - beta
    is_growth: bool = False  # the state loses its growth, not its decay
    counter: float | None = None  # where a step counter stopped
    headroom: float | None = None  # share of updates at least 4 half gaps wide
    skipped: int = 0
    net: float | None = None  # net efficiency
    written_step: int | None = None  # the last step after which something else wrote to it
    gradient: float | None = None  # the largest
    moved: float | None = None  # given where it should not: rms of the window's movement, as a share of the weights
    reason: str = ""


class Advice(NamedTuple):
    """Three parts of a sentence, each without capital or full stop; `cure` and `caution` may be empty."""

    finding: str
    cure: str = ""
    caution: str = ""


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


# --- one function per cause ----------------------------------------------------------------------


def _weight_rounding(seen: Seen) -> Advice:
    kind = short(seen.dtype)
    if seen.displacement is not None:
        finding = (
            f"{kind} weights round the drift away: {fixed(seen.displacement)} of the summed update arrived, although"
            f" single steps look well (efficiency {fixed(seen.efficiency)})"
        )
    elif seen.efficiency is None and seen.steps:
        still = (
            f"not one sampled bit of its optimizer's tensors has moved in {plural(seen.steps, 'step')} with gradients"
        )
        finding = f"{still}: {kind} weights round the updates away"
    else:
        without = "" if seen.dtype in FULL else " without an FP32 master"
        finding = f"{kind} weights{without} round the updates away ({_loss(seen)})"
    now = f" (now {number(seen.lr)})" if seen.lr is not None else ""
    edge = ""
    if seen.critical_lr:
        edge = f"keep the learning rate above {number(seen.critical_lr)}{now}, below which half of the updates are lost"
    if seen.dtype in FULL:
        return Advice(finding, edge or f"raise the learning rate{now}")
    cure = (
        f"keep FP32 master weights (precision='{_mixed(seen.dtype)}') or use stochastic rounding (torchao) or Kahan"
        " summation (optimi)"
    )
    if edge:
        cure += f", or {edge}"
    return Advice(finding, cure, "either repair raises the effective learning rate, so retune it")


def _state_rounding(seen: Seen) -> Advice:
    name, kind = f"optimizer state {seen.accumulator}", short(seen.dtype)
    if seen.counter is not None:
        finding = f"{name} in {kind} has stopped at {seen.counter:g}, where adding 1 changes nothing"
        cure = "keep the step counter in FP32"
    else:
        rate = f" at 1 - beta = {number(seen.rate)}" if seen.rate is not None else ""
        part = "growth" if seen.is_growth else "decay"
        finding = f"{name} in {kind} rounds its {part} away{rate}"
        if seen.efficiency is not None:
            finding += f" (efficiency of the {part} {fixed(seen.efficiency)})"
        cure = "keep the optimizer state in FP32"
        floor = smallest_rate(seen.dtype)
        if floor is not None and (seen.rate is None or seen.rate < floor):
            cure += f" or use a beta of at most {1 - floor:.4g}"
    factor = fixed(seen.state_factor)
    if seen.state_factor is None or abs(seen.state_factor - 1) < _HARDLY:
        one_way = "" if seen.counter is not None or seen.is_growth else ", so it can grow but not shrink"
        is_seen = seen.state_factor is not None and abs(seen.state_factor - 1) >= _NOTHING
        so_far = f" (so far the updates are {factor} of what FP32 state would give)" if is_seen else ""
        return Advice(f"{finding}{one_way}{so_far}", cure)
    if not seen.accumulator:
        finding = "the optimizer state has lost part of what it should hold to rounding"
    finding += f", and the updates are {factor} of what FP32 state would give"
    caution = ""
    if seen.state_factor > 0:
        caution = f"that multiplies the effective learning rate by about {number(1 / seen.state_factor)}, so retune it"
    return Advice(finding, cure, caution)


def _decay_rounding(seen: Seen) -> Advice:
    rate = f" (lr * weight_decay = {number(seen.decay_rate)} per step)" if seen.decay_rate is not None else ""
    kind = short(seen.dtype)
    return Advice(
        f"weight decay{rate} is lost in {kind} weights ({_loss(seen)})",
        f"keep FP32 master weights (precision='{_mixed(seen.dtype)}'), or use stochastic rounding, or an optimizer that"
        " adds decay and gradient in one rounding (fused=True)",
        "the decay then starts to act",
    )


def _average_rounding(seen: Seen) -> Advice:
    if seen.reason:
        return Advice(
            f"{_average(seen)} is {seen.reason} ({_loss(seen)})",
            "validate an FP32 copy of the averaged model, or train with FP32 weights"
            f" (precision='{_mixed('bfloat16')}')",
        )
    rate = f" at 1 - decay = {number(seen.rate)}" if seen.rate is not None else ""
    return Advice(
        f"{_average(seen)} in {short(seen.dtype)} does not follow the weights{rate} ({_loss(seen)})",
        "keep the averaged model in FP32 (make it from model.float() or convert it after copying)",
    )


def _average(seen: Seen) -> str:
    return f"the average '{seen.accumulator.removeprefix('average:')}'"


def _accumulation_rounding(seen: Seen) -> Advice:
    return Advice(
        f"gradients summed in {short(seen.dtype)} lose micro-batches ({_loss(seen)})",
        f"accumulate gradients in FP32 (FP32 weights with precision='{_mixed(seen.dtype)}'), or use fewer and larger"
        " micro-batches",
        "the summed gradient then grows",
    )


def _overwritten(seen: Seen) -> Advice:
    kept = f"{percent(min(max(seen.net, 0.0), 1.0))} of" if seen.net is not None else "next to nothing of"
    last = f", last after step {seen.written_step}" if seen.written_step is not None else ""
    return Advice(
        f"what its steps apply is overwritten before the next step{last}: {kept} the intended update is left at the end",
        "find what writes to it between steps: averaged weights that stay in the model after a validation, a checkpoint"
        " or a copy that is loaded again and again",
    )


def _not_copied_back(seen: Seen) -> Advice:
    kept = f" (net efficiency {fixed(seen.net)})" if seen.net is not None else ""
    return Advice(
        f"its optimizer steps a copy of it, and the copy is not written back to the model{kept}",
        "copy the master weights to the model after every step, or give the model's own parameters to the optimizer",
    )


def _average_diverges(seen: Seen) -> Advice:
    return Advice(
        f"{_average(seen)} moves away from the weights ({_loss(seen)})",
        "check its update: average = decay * average + (1 - decay) * weight; a sign or the order of the two is wrong",
    )


def _average_not_updated(seen: Seen) -> Advice:
    return Advice(
        f"{_average(seen)} was not updated in {plural(seen.steps, 'step')} in which its weights moved",
        "call its update after the step, and check that the averaged copy is the one that was given to the watch",
    )


def _negligible_gradient(seen: Seen) -> Advice:
    size = f" (largest {number(seen.gradient)})" if seen.gradient is not None else ""
    return Advice(
        f"its gradient is so small{size} that the rule makes next to no update of it: no signal reaches it",
        "look for what cancels its gradient, such as a softmax over a single choice; more precision changes nothing",
    )


def _requires_grad_off(seen: Seen) -> Advice:
    if seen.moved is not None:
        return Advice(
            f"it is frozen (requires_grad is False), and yet it moves, by {percent(seen.moved)} of its size in this window",
            "if that is not meant, look for adapters merged and unmerged in a short format, or an optimizer that holds it",
        )
    cure = "to train it, set requires_grad=True and give it to an optimizer"
    return Advice("it is frozen: requires_grad is False", cure)


def _not_in_optimizer(seen: Seen) -> Advice:
    if seen.reason:
        cure = "make the optimizer after the model is wrapped or changed, or give it the new tensor (add_param_group)"
        return Advice(f"no optimizer holds it: {seen.reason}", cure)
    cure = "add it to a parameter group, or set requires_grad=False if it should stay as it is"
    return Advice("it requires a gradient, but no optimizer holds it", cure)


def _no_gradient(seen: Seen) -> Advice:
    return Advice(
        f"its gradient was None in {_all(seen.steps)}",
        "check that forward uses it and that nothing detaches it from the loss",
    )


def _zero_gradient(seen: Seen) -> Advice:
    if seen.moved is not None:
        return Advice(
            f"all its sampled gradients were 0 in {_all(seen.steps)}, and yet decay or momentum moves it",
            "if it should stay as it is, set its gradient to None (zero_grad(set_to_none=True)) or take it out of the"
            " optimizer; else look for dead activations, a mask or a zero in front of it",
        )
    return Advice(
        f"all its sampled gradients were 0 in {_all(seen.steps)}",
        "check for dead activations, a mask, a zero in front of it, or (an embedding) rows that no token uses",
    )


def _zero_learning_rate(seen: Seen) -> Advice:
    if seen.peak_lr:
        return Advice(
            f"its learning rate of {number(seen.lr or 0.0)} has all but run out (peak {number(seen.peak_lr)})",
            "if training should go on, check the schedule",
        )
    return Advice(f"its learning rate was 0 in {_all(seen.steps)}", "check the schedule and its parameter group")


def _skipped_steps(seen: Seen) -> Advice:
    return Advice(
        f"the gradient scaler skipped {seen.skipped} of {plural(seen.steps, 'step')}, and so in the windows before",
        "look for NaN or overflow in the loss, clip the gradients, or use BF16, which needs no scaler",
    )


def _not_written(seen: Seen) -> Advice:
    share = f"{percent(seen.headroom)} of " if seen.headroom is not None else ""
    return Advice(
        f"{share}its updates are at least four times what {short(seen.dtype)} can store, yet the optimizer does not"
        f" write them ({_loss(seen)})",
        "this is not rounding but a fault of the optimizer: use another implementation (foreach=True, fused=False) or"
        " another version",
    )


def _non_finite(seen: Seen) -> Advice:
    return Advice(
        "NaN or infinity among its weights, gradients or updates",
        "go back to a checkpoint from before and lower the learning rate, clip the gradients, or look for log(0) and"
        " overflow",
    )


def _replicas_differ(seen: Seen) -> Advice:
    return Advice(
        "its stored values differ between ranks that should hold the same",
        "these ranks train different models: check that all load the same checkpoint, that its gradient is reduced over"
        " all of them, and that nothing writes to it on one rank only",
    )


def _not_replayable(seen: Seen) -> Advice:
    return Advice(unknown(seen.reason or "its update cannot be replayed").rstrip("."))


_ADVICE: dict[Cause, Callable[[Seen], Advice]] = {
    Cause.weight_rounding: _weight_rounding,
    Cause.state_rounding: _state_rounding,
    Cause.decay_rounding: _decay_rounding,
    Cause.average_rounding: _average_rounding,
    Cause.accumulation_rounding: _accumulation_rounding,
    Cause.overwritten: _overwritten,
    Cause.not_copied_back: _not_copied_back,
    Cause.average_diverges: _average_diverges,
    Cause.average_not_updated: _average_not_updated,
    Cause.negligible_gradient: _negligible_gradient,
    Cause.requires_grad_off: _requires_grad_off,
    Cause.not_in_optimizer: _not_in_optimizer,
    Cause.no_gradient: _no_gradient,
    Cause.zero_gradient: _zero_gradient,
    Cause.zero_learning_rate: _zero_learning_rate,
    Cause.skipped_steps: _skipped_steps,
    Cause.not_written: _not_written,
    Cause.non_finite: _non_finite,
    Cause.replicas_differ: _replicas_differ,
    Cause.not_replayable: _not_replayable,
}


# --- words and numbers ---------------------------------------------------------------------------

_NOTHING = 0.02  # a state factor so close to 1 is 1
_HARDLY = 0.1  # a change of the effective learning rate that nobody need retune for


def _all(steps: int) -> str:
    return "the one step of this window" if steps == 1 else f"all {steps} steps of this window"


def _loss(seen: Seen) -> str:
    parts = []
    if seen.efficiency is not None:
        parts.append(f"efficiency {fixed(seen.efficiency)}")
    if seen.lost is not None:
        parts.append(f"{percent(seen.lost)} lost")
    return ", ".join(parts) or "share unknown"


def _mixed(dtype: str) -> str:
    return "16-mixed" if dtype == "float16" else "bf16-mixed"
