"""All charts of a page: specifications by "<chart>-<run>", and what the page's script fills in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from update_watch.dashboards.report.charts.classes import CLASSES
from update_watch.dashboards.report.charts.headroom import headroom_by_row
from update_watch.dashboards.report.charts.heatmap import heatmap
from update_watch.dashboards.report.charts.map import kind_map_chart
from update_watch.dashboards.report.charts.over_time import arrived
from update_watch.dashboards.report.charts.parts import Spec, scales_of
from update_watch.dashboards.report.charts.ranges import drifts, fp16_room, skipped
from update_watch.dashboards.report.charts.rates import tensors_by_rate
from update_watch.dashboards.report.charts.ratios import ratios
from update_watch.dashboards.report.charts.sizes import sizes
from update_watch.dashboards.report.charts.states import states
from update_watch.dashboards.report.charts.tensor import tensor_charts
from update_watch.dashboards.report.first_screen import FirstScreen
from update_watch.dashboards.report.history import History
from update_watch.dashboards.report.kind_map import kind_map
from update_watch.dashboards.report.row_groups import Rows, kind_rows, tensor_rows
from update_watch.dashboards.report.traces import classes_PH, map_traces

MOST_ROWS = 40  # of a chart by kind
MOST_TENSORS = 24  # a model with more is shown by kind


class Drawing(NamedTuple):
    charts: Mapping[str, Spec]
    maps: Sequence[Mapping[str, Any]]  # per run: cells, and how they fared over it
    tensor_charts: Mapping[str, Spec]  # by series, without values


def every_chart(histories: Sequence[History], screens: Sequence[FirstScreen]) -> Drawing:
    """Charts of runs side by side share their scales. A chart that has nothing to show is not there."""
    scales = scales_of(histories)
    is_one = len(histories) == 1
    found: dict[str, Spec] = {}
    if any(screen.arrived for screen in screens):
        found["arrived"] = arrived(histories, scales, screens[0].marks if is_one else (), 150 if is_one else 190)
    maps = []
    for run, (history, screen) in enumerate(zip(histories, screens, strict=True)):
        by_rate = tensors_by_rate(history, screen.rates) if screen.rates else None
        if by_rate is not None:
            found[f"rates-{run}"] = by_rate
        kinds = kind_map(history.table.name)
        if kinds.cells:
            found[f"map-{run}"] = kind_map_chart(kinds, history.name)
        maps.append(
            {
                "cells": [[c.row, c.column, len(c.members)] for c in kinds.cells],
                "rows": kinds.rows,
                "columns": kinds.columns,
                **_worst_names(history, map_traces(history, kinds)),
            }
        )
        rows = _rows(history)
        is_measured = bool((classes_PH(history) <= CLASSES.index("arrives")).any())
        if len(history.spans) > 1 and is_measured:
            found[f"heatmap-{run}"] = heatmap(history, rows, scales)
        if any(not math.isnan(numbers.ratio) for numbers in history.run_H):
            found[f"ratios-{run}"] = ratios(history, scales)
        warned = [alert.step for alert in history.alerts if alert.title.startswith("DIVERGES")]
        by_size = sizes(history, scales, warned)
        if by_size is not None:
            found[f"sizes-{run}"] = by_size
            beside = {
                "drifts": drifts(history, scales),
                "room": fp16_room(history, scales),
                "skips": skipped(history, scales),
            }
            found |= {f"{name}-{run}": one for name, one in beside.items() if one is not None}
        if history.last.headroom is not None:
            found[f"headroom-{run}"] = headroom_by_row(history, kind_rows(history.last.table.name, MOST_ROWS), scales)
        if history.last.accumulators:
            found[f"states-{run}"] = states(history)
    return Drawing(found, maps, tensor_charts(scales))


def _rows(history: History) -> Rows:
    names = history.table.name
    return tensor_rows(names) if len(names) <= MOST_TENSORS else kind_rows(names, MOST_ROWS)


def _worst_names(history: History, traces: dict[str, Any]) -> dict[str, Any]:
    """The worst tensor of each cell at the end, by name: what a click on the cell opens."""
    return {**traces, "worst": [history.table.name[i] for i in traces["worst"]]}
