"""What the optimizer keeps beside the weights (moments, decay, averages): how much of its changes arrives."""

from __future__ import annotations

import numpy as np

from update_watch.dashboards.frame import NO_CODE
from update_watch.dashboards.report.charts.parts import HEALTH_COLOR, HEALTHS, ROW_AXIS, Spec, chart
from update_watch.dashboards.report.history import History, accumulator_names, efficiency_of
from update_watch.report import SEVERITY

_BELOW, _PLACES = 10, 300  # places of ticks below zero, and more than there are


def states(history: History) -> Spec:
    """Efficiency of every accumulator of every tensor, one tick each, last window."""
    frame = history.last
    names = [n for n in accumulator_names(frame) if not np.isnan(efficiency_of(frame.accumulators[n])).all()]
    values = []
    for r, name in enumerate(names):
        columns = frame.accumulators[name]
        found = efficiency_of(columns)
        inside = np.flatnonzero((columns.health != NO_CODE) & ~np.isnan(found))
        dtypes = list(dict.fromkeys(columns.dtype))
        code_of = {dtype: code for code, dtype in enumerate(dtypes)}
        at = np.rint(np.clip(found[inside], -0.05, 1.15) * 200).astype(np.int64)
        dtype = np.fromiter(map(code_of.__getitem__, columns.dtype), dtype=np.int64, count=len(found))[inside]
        # tensors that share a tick; the worst come last: on top
        order = len(SEVERITY) - columns.health[inside].astype(np.int64)
        ticks, first, counts = np.unique(
            (order * _PLACES + at + _BELOW) * len(dtypes) + dtype, return_index=True, return_counts=True
        )
        for code, i, count in zip(ticks.tolist(), first.tolist(), counts.tolist(), strict=True):
            more = f" and {count - 1} more" if count > 1 else ""
            name_of = frame.table.name[inside[i]] + more
            (health, where), kind = divmod(code // len(dtypes), _PLACES), code % len(dtypes)
            tick = {"health": HEALTHS[len(SEVERITY) - health], "dtype": dtypes[kind], "at": (where - _BELOW) / 200}
            values.append({"r": r, "name": name_of, **tick})
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
