"""What the optimizer keeps beside the weights (moments, decay, averages): how much of its changes arrives."""

from __future__ import annotations

import math

import numpy as np

from update_watch.dashboards.frame import NO_CODE
from update_watch.dashboards.report.charts.parts import HEALTH_COLOR, HEALTHS, ROW_AXIS, Spec, chart
from update_watch.dashboards.report.history import History, accumulator_names, efficiency_of


def states(history: History) -> Spec:
    """Efficiency of every accumulator of every tensor, one tick each, last window."""
    frame = history.last
    names = [n for n in accumulator_names(frame) if not np.isnan(efficiency_of(frame.accumulators[n])).all()]
    values = []
    for r, name in enumerate(names):
        columns = frame.accumulators[name]
        ticks: dict[tuple[float, int, str], list[int]] = {}  # tensors that share a tick
        for i, value in enumerate(efficiency_of(columns).tolist()):
            if columns.health[i] != NO_CODE and not math.isnan(value):
                at = round(min(1.15, max(-0.05, value)) * 200) / 200
                ticks.setdefault((at, int(columns.health[i]), columns.dtype[i]), []).append(i)
        for (at, health, dtype), members in sorted(ticks.items(), key=lambda item: -item[0][1]):  # the worst on top
            more = f" and {len(members) - 1} more" if len(members) > 1 else ""
            name_of = frame.table.name[members[0]] + more
            values.append({"r": r, "name": name_of, "health": HEALTHS[health], "dtype": dtype, "at": at})
    body = {
        "params": [{"name": "labels", "value": names}],
        "data": {"values": values},
        "mark": {"type": "tick", "thickness": 1.5, "bandSize": 18, "opacity": 0.75, "tooltip": True},
        "encoding": {
            "x": {
                "field": "at",
                "type": "quantitative",
                "scale": {"domain": [-0.05, 1.15], "nice": False},
                "axis": {
                    "title": "arrived (the lower of growth and decay)",
                    "values": [0, 0.2, 0.4, 0.6, 0.8, 1],
                    "format": ".1f",
                },
            },
            "y": {
                "field": "r",
                "type": "ordinal",
                "scale": {"domain": list(range(len(names)))},
                "axis": {**ROW_AXIS, "labelFontSize": 11},
            },
            "color": {**HEALTH_COLOR, "legend": None},
            "tooltip": [
                {"field": "name", "type": "nominal", "title": "tensor"},
                {"field": "health", "type": "nominal"},
                {"field": "dtype", "type": "nominal", "title": "stored in"},
                {"field": "at", "type": "quantitative", "title": "efficiency", "format": ".2f"},
            ],
        },
    }
    words = "Efficiency of what the optimizer keeps beside the weights, a tick per tensor"
    return chart(max(40, 30 * len(names)), body, words, renderer="canvas" if len(values) > 1000 else "svg")
