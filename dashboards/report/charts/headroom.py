"""Headroom: how far updates are from being rounded away, by kind of tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from update_watch.dashboards.report.charts.parts import ROW_AXIS, Scales, Spec, chart
from update_watch.dashboards.report.history import History, headroom_weights
from update_watch.dashboards.report.row_groups import Rows
from update_watch.dashboards.run_numbers import Floats
from update_watch.report import HEADROOM_LOW

_BLOCK = 2**13  # tensors that are added up at a time


def _edge() -> list[Spec]:
    x = {"field": "x", "type": "quantitative"}
    rule = {"data": {"values": [{"x": 0}]}, "mark": {"type": "rule", "style": "edge"}, "encoding": {"x": x}}

    def word(at: float, text: str, align: str, style: str) -> Spec:
        mark = {
            "type": "text",
            "align": align,
            "style": style,
            "baseline": "bottom",
            "dx": -5 if align == "right" else 5,
        }
        encoding = {"x": x, "y": {"value": -3}, "text": {"field": "t"}}
        return {"data": {"values": [{"x": at, "t": text}]}, "mark": mark, "encoding": encoding}

    return [rule, word(0, "← lost", "right", "lost-word"), word(0, "arrives →", "left", "arrives-word")]


def headroom_by_row(history: History, rows: Rows, scales: Scales, step_px: int = 17) -> Spec:
    """Headroom of each row's elements, last window: how dark a cell is says how many lie there."""
    frame = history.last
    weights = headroom_weights(frame)
    by_row = [_row_headroom(frame.headroom, weights, members) for members in rows.members]
    values = [
        {"r": r, "from": HEADROOM_LOW + i, "to": HEADROOM_LOW + i + 1, "share": float(f"{share:.3g}")}
        for r, shares in enumerate(by_row)
        if shares is not None
        for i, share in enumerate(shares)
        if share >= 0.002
    ]
    labels = {"field": "label", "type": "nominal", "title": "tensor" if rows.by == "tensor" else rows.by}

    def cells(test: str, style: str) -> Spec:
        return {
            "data": {"values": values},
            "transform": [{"filter": test}, {"calculate": "labels[datum.r]", "as": "label"}],
            "mark": {"type": "rect", "style": style, "tooltip": True, "clip": True, "xOffset": 0.5, "x2Offset": -0.5},
            "encoding": {
                "x": {
                    "field": "from",
                    "type": "quantitative",
                    "scale": {"domain": list(scales.octaves), "nice": False},
                    "axis": {
                        "title": "doublings above the smallest step",
                        "grid": False,
                        "tickCount": 12,
                        "labelSeparation": 5,
                    },
                },
                "x2": {"field": "to"},
                "y": {
                    "field": "r",
                    "type": "ordinal",
                    "scale": {"domain": list(range(len(rows.labels))), "paddingInner": 0.12},
                    "axis": ROW_AXIS,
                },
                "opacity": {
                    "field": "share",
                    "type": "quantitative",
                    "scale": {"domain": [0, 0.3], "range": [0.06, 1], "clamp": True},
                    "legend": None,
                },
                "tooltip": [
                    labels,
                    {"field": "from", "type": "quantitative", "title": "doublings above the smallest step, from"},
                    {"field": "to", "type": "quantitative", "title": "to"},
                    {
                        "field": "share",
                        "type": "quantitative",
                        "title": "of the elements that should have changed",
                        "format": ".1%",
                    },
                ],
            },
        }

    body = {
        "params": [{"name": "labels", "value": list(rows.labels)}],
        "layer": [cells("datum.from < 0", "lost"), cells("datum.from >= 0", "arrives"), *_edge()],
    }
    words = "How far updates are above the smallest step that is stored, by kind of tensor"
    return chart(max(60, step_px * len(rows.labels)), body, words, renderer="canvas")


def _row_headroom(headroom: Floats | None, weights_P: Floats, members: Sequence[int]) -> Floats | None:
    if headroom is None:
        return None
    index = np.array(members, dtype=np.intp)
    index = index[index < len(headroom)]
    index = index[~np.isnan(headroom[index, 0])]
    weights = weights_P[index]
    if not weights.sum() > 0:
        return None
    shares: Floats = np.zeros(headroom.shape[1])
    for start in range(0, len(index), _BLOCK):
        block = slice(start, start + _BLOCK)
        shares += weights[block] @ headroom[index[block]]
    shares /= weights.sum()
    return shares
