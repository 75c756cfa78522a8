"""A whole run in bounded size: what the HTML report is drawn from.

Windows are joined to spans of about equal length, `SPANS` to twice as many, each tensor as in its worst window of the
span: a stall of one window stays visible in a run of any length. Values of the run as a whole are means over a span.
P is the number of tensors, H the number of spans; NaN stands for "not known".
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from update_watch.dashboards.frame import TENSOR_NUMBERS, Columns, Floats, Frame, Outlook, TensorTable, frame_of
from update_watch.dashboards.joining import join
from update_watch.dashboards.journal.lines import AT_MOVEMENT
from update_watch.dashboards.journal.reader import JournalReader
from update_watch.dashboards.journal.scanning import WHOLE
from update_watch.dashboards.journal.thinning import window_steps
from update_watch.dashboards.report.cases import MOST
from update_watch.dashboards.run_numbers import RunNumbers, mean_of
from update_watch.dashboards.unseen import standing
from update_watch.report import SEVERITY, Alert, Health, Report

SPANS = 200
MOST_VALUES = 20_000_000  # tensors x spans: of a model of more than 100,000 tensors a point stands for more windows
_FORETOLD = 0.2  # of the schedule
ABSENT = len(SEVERITY)  # in `health_PH`: the tensor was not watched
# per tensor: what is drawn over the run. "margin" is the learning rate over the critical one
SERIES = (
    "efficiency",
    "update_ratio",
    "applied_ratio",
    "lr",
    "margin",
    "gradient_rms",
    "gradient_spread",
    "copy_changed",
)
# of every window; the last is read as a whole
_READ = frozenset(SERIES) & {*TENSOR_NUMBERS} | {"critical_lr", "state_factor"}
# of the last window of very many tensors, and of what is kept beside them
_DRAWN = _READ | {
    "displacement_efficiency",
    "lost_fraction",
    "wanted_fraction",
    "since_step",
    "low_states",
    "growth_efficiency",
    "decay_efficiency",
}


class Ranges(NamedTuple):
    """What may leave its range, of a span. NaN stands for "not known"."""

    state: float  # state factor, the median of the tensors
    room: float  # doublings of the largest FP16 gradient up to infinity, in the last window
    skipped: float  # share of the steps, 0..1


@dataclasses.dataclass(frozen=True)
class History:
    """A run from its first to its last window."""

    name: str
    table: TensorTable  # every tensor the run had
    last: Frame
    spans: tuple[tuple[int, int], ...]  # (the step before, the last step)
    times: tuple[float, ...]  # when each span ended, seconds since the epoch
    windows: int  # closed windows in all
    health_PH: NDArray[np.int8]  # index in SEVERITY, or ABSENT
    series_PH: Mapping[str, NDArray[np.float32]]  # by name, those of SERIES
    run_H: tuple[RunNumbers, ...]  # means over a span
    ranges_H: tuple[Ranges, ...]
    alerts: tuple[Alert, ...]
    damaged: int = 0  # journal lines that could not be read
    missing: int = 0  # windows that could not be written
    ends_at: int | None = None  # step at which the journal ends, where the last window is not in it
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    foretold: Outlook | None = None  # the first forecast from a fifth of the schedule on

    @property
    def first_step(self) -> int:
        return self.spans[0][0]

    @property
    def last_step(self) -> int:
        return max(self.last.end, self.spans[-1][1])

    @property
    def windows_per_span(self) -> int:
        """Windows a column of a chart stands for, rounded."""
        return max(1, round(self.windows / len(self.spans)))

    @property
    def gaps(self) -> list[int]:
        """The spans before which there is nothing for longer than two of them: windows that could not be written, or were not seen.

        By what lies between windows in general: steps are numbered as the trainer does, not always one by one.
        """
        begins, ends = np.array(self.spans, dtype=np.float64).T
        usual = float(np.median(np.diff(ends))) if len(ends) > 2 else math.inf
        found: list[int] = (np.flatnonzero(begins[1:] - ends[:-1] > 2 * usual) + 1).tolist()
        return found

    def of_run(self, name: str) -> Floats:
        """One of the run's numbers per span, (H,)."""
        return np.array([getattr(numbers, name) for numbers in self.run_H], dtype=np.float64)


def read_history(
    path: str | os.PathLike[str], name: str | None = None, spans: int = SPANS, last: Report | None = None
) -> History:
    """The history in a journal. Where a run was resumed from an earlier checkpoint, the later windows count.

    `last`: the run's last report, which may be missing in the journal, as where the disk was full.

    Raises:
        JournalError: not a journal, or of a newer version; EmptyJournalError: without a window so far.
        OSError: it cannot be read.
    """
    path = Path(path)
    kept: dict[int, int] = {}  # line number -> step
    earliest: float = float("inf")
    numbered = window_steps(path)
    ends_at = numbered[-1][1] if numbered else None
    if last is None or last.step == ends_at:
        last = ends_at = None
    else:
        earliest = last.step
    for number, step, _ in reversed(numbered):
        if step < earliest:
            earliest, kept[number] = step, step
    reader = JournalReader(path)
    at = [*kept.values(), *([] if last is None else [last.step])]
    builder = _Builder(min(at, default=0), max(at, default=0), spans)
    behind = {number for number, _, _ in numbered}.difference(kept)  # of a run before it was resumed
    for frame in standing(reader.frames(lambda number: number not in behind, _READ)):
        builder.add(frame)
    label = name or str(reader.run.get("name") or path.stem)
    if last is not None:
        builder.add(frame_of(last))
        return builder.finish(label, reader, ends_at)
    if builder.last is None:
        raise reader.without_windows()
    # only the state at the end is shown in full, and of very many tensors no what-if, which asks for all there is
    is_asked = len(builder.last.table.name) <= MOST
    end, drawn = (WHOLE, None) if is_asked else (AT_MOVEMENT, _DRAWN)
    builder.last = reader.newest(builder.last, end, drawn)
    return builder.finish(label, reader)


def history_of(
    reports: Sequence[Report], name: str = "run", spans: int = SPANS, run: Mapping[str, Any] | None = None
) -> History:
    """The history in reports.

    Raises:
        ValueError: there is none.
    """
    if not reports:
        raise ValueError(f"history_of(reports=[], name={name!r}): at least one report is needed.")
    kept: list[Report] = []
    for report in reversed(reports):
        if not kept or report.step < kept[-1].step:
            kept.append(report)
    builder = _Builder(kept[-1].step, kept[0].step, spans)
    for frame in standing(map(frame_of, reversed(kept))):
        builder.add(frame)
    return dataclasses.replace(builder.finish(name), run=run or {})


class _Builder:
    """Takes frames in order of step and holds no more than a span of them."""

    def __init__(self, first: int, last: int, spans: int) -> None:
        self._steps, self._most = last - first, spans
        self._length: float | None = None  # steps of a span
        self._tables: list[TensorTable] = []
        self._spans: list[_Span] = []
        self._held: Frame | None = None
        self._runs: list[tuple[RunNumbers, int]] = []  # of the windows in `_held`
        self._alerts: list[Alert] = []
        self._windows = 0
        self._foretold: Outlook | None = None
        self.last: Frame | None = None

    def add(self, frame: Frame) -> None:
        self.last = frame = dataclasses.replace(frame, table=self._one_of_it(frame.table))
        if frame.until is not None:  # it is there already
            return
        if self._length is None:
            spans = min(self._most, max(8, MOST_VALUES // max(1, len(frame.table.name))))
            self._length = max(1.0, self._steps / max(1, spans - 1))
        held = self._held
        fits = held is not None and held.table is frame.table and frame.step - held.begin <= self._length
        if held is not None and fits:
            self._held = join(held, frame)
        else:
            self._close()
            self._held = frame
        self._runs.append((frame.run, frame.windows))
        self._alerts += frame.alerts
        self._windows += frame.windows
        if self._foretold is None and frame.outlook is not None and frame.step >= _FORETOLD * frame.outlook.until:
            self._foretold = frame.outlook

    def finish(self, name: str, reader: JournalReader | None = None, ends_at: int | None = None) -> History:
        self._close()
        assert self.last is not None
        table, places = _union(self._tables, self.last.table)
        shape = (len(table.name), len(self._spans))
        health = np.full(shape, ABSENT, dtype=np.int8)
        series = {key: np.full(shape, np.nan, dtype=np.float32) for key in SERIES}
        for h, span in enumerate(self._spans):
            at = places[id(span.table)]
            health[at, h] = span.health
            for key, values in span.series.items():
                series[key][at, h] = values
        return History(
            name=name,
            table=table,
            last=self.last,
            spans=tuple(span.steps for span in self._spans),
            times=tuple(span.time for span in self._spans),
            windows=self._windows,
            health_PH=health,
            series_PH=series,
            run_H=tuple(span.run for span in self._spans),
            ranges_H=tuple(span.ranges for span in self._spans),
            alerts=tuple(self._alerts),
            damaged=0 if reader is None else len(reader.damaged),
            missing=0 if reader is None else reader.missing,
            ends_at=ends_at,
            run={} if reader is None else reader.run,
            foretold=self._foretold,
        )

    def _one_of_it(self, table: TensorTable) -> TensorTable:
        """The same object for the same tensors: comparing and hashing a million names takes its time."""
        for known in self._tables:
            if known is table or known == table:
                return known
        self._tables.append(table)
        return table

    def _close(self) -> None:
        frame = self._held
        if frame is not None:
            run = mean_of([numbers for numbers, _ in self._runs], [windows for _, windows in self._runs])
            steps = (frame.begin, frame.step)
            self._spans.append(
                _Span(steps, frame.time, frame.table, frame.tensors.health, _series(frame), run, _ranges(frame))
            )
            self._held, self._runs = None, []


@dataclasses.dataclass(frozen=True)
class _Span:
    steps: tuple[int, int]
    time: float
    table: TensorTable
    health: NDArray[np.int8]
    series: Mapping[str, NDArray[np.float32]]
    run: RunNumbers
    ranges: Ranges


def _ranges(frame: Frame) -> Ranges:
    factors = frame.tensors.numbers["state_factor"]
    factors = factors[factors > 0]
    room = None if frame.divergence is None else frame.divergence.overflow_doublings
    return Ranges(
        float(np.median(factors)) if len(factors) else np.nan,
        np.nan if room is None else room,
        frame.skipped_steps / max(1, frame.window, frame.skipped_steps),
    )


def _series(frame: Frame) -> dict[str, NDArray[np.float32]]:
    numbers = frame.tensors.numbers
    found = {key: numbers[key] for key in SERIES if key in numbers} | {"margin": margin(frame.tensors)}
    return {key: _single(values) for key, values in found.items()}


def _single(values: Floats) -> NDArray[np.float32]:
    """In four bytes each; what they do not hold is of a damaged file, and not known."""
    with np.errstate(over="ignore"):
        found = values.astype(np.float32)
    found[np.isinf(found)] = np.nan
    return found


def margin(tensors: Columns) -> Floats:
    """Learning rate over the one at which half of a tensor's updates are lost, (P,): under 1 more than half is lost."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios: Floats = tensors.numbers["lr"] / tensors.numbers["critical_lr"]
    ratios[~np.isfinite(ratios)] = np.nan
    return ratios


def headroom_weights(frame: Frame) -> Floats:
    """Wanted elements per tensor: the weight of its headroom."""
    wanted = np.nan_to_num(frame.tensors.numbers["wanted_fraction"], nan=1.0)
    weights: Floats = np.array(frame.table.numel, dtype=np.float64) * wanted
    return weights


def _union(tables: Sequence[TensorTable], last: TensorTable) -> tuple[TensorTable, dict[int, NDArray[np.intp]]]:
    """All tensors that ever were, those of the last window first, and where those of each table (by `id`) stand in it."""
    if all(table is last for table in tables):  # nearly always
        return last, {id(last): np.arange(len(last.name))}
    places: dict[str, int] = {name: i for i, name in enumerate(last.name)}
    columns: list[list[Any]] = [list(column) for column in last]
    for table in tables:
        for i, name in enumerate(table.name):
            if name not in places:
                places[name] = len(places)
                for column, source in zip(columns, table, strict=True):
                    column.append(source[i])
    merged: list[Any] = [tuple(column) for column in columns]
    union = last if len(places) == len(last.name) else TensorTable(*merged)
    return union, {id(table): np.array([places[name] for name in table.name], dtype=np.intp) for table in tables}


def accumulator_names(frame: Frame) -> list[str]:
    """Those that some tensor has, optimizer states first, then decay, averages, gradients."""
    order = {"weight_decay": 1, "grad": 3}
    return sorted(frame.accumulators, key=lambda name: 2 if name.startswith("average:") else order.get(name, 0))


def efficiency_of(columns: Columns) -> Floats:
    """The efficiency that decides: the lower of growth and decay where they are told apart."""
    parts = [columns.numbers[key] for key in ("efficiency", "growth_efficiency", "decay_efficiency")]
    stacked = np.where(np.isnan(parts), np.inf, parts).min(axis=0)
    return np.where(np.isinf(stacked), np.nan, stacked)


def is_unwell(health: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Broken, stalled or stalling."""
    found: NDArray[np.bool_] = health <= SEVERITY.index(Health.stalling)
    return found
