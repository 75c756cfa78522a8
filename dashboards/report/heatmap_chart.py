"""The heatmap: which tensors, since when."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from update_watch.dashboards.report.chart_parts import ROW_AXIS, Scales, Spec, chart, step_axis
from update_watch.dashboards.report.history import History
from update_watch.dashboards.report.palette import CLASSES, NO_CLASS
from update_watch.dashboards.report.row_groups import Rows
from update_watch.report import SEVERITY, Health


def cell_class(health: NDArray[np.int8], efficiency: NDArray[np.floating[Any]]) -> NDArray[np.int8]:
    """Index in `CLASSES` of each cell. The verdict decides between well and not, the efficiency the shade."""
    efficiency = np.nan_to_num(efficiency, nan=1.0)
    classes = np.full(health.shape, NO_CLASS, dtype=np.int8)
    classes[health == SEVERITY.index(Health.healthy)] = 5
    classes[(classes == 5) & (efficiency < 0.96)] = 4
    classes[health == SEVERITY.index(Health.stalling)] = 3
    classes[(classes == 3) & (efficiency < 0.5)] = 2
    classes[health == SEVERITY.index(Health.stalled)] = 1
    classes[health == SEVERITY.index(Health.broken)] = 0
    return classes


def heatmap(history: History, rows: Rows, scales: Scales, step_px: int = 12) -> Spec:
    """Efficiency, rows by steps: of each row's worst tensor in the worst window of each span.

    Neighbours of one class are one rectangle, which says from when to when, and how low the efficiency was.
    """
    efficiency_PH = history.series_PH["efficiency"]
    classes_PH = cell_class(history.health_PH, efficiency_PH)
    # one number to order by: class, then efficiency
    order_PH = classes_PH * 100.0 + np.clip(np.nan_to_num(efficiency_PH, nan=9.0), -9.0, 9.0)
    values = []
    for r, members in enumerate(rows.members):
        if not members:
            continue
        index = np.array(members)
        worst_H = index[order_PH[index].argmin(axis=0)]
        order_H = order_PH[worst_H, range(len(worst_H))]
        classes_H = (order_H + 9.0) // 100.0
        edges = [0, *(np.flatnonzero(np.diff(classes_H)) + 1).tolist(), len(classes_H)]
        for first, beyond in itertools.pairwise(edges):
            if classes_H[first] == NO_CLASS:
                continue
            h = first + int(order_H[first:beyond].argmin())
            worst = int(worst_H[h])
            values.append(
                {
                    "r": r,
                    "begin": history.spans[first][0],
                    "end": history.spans[beyond - 1][1],
                    "verdict": CLASSES[int(classes_H[first])],
                    "efficiency": _rounded(float(efficiency_PH[worst, h])),
                    "name": history.table.name[worst],
                }
            )
    color = {
        "field": "verdict",
        "type": "nominal",
        "scale": {"domain": list(CLASSES), "range": "ordinal"},
        "legend": None,
    }
    body = {
        "params": [{"name": "labels", "value": list(rows.labels)}],
        "data": {"values": values},
        # a stroke of the same colour closes the hair lines between neighbours
        "mark": {"type": "rect", "tooltip": True, "strokeWidth": 0.7},
        "encoding": {
            "x": {"field": "begin", **step_axis(scales)},
            "x2": {"field": "end"},
            "y": {
                "field": "r",
                "type": "ordinal",
                "scale": {"domain": list(range(len(rows.labels))), "paddingInner": 0.14},
                "axis": ROW_AXIS,
            },
            "fill": color,
            "stroke": color,
            "tooltip": [
                {"field": "name", "type": "nominal", "title": "tensor" if rows.by == "tensor" else "worst tensor"},
                {"field": "verdict", "type": "nominal"},
                {"field": "efficiency", "type": "quantitative", "title": "lowest efficiency", "format": ".2f"},
                {"field": "begin", "type": "quantitative", "title": "after step", "format": ","},
                {"field": "end", "type": "quantitative", "title": "up to step", "format": ","},
            ],
        },
    }
    return chart(max(60, step_px * len(rows.labels)), body, renderer="canvas")


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 2)
