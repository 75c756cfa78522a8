"""A window as columns: what a report holds, as one array per quantity instead of one object per tensor.

The journal stores columns and the HTML report computes with them; thousands of tensors over thousands of windows
would be slow as objects. P is the number of tensors. NaN stands for "not known".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from update_watch.report import (
    HEADROOM_BINS,
    SEVERITY,
    AccumulatorReport,
    Alert,
    Cause,
    Health,
    LayerReport,
    Report,
    TensorReport,
    weighted_mean,
)

Floats = NDArray[np.float64]
Codes = NDArray[np.int8]

CAUSES: tuple[Cause, ...] = tuple(Cause)
NO_CODE = -1  # of a cause: none; of a health: there is no such accumulator


def _number_fields(cls: Any) -> tuple[str, ...]:
    """Names of the fields that hold a number or None (annotations are strings here)."""
    return tuple(f.name for f in dataclasses.fields(cls) if f.type in ("float | None", "int | None"))


TENSOR_NUMBERS = _number_fields(TensorReport)
ACCUMULATOR_NUMBERS = _number_fields(AccumulatorReport)
WHOLE_NUMBERS = frozenset({"since_step"})

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


class TensorTable(NamedTuple):
    """What does not change from window to window: one entry per tensor in each column."""

    name: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    layer: tuple[str, ...]
    optimizer_group: tuple[str, ...]
    dtype: tuple[str, ...]
    shape: tuple[tuple[int, ...], ...]
    numel: tuple[int, ...]
    trainable: tuple[bool, ...]
    scheme: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Columns:
    """Verdicts and numbers of all tensors, or of one accumulator of all tensors."""

    health: Codes  # index in SEVERITY: the smaller, the worse
    cause: Codes  # index in CAUSES
    numbers: Mapping[str, Floats]
    advice: Mapping[int, str]  # tensor index -> sentence; no entry where it is empty
    dtype: tuple[str, ...] = ()  # of an accumulator, per tensor


@dataclasses.dataclass(frozen=True)
class Frame:
    """One window, or several joined to one."""

    step: int  # optimizer step at its end
    window: int  # optimizer steps in it
    windows: int  # closed windows it was joined from
    time: float  # seconds since the epoch
    health: Health
    headline: str
    cost_ms: float | None  # per optimizer step (ms)
    skipped_steps: int
    alerts: tuple[Alert, ...]
    table: TensorTable
    tensors: Columns
    headroom: Floats | None  # [P, HEADROOM_BINS], NaN rows where not known
    what_if: Mapping[str, Floats]
    accumulators: Mapping[str, Columns]
    has_layers: bool = True

    @property
    def begin(self) -> int:
        """The step before its first."""
        return self.step - self.window


# --- from and to reports ---------------------------------------------------------------------------


def frame_of(report: Report) -> Frame:
    """A report as columns."""
    tensors = report.tensors
    table = TensorTable(*(tuple(getattr(t, field) for t in tensors) for field in TensorTable._fields))
    names = dict.fromkeys(name for t in tensors for name in t.accumulators)
    formats = dict.fromkeys(name for t in tensors if t.what_if for name in t.what_if)
    return Frame(
        step=report.step,
        window=report.window,
        windows=1,
        time=report.time,
        health=report.health,
        headline=report.headline,
        cost_ms=report.cost_ms,
        skipped_steps=report.skipped_steps,
        alerts=report.alerts,
        table=table,
        tensors=_columns(tensors, TENSOR_NUMBERS),
        headroom=_headroom(tensors),
        what_if={name: _floats([(t.what_if or {}).get(name) for t in tensors]) for name in formats},
        accumulators={
            name: _columns([t.accumulators.get(name) for t in tensors], ACCUMULATOR_NUMBERS, has_dtype=True)
            for name in names
        },
        has_layers=bool(report.layers),
    )


def report_of(frame: Frame) -> Report:
    """The report again; of joined windows each tensor's worst."""
    table = frame.table
    per_accumulator = {name: _accumulators(name, columns) for name, columns in frame.accumulators.items()}
    numbers = {name: _optional(values, name) for name, values in frame.tensors.numbers.items()}
    what_if = {name: _optional(values, name) for name, values in frame.what_if.items()}
    tensors = []
    for i, identity in enumerate(zip(*table, strict=True)):
        guesses = {name: values[i] for name, values in what_if.items() if values[i] is not None}
        tensors.append(
            TensorReport(
                **dict(zip(TensorTable._fields, identity, strict=True)),
                health=SEVERITY[frame.tensors.health[i]],
                cause=_cause(frame.tensors.cause[i]),
                advice=frame.tensors.advice.get(i, ""),
                headroom_histogram=_histogram(frame.headroom, i),
                accumulators={name: a for name, found in per_accumulator.items() if (a := found[i]) is not None},
                what_if=guesses or None,
                **{name: values[i] for name, values in numbers.items()},
            )
        )
    return Report(
        step=frame.step,
        window=frame.window,
        health=frame.health,
        headline=frame.headline,
        tensors=tuple(tensors),
        layers=_layers(tensors) if frame.has_layers else (),
        alerts=frame.alerts,
        time=frame.time,
        cost_ms=frame.cost_ms,
        skipped_steps=frame.skipped_steps,
    )


def _columns(items: Sequence[Any], numbers: Sequence[str], has_dtype: bool = False) -> Columns:
    return Columns(
        health=np.array([NO_CODE if x is None else SEVERITY.index(x.health) for x in items], dtype=np.int8),
        cause=np.array(
            [NO_CODE if x is None or x.cause is None else CAUSES.index(x.cause) for x in items], dtype=np.int8
        ),
        numbers={name: _floats([None if x is None else getattr(x, name) for x in items]) for name in numbers},
        advice={i: x.advice for i, x in enumerate(items) if x is not None and x.advice},
        dtype=tuple("" if x is None else x.dtype for x in items) if has_dtype else (),
    )


def _floats(values: Sequence[float | None]) -> Floats:
    array = np.array(values, dtype=np.float64)  # None becomes NaN
    array[np.isinf(array)] = np.nan
    return array


def _headroom(tensors: Sequence[TensorReport]) -> Floats | None:
    if all(t.headroom_histogram is None for t in tensors):
        return None
    rows = np.full((len(tensors), HEADROOM_BINS), np.nan)
    for i, tensor in enumerate(tensors):
        if tensor.headroom_histogram is not None:
            rows[i] = tensor.headroom_histogram
    return rows


def _accumulators(name: str, columns: Columns) -> list[AccumulatorReport | None]:
    numbers = {field: _optional(values, field) for field, values in columns.numbers.items()}
    found: list[AccumulatorReport | None] = []
    for i, code in enumerate(columns.health):
        if code == NO_CODE:
            found.append(None)
            continue
        values: dict[str, Any] = {field: column[i] for field, column in numbers.items()}
        health, cause = SEVERITY[code], _cause(columns.cause[i])
        found.append(
            AccumulatorReport(name, columns.dtype[i], health, cause=cause, advice=columns.advice.get(i, ""), **values)
        )
    return found


def _optional(values: Floats, name: str) -> list[Any]:
    convert = int if name in WHOLE_NUMBERS else float
    return [None if math.isnan(v) else convert(v) for v in values.tolist()]


def _cause(code: int) -> Cause | None:
    return None if code == NO_CODE else CAUSES[code]


def _histogram(headroom: Floats | None, i: int) -> tuple[float, ...] | None:
    if headroom is None or np.isnan(headroom[i]).any():
        return None
    return tuple(headroom[i].tolist())


def _layers(tensors: Sequence[TensorReport]) -> tuple[LayerReport, ...]:
    layers: dict[str, list[TensorReport]] = {}
    for tensor in tensors:
        layers.setdefault(tensor.layer, []).append(tensor)
    found = []
    for name, members in layers.items():
        worst = min((t.health for t in members), key=SEVERITY.index)
        names = tuple(t.name for t in members if t.health is worst)
        found.append(LayerReport(name, worst, names, weighted_mean((t.efficiency, t.numel) for t in members)))
    return tuple(found)


# --- joining windows ---------------------------------------------------------------------------------


def join(first: Frame, second: Frame) -> Frame:
    """One frame for two neighbours of the same tensors: each tensor (and accumulator) as in the worse of the two.

    Alerts are kept, all of them. Time and step are those of the second; the cost is the mean over windows.
    """
    takes_first = _is_worse(first.tensors, second.tensors)
    worse = first if SEVERITY.index(first.health) < SEVERITY.index(second.health) else second
    windows = first.windows + second.windows
    costs = [(f.cost_ms, f.windows) for f in (first, second)]
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
        what_if=_pick_each(takes_first, first.what_if, second.what_if),
        accumulators=_join_accumulators(first.accumulators, second.accumulators),
        has_layers=first.has_layers or second.has_layers,
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
    nothing = np.full((len(takes_first), HEADROOM_BINS), np.nan)
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
