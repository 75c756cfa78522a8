"""Which learning rate these weights can take: how many tensors would lose less than half of their updates at it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from update_watch.dashboards.report.charts.parts import Spec, chart, number
from update_watch.dashboards.report.history import History

_POINTS = 120


def critical_rates(history: History) -> list[float]:
    """Of each tensor that knows it, in order: below it half of its updates are lost."""
    found = history.last.tensors.numbers["critical_lr"]
    rates: list[float] = np.sort(found[np.isfinite(found) & (found > 0)]).tolist()
    return rates


def tensors_by_rate(history: History, marks: Mapping[str, float], height: int = 150) -> Spec | None:
    """Share of the tensors that can take a learning rate, over learning rates; None where nothing is known of it.

    Args:
        marks: learning rates to point at by name: "now", "peak", "end".
    """
    rates = critical_rates(history)
    if not rates:
        return None
    shown = [rate for rate in marks.values() if rate > 0 and math.isfinite(rate)]
    low, high = min([rates[0], *shown]) / 2, max([rates[-1], *shown]) * 2
    size = max(1, -(-len(rates) // _POINTS))
    steps = [(low, 0.0)] + [(rates[k], min(len(rates), k + size) / len(rates)) for k in range(0, len(rates), size)]
    values = [{"lr": number(rate), "share": round(share, 4)} for rate, share in [*steps, (high, 1.0)]]
    x = {
        "field": "lr",
        "type": "quantitative",
        "scale": {"type": "log", "domain": [low, high], "nice": False},
        "axis": {"title": None, "format": ".0e", "tickCount": 4, "grid": False},
    }
    y = {
        "field": "share",
        "type": "quantitative",
        "scale": {"domain": [0, 1.05], "nice": False},
        "axis": {"title": None, "format": "%", "values": [0, 0.25, 0.5, 0.75, 1]},
    }
    tooltip = [
        {"field": "share", "type": "quantitative", "title": "of the tensors can take", "format": ".0%"},
        {"field": "lr", "type": "quantitative", "title": "a learning rate of", "format": ".2e"},
    ]
    layers: list[Spec] = [
        {
            "data": {"values": values},
            "mark": {"type": "line", "style": "main", "interpolate": "step-after", "tooltip": True},
            "encoding": {"x": x, "y": y, "tooltip": tooltip},
        },
        {
            "data": {"values": values},
            "mark": {"type": "rule", "opacity": 0, "strokeWidth": 9, "tooltip": True},
            "encoding": {"x": x, "tooltip": tooltip},
        },
    ]
    layers += _marks(marks, low, high)
    words = ", ".join(f"{name} {rate:.1e}" for name, rate in marks.items())
    return chart(height, {"layer": layers}, f"Share of the tensors that can take a learning rate, with {words}")


def _marks(marks: Mapping[str, float], low: float, high: float) -> Sequence[Spec]:
    found: list[Spec] = []
    for row, (name, rate) in enumerate(sorted(marks.items(), key=lambda item: item[1])):
        if not rate > 0:
            continue
        is_left = math.log(rate / low) > 0.75 * math.log(high / low)  # no room for its word on the right
        x = {"field": "lr", "type": "quantitative"}
        data = {"values": [{"lr": number(rate), "text": name}]}
        align, dx = ("right", -4) if is_left else ("left", 4)
        found += [
            {"data": data, "mark": {"type": "rule", "style": "onset"}, "encoding": {"x": x}},
            {
                "data": data,
                "mark": {"type": "text", "style": "note", "align": align, "baseline": "top", "dx": dx},
                "encoding": {"x": x, "y": {"value": 2 + 13 * row}, "text": {"field": "text"}},
            },
        ]
    return found
