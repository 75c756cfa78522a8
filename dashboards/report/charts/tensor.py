"""One tensor over the run: small charts, one per number, whose values the page's script fills in."""

from __future__ import annotations

from typing import Any

from update_watch.dashboards.report.charts.parts import Scales, Spec, nearest, step_axis, time_chart

# series of the traces, title, format of the axis, whether the axis is logarithmic
CHARTS = (
    ("efficiency", "arrived, of each update", "%", False),
    ("update_ratio", "size of the update against the weight", ".0e", True),
    ("margin", "learning rate margin (under 1 more than half is lost)", ".1~g", True),
    ("gradient_rms", "gradient, rms", ".0e", True),
    ("gradient_spread", "gradient, how much its rms varies within a window", "%", True),
    ("copy_changed", "BF16 copy: values that a step changes", "%", True),
    ("lr", "learning rate", ".0e", True),
)


def tensor_charts(scales: Scales) -> dict[str, Spec]:
    """Specifications by series; data set "values" is empty: rows of `step` and `v`."""
    return {series: _chart(series, title, form, is_log, scales) for series, title, form, is_log in CHARTS}


def _chart(series: str, title: str, form: str, is_log: bool, scales: Scales) -> Spec:
    x = {"field": "step", **step_axis(scales)}
    scale: dict[str, Any] = {"type": "log", "nice": False} if is_log else {"domain": [0, 1.05], "nice": False}
    axis = {"title": None, "format": form, "tickCount": 3, "labelLimit": 60, "grid": not is_log}
    y = {"field": "v", "type": "quantitative", "scale": scale, "axis": axis}
    tooltip = [
        {"field": "v", "type": "quantitative", "title": title, "format": ".1%" if form == "%" else ".2e"},
        {"field": "step", "type": "quantitative", "title": "up to step", "format": ","},
    ]
    line = {
        "data": {"name": "values", "values": []},
        "mark": {"type": "line", "style": "main"},
        "encoding": {"x": x, "y": y},
    }
    layers: list[Spec] = [line]
    if series == "margin":
        edge = {"data": {"values": [{"v": 1}]}, "mark": {"type": "rule", "style": "onset"}}
        layers.append({**edge, "encoding": {"y": {"field": "v", "type": "quantitative"}}})
    points = nearest([], tooltip)
    layers.append({**points, "data": {"name": "values"}})
    return time_chart(84, layers, title)
