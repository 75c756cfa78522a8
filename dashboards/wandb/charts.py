"""Custom charts for W&B: Vega-Lite specifications, saved as presets of an entity and used by the workspace.

W&B puts the rows of the panel's query where the data is called `wandb`, and replaces `${field:x}` and `${string:x}`
by what the panel says. Rows of several runs arrive in one table with the run's name beside each row; as a heatmap
shows one run, the charts take the first.

A changed specification needs another `version` in its name: W&B's API makes presets and does not change them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from update_watch.dashboards.metrics import HEADROOM_KINDS, HEATMAP

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"

# Red to blue, readable with every kind of colour vision. The change from one to the other lies where a tensor
# counts as stalling (0.8); everything that rounding leaves alone (above 0.96) has one colour.
EFFICIENCY_DOMAIN = [0.0, 0.1, 0.5, 0.8, 0.9, 0.96, 1.0]
EFFICIENCY_COLORS = ["#67001f", "#b2182b", "#f4a582", "#fddbc7", "#d1e5f0", "#4393c3", "#4393c3"]
LOST_COLOR, ARRIVING_COLOR = "#b2182b", "#2166ac"


@dataclasses.dataclass(frozen=True)
class Chart:
    """A preset and the panel settings that go with it."""

    name: str  # of the preset, in its entity
    title: str
    table: str  # key of the logged table
    fields: dict[str, str]  # placeholder -> column
    strings: dict[str, str]  # placeholder -> text
    spec: dict[str, Any]

    def preset(self, entity: str) -> str:
        """Name by which a panel finds it."""
        return f"{entity}/{self.name}"


def _first_run_only() -> list[dict[str, Any]]:
    first = {"op": "first_value", "field": "${field:run}", "as": "first_run"}
    return [
        {"window": [first], "frame": [None, None]},
        {"filter": "datum['${field:run}'] === datum.first_run"},
    ]


def _kind_axis() -> dict[str, Any]:
    # In the order of the model, which is the order of the rows.
    axis = {"labelFontSize": 9, "labelLimit": 260, "labelOverlap": True, "title": None}
    return {"field": "${field:kind}", "type": "nominal", "sort": None, "axis": axis}


def _heatmap_spec() -> dict[str, Any]:
    return {
        "$schema": SCHEMA,
        "title": {"text": "${string:title}", "subtitle": "${string:subtitle}", "anchor": "start"},
        "data": {"name": "wandb"},
        "width": "container",
        "height": "container",
        "autosize": {"type": "fit", "contains": "padding"},
        "transform": _first_run_only(),
        "mark": {"type": "rect", "tooltip": True},
        "encoding": {
            "x": {
                "field": "${field:begin}",
                "type": "quantitative",
                "scale": {"zero": False, "nice": False},
                "axis": {"title": "step", "grid": False, "format": "~s"},
            },
            "x2": {"field": "${field:step}"},
            "y": _kind_axis(),
            "color": {
                "field": "${field:efficiency}",
                "type": "quantitative",
                "scale": {"domain": EFFICIENCY_DOMAIN, "range": EFFICIENCY_COLORS, "clamp": True},
                "legend": {"title": "efficiency", "format": ".1f", "values": [0, 0.5, 0.8, 1]},
            },
            "tooltip": [
                {"field": "${field:run}", "type": "nominal", "title": "run"},
                {"field": "${field:kind}", "type": "nominal", "title": "kind"},
                {"field": "${field:begin}", "type": "quantitative", "title": "after step", "format": ","},
                {"field": "${field:step}", "type": "quantitative", "title": "up to step", "format": ","},
                {"field": "${field:efficiency}", "type": "quantitative", "title": "efficiency", "format": ".3f"},
            ],
        },
    }


def _word(word: str, x: float, align: str, color: str) -> dict[str, Any]:
    mark = {"type": "text", "align": align, "color": color, "fontWeight": "bold", "baseline": "bottom", "y": -3}
    encoding = {"x": {"field": "x", "type": "quantitative"}, "text": {"field": "word"}}
    return {"data": {"values": [{"x": x, "word": word}]}, "mark": mark, "encoding": encoding}


def _headroom_spec() -> dict[str, Any]:
    octave = "datum['${field:octave}']"
    cells = {
        "transform": [*_first_run_only(), {"calculate": f"{octave} + 1", "as": "octave_end"}],
        "mark": {"type": "rect", "tooltip": True},
        "encoding": {
            "x": {
                "field": "${field:octave}",
                "type": "quantitative",
                "scale": {"domain": [-16, 16], "nice": False},
                "axis": {"title": "headroom: log2(|intended update| / half a gap)", "grid": False, "tickCount": 16},
            },
            "x2": {"field": "octave_end"},
            "y": _kind_axis(),
            "color": {"condition": {"test": f"{octave} < 0", "value": LOST_COLOR}, "value": ARRIVING_COLOR},
            "opacity": {
                "field": "${field:share}",
                "type": "quantitative",
                "scale": {"domain": [0, 0.4], "range": [0.06, 1], "clamp": True},
                "legend": {"title": "share of kind", "format": ".0%", "values": [0.05, 0.1, 0.2, 0.4]},
            },
            "tooltip": [
                {"field": "${field:run}", "type": "nominal", "title": "run"},
                {"field": "${field:kind}", "type": "nominal", "title": "kind"},
                {"field": "${field:octave}", "type": "quantitative", "title": "headroom from"},
                {"field": "octave_end", "type": "quantitative", "title": "to"},
                {"field": "${field:share}", "type": "quantitative", "title": "share", "format": ".1%"},
            ],
        },
    }
    edge = {
        "data": {"values": [{"edge": 0}]},
        "mark": {"type": "rule", "size": 2, "color": "#808080"},
        "encoding": {"x": {"field": "edge", "type": "quantitative"}},
    }
    return {
        "$schema": SCHEMA,
        "title": {"text": "${string:title}", "subtitle": "${string:subtitle}", "anchor": "start", "offset": 18},
        "data": {"name": "wandb"},
        "width": "container",
        "height": "container",
        "autosize": {"type": "fit", "contains": "padding"},
        "layer": [
            cells,
            edge,
            _word("← lost", -0.3, "right", LOST_COLOR),
            _word("arrives →", 0.3, "left", ARRIVING_COLOR),
        ],
    }


HEATMAP_CHART = Chart(
    name="update-watch-heatmap-v2",
    title="update-watch: efficiency, kinds by steps",
    table=HEATMAP,
    fields={"run": "name", "kind": "kind", "begin": "begin", "step": "step", "efficiency": "efficiency"},
    strings={
        "title": "Which kinds of tensors receive their updates",
        "subtitle": "Efficiency of the worst tensor of a kind: 1 = every update arrives, 0 = none does",
    },
    spec=_heatmap_spec(),
)

HEADROOM_CHART = Chart(
    name="update-watch-headroom-v2",
    title="update-watch: headroom by kind",
    table=HEADROOM_KINDS,
    fields={"run": "name", "kind": "kind", "octave": "octave", "share": "share"},
    strings={
        "title": "How far the updates are from being rounded away",
        "subtitle": "Left of 0 an update is under half a gap and lost; halving the learning rate moves all one to the left",
    },
    spec=_headroom_spec(),
)

CHARTS = (HEATMAP_CHART, HEADROOM_CHART)
