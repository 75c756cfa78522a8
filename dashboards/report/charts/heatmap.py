"""The heatmap: which tensors, since when."""

from __future__ import annotations

import itertools
import math

import numpy as np

from update_watch.dashboards.report.charts.classes import CLASSES, NO_CLASS, cell_class
from update_watch.dashboards.report.charts.parts import ROW_AXIS, Scales, Spec, step_axis, time_chart
from update_watch.dashboards.report.history import History
from update_watch.dashboards.report.row_groups import Rows


def heatmap(history: History, rows: Rows, scales: Scales, step_px: int = 16) -> Spec:
    """Efficiency, rows by steps: of each row's worst tensor in the worst window of each span.

    Neighbours of one class are one rectangle, which says from when to when, and how low the efficiency was.
    """
    efficiency_PH = history.series_PH["efficiency"]
    classes_PH = cell_class(history.health_PH, efficiency_PH)
    # one number to order by: class, then efficiency
    order_PH = classes_PH * 100.0 + np.clip(np.nan_to_num(efficiency_PH, nan=9.0), -9.0, 9.0)
    values, gaps = [], history.gaps
    for r, members in enumerate(rows.members):
        if not members:
            continue
        index = np.array(members)
        worst_H = index[order_PH[index].argmin(axis=0)]
        order_H = order_PH[worst_H, range(len(worst_H))]
        classes_H = (order_H + 9.0) // 100.0
        edges = {0, *(np.flatnonzero(np.diff(classes_H)) + 1).tolist(), *gaps, len(classes_H)}
        for first, beyond in itertools.pairwise(sorted(edges)):
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
    layer: Spec = {
        "data": {"values": values},
        # a stroke of the same colour closes the hair lines between neighbours
        "mark": {"type": "rect", "tooltip": True, "strokeWidth": 0.7, "cursor": "pointer"},
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
                {"field": "verdict", "type": "nominal", "title": "its updates"},
                {"field": "efficiency", "type": "quantitative", "title": "arrived, at the least", "format": ".0%"},
                {"field": "begin", "type": "quantitative", "title": "after step", "format": ","},
                {"field": "end", "type": "quantitative", "title": "up to step", "format": ","},
            ],
        },
    }
    return time_chart(
        max(60, step_px * len(rows.labels)),
        [layer],
        f"Heatmap of {history.name}: how much of each update arrived, by {rows.by} over the run",
        renderer="canvas",
        params=[{"name": "labels", "value": list(rows.labels)}],
    )


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 2)
