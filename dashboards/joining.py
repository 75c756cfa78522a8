"""Joining windows: what many windows say in the place of one, so that a run of any length is of bounded size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from update_watch.dashboards.frame import NO_CODE, Codes, Columns, Floats, Frame
from update_watch.dashboards.run_numbers import mean_of
from update_watch.report import SEVERITY, Health, weighted_mean

# Where several windows are joined, each tensor keeps its worst one: a stall is never hidden. "unknown" does not
# hide what was measured before or after it.
_KEEPING_ORDER = (
    Health.broken,
    Health.stalled,
    Health.stalling,
    Health.idle,
    Health.healthy,
    Health.unknown,
    Health.frozen,
)
_KEEPING_RANK = np.array([_KEEPING_ORDER.index(h) for h in SEVERITY], dtype=np.int8)


def join(first: Frame, second: Frame) -> Frame:
    """One frame for two neighbours of the same tensors: each tensor (and accumulator) as in the worse of the two.

    Alerts are kept, all of them. Time and step are those of the second; cost and numbers of the run are means.
    """
    takes_first = _is_worse(first.tensors, second.tensors)
    worse = first if SEVERITY.index(first.health) < SEVERITY.index(second.health) else second
    windows = first.windows + second.windows
    costs = [(f.cost_ms, f.windows) for f in (first, second)]
    shares = [(f.cost_share, f.windows) for f in (first, second)]
    seen = [f.observed_steps for f in (first, second) if f.observed_steps is not None]
    return Frame(
        step=second.step,
        window=first.window + second.window,
        windows=windows,
        time=second.time,
        health=worse.health,
        headline=worse.headline,
        cost_ms=weighted_mean(costs),
        skipped_steps=first.skipped_steps + second.skipped_steps,
        alerts=first.alerts + second.alerts,
        table=second.table,
        tensors=_pick(takes_first, first.tensors, second.tensors),
        headroom=_pick_optional(takes_first, first.headroom, second.headroom),
        movement=_pick_optional(takes_first, first.movement, second.movement),
        places=_pick_optional(takes_first, first.places, second.places),
        what_if=_pick_each(takes_first, first.what_if, second.what_if),
        accumulators=_join_accumulators(first.accumulators, second.accumulators),
        has_layers=first.has_layers or second.has_layers,
        run=mean_of((first.run, second.run), (first.windows, second.windows)),
        outlook=second.outlook,
        divergence=second.divergence,
        observed_steps=sum(seen) if len(seen) == 2 else None,
        cost_share=weighted_mean(shares),
        observed_at=second.observed_at,
    )


def _is_worse(first: Columns, second: Columns) -> NDArray[np.bool_]:
    """Where `first` is worse than `second`, or equally healthy with a lower efficiency."""
    rank_a, rank_b = _rank(first.health), _rank(second.health)
    low_a, low_b = (np.nan_to_num(c.numbers["efficiency"], nan=np.inf) for c in (first, second))
    worse: NDArray[np.bool_] = (rank_a < rank_b) | ((rank_a == rank_b) & (low_a < low_b))
    return worse


def _rank(health: Codes) -> Codes:
    return np.where(health == NO_CODE, np.int8(len(SEVERITY)), _KEEPING_RANK[health])


def _pick(takes_first: NDArray[np.bool_], first: Columns, second: Columns) -> Columns:
    advice = {i: text for i, text in first.advice.items() if takes_first[i]}
    advice.update((i, text) for i, text in second.advice.items() if not takes_first[i])
    dtype = second.dtype
    if first.dtype != second.dtype:
        dtype = tuple(a if take else b for take, a, b in zip(takes_first, first.dtype, second.dtype, strict=True))
    return Columns(
        health=np.where(takes_first, first.health, second.health),
        cause=np.where(takes_first, first.cause, second.cause),
        numbers=_pick_each(takes_first, first.numbers, second.numbers),
        advice=advice,
        dtype=dtype,
    )


def _pick_each(takes_first: NDArray[np.bool_], a: Mapping[str, Floats], b: Mapping[str, Floats]) -> dict[str, Floats]:
    nothing = np.full(len(takes_first), np.nan)
    return {name: np.where(takes_first, a.get(name, nothing), b.get(name, nothing)) for name in {**a, **b}}


def _pick_optional(takes_first: NDArray[np.bool_], a: Floats | None, b: Floats | None) -> Floats | None:
    if a is None and b is None:
        return None
    nothing = np.full_like(b if a is None else a, np.nan)
    return np.where(takes_first[:, None], nothing if a is None else a, nothing if b is None else b)


def _join_accumulators(first: Mapping[str, Columns], second: Mapping[str, Columns]) -> dict[str, Columns]:
    joined = {}
    for name in {**first, **second}:
        a, b = first.get(name), second.get(name)
        if a is None or b is None:
            only = a or b
            assert only is not None
            joined[name] = only
        else:
            joined[name] = _pick(_is_worse(a, b), a, b)
    return joined
