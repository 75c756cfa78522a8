"""The rows of the report's table of tensors, as compact data for its script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from update_watch.dashboards.frame import CAUSES, NO_CODE, Columns, Floats
from update_watch.dashboards.report.history import History, margin
from update_watch.dashboards.report.traces import run_traces
from update_watch.naming import without_prefix
from update_watch.report import SEVERITY
from update_watch.wording import cause_label

MOST_ROWS = 6000  # of all runs together; the worst are kept

# names of a row's cells, in this order
FIELDS = (
    "run",
    "name",
    "health",
    "cause",
    "efficiency",
    "lost",
    "displacement",
    "ratio",
    "margin",
    "since",
    "numel",
    "dtype",
    "advice",
    "shape",
    "group",
    "also",
    "state",
    "accumulators",
    "short",
    "trace",
)


def tensor_list(histories: Sequence[History]) -> dict[str, Any]:
    """`fields`, `rows` (worst first), `texts` (advice, by index), `causes`, `codes`, `healths`, `left_out`, and `traces` of each
    run: what was measured of its rows' tensors over the run, in the order of `trace`."""
    texts: dict[str, int] = {"": 0}
    ranked: list[tuple[tuple[int, float, int], list[Any]]] = []
    for run, history in enumerate(histories):
        ranked += _rows(run, history, texts)
    ranked.sort(key=lambda pair: pair[0])
    kept = [row for _, row in ranked[:MOST_ROWS]]
    shown: list[list[int]] = [[] for _ in histories]
    for row in kept:  # the last cell holds the tensor's index so far
        row[-1], index = len(shown[row[0]]), row[-1]
        shown[row[0]].append(index)
    return {
        "fields": FIELDS,
        "rows": kept,
        "texts": list(texts),
        "causes": [cause_label(cause) for cause in CAUSES],
        "codes": [cause.value for cause in CAUSES],
        "healths": [health.value for health in SEVERITY],
        "left_out": len(ranked) - len(kept),
        "traces": [run_traces(history, index) for history, index in zip(histories, shown, strict=True)],
    }


def _rows(run: int, history: History, texts: dict[str, int]) -> list[tuple[tuple[int, float, int], list[Any]]]:
    frame = history.last
    table, tensors = frame.table, frame.tensors
    numbers = {
        name: _short(tensors.numbers[name])
        for name in (
            "efficiency",
            "lost_fraction",
            "displacement_efficiency",
            "update_ratio",
            "since_step",
            "state_factor",
        )
    }
    margins = _short(margin(tensors))
    shorts, _ = without_prefix(table.name)
    parts = {name: (columns, _accumulator_numbers(columns)) for name, columns in frame.accumulators.items()}
    found = []
    for i, name in enumerate(table.name):
        efficiency = numbers["efficiency"][i]
        row = [
            run,
            name,
            int(tensors.health[i]),
            int(tensors.cause[i]),
            efficiency,
            numbers["lost_fraction"][i],
            numbers["displacement_efficiency"][i],
            numbers["update_ratio"][i],
            margins[i],
            numbers["since_step"][i],
            table.numel[i],
            table.dtype[i],
            texts.setdefault(tensors.advice.get(i, ""), len(texts)),
            "×".join(str(n) for n in table.shape[i]),
            table.optimizer_group[i],
            [other for other in table.names[i] if other != name],
            numbers["state_factor"][i],
            [
                [
                    part,
                    columns.dtype[i],
                    int(columns.health[i]),
                    *(values[i] for values in three),
                    _text(columns, i, texts),
                ]
                for part, (columns, three) in parts.items()
                if columns.health[i] != NO_CODE
            ],
            shorts[i],
            i,
        ]
        low = math.inf if efficiency is None else efficiency
        found.append(((int(tensors.health[i]), low, -table.numel[i]), row))
    return found


def _text(columns: Columns, i: int, texts: dict[str, int]) -> int:
    return texts.setdefault(columns.advice.get(i, ""), len(texts))


def _accumulator_numbers(columns: Columns) -> list[list[float | None]]:
    return [_short(columns.numbers[key]) for key in ("efficiency", "growth_efficiency", "decay_efficiency")]


def _short(values: Floats) -> list[Any]:
    """Three digits; whole where it is whole."""
    found: list[Any] = []
    for value in values.tolist():
        if not math.isfinite(value):
            found.append(None)
        else:
            found.append(int(value) if value == int(value) else float(f"{value:.3g}"))
    return found
