"""The cheapest set of changes after which nothing is lost to rounding any more, of the cures that `cures` knows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from update_watch.cures import FOR_CAUSE, TITLES, Cure, cures_for
from update_watch.foresight.forecasts import Change, Plan
from update_watch.foresight.what_if import cost_of, in_fp32
from update_watch.naming import group_words
from update_watch.report import Cause, Health, Report, TensorReport, weighted_mean
from update_watch.wording import fixed, size

FEW = 0.01  # share of the parameters that may be kept in FP32 alone, beside the others
_UNWELL = (Health.stalled, Health.stalling)
_BESIDE = (Cure.fp32_states, Cure.fp32_average)  # they change what lies beside the weights
_OF_BF16 = (Cure.stochastic_rounding, Cure.kahan)  # what packages have them for


class _Loss(NamedTuple):
    """What is lost of one tensor, or of what accumulates beside it."""

    tensor: TensorReport
    efficiency: float | None
    accumulator: str = ""  # the state or average; "" for the weight


class _Option(NamedTuple):
    cure: Cure
    is_alone: bool  # for the tensors that are not well, and no others


def plan(report: Report, without: Iterable[str] = ()) -> Plan:
    """The cheapest set of changes: by bytes, then by how many there are. Empty where nothing is lost.

    `without`: cures (values of `cures.Cure`, or one alone) that are out of the question.

    Raises:
        ValueError: `without` names no cure, or leaves none for something that is not well.
    """
    excluded = _named([without] if isinstance(without, str) else without)
    losses = _losses(report.tensors)
    choices = []
    for cause, members in losses.items():
        fitting = [option for option in _options(cause, members, report.tensors) if option.cure not in excluded]
        if not fitting:
            raise ValueError(
                f"plan(without={sorted(map(str, excluded))}) leaves no cure for {cause}; allow one of"
                f" {', '.join(option.cure for option in _options(cause, members, report.tensors))}"
            )
        choices.append(fitting)
    plans = [
        _changes(dict(zip(losses, chosen, strict=True)), losses, report.tensors)
        for chosen in itertools.product(*choices)
    ]
    best = min(plans, key=lambda changes: (sum(change.bytes for change in changes), len(changes)))
    total = sum(change.bytes for change in best)
    return Plan(tuple(best), total, _text(best, total, report.tensors))


def _named(names: Iterable[str]) -> set[Cure]:
    known = {cure.value: cure for cure in Cure}
    names = list(map(str, names))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"plan(without={unknown}) must name some of {', '.join(known)}")
    return {known[name] for name in names}


def can_stand_alone(mine: Sequence[TensorReport], tensors: Sequence[TensorReport]) -> bool:
    """Whether these can be kept in FP32 beside the others: few elements, none that is multiplied as a matrix."""
    trained = sum(t.numel for t in tensors if t.trainable) or 1
    few = sum(t.numel for t in mine) <= FEW * trained
    return few and all(len(t.shape) == 1 for t in mine) and any(t not in mine for t in tensors)


def _losses(tensors: Iterable[TensorReport]) -> dict[Cause, list[_Loss]]:
    """Of all that precision can cure."""
    found: dict[Cause, list[_Loss]] = {}
    for t in tensors:
        if t.health in _UNWELL and t.cause is not None and t.cause in FOR_CAUSE:
            found.setdefault(t.cause, []).append(_Loss(t, t.efficiency))
        for a in t.accumulators.values():
            if a.health in _UNWELL and a.cause is not None and a.cause in FOR_CAUSE:
                found.setdefault(a.cause, []).append(_Loss(t, a.efficiency, a.name))
    return found


def _options(cause: Cause, members: list[_Loss], tensors: Sequence[TensorReport]) -> list[_Option]:
    mine = [loss.tensor for loss in members]
    is_bf16 = all(t.dtype == "bfloat16" for t in mine)
    found = [
        _Option(cure, False) for cure in cures_for(cause, [t.options for t in mine]) if is_bf16 or cure not in _OF_BF16
    ]
    if cause is Cause.weight_rounding and can_stand_alone(mine, tensors):
        found.append(_Option(Cure.masters, True))
    return found


def _changes(
    chosen: Mapping[Cause, _Option], losses: Mapping[Cause, list[_Loss]], tensors: Sequence[TensorReport]
) -> list[Change]:
    """One for each cure, however many causes it is for."""
    whole = [t for t in tensors if t.trainable]
    found = []
    for cure in dict.fromkeys(option.cure for option in chosen.values()):
        causes = [cause for cause, option in chosen.items() if option.cure is cure]
        lost = [loss for cause in causes for loss in losses[cause]]
        mine = {loss.tensor.name: loss.tensor for loss in lost}
        is_alone = all(chosen[cause].is_alone for cause in causes) or cure in _BESIDE
        cost = cost_of(cure, mine.values() if is_alone else whole)
        title = "keep these alone in FP32" if cure is Cure.masters and is_alone else TITLES[cure]
        now = weighted_mean((loss.efficiency, loss.tensor.numel) for loss in lost)
        then = weighted_mean(
            (_cured(cure, cause, loss), loss.tensor.numel) for cause in causes for loss in losses[cause]
        )
        names = dict.fromkeys(loss.accumulator for loss in lost if loss.accumulator) if cure in _BESIDE else {}
        found.append(Change(cure, title, tuple(map(str, causes)), tuple(mine), now, then, cost, tuple(names)))
    return found


def _cured(cure: Cure, cause: Cause, loss: _Loss) -> float | None:
    """Its efficiency then: what FP32 holds of these updates; of rounding at random, a remainder or an FP32 sum, all."""
    return in_fp32(loss.tensor) if cause is Cause.weight_rounding and cure is Cure.masters else 1.0


def _text(changes: Sequence[Change], total: int, tensors: Sequence[TensorReport]) -> str:
    if not changes:
        return "Nothing has to be changed: nothing is known to be lost to rounding."
    shapes = {t.name: t.shape for t in tensors}
    lines = [
        f"{change.title} (+{size(change.bytes)}): {_of(change)}{', '.join(group_words(change.tensors, shapes, 3))} from efficiency"
        f" {fixed(change.efficiency)} to {fixed(change.cured)}"
        for change in changes
    ]
    lines = [f"{line[:1].upper()}{line[1:]}." for line in lines]
    return "\n".join(lines if len(lines) == 1 else [*lines, f"+{size(total)} in all."])


def _of(change: Change) -> str:
    return f"{' and '.join(change.accumulators)} of " if change.accumulators else ""
