"""Sentences of what is lost: rounded away, not written, thrown away between steps."""

from __future__ import annotations

from update_watch.cures import BETAS, switch
from update_watch.judge.number_formats import FULL, smallest_rate
from update_watch.judge.seen import Advice, Seen
from update_watch.wording import fixed, number, percent, plural, short

_NOTHING = 0.02  # a state factor so close to 1 is 1
_HARDLY = 0.1  # a change of the effective learning rate that nobody need retune for


def weight_rounding(seen: Seen) -> Advice:
    kind = short(seen.dtype)
    if seen.displacement is not None:
        finding = (
            f"{kind} weights round the drift away: {fixed(seen.displacement)} of the summed update arrived, although"
            f" single steps look well (efficiency {fixed(seen.efficiency)})"
        )
    elif seen.peak_lr:
        finding = f"{kind} weights round the updates away, as they did until the learning rate ran out (peak {number(seen.peak_lr)})"
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
        f"keep FP32 master weights ({switch(seen.trainer, seen.dtype)}) or use stochastic rounding (torchao) or Kahan"
        f" summation ({'kahan_sum=True' if 'kahan_sum' in seen.options else 'optimi'})"
    )
    if seen.near_one:
        cure = f"store it zero-centred (w - 1), or {cure}"
    if edge:
        cure += f", or {edge}"
    return Advice(finding, cure, "either repair raises the effective learning rate, so retune it")


def state_rounding(seen: Seen) -> Advice:
    name, kind = f"optimizer state {seen.accumulator}", short(seen.dtype)
    if seen.counter is not None:
        finding = f"{name} in {kind} has stopped at {seen.counter:g}, where adding 1 changes nothing"
        cure = "keep the step counter in FP32"
    else:
        rate = f" at 1 - beta = {number(seen.rate)}" if seen.rate else ""  # 0: a sum, as of Adagrad
        part = "growth" if seen.is_growth else "decay"
        finding = f"{name} in {kind} rounds its {part} away{rate}"
        if seen.efficiency is not None:
            finding += f" (efficiency of the {part} {fixed(seen.efficiency)})"
        cure = "keep the optimizer state in FP32"
        floor = smallest_rate(seen.dtype)
        has_beta = bool(seen.rate) if seen.rate is not None else any(name in seen.options for name in BETAS)
        if floor is not None and has_beta and (seen.rate is None or seen.rate < floor):
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


def decay_rounding(seen: Seen) -> Advice:
    rate = f" (lr * weight_decay = {number(seen.decay_rate)} per step)" if seen.decay_rate is not None else ""
    kind = short(seen.dtype)
    cure = f"keep FP32 master weights ({switch(seen.trainer, seen.dtype)}), or use stochastic rounding"
    if "fused" in seen.options:
        cure += ", or fused=True, which adds decay and gradient in one rounding"
    return Advice(
        f"weight decay{rate} is lost in {kind} weights ({_loss(seen)})",
        cure,
        "the decay then starts to act",
    )


def average_rounding(seen: Seen) -> Advice:
    if seen.reason:
        return Advice(
            f"{_average(seen)} is {seen.reason} ({_loss(seen)})",
            "validate an FP32 copy of the averaged model, or train with FP32 weights"
            f" ({switch(seen.trainer, 'bfloat16')})",
        )
    rate = f" at 1 - decay = {number(seen.rate)}" if seen.rate is not None else ""
    return Advice(
        f"{_average(seen)} in {short(seen.dtype)} does not follow the weights{rate} ({_loss(seen)})",
        "keep the averaged model in FP32 (make it from model.float() or convert it after copying)",
    )


def _average(seen: Seen) -> str:
    return f"the average '{seen.accumulator.removeprefix('average:')}'"


def accumulation_rounding(seen: Seen) -> Advice:
    return Advice(
        f"gradients summed in {short(seen.dtype)} lose micro-batches ({_loss(seen)})",
        f"accumulate gradients in FP32 ({switch(seen.trainer, seen.dtype)}), or use fewer and larger micro-batches",
        "the summed gradient then grows",
    )


def not_written(seen: Seen) -> Advice:
    share = f"{percent(seen.headroom)} of " if seen.headroom is not None else ""
    other = "fused=False" if "fused=True" in seen.options else "foreach=True" if "foreach" in seen.options else ""
    return Advice(
        f"{share}its updates are at least four times what {short(seen.dtype)} can store, yet the optimizer does not"
        f" write them ({_loss(seen)})",
        f"this is not rounding but a fault of the optimizer: use another implementation{f' ({other})' if other else ''} or"
        " another version",
    )


AT_ZERO = "set to exactly 0 again, as pruning does"
TAKEN_BACK = "the same share of each element"
HELD = "put back to the bit after its steps, and the others are left alone"
NOT_AGAIN = "in this window nothing was seen of it, and the next one decides"


def overwritten(seen: Seen) -> Advice:
    if seen.reason == AT_ZERO:
        return Advice(
            f"it is held at 0: what its steps apply to the elements of it that were read is {AT_ZERO}",
            "if they should train, find what writes zeros to it between steps",
        )
    if seen.reason == HELD:
        return Advice(
            f"{percent(seen.net or 0.0)} of its elements that were read are {HELD}",
            "if they should train, find what writes to them between steps",
        )
    if seen.reason == TAKEN_BACK:
        return Advice(
            f"{percent(1 - (seen.net or 0.0))} of what its steps apply is taken back from time to time, {TAKEN_BACK}, as Lookahead"
            " does",
            "if nothing of the kind is meant, look for an average that is written to it between steps",
        )
    kept = f"{percent(min(max(seen.net, 0.0), 1.0))} of" if seen.net is not None else "next to nothing of"
    last = f", last after step {seen.written_step}" if seen.written_step is not None else ""
    left = f": {kept} the intended update is left at the end" if not seen.reason else f"; {seen.reason}"
    return Advice(
        f"what its steps apply is overwritten before the next step{last}{left}",
        "find what writes to it between steps: averaged weights that stay in the model after a validation, a checkpoint"
        " or a copy that is loaded again and again, a rounding to a coarser grid",
    )


def not_copied_back(seen: Seen) -> Advice:
    kept = f" (net efficiency {fixed(seen.net)})" if seen.net is not None else ""
    return Advice(
        f"its optimizer steps a copy of it, and the copy is not written back to the model{kept}",
        "copy the master weights to the model after every step, or give the model's own parameters to the optimizer",
    )


def average_diverges(seen: Seen) -> Advice:
    return Advice(
        f"{_average(seen)} moves away from the weights ({_loss(seen)})",
        "check its update: average = decay * average + (1 - decay) * weight; a sign or the order of the two is wrong",
    )


def average_not_updated(seen: Seen) -> Advice:
    if seen.efficiency is not None:
        return Advice(
            f"{_average(seen)} is updated, but moves by {fixed(seen.efficiency)} of what its decay says, which rounding does"
            " not explain",
            "check that every update is made, and with this decay",
        )
    finding = f"{_average(seen)} was not updated in {plural(seen.steps, 'step')} in which its weights moved"
    if seen.reason:
        return Advice(
            f"{finding}, and it was before",
            "look for what ended it: a condition, or an error that is caught (if it was to end, nothing is wrong)",
        )
    return Advice(
        finding,
        "call its update after the step (if it is to begin later, as SWA does, nothing is wrong), and check that the averaged copy is"
        " the one that was given to the watch",
    )


def _loss(seen: Seen) -> str:
    parts = []
    if seen.efficiency is not None:
        parts.append(f"efficiency {fixed(seen.efficiency)}")
    if seen.lost is not None:
        parts.append(f"{percent(seen.lost)} lost")
    return ", ".join(parts) or "share unknown"
