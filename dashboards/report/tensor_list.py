"""The rows of the report's table of tensors, as compact data for its script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from update_watch.dashboards.frame import CAUSES, NO_CODE, Columns, Floats
from update_watch.dashboards.report.history import History, margin
from update_watch.dashboards.report.traces import run_traces
from update_watch.naming import shared_prefix
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
    """`fields`, `rows` (worst first), `texts` (advice, by index), `causes`, `codes`, `healths`, `counts` (tensors of
    each, of all runs), `left_out`, and `traces` of each run: what was measured of its rows' tensors over the run, in the order of
    `trace`."""
    order = _worst_first(histories)
    texts: dict[str, int] = {"": 0}
    shown: list[list[int]] = [[] for _ in histories]
    for run, index in order:
        shown[run].append(index)
    made = [iter(_rows(run, history, shown[run], texts)) for run, history in enumerate(histories)]
    found = [history.last.tensors.health for history in histories]
    return {
        "fields": FIELDS,
        "rows": [next(made[run]) for run, _ in order],
        "texts": list(texts),
        "causes": [cause_label(cause) for cause in CAUSES],
        "codes": [cause.value for cause in CAUSES],
        "healths": [health.value for health in SEVERITY],
        "counts": np.bincount(np.concatenate(found), minlength=len(SEVERITY)).tolist(),
        "left_out": sum(map(len, found)) - len(order),
        "traces": [run_traces(history, index) for history, index in zip(histories, shown, strict=True)],
    }


def _worst_first(histories: Sequence[History]) -> list[tuple[int, int]]:
    """(run, tensor) of the rows: by health, efficiency, then larger ones first."""
    ranked: list[tuple[tuple[int, float, int], int, int]] = []
    for run, history in enumerate(histories):
        table, tensors = history.last.table, history.last.tensors
        low = np.where(np.isnan(tensors.numbers["efficiency"]), np.inf, tensors.numbers["efficiency"])
        sizes = np.array(table.numel, dtype=np.int64)
        for i in np.lexsort((-sizes, low, tensors.health))[:MOST_ROWS].tolist():
            ranked.append(((int(tensors.health[i]), float(low[i]), -table.numel[i]), run, i))
    ranked.sort(key=lambda entry: entry[0])
    return [(run, i) for _, run, i in ranked[:MOST_ROWS]]


def _rows(run: int, history: History, shown: Sequence[int], texts: dict[str, int]) -> list[list[Any]]:
    """The rows of these tensors; the last cell is their place among them."""
    frame, at = history.last, np.array(shown, dtype=np.intp)
    table, tensors = frame.table, frame.tensors
    numbers = {
        name: _short(tensors.numbers[name][at])
        for name in (
            "efficiency",
            "lost_fraction",
            "displacement_efficiency",
            "update_ratio",
            "since_step",
            "state_factor",
        )
    }
    margins = _short(margin(tensors)[at])
    prefix = len(shared_prefix(table.name))
    parts = {name: (columns, _accumulator_numbers(columns, at)) for name, columns in frame.accumulators.items()}
    return [
        [
            run,
            table.name[i],
            int(tensors.health[i]),
            int(tensors.cause[i]),
            numbers["efficiency"][k],
            numbers["lost_fraction"][k],
            numbers["displacement_efficiency"][k],
            numbers["update_ratio"][k],
            margins[k],
            numbers["since_step"][k],
            table.numel[i],
            table.dtype[i],
            texts.setdefault(tensors.advice.get(i, ""), len(texts)),
            "×".join(str(n) for n in table.shape[i]),
            table.optimizer_group[i],
            [other for other in table.names[i] if other != table.name[i]],
            numbers["state_factor"][k],
            [
                [
                    part,
                    columns.dtype[i],
                    int(columns.health[i]),
                    *(values[k] for values in three),
                    _text(columns, i, texts),
                ]
                for part, (columns, three) in parts.items()
                if columns.health[i] != NO_CODE
            ],
            table.name[i][prefix:],
            k,
        ]
        for k, i in enumerate(shown)
    ]


def _text(columns: Columns, i: int, texts: dict[str, int]) -> int:
    return texts.setdefault(columns.advice.get(i, ""), len(texts))


def _accumulator_numbers(columns: Columns, at: NDArray[np.intp]) -> list[list[float | None]]:
    return [_short(columns.numbers[key][at]) for key in ("efficiency", "growth_efficiency", "decay_efficiency")]


def _short(values: Floats) -> list[Any]:
    """Three digits; whole where it is whole."""
    found: list[Any] = []
    for value in values.tolist():
        if not math.isfinite(value):
            found.append(None)
        else:
            found.append(int(value) if value == int(value) else float(f"{value:.3g}"))
    return found
