"""Charts of a run as a whole: healths and efficiency over its steps, accumulators, alerts.

Functions from histories to Vega-Lite specifications, data included. The others are in `heatmap_chart`,
`ratio_charts` and `headroom_charts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from update_watch.dashboards.frame import NO_CODE
from update_watch.dashboards.report.chart_parts import HEALTH_COLOR, HEALTHS, ROW_AXIS, Scales, Spec, chart, step_axis
from update_watch.dashboards.report.history import History, accumulator_names, efficiency_of
from update_watch.report import SEVERITY, Health, Level


def health_over_steps(history: History, scales: Scales) -> Spec:
    """Number of tensors per health over the run, stacked."""
    present = [s for s in range(len(SEVERITY)) if history.counts_HS[:, s].any()]
    values = [
        {"step": end, "health": HEALTHS[s], "order": -s, "n": round(float(history.counts_HS[h, s]), 1)}
        for s in present
        for h, (_, end) in enumerate(history.spans)
    ]
    first = [{**v, "step": history.first_step} for v in values if v["step"] == history.spans[0][1]]
    body = {
        "data": {"values": first + values},
        "mark": {"type": "area", "line": False, "tooltip": True, "interpolate": "step-before"},
        "encoding": {
            "x": {"field": "step", **step_axis(scales)},
            "y": {
                "field": "n",
                "type": "quantitative",
                "stack": "zero",
                "scale": {"nice": False},
                "axis": {"title": "tensors", "tickCount": 4, "format": "d"},
            },
            "order": {"field": "order", "type": "quantitative"},
            "color": {**HEALTH_COLOR, "legend": None},
            "tooltip": [
                {"field": "health", "type": "nominal"},
                {"field": "n", "type": "quantitative", "title": "tensors", "format": "~r"},
                {"field": "step", "type": "quantitative", "title": "up to step", "format": ","},
            ],
        },
    }
    return chart(150, body)


def efficiency_over_steps(histories: Sequence[History], scales: Scales) -> Spec:
    """Efficiency of the run (weighted by size) over its steps; one line per run."""
    values: list[dict[str, Any]] = [
        {"step": end, "run": i, "name": history.name, "efficiency": round(float(value), 4)}
        for i, history in enumerate(histories)
        for (_, end), value in zip(history.spans, history.efficiency_H, strict=True)
        if not math.isnan(value)
    ]
    values = [
        {**v, "step": histories[v["run"]].first_step} for v in values if v["step"] == histories[v["run"]].spans[0][1]
    ] + values
    low = min((v["efficiency"] for v in values), default=0.0)
    encoding: dict[str, Any] = {
        "x": {"field": "step", **step_axis(scales)},
        "y": {
            "field": "efficiency",
            "type": "quantitative",
            "scale": {"domain": [min(0.0, low), 1.05], "nice": False},
            "axis": {"title": "efficiency", "tickCount": 5, "format": ".1f"},
        },
        "tooltip": [
            {"field": "name", "type": "nominal", "title": "run"},
            {"field": "efficiency", "type": "quantitative", "format": ".3f"},
            {"field": "step", "type": "quantitative", "title": "up to step", "format": ","},
        ],
    }
    mark: dict[str, Any] = {"type": "line", "style": "main", "tooltip": True}
    if len(histories) > 1:
        mark = {**mark, "style": [], "strokeWidth": 2}
        legend = {"title": None, "orient": "top", "symbolType": "stroke", "symbolStrokeWidth": 2, "labelLimit": 300}
        by_run = {"field": "name", "type": "nominal", "sort": None, "legend": legend}
        encoding["color"] = {**by_run, "scale": {"range": "diverging"}}
        encoding["strokeDash"] = by_run
    return chart(150, {"data": {"values": values}, "mark": mark, "encoding": encoding})


def accumulators(history: History) -> Spec:
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
                    "title": "efficiency (the lower of growth and decay)",
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
    return chart(max(40, 30 * len(names)), body, renderer="canvas" if len(values) > 1000 else "svg")


LEVELS = (Level.error, Level.warn, Level.info)
_LEVEL_HEALTH = {Level.error: Health.stalled, Level.warn: Health.stalling, Level.info: Health.healthy}
_MOST_ALERTS = 150  # marks per level; beyond, alerts of neighbouring steps share one


def alert_timeline(history: History, scales: Scales) -> Spec:
    """When alerts were raised, one row per level; where there are many, one mark for several."""
    width = max(1.0, (history.last_step - history.first_step) / _MOST_ALERTS)
    bins: dict[tuple[int, int], list[int]] = {}
    for i, alert in enumerate(history.alerts):
        bins.setdefault((LEVELS.index(alert.level), int((alert.step - history.first_step) // width)), []).append(i)
    values = []
    for (row, _), members in bins.items():
        first = history.alerts[members[0]]
        more = f" (and {len(members) - 1} more here)" if len(members) > 1 else ""
        health = _LEVEL_HEALTH[first.level].value
        values.append({"r": row, "step": first.step, "n": len(members), "title": first.title + more, "health": health})
    rows = [row for row in range(len(LEVELS)) if any(v["r"] == row for v in values)]
    body = {
        "params": [{"name": "labels", "value": [level.value.lower() for level in LEVELS]}],
        "data": {"values": values},
        "mark": {"type": "point", "filled": True, "opacity": 0.9, "tooltip": True},
        "encoding": {
            "x": {"field": "step", **step_axis(scales)},
            "y": {
                "field": "r",
                "type": "ordinal",
                "scale": {"domain": rows},
                "axis": {**ROW_AXIS, "labelFontSize": 11, "grid": True},
            },
            "size": {
                "field": "n",
                "type": "quantitative",
                "scale": {"domain": [1, 10], "range": [60, 300], "clamp": True},
                "legend": None,
            },
            "color": {**HEALTH_COLOR, "legend": None},
            "tooltip": [
                {"field": "title", "type": "nominal", "title": "alert"},
                {"field": "step", "type": "quantitative", "format": ","},
            ],
        },
    }
    return chart(max(30, 28 * len(rows)), body)
