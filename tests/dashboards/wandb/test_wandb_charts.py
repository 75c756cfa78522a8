"""The custom chart presets: drawn by Vega-Lite as W&B would, with the columns that are logged."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import opened
from update_watch.dashboards.wandb.charts import (
    ARRIVING_COLOR,
    CHARTS,
    EFFICIENCY_COLORS,
    HEADROOM_CHART,
    HEATMAP_CHART,
    LOST_COLOR,
    Chart,
)
from update_watch.dashboards.wandb.rows import HEADROOM_COLUMN_NAMES, HEATMAP_COLUMN_NAMES

COLUMNS = {HEATMAP_CHART.name: HEATMAP_COLUMN_NAMES, HEADROOM_CHART.name: HEADROOM_COLUMN_NAMES}
vl_convert = pytest.importorskip("vl_convert")


def filled(chart: Chart, rows: list[dict[str, Any]], **size: Any) -> dict[str, Any]:
    """The specification as W&B hands it to Vega: placeholders replaced, rows put in."""
    text = json.dumps(chart.spec)
    for kind, values in (("field", chart.fields), ("string", chart.strings)):
        for name, value in values.items():
            text = text.replace(f"${{{kind}:{name}}}", value)
    spec: dict[str, Any] = json.loads(text)
    return {**spec, "data": {"values": rows}, "width": 600, "height": 300, **size}


def heatmap_rows() -> list[dict[str, Any]]:
    def cell(run: str, layer: str, begin: int, efficiency: float) -> dict[str, Any]:
        return {"name": run, "kind": layer, "begin": begin, "step": begin + 128, "efficiency": efficiency}

    return [
        *(cell("first", "z.first", begin, 1.0) for begin in (0, 128)),
        cell("first", "a.second", 0, 0.97),
        cell("first", "a.second", 128, 0.0),
        cell("other", "b.third", 0, 0.5),
    ]


def headroom_rows() -> list[dict[str, Any]]:
    cells = [("norm", -4, 0.75), ("norm", 0, 0.25), ("attn", 3, 1.0)]
    return [{"name": "first", "kind": layer, "octave": octave, "share": share} for layer, octave, share in cells]


ROWS = {HEATMAP_CHART.name: heatmap_rows(), HEADROOM_CHART.name: headroom_rows()}


def cells_of(chart: Chart) -> list[dict[str, str]]:
    """The rectangles of the drawing: their description and how they are painted."""
    svg = vl_convert.vegalite_to_svg(filled(chart, ROWS[chart.name]))
    marks = re.findall(r'<path aria-label="([^"]*)"[^>]*aria-roledescription="rect mark"([^>]*)>', svg)
    return [{"label": html.unescape(label), **dict(re.findall(r'([\w-]+)="([^"]*)"', rest))} for label, rest in marks]


@pytest.mark.parametrize("chart", CHARTS, ids=lambda c: c.name)
def test_placeholders_and_panel_settings_agree_and_name_logged_columns(chart: Chart) -> None:
    text = json.dumps(chart.spec)
    assert set(re.findall(r"\$\{field:(\w+)\}", text)) == set(chart.fields)
    assert set(re.findall(r"\$\{string:(\w+)\}", text)) == set(chart.strings)
    assert set(chart.fields.values()) == {*COLUMNS[chart.name], "name"}


def test_the_heatmap_paints_what_arrives_blue_and_what_stalls_dark_red() -> None:
    painted = {
        re.sub(r"; up to step.*efficiency", "; efficiency", c["label"]): c["fill"] for c in cells_of(HEATMAP_CHART)
    }
    assert len(painted) == 4  # of the first run only
    colors = [fill for label, fill in painted.items()]
    rgb = [f"rgb({int(c[1:3], 16)}, {int(c[3:5], 16)}, {int(c[5:7], 16)})" for c in EFFICIENCY_COLORS]
    assert colors == [rgb[-1], rgb[-1], rgb[-1], rgb[0]]


def test_the_heatmap_keeps_the_models_order_of_kinds() -> None:
    svg = vl_convert.vegalite_to_svg(filled(HEATMAP_CHART, heatmap_rows()))
    assert svg.index(">z.first<") < svg.index(">a.second<")
    assert ">b.third<" not in svg


def test_the_headroom_chart_paints_lost_octaves_red_and_arriving_ones_blue() -> None:
    cells = cells_of(HEADROOM_CHART)
    assert [c["fill"] for c in cells] == [LOST_COLOR, ARRIVING_COLOR, ARRIVING_COLOR]
    opacities = [float(c["opacity"]) for c in cells]
    assert opacities[0] == opacities[2] == 1.0  # clamped at 40%
    assert 0.5 < opacities[1] < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("chart", CHARTS, ids=lambda c: c.name)
def test_a_browser_draws_the_chart_to_the_size_of_its_panel_without_an_error(chart: Chart, tmp_path: Path) -> None:
    spec = filled(chart, ROWS[chart.name], width="container", height="container")
    page = tmp_path / "chart.html"
    style = "<style>html, body, #vega-chart { width: 640px; height: 400px; margin: 0 }</style>"
    page.write_text(vl_convert.vegalite_to_html(spec, bundle=True).replace("</head>", style + "</head>"))
    driver = opened(tmp_path / "profile")
    try:
        driver.get(page.as_uri())
        driver.implicitly_wait(10)
        drawing = driver.find_element("css selector", "#vega-chart canvas, #vega-chart svg")
        assert drawing.size["width"] == pytest.approx(640, abs=60)
        assert drawing.size["height"] == pytest.approx(400, abs=60)
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
        driver.save_screenshot(str(tmp_path / f"{chart.name}.png"))
    finally:
        driver.quit()
