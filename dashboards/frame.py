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

from update_watch.dashboards.run_numbers import RunNumbers, run_numbers
from update_watch.foresight.divergence import Divergence
from update_watch.foresight.forecasts import Forecast
from update_watch.report import (
    HEADROOM_BINS,
    PLACES,
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
from update_watch.worker import unhurried

Floats = NDArray[np.float64]
Codes = NDArray[np.int8]

CAUSES: tuple[Cause, ...] = tuple(Cause)
NO_CODE = -1  # of a cause: none; of a health: there is no such accumulator


def _number_fields(cls: Any) -> tuple[str, ...]:
    """Names of the fields that hold a number or None (annotations are strings here)."""
    return tuple(f.name for f in dataclasses.fields(cls) if f.type in ("float | None", "int | None"))


TENSOR_NUMBERS = _number_fields(TensorReport)
ACCUMULATOR_NUMBERS = _number_fields(AccumulatorReport)
WHOLE_NUMBERS = frozenset({"since_step", "low_states"})


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
    options: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Columns:
    """Verdicts and numbers of all tensors, or of one accumulator of all tensors."""

    health: Codes  # index in SEVERITY: the smaller, the worse
    cause: Codes  # index in CAUSES
    numbers: Mapping[str, Floats]
    advice: Mapping[int, str]  # tensor index -> sentence; no entry where it is empty
    dtype: tuple[str, ...] = ()  # of an accumulator, per tensor


class Outlook(NamedTuple):
    """What a forecast says of the run as a whole."""

    until: int  # the schedule's last step
    headline: str
    course: tuple[tuple[int, float, float], ...]  # (step, efficiency, learning rate over that of now)
    error: float | None = None  # by how much 90% of the forecasts at half of the run so far were off by now
    made_at: int | None = None  # the step; of the run, as the following. Early journals have none of them
    stalling_share: float | None = None
    lost_share: float | None = None
    from_step: int | None = None
    floor: float | None = None


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
    movement: Floats | None  # the same, by intended^2
    places: Floats | None  # [P, PLACES]: of that, by quarter of an octave
    what_if: Mapping[str, Floats]
    accumulators: Mapping[str, Columns]
    has_layers: bool = True
    run: RunNumbers = RunNumbers()  # of the run as a whole; of several windows the mean
    outlook: Outlook | None = None  # of several windows the last; so is the following
    divergence: Divergence | None = None
    observed_steps: int | None = None  # in which something was measured
    cost_share: float | None = None  # of the time between steps, 0..1
    observed_at: int | None = None  # step of the last window of which anything was
    until: int | None = None  # step up to which its verdict stands, where nothing was looked at since; not in a journal

    @property
    def end(self) -> int:
        """The last step that it speaks of."""
        return self.step if self.until is None else self.until

    @property
    def begin(self) -> int:
        """The step before its first."""
        return self.step - self.window


# --- from and to reports ---------------------------------------------------------------------------


def frame_of(report: Report) -> Frame:
    """A report as columns."""
    tensors = report.tensors
    table = TensorTable(*(tuple(getattr(t, field) for t in tensors) for field in unhurried(TensorTable._fields)))
    names = dict.fromkeys(name for t in tensors for name in t.accumulators)
    formats = dict.fromkeys(name for t in tensors if t.what_if for name in t.what_if)
    columns = _columns(tensors, TENSOR_NUMBERS)
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
        tensors=columns,
        headroom=_histograms([t.headroom_histogram for t in tensors]),
        movement=_histograms([t.movement_histogram for t in tensors]),
        places=_histograms([t.movement_places for t in tensors], PLACES),
        what_if={name: _floats([(t.what_if or {}).get(name) for t in tensors]) for name in formats},
        accumulators={
            name: _columns([t.accumulators.get(name) for t in tensors], ACCUMULATOR_NUMBERS, has_dtype=True)
            for name in names
        },
        has_layers=bool(report.layers),
        run=run_numbers(table.numel, columns.health, columns.numbers),
        outlook=_outlook(report),
        divergence=report.divergence,
        observed_steps=report.observed_steps,
        cost_share=report.cost_share,
        observed_at=report.observed_at,
    )


def _outlook(report: Report) -> Outlook | None:
    found = report.forecast
    if found is None:
        return None
    shares = found.stalling_share, found.lost_share
    said = found.until, found.headline, found.course, found.error
    return Outlook(*said, found.step, *shares, found.from_step, found.floor)


def _forecast(found: Outlook | None, step: int) -> Forecast | None:
    """Without its tensors, which journals do not keep."""
    if found is None or found.stalling_share is None or found.lost_share is None:
        return None
    return Forecast(
        step=step if found.made_at is None else found.made_at,
        until=found.until,
        tensors=(),
        stalling_share=found.stalling_share,
        lost_share=found.lost_share,
        from_step=found.from_step,
        floor=found.floor,
        headline=found.headline,
        error=found.error,
        course=found.course,
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
                movement_histogram=_histogram(frame.movement, i),
                movement_places=_histogram(frame.places, i),
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
        observed_steps=frame.observed_steps,
        cost_share=frame.cost_share,
        observed_at=frame.observed_at,
        forecast=_forecast(frame.outlook, frame.step),
        divergence=frame.divergence,
    )


def _columns(items: Sequence[Any], numbers: Sequence[str], has_dtype: bool = False) -> Columns:
    return Columns(
        health=np.array([NO_CODE if x is None else SEVERITY.index(x.health) for x in items], dtype=np.int8),
        cause=np.array(
            [NO_CODE if x is None or x.cause is None else CAUSES.index(x.cause) for x in items], dtype=np.int8
        ),
        numbers={
            name: _floats([None if x is None else getattr(x, name) for x in items]) for name in unhurried(numbers)
        },
        advice={i: x.advice for i, x in enumerate(items) if x is not None and x.advice},
        dtype=tuple("" if x is None else x.dtype for x in items) if has_dtype else (),
    )


def _floats(values: Sequence[float | None]) -> Floats:
    array = np.array(values, dtype=np.float64)  # None becomes NaN
    array[np.isinf(array)] = np.nan
    return array


def _histograms(found: Sequence[tuple[float, ...] | None], bins: int = HEADROOM_BINS) -> Floats | None:
    if all(histogram is None for histogram in found):
        return None
    rows = np.full((len(found), bins), np.nan)
    for i, histogram in enumerate(unhurried(found)):
        if histogram is not None:
            rows[i] = histogram
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


def _histogram(rows: Floats | None, i: int) -> tuple[float, ...] | None:
    if rows is None or np.isnan(rows[i]).any():
        return None
    return tuple(rows[i].tolist())


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
