"""The size of updates against the weights over the run, with the band in which BF16 rounds them away."""

from __future__ import annotations

import math

from update_watch.dashboards.report.charts.parts import (
    BF16_EPSILON,
    BF16_HALF_ULP,
    Scales,
    Spec,
    nearest,
    number,
    step_axis,
    time_chart,
)
from update_watch.dashboards.report.history import History


def _band() -> list[Spec]:
    """BF16's smallest step against a weight, from half a gap just below a power of two to half a gap at it."""
    low, high = BF16_HALF_ULP

    def text(at: float, words: str) -> Spec:
        return {
            "data": {"values": [{"at": at, "words": words}]},
            "mark": {"type": "text", "style": "note", "align": "left", "baseline": "middle", "dx": 5},
            "encoding": {
                "y": {"field": "at", "type": "quantitative"},
                "x": {"value": "width"},
                "text": {"field": "words"},
            },
        }

    return [
        {
            "data": {"values": [{"low": low, "high": high}]},
            "mark": {"type": "rect", "style": "band"},
            "encoding": {"y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}},
        },
        {
            "data": {"values": [{"at": BF16_EPSILON}]},
            "mark": {"type": "rule", "style": "epsilon"},
            "encoding": {"y": {"field": "at", "type": "quantitative"}},
        },
        text(math.sqrt(low * high), "smallest"),
        text(BF16_EPSILON, "ε"),
    ]


def ratios(history: History, scales: Scales) -> Spec:
    """Median and 10 to 90 percent of the tensors' update ratios over the run, intended and applied; means over a span."""
    low = scales.ratio[0]
    values = []
    for (_, end), run in zip(history.spans, history.run_H, strict=True):
        if math.isnan(run.ratio):
            continue
        row = {"low": run.ratio_low, "median": run.ratio, "high": run.ratio_high, "applied": run.applied}
        values.append({"step": end, **{key: number(max(value, low)) for key, value in row.items()}})
    values = [{**values[0], "step": history.first_step}, *values] if values else []
    x = {"field": "step", **step_axis(scales)}
    scale = {"type": "log", "domain": list(scales.ratio), "nice": False}
    axis = {"title": "update / weight", "format": ".0e", "tickCount": 4, "grid": False}
    tooltip = [
        {"field": "step", "type": "quantitative", "title": "up to step", "format": ","},
        {"field": "high", "type": "quantitative", "title": "computed, 90% below", "format": ".2e"},
        {"field": "median", "type": "quantitative", "title": "computed, median", "format": ".2e"},
        {"field": "low", "type": "quantitative", "title": "computed, 10% below", "format": ".2e"},
        {"field": "applied", "type": "quantitative", "title": "arrived, median", "format": ".2e"},
    ]

    def line(field: str, style: str) -> Spec:
        return {
            "mark": {"type": "line", "style": style},
            "encoding": {"x": x, "y": {"field": field, "type": "quantitative"}},
        }

    spread = {
        "mark": {"type": "area", "style": "spread"},
        "encoding": {
            "x": x,
            "y": {"field": "low", "type": "quantitative", "scale": scale, "axis": axis},
            "y2": {"field": "high"},
        },
    }
    return time_chart(
        200,
        [*_band(), spread, line("median", "main"), line("applied", "second"), nearest(values, tooltip)],
        f"Size of the updates against the weights over the run of {history.name}, computed and arrived",
        data={"values": values},
    )
