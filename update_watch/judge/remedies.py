"""What to change where tensors are not well, as far as it applies to them: in the words of the trainer, with its cost.

`cures` holds what each cure is and costs; here it is chosen. The cheapest that fits comes first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from update_watch.cures import BETAS, Cure, cures_for, switch
from update_watch.foresight.forecasts import Forecast
from update_watch.foresight.plan import can_stand_alone
from update_watch.foresight.what_if import cost_of
from update_watch.judge.advice import brief
from update_watch.judge.number_formats import FULL, smallest_rate
from update_watch.naming import family, group_words
from update_watch.report import Cause, TensorReport
from update_watch.wording import number, size


def remedy(
    cause: Cause | None,
    mine: Sequence[TensorReport],
    tensors: Sequence[TensorReport],
    trainer: str,
    advice: str,
    part: str = "",
) -> str:
    """What to change for the tensors `mine` of `tensors`, without capital or full stop; "" where there is nothing.

    `advice`: that of the worst of them. `part`: the accumulator it is about, "" for the weights.
    """
    if mine[0].dtype in FULL and not part:
        return _cure_of(advice)
    masters = switch(trainer, mine[0].dtype)
    trained = [t for t in tensors if t.trainable]
    if cause is Cause.weight_rounding:
        whole = f"keep FP32 master weights: {masters} (+{size(cost_of(Cure.masters, trained))})"
        option = "kahan_sum=True" if all("kahan_sum" in t.options for t in mine) else "optimi"
        kahan = f"Kahan summation ({option}, +{size(cost_of(Cure.kahan, trained))})"
        if can_stand_alone(mine, tensors):
            words = ", ".join(group_words([t.name for t in mine], {t.name: t.shape for t in tensors}, 3))
            alone = f"keep {words} in FP32 (+{size(cost_of(Cure.masters, mine))})"
            centred = ", or store norm weights zero-centred (w - 1)" if are_norms(mine) else ""
            return f"{alone}{centred}, or {whole}"
        return f"{whole}, or use stochastic rounding (torchao, +0 B) or {kahan}; then retune the learning rate"
    if cause is Cause.decay_rounding:
        whole = f"FP32 master weights: {masters} (+{size(cost_of(Cure.masters, trained))})"
        if Cure.fused_decay not in cures_for(cause.value, [t.options for t in mine]):
            return f"keep {whole}, or use stochastic rounding (torchao, +0 B)"
        return f"fused=True in the optimizer, which adds decay and gradient in one rounding (+0 B), or {whole}"
    if cause is Cause.state_rounding:
        floor = smallest_rate(mine[0].dtype)
        has_beta = all(any(name in t.options for name in BETAS) for t in mine)
        beta = f", or use a beta of at most {1 - floor:.4g} (+0 B)" if floor is not None and has_beta else ""
        return f"keep the optimizer state in FP32 (+{size(cost_of(Cure.fp32_states, mine))}){beta}"
    if cause is Cause.average_rounding:
        copies = [dataclasses.replace(t, dtype=t.accumulators[part].dtype) for t in mine if part in t.accumulators]
        return f"keep the averaged model in FP32 (+{size(cost_of(Cure.fp32_average, copies or mine))})"
    return _cure_of(advice)


def ahead(forecast: Forecast, mine: Sequence[TensorReport], tensors: Sequence[TensorReport], trainer: str) -> str:
    """What to change so that these will not stall, without capital or full stop."""
    trained = [t for t in tensors if t.trainable]
    masters = f"keep FP32 master weights: {switch(trainer, mine[0].dtype)} (+{size(cost_of(Cure.masters, trained))})"
    if forecast.floor is None:
        return masters
    return f"end the schedule at {number(forecast.floor)} or above (+0 B), or {masters}"


def are_norms(mine: Sequence[TensorReport]) -> bool:
    """Whether all of them are weights of norms."""
    return all(family(t.name, t.shape) == "norm" for t in mine)


def _cure_of(advice: str) -> str:
    parts = brief(advice).split("; ")
    return parts[1] if len(parts) > 1 else ""
