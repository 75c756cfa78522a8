"""What the charts of the HTML report share: scales, axes and the frame of a Vega-Lite specification.

A chart over time has a data set "cursor", which the page fills with where the pointer is in any of them, and `time` in
its `usermeta`, by which the page knows that its steps may be shown as hours instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from update_watch.dashboards.report.history import History
from update_watch.dashboards.run_numbers import Floats
from update_watch.report import HEADROOM_LOW, SEVERITY

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
Spec = dict[str, Any]

# BF16 keeps 7 mantissa bits: half a gap between neighbours is between 2^-9 and 2^-8 of a value.
BF16_EPSILON = 2.0**-7
BF16_HALF_ULP = (2.0**-9, 2.0**-8)

HEALTHS = [health.value for health in SEVERITY]
HEALTH_COLOR = {"field": "health", "type": "nominal", "scale": {"domain": HEALTHS, "range": "category"}}
ROW_AXIS = {
    "title": None,
    "labelExpr": "labels[datum.value]",
    "labelFont": "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace",
    "labelFontSize": 11,
    "labelLimit": 230,
    "labelOverlap": True,
    "ticks": False,
    "domain": False,
}


class Scales(NamedTuple):
    """What the charts of runs side by side have in common, so that they can be compared."""

    steps: tuple[int, int]
    ratio: tuple[float, float]  # update / weight
    octaves: tuple[int, int]  # headroom
    lr: tuple[float, float] | None  # of the runs


def scales_of(histories: Sequence[History]) -> Scales:
    """Scales wide enough for all of `histories`."""
    ratios = np.concatenate([h.series_PH["update_ratio"].ravel() for h in histories]).astype(np.float64)
    known = ratios[~np.isnan(ratios) & (ratios > 0)]
    low = min(float(known.min()) if len(known) else BF16_HALF_ULP[0], BF16_HALF_ULP[0])
    high = max(float(known.max()) if len(known) else BF16_EPSILON, BF16_EPSILON)
    rows = [h.last.headroom for h in histories if h.last.headroom is not None]
    octaves = (-4, 4)
    if rows:
        # what hardly any tensor has is not worth the width; it is in the outermost bar drawn
        filled = np.flatnonzero(np.any([np.fmax.reduce(r, axis=0, initial=0.0) > 0.002 for r in rows], axis=0))
        if len(filled):
            octaves = (int(filled[0]) + HEADROOM_LOW, int(filled[-1]) + HEADROOM_LOW + 1)
    rates = np.concatenate([h.of_run("lr") for h in histories])
    rates = rates[~np.isnan(rates) & (rates > 0)]
    return Scales(
        steps=(min(h.first_step for h in histories), max(h.last_step for h in histories)),
        ratio=(max(low / 1.5, 1e-9, high * 1e-8), high * 1.5),
        octaves=(min(octaves[0], -2), max(octaves[1], 2)),
        lr=(float(rates.min()), float(rates.max())) if len(rates) else None,
    )


def chart(height: int, body: Mapping[str, Any], description: str, renderer: str = "svg", **usermeta: Any) -> Spec:
    return {
        "$schema": SCHEMA,
        "description": description,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "usermeta": {"embedOptions": {"renderer": renderer}, **usermeta},
        **body,
    }


def time_chart(
    height: int,
    layers: Sequence[Spec],
    description: str,
    renderer: str = "svg",
    until: int | None = None,
    **body: Any,
) -> Spec:
    """A chart whose x axis is the run, or goes on `until` a later step: layers, and the line at the pointer."""
    cursor = {
        "data": {"name": "cursor", "values": []},
        "mark": {"type": "rule", "style": "cursor"},
        "encoding": {"x": {"field": "step", "type": "quantitative"}},
    }
    return chart(
        height,
        {**body, "layer": [*layers, cursor]},
        description,
        renderer,
        time=True,
        **({} if until is None else {"until": until}),
    )


def times_axis(known: Floats, least: float, title: str, ticks: int) -> dict[str, Any]:
    """A y axis of times, in octaves: of what is known, and at least from 1 / `least` to `least`."""
    domain = [min(float(known.min()), 1 / least) / 1.1, max(float(known.max()), least) * 1.1]
    return {
        "scale": {"type": "log", "base": 2, "domain": domain, "nice": False},
        "axis": {"title": title, "format": "~g", "tickCount": ticks, "grid": False, "minExtent": 30},
    }


def step_axis(scales: Scales) -> dict[str, Any]:
    return {
        "type": "quantitative",
        "scale": {"domain": list(scales.steps), "nice": False},
        "axis": {"title": None, "labelExpr": "format(datum.value, ',')", "grid": False, "tickCount": 5},
    }


def nearest(values: Sequence[Mapping[str, Any]], tooltip: Sequence[Spec]) -> Spec:
    """Invisible lines that make every point of a chart over time answer the pointer, at any height."""
    return {
        "data": {"values": list(values)},
        "mark": {"type": "rule", "opacity": 0, "strokeWidth": 9, "tooltip": True},
        "encoding": {"x": {"field": "step", "type": "quantitative"}, "tooltip": list(tooltip)},
    }


def number(value: float, digits: int = 4) -> float | None:
    """So many significant digits; None where it is not known."""
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None
