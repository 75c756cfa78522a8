"""What to change where tensors are not well, as far as it applies to them: in the words of the trainer, with its cost.

`cures` holds what each cure is and costs; here it is chosen. The cheapest that fits comes first.
"""

from __future__ import annotations

import numpy as np

from update_watch.columns.evidence_columns import having
from update_watch.cures import BETAS, Cure, cures_for, switch
from update_watch.foresight.forecasts import Forecast
from update_watch.foresight.plan import FEW
from update_watch.foresight.what_if import BITS
from update_watch.judge.advice import brief
from update_watch.judge.columns.codes import Rows
from update_watch.judge.columns.judged import Judged
from update_watch.judge.number_formats import FULL, smallest_rate
from update_watch.naming import family
from update_watch.report import Cause
from update_watch.wording import number, size


def remedy(cause: Cause | None, mine: Rows, judged: Judged, trainer: str, advice: str, part: str = "") -> str:
    """What to change for the tensors at the places `mine`, without capital or full stop; "" where there is nothing.

    `advice`: that of the worst of them. `part`: the accumulator it is about, "" for the weights.
    """
    dtype = judged.raw("dtype")[mine[0]]
    if dtype in FULL and not part:
        return _cure_of(advice)
    masters, trained = switch(trainer, dtype), judged.trainable
    if cause is Cause.weight_rounding:
        whole = f"keep FP32 master weights: {masters}{_price(judged.cost_of(Cure.masters, trained))}"
        option = "kahan_sum=True" if judged.having("options", _has_kahan)[mine].all() else "optimi"
        price = judged.cost_of(Cure.kahan, trained)
        kahan = f"Kahan summation ({option}{f', +{size(price)}' if price else ''})"
        if _can_stand_alone(judged, mine):
            alone = f"keep {', '.join(judged.words(mine))} in FP32{_price(judged.cost_of(Cure.masters, mine))}"
            centred = ", or store norm weights zero-centred (w - 1)" if are_norms(judged, mine) else ""
            return f"{alone}{centred}, or {whole}"
        return f"{whole}, or use stochastic rounding (torchao, +0 B) or {kahan}; then retune the learning rate"
    if cause is Cause.decay_rounding:
        whole = f"FP32 master weights: {masters}{_price(judged.cost_of(Cure.masters, trained))}"
        if Cure.fused_decay not in cures_for(cause.value, _options(judged, mine)):
            return f"keep {whole}, or use stochastic rounding (torchao, +0 B)"
        return f"fused=True in the optimizer, which adds decay and gradient in one rounding (+0 B), or {whole}"
    if cause is Cause.state_rounding:
        floor = smallest_rate(dtype)
        has_beta = all(any(name in options for name in BETAS) for options in _options(judged, mine))
        beta = f", or use a beta of at most {1 - floor:.4g} (+0 B)" if floor is not None and has_beta else ""
        return f"keep the optimizer state in FP32 (+{size(judged.cost_of(Cure.fp32_states, mine))}){beta}"
    if cause is Cause.average_rounding:
        return f"keep the averaged model in FP32 (+{size(_cost_of_average(judged, mine, part))})"
    return _cure_of(advice)


def ahead(forecast: Forecast, mine: Rows, judged: Judged, trainer: str) -> str:
    """What to change so that these will not stall, without capital or full stop."""
    cost = size(judged.cost_of(Cure.masters, judged.trainable))
    masters = f"keep FP32 master weights: {switch(trainer, judged.raw('dtype')[mine[0]])} (+{cost})"
    if forecast.floor is None:
        return masters
    return f"end the schedule at {number(forecast.floor)} or above (+0 B), or {masters}"


def are_norms(judged: Judged, mine: Rows) -> bool:
    """Whether all of them are weights of norms."""
    names, shapes = judged.names, judged.raw("shape")
    return all(family(names[place], shapes[place]) == "norm" for place in mine.tolist())


def _can_stand_alone(judged: Judged, mine: Rows) -> bool:
    """As `plan.can_stand_alone`."""
    if len(mine) == len(judged) or judged.numel(mine) > FEW * (judged.numel(judged.trainable) or 1):
        return False
    shapes = judged.raw("shape")
    return all(len(shapes[place]) == 1 for place in mine.tolist())


def _options(judged: Judged, mine: Rows) -> set[tuple[str, ...]]:
    options = judged.raw("options")
    return {options[place] for place in mine.tolist()}


def _has_kahan(options: tuple[str, ...]) -> bool:
    return "kahan_sum" in options


def _price(more: int) -> str:
    """Of formats of other than 16 bits it is not known."""
    return f" (+{size(more)})" if more else ""


def _cost_of_average(judged: Judged, mine: Rows, name: str) -> int:
    """By the format of the average, of those that have one of this name."""
    is_there, is_low = np.zeros(len(judged), bool), np.zeros(len(judged), bool)
    for part in judged.parts:
        if part.name == name:
            is_there[part.places] = True
            is_low[part.places] = having(part.raw("dtype"), BITS.__contains__)
    is_mine = np.isin(np.arange(len(judged)), mine) & is_there
    if is_mine.any():
        return judged.cost_of(Cure.fp32_average, is_mine, is_low)
    return judged.cost_of(Cure.fp32_average, mine)


def _cure_of(advice: str) -> str:
    parts = brief(advice).split("; ")
    return parts[1] if len(parts) > 1 else ""
