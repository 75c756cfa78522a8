"""The map kind x depth: which tensors of which layer receive their updates, at one moment of the run."""

from __future__ import annotations

from typing import Any

from update_watch.dashboards.report.charts.classes import CLASSES
from update_watch.dashboards.report.charts.parts import ROW_AXIS, Spec, chart
from update_watch.dashboards.report.kind_map import KindMap

_ROW_PX = 19
_WIDE = 14  # columns from which on the map takes the whole width
_COLUMN_PX, _LETTER_PX = 46, 6.7


def kind_map_chart(kinds: KindMap, run_name: str) -> Spec:
    """The map without its values: the page's script fills the data set "cells" for the step that its slider shows.

    Fields of a cell: r, c (row and column), verdict, mark, efficiency, name (of its worst tensor), tensors.
    """
    columns = len(kinds.columns)
    # a number needs room: every second, every fifth label where there are many
    every = max(1, -(-columns // 40))
    x_axis = {
        "title": None,
        "labelExpr": "columns[datum.value]",
        "labelAngle": 0,
        "labelOverlap": True,
        "values": [c for c in range(columns) if c % every == 0 or c == columns - 1],
        "ticks": False,
        "domain": False,
        "orient": "top",
    }
    x = {
        "field": "c",
        "type": "ordinal",
        "scale": {"domain": list(range(columns)), "paddingInner": 0.08},
        "axis": x_axis,
    }
    y = {
        "field": "r",
        "type": "ordinal",
        "scale": {"domain": list(range(len(kinds.rows))), "paddingInner": 0.1},
        "axis": ROW_AXIS,
    }
    color = {
        "field": "verdict",
        "type": "nominal",
        "scale": {"domain": list(CLASSES), "range": "ordinal"},
        "legend": None,
    }
    tooltip = [
        {"field": "name", "type": "nominal", "title": "tensor"},
        {"field": "verdict", "type": "nominal", "title": "its updates"},
        {"field": "efficiency", "type": "quantitative", "title": "arrived", "format": ".0%"},
        {"field": "tensors", "type": "nominal", "title": "cell"},
    ]
    body: dict[str, Any] = {
        "params": [{"name": "labels", "value": list(kinds.rows)}, {"name": "columns", "value": list(kinds.columns)}],
        "data": {"name": "cells", "values": []},
        "encoding": {"x": x, "y": y},
        "layer": [
            {
                "mark": {"type": "rect", "tooltip": True, "cursor": "pointer", "style": "cell"},
                "encoding": {"fill": color, "tooltip": tooltip},
            },
            {
                "mark": {"type": "text", "style": "cell-mark", "baseline": "middle", "tooltip": None},
                "encoding": {"text": {"field": "mark", "type": "nominal"}},
            },
        ],
    }
    made = chart(
        max(40, _ROW_PX * len(kinds.rows)),
        body,
        f"Map of {run_name}: kinds of tensors by layer, coloured by how much of their updates arrives",
        renderer="canvas" if columns * len(kinds.rows) > 600 else "svg",
        map=True,
    )
    if columns < _WIDE:
        # that of the labels with it; the page's script makes it less where there is less room
        made["width"] = _COLUMN_PX * columns + _LETTER_PX * max(map(len, kinds.rows), default=0) + 20
        made["autosize"] = {"type": "fit-x", "contains": "padding"}
    return made
