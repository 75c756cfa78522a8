"""Charts of the size of updates against the weights, with the band in which BF16 rounds them away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from update_watch.dashboards.report.chart_parts import (
    BF16_EPSILON,
    BF16_HALF_ULP,
    HEALTH_COLOR,
    HEALTHS,
    ROW_AXIS,
    Scales,
    Spec,
    chart,
    step_axis,
)
from update_watch.dashboards.report.history import History
from update_watch.dashboards.report.row_groups import Rows
from update_watch.kinds import places


def _band(axis: str) -> list[Spec]:
    """The half-ulp band and the BF16 epsilon across `axis`, with words at its end."""
    low, high = BF16_HALF_ULP
    other: dict[str, Any] = {"y": {"value": -4}} if axis == "x" else {"x": {"value": "width"}}
    word = {"x": {"align": "center", "baseline": "bottom"}, "y": {"align": "left", "baseline": "middle"}}[axis]
    middle = math.sqrt(low * high)

    def text(at: float, words: str, **more: Any) -> Spec:
        return {
            "data": {"values": [{"at": at, "words": words}]},
            "mark": {"type": "text", "style": "note", **word, **more},
            "encoding": {axis: {"field": "at", "type": "quantitative"}, **other, "text": {"field": "words"}},
        }

    return [
        {
            "data": {"values": [{"low": low, "high": high}]},
            "mark": {"type": "rect", "style": "band"},
            "encoding": {axis: {"field": "low", "type": "quantitative"}, f"{axis}2": {"field": "high"}},
        },
        {
            "data": {"values": [{"at": BF16_EPSILON}]},
            "mark": {"type": "rule", "style": "epsilon"},
            "encoding": {axis: {"field": "at", "type": "quantitative"}},
        },
        text(middle, "half ulp", **({"align": "right"} if axis == "x" else {"dx": 5})),
        text(BF16_EPSILON, "ε", **({"align": "left", "dx": 2} if axis == "x" else {"dx": 5})),
    ]


_CROWD = 300  # tensors from which on marks are small and pale, and one stands for all of a kind in its row


def _representatives(history: History, members: Sequence[int]) -> list[tuple[int, int]]:
    """(tensor, how many it stands for): all of them, or where the model is large the worst of each kind."""
    if len(history.table.name) <= _CROWD:
        return [(i, 1) for i in members]
    tensors = history.last.tensors
    efficiency = np.nan_to_num(tensors.numbers["efficiency"], nan=9.0)
    kinds: dict[str, list[int]] = {}
    place_of = places(history.table.name)
    for i in members:
        kinds.setdefault(place_of[history.table.name[i]].kind, []).append(i)
    return [
        (min(alike, key=lambda i: (int(tensors.health[i]), float(efficiency[i]))), len(alike))
        for alike in kinds.values()
    ]


def ratios_by_layer(history: History, rows: Rows, scales: Scales, step_px: int = 14) -> Spec:
    """Intended and applied update against the weight, one pair of marks per tensor, last window."""
    numbers = history.last.tensors.numbers
    intended, applied = numbers["update_ratio"], numbers["applied_ratio"]
    domain = list(scales.ratio)
    health = history.last.tensors.health
    values = []
    for r, members in enumerate(rows.members):
        measured = [i for i in members if i < len(intended) and intended[i] > 0]
        for i, count in _representatives(history, measured):
            got = 0.0 if math.isnan(applied[i]) else float(applied[i])
            value = {
                "r": r,
                "name": history.table.name[i],
                "dtype": history.table.dtype[i],
                "health": HEALTHS[health[i]],
                "intended": float(f"{intended[i]:.3g}"),
                "applied": float(f"{got:.3g}"),
                "at": float(f"{min(max(got, domain[0]), domain[1]):.3g}"),
            }
            values.append({**value, "also": f"{count - 1} more of its kind, better off"} if count > 1 else value)
    y = {"field": "r", "type": "ordinal", "scale": {"domain": list(range(len(rows.labels)))}, "axis": ROW_AXIS}
    tooltip = [
        {"field": "name", "type": "nominal", "title": "tensor"},
        {"field": "health", "type": "nominal"},
        {"field": "dtype", "type": "nominal", "title": "stored in"},
        {"field": "intended", "type": "quantitative", "title": "intended / weight", "format": ".2e"},
        {"field": "applied", "type": "quantitative", "title": "applied / weight", "format": ".2e"},
        *([{"field": "also", "type": "nominal", "title": "stands for"}] if any("also" in v for v in values) else []),
    ]
    scale = {"type": "log", "domain": domain, "nice": False}
    axis = {"title": "update / weight (log scale)", "format": ".0e", "tickCount": 6, "grid": False}
    data = {"name": "pairs", "values": values}
    is_crowded = len(values) > _CROWD
    size = 16 if is_crowded else 34
    body = {
        "params": [{"name": "labels", "value": list(rows.labels)}],
        "layer": [
            *_band("x"),
            {
                "data": data,
                "mark": {"type": "rule", "style": "way", "opacity": 0.25 if is_crowded else 1},
                "encoding": {
                    "x": {"field": "at", "type": "quantitative", "scale": scale, "axis": axis},
                    "x2": {"field": "intended"},
                    "y": y,
                },
            },
            {
                "data": data,
                "mark": {
                    "type": "point",
                    "style": "intended",
                    "size": size,
                    "filled": False,
                    "opacity": 0.45 if is_crowded else 1,
                },
                "encoding": {"x": {"field": "intended", "type": "quantitative"}, "y": y, "tooltip": tooltip},
            },
            {
                "data": data,
                "mark": {"type": "point", "filled": True, "size": size, "opacity": 0.8 if is_crowded else 1},
                "encoding": {
                    "x": {"field": "at", "type": "quantitative"},
                    "y": y,
                    "color": {**HEALTH_COLOR, "legend": None},
                    "tooltip": tooltip,
                },
            },
        ],
    }
    return chart(max(80, step_px * len(rows.labels)), body, renderer="canvas" if is_crowded else "svg")


def ratios_over_steps(history: History, scales: Scales) -> Spec:
    """Median and 10 to 90 percent of the tensors' update ratios over the run, intended and applied."""
    intended, applied = history.series_PH["update_ratio"], history.series_PH["applied_ratio"]
    domain = list(scales.ratio)
    values: list[dict[str, float]] = []
    for h, (_, end) in enumerate(history.spans):
        asked = intended[:, h][~np.isnan(intended[:, h])]
        got = applied[:, h][~np.isnan(applied[:, h])]
        if len(asked):
            low, median, high = (float(v) for v in np.quantile(asked, (0.1, 0.5, 0.9)))
            row = {
                "step": end,
                "low": max(low, domain[0]),
                "median": max(median, domain[0]),
                "high": max(high, domain[0]),
            }
            if len(got):
                row["applied"] = max(float(np.median(got)), domain[0])
            row = {key: float(f"{value:.4g}") for key, value in row.items()} | {"step": end}
            values += [row] if values else [{**row, "step": history.first_step}, row]
    x = {"field": "step", **step_axis(scales)}
    scale = {"type": "log", "domain": domain, "nice": False}
    axis = {"title": "update / weight (log scale)", "format": ".0e", "tickCount": 4, "grid": False}
    tooltip = [
        {"field": "step", "type": "quantitative", "title": "up to step", "format": ","},
        {"field": "high", "type": "quantitative", "title": "intended, 90% below", "format": ".2e"},
        {"field": "median", "type": "quantitative", "title": "intended, median", "format": ".2e"},
        {"field": "low", "type": "quantitative", "title": "intended, 10% below", "format": ".2e"},
        {"field": "applied", "type": "quantitative", "title": "applied, median", "format": ".2e"},
    ]

    def line(field: str, style: str) -> Spec:
        return {
            "mark": {"type": "line", "style": style, "tooltip": True},
            "encoding": {"x": x, "y": {"field": field, "type": "quantitative"}, "tooltip": tooltip},
        }

    spread = {
        "mark": {"type": "area", "style": "spread", "tooltip": True},
        "encoding": {
            "x": x,
            "y": {"field": "low", "type": "quantitative", "scale": scale, "axis": axis},
            "y2": {"field": "high"},
            "tooltip": tooltip,
        },
    }
    body = {
        "data": {"values": values},
        "layer": [*_band("y"), spread, line("median", "main"), line("applied", "second")],
    }
    return chart(210, body)
