"""One sentence per cause: what was seen, what to change, what to mind. Progress bar, alert and report all use it.

Every cause has a function from `Seen` (the numbers) to `Advice` (three parts). `say` joins the parts for one
tensor; a headline uses the finding and the cure only. Numbers that are not known are left out, never guessed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from update_watch.report import Cause


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


def unknown(reason: str) -> str:
    """The sentence for a health that is not known."""
    return f"{_UNKNOWN}{reason}."


def why(text: str) -> str:
    """The reason in such a sentence."""
    return text.removeprefix(_UNKNOWN).rstrip(".")


def nothing_intended(steps: int) -> str:
    """The sentence for a tensor that is idle without one of the causes."""
    return f"The optimizer intended no change in {plural(steps, 'measured step')}."


_UNKNOWN = "Unknown, because "


# --- reasons for `unknown` ---------------------------------------------------------------------


def not_measured(steps: int) -> str:
    if not steps:
        return "its optimizer took no step in this window"
    return "it was measured in none of the optimizer steps of this window"


def too_few_steps(seen: int, needed: int) -> str:
    return f"only {seen} of the {needed} measured steps a verdict needs {'was' if seen == 1 else 'were'} seen so far"


def one_window() -> str:
    return "one window alone may mislead about it; the next one decides"


def too_noisy(efficiency: float, error: float, windows: int) -> str:
    return (
        f"its efficiency of {fixed(efficiency)} has a standard error of {fixed(error)} after"
        f" {plural(windows, 'window')}; windows are pooled until that is small enough"
    )


def too_small() -> str:
    return (
        "so few of its stored values are expected to change at this learning rate that none changing means nothing;"
        " windows are pooled until enough are"
    )


def finer_than_fp32() -> str:
    return "its updates are finer than FP32, in which samples are compared; FP64 weights hold them"


def remainder_unclear(efficiency: float) -> str:
    return (
        f"its stored value took {fixed(efficiency)} of the update, but FP32 weights or a compensation kept elsewhere"
        " may hold the rest, and the sum over the window is still too small to tell; a longer window would"
    )


def rising_lr(lr: float) -> str:
    return (
        f"the learning rate has just risen threefold or more, to {number(lr)}: too early to call its lost updates a"
        " stall"
    )


def unexplained(efficiency: float, lost: float | None) -> str:
    kept = f" although {percent(lost)} of its updates were lost" if lost is not None else ""
    return (
        f"it moved by {fixed(efficiency)} of the intended update{kept}, which rounding does not explain: something else"
        " writes to it, or the optimizer's rule was not replayed rightly"
    )


def overflow(skipped: int, steps: int) -> str:
    return f"the gradient scaler skipped {skipped} of {steps} steps of this window, where gradients overflow"


# --- one function per cause ----------------------------------------------------------------------


def _weight_rounding(seen: Seen) -> Advice:
    kind = short(seen.dtype)
    if seen.displacement is not None:
        finding = (
            f"{kind} weights round the drift away: {fixed(seen.displacement)} of the summed update arrived, although"
            f" single steps look well (efficiency {fixed(seen.efficiency)})"
        )
    else:
        without = "" if seen.dtype in _FULL else " without an FP32 master"
        finding = f"{kind} weights{without} round the updates away ({_loss(seen)})"
    now = f" (now {number(seen.lr)})" if seen.lr is not None else ""
    edge = ""
    if seen.critical_lr:
        edge = f"keep the learning rate above {number(seen.critical_lr)}{now}, below which half of the updates are lost"
    if seen.dtype in _FULL:
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
        floor = _smallest_rate(seen.dtype)
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


def _requires_grad_off(seen: Seen) -> Advice:
    return Advice(
        "it is frozen: requires_grad is False", "to train it, set requires_grad=True and give it to an optimizer"
    )


def _not_in_optimizer(seen: Seen) -> Advice:
    return Advice(
        "it requires a gradient, but no optimizer holds it",
        "add it to a parameter group, or set requires_grad=False if it should stay as it is",
    )


def _no_gradient(seen: Seen) -> Advice:
    return Advice(
        f"its gradient was None in {_all(seen.steps)}",
        "check that forward uses it and that nothing detaches it from the loss",
    )


def _zero_gradient(seen: Seen) -> Advice:
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
    return Advice(f"{_UNKNOWN}{seen.reason or 'its update cannot be replayed'}")


_ADVICE: dict[Cause, Callable[[Seen], Advice]] = {
    Cause.weight_rounding: _weight_rounding,
    Cause.state_rounding: _state_rounding,
    Cause.decay_rounding: _decay_rounding,
    Cause.average_rounding: _average_rounding,
    Cause.accumulation_rounding: _accumulation_rounding,
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
_FULL = frozenset({"float32", "float64"})
_SHORT = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32", "float64": "FP64"}
# significant bits, the hidden one included: a value x loses x * c to rounding for all c <= 2^-(bits + 1), and for
# some x up to 2^-bits
SIGNIFICANT_BITS = {
    "bfloat16": 8,
    "float16": 11,
    "float32": 24,
    "float64": 53,
    "float8_e4m3fn": 4,
    "float8_e4m3fnuz": 4,
    "float8_e5m2": 3,
    "float8_e5m2fnuz": 3,
}


def short(dtype: str) -> str:
    """ "bfloat16" -> "BF16"."""
    return _SHORT.get(dtype, dtype or "low-precision")


def number(value: float) -> str:
    """Two significant digits: learning rates and factors."""
    return f"{value:.2g}"


def fixed(value: float | None) -> str:
    """Two decimals: efficiencies."""
    return "unknown" if value is None else f"{value + 0.0:.2f}".replace("-0.00", "0.00")


def percent(share: float | None) -> str:
    """A share in percent that says 0% and 100% only when it is."""
    if share is None:
        return "an unknown share"
    if 0 < share < 0.005:
        return "under 1%"
    if 0.995 <= share < 1:
        return "over 99%"
    return f"{100 * share:.0f}%"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


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


def _smallest_rate(dtype: str) -> float | None:
    """1 - beta from which on every stored value can decay."""
    bits = SIGNIFICANT_BITS.get(dtype)
    return 2.0**-bits if bits is not None and bits < 24 else None
