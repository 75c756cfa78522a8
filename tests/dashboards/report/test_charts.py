"""Chart specifications: their data is the run's, nothing bad is hidden, and Vega-Lite accepts and draws every one."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from tests.support.run_samples import Spec, fully_filled_report, gpt, large, synthetic_run
from update_watch.dashboards.report import charts
from update_watch.dashboards.report.chart_parts import scales_of
from update_watch.dashboards.report.headroom_charts import headroom, headroom_by_row
from update_watch.dashboards.report.heatmap_chart import heatmap
from update_watch.dashboards.report.history import SPANS, History, history_of
from update_watch.dashboards.report.palette import CLASSES, RUNS, THEMES, chart_config
from update_watch.dashboards.report.ratio_charts import ratios_by_layer, ratios_over_steps
from update_watch.dashboards.report.row_groups import kind_rows, layer_rows, tensor_rows
from update_watch.report import Alert, Health, Level, Report, TensorReport

HOSTILE = "</script><img src=x onerror=alert(1)>"


def small_run(windows: int = 12) -> History:
    kinds = ("bf16", "frozen", "idle", "unknown", "broken", "fp32")
    specs = [dataclasses.replace(s, kind=kinds[i] if i < len(kinds) else "bf16") for i, s in enumerate(gpt(1))]
    return history_of(list(synthetic_run((*specs, Spec(HOSTILE, (4,), 1.0)), windows=windows)), "run")


def every_chart(history: History) -> dict[str, dict[str, Any]]:
    scales = scales_of([history])
    names, layers = history.table.name, history.table.layer
    return {
        "heatmap": heatmap(history, tensor_rows(names), scales),
        "heatmap-kinds": heatmap(history, kind_rows(names, 40), scales),
        "health": charts.health_over_steps(history, scales),
        "efficiency": charts.efficiency_over_steps([history], scales),
        "efficiency-two": charts.efficiency_over_steps([history, dataclasses.replace(history, name="b")], scales),
        "ratios": ratios_over_steps(history, scales),
        "layers": ratios_by_layer(history, layer_rows(names, layers, 60), scales),
        "headroom": headroom(history, scales),
        "kinds": headroom_by_row(history, kind_rows(names, 40), scales),
        "accumulators": charts.accumulators(history),
        "alerts": charts.alert_timeline(history, scales),
    }


def tensor(name: str = "a.weight", health: Health = Health.healthy, **fields: Any) -> TensorReport:
    return TensorReport(name, health, **{"efficiency": 0.99, "numel": 10, "layer": "a", "dtype": "bfloat16", **fields})


def report(step: int, *tensors: TensorReport, **fields: Any) -> Report:
    return Report(step, 10, Health.healthy, "", tensors, **fields)


# --- Vega-Lite takes them ----------------------------------------------------------------------------------


def _svg(spec: dict[str, Any], theme: str = "light") -> str:
    vl_convert = pytest.importorskip("vl_convert")
    config = {**chart_config(theme), "background": THEMES[theme]["page"]}
    return str(vl_convert.vegalite_to_svg(json.dumps({**spec, "width": 500, "config": config}), vl_version="6.4"))


RUN = small_run()


@pytest.mark.parametrize("name", list(every_chart(RUN)))
def test_every_chart_is_a_valid_specification(name):
    altair = pytest.importorskip("altair")
    altair.Chart.from_dict(every_chart(RUN)[name], validate=True)


@pytest.mark.parametrize("theme", list(THEMES))
@pytest.mark.parametrize("name", list(every_chart(RUN)))
def test_every_chart_draws_marks_in_the_colours_of_its_theme(name, theme):
    svg = _svg(every_chart(RUN)[name], theme)
    assert svg.count("<path") > 3
    assert THEMES[theme]["quiet"] in svg  # the axis
    used = {color for color in (*THEMES[theme].values(), *RUNS[theme]) if f'"{color}"' in svg}
    assert len(used) >= 4
    assert "#4c78a8" not in svg  # Vega's own blue: a mark that nobody coloured


@pytest.mark.parametrize("run", ["one window", "no numbers", "no tensors"])
def test_every_chart_is_drawn_for_runs_with_little_to_show(run):
    reports = {
        "one window": list(synthetic_run(gpt(1), windows=1)),
        "no numbers": [report(10, TensorReport("a", Health.unknown)), report(20, TensorReport("a", Health.unknown))],
        "no tensors": [report(10)],
    }[run]
    for name, spec in every_chart(history_of(reports)).items():
        assert _svg(spec).startswith("<svg"), name


def test_no_specification_holds_a_value_that_json_cannot():
    broken = report(10, tensor(efficiency=math.nan, update_ratio=math.inf, applied_ratio=math.nan, lr=math.inf))
    for spec in [*every_chart(history_of([broken])).values(), *every_chart(RUN).values()]:
        json.dumps(spec, allow_nan=False)


def test_names_are_data_and_never_part_of_an_expression():
    def expressions(node: Any, key: str = "") -> list[str]:
        if isinstance(node, dict):
            return [text for k, v in node.items() if k not in ("values", "value") for text in expressions(v, k)]
        if isinstance(node, list):
            return [text for v in node for text in expressions(v, key)]
        return [str(node)]

    for name, spec in every_chart(RUN).items():
        assert not any(HOSTILE in text for text in expressions(spec)), name
    assert HOSTILE in json.dumps(every_chart(RUN)["heatmap"])


# --- the heatmap -----------------------------------------------------------------------------------------------


def cells(spec: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(v["r"], v["begin"], v["end"], v["verdict"], v["efficiency"]) for v in spec["data"]["values"]]


def test_the_heatmap_says_from_when_to_when_each_tensor_was_in_what_state():
    run = [
        report(10, tensor("a", efficiency=0.99), tensor("b", Health.stalled, efficiency=0.05)),
        report(20, tensor("a", efficiency=0.97), tensor("b", Health.stalling, efficiency=0.3)),
        report(30, tensor("a", efficiency=0.9), tensor("b", Health.stalling, efficiency=0.6)),
        report(40, tensor("a", Health.frozen, efficiency=None), tensor("b", Health.broken, efficiency=None)),
    ]
    history = history_of(run)
    assert cells(heatmap(history, tensor_rows(history.table.name), scales_of([history]))) == [
        (0, 0, 20, "healthy", 0.97),
        (0, 20, 30, "healthy, under 0.96", 0.9),
        (1, 0, 10, "stalled", 0.05),
        (1, 10, 20, "stalling, under half", 0.3),
        (1, 20, 30, "stalling", 0.6),
        (1, 30, 40, "broken", None),
    ]


def test_a_row_of_several_tensors_shows_its_worst_and_names_it():
    run = [report(10, tensor("h.0.w"), tensor("h.1.w", Health.stalled, efficiency=0.01), tensor("h.2.w"))]
    history = history_of(run)
    (cell,) = heatmap(history, kind_rows(history.table.name, 10), scales_of([history]))["data"]["values"]
    assert (cell["verdict"], cell["name"], cell["efficiency"]) == ("stalled", "h.1.w", 0.01)


def test_a_stall_the_efficiency_does_not_show_is_shown_all_the_same():
    # drift lost under passing oscillation: efficiency 0.95, verdict stalling
    history = history_of([report(10, tensor("a", Health.stalling, efficiency=0.95))])
    assert cells(heatmap(history, tensor_rows(("a",)), scales_of([history])))[0][3] == "stalling"


@pytest.mark.parametrize("view", ["tensor", "kind", "layer"])
def test_a_stall_of_one_window_among_thousands_is_in_the_heatmap(view):
    run = [report(10 * n, tensor("h.0.w", layer="h.0"), tensor("h.1.w", layer="h.1")) for n in range(1, 5001)]
    run[3210] = report(32_110, tensor("h.0.w"), tensor("h.1.w", Health.stalled, efficiency=0.02, layer="h.1"))
    history = history_of(run)
    names, layers = history.table.name, history.table.layer
    rows = {"tensor": tensor_rows(names), "kind": kind_rows(names, 10), "layer": layer_rows(names, layers, 10)}[view]
    stalled = [cell for cell in cells(heatmap(history, rows, scales_of([history]))) if cell[3] == "stalled"]
    assert len(stalled) == 1
    assert stalled[0][1] < 32_110 <= stalled[0][2]
    assert len(history.spans) <= 2 * SPANS


# --- the other charts ----------------------------------------------------------------------------------------


def test_counts_per_health_are_those_of_the_reports():
    reports = list(synthetic_run(windows=8))
    history = history_of(reports)
    values = charts.health_over_steps(history, scales_of([history]))["data"]["values"]
    for r in reports:
        shown = {v["health"]: v["n"] for v in values if v["step"] == r.step}
        assert {k: n for k, n in shown.items() if n} == {k: n for k, n in r.counts.items() if n}


def test_the_efficiency_of_the_run_is_weighted_by_size():
    run = [report(10, tensor("a", efficiency=1.0, numel=300), tensor("b", Health.stalled, efficiency=0.0, numel=100))]
    history = history_of(run)
    values = charts.efficiency_over_steps([history], scales_of([history]))["data"]["values"]
    assert [(v["step"], v["efficiency"]) for v in values] == [(0, 0.75), (10, 0.75)]


def test_ratios_over_the_run_are_quantiles_of_the_tensors():
    tensors = [tensor(f"t{i}", update_ratio=0.001 * (i + 1), applied_ratio=0.0005 * (i + 1)) for i in range(11)]
    history = history_of([report(10, *tensors)])
    values = ratios_over_steps(history, scales_of([history]))["data"]["values"]
    assert values[-1] == {"step": 10, "low": 0.002, "median": 0.006, "high": 0.01, "applied": 0.003}


def test_the_ratio_charts_draw_epsilon_and_the_half_ulp_band_of_bf16():
    for spec in (every_chart(RUN)["layers"], every_chart(RUN)["ratios"]):
        drawn = [value for layer in spec["layer"] if "data" in layer for value in layer["data"].get("values", [])]
        assert {"low": 2**-9, "high": 2**-8} in drawn
        assert {"at": 2**-7} in drawn


def test_an_update_of_which_nothing_arrives_is_drawn_at_the_left_edge_and_not_left_out():
    history = history_of([report(10, tensor("a", Health.stalled, update_ratio=1e-4, applied_ratio=0.0))])
    scales = scales_of([history])
    spec = ratios_by_layer(history, layer_rows(("a",), ("a",), 10), scales)
    (value,) = spec["layer"][-1]["data"]["values"]
    assert (value["intended"], value["applied"]) == (1e-4, 0.0)
    assert value["at"] == pytest.approx(scales.ratio[0], rel=0.01)


def test_headroom_is_weighted_by_the_wanted_elements():
    low, high = ([1.0 if i == k else 0.0 for i in range(32)] for k in (10, 20))
    run = [
        report(
            10,
            tensor("a", numel=100, wanted_fraction=0.5, headroom_histogram=tuple(low)),
            tensor("b", numel=150, wanted_fraction=1.0, headroom_histogram=tuple(high)),
        )
    ]
    history = history_of(run)
    spec = headroom(history, scales_of([history]))
    assert spec["layer"][0]["data"]["values"] == [
        {"from": -6, "to": -5, "share": 0.25},
        {"from": 4, "to": 5, "share": 0.75},
    ]


def test_accumulators_show_the_lower_of_growth_and_decay():
    history = history_of([fully_filled_report()])
    (value,) = charts.accumulators(history)["data"]["values"]
    assert (value["at"], value["health"], value["dtype"]) == (0.01, "stalled", "bfloat16")


def test_alerts_beyond_what_can_be_told_apart_share_a_mark_and_none_is_lost():
    run = [
        report(10 * n, tensor(), alerts=(Alert(10 * n, Level.error if n % 2 else Level.info, f"alert {n}", ""),))
        for n in range(1, 2001)
    ]
    history = history_of(run)
    values = charts.alert_timeline(history, scales_of([history]))["data"]["values"]
    assert len(values) <= 2 * 151
    assert sum(v["n"] for v in values) == 2000


def test_a_chart_of_two_thousand_tensors_stays_small():
    history = history_of(list(synthetic_run(large(2000), windows=3)))
    for name, spec in every_chart(history).items():
        if name != "heatmap":  # one row per tensor: made only for small models
            assert len(json.dumps(spec)) < 400_000, name
            assert spec["height"] < 1200, name


def test_runs_side_by_side_share_their_scales():
    a = history_of([report(10, tensor("a", update_ratio=1e-2)), report(20, tensor("a", update_ratio=1e-2))])
    b = history_of([report(50, tensor("a", update_ratio=1e-5))])
    scales = scales_of([a, b])
    assert scales.steps == (0, 50)
    assert scales.ratio == pytest.approx((1e-5 / 1.5, 1.5e-2))
    assert scales.octaves == (-4, 4)


# --- histories ----------------------------------------------------------------------------------------------


def test_a_run_resumed_from_an_earlier_step_shows_the_later_windows_only():
    first = [report(10 * n, tensor("a", efficiency=0.5)) for n in range(1, 9)]
    again = [report(10 * n, tensor("a", efficiency=0.9)) for n in range(5, 8)]
    history = history_of(first + again)
    assert history.spans == ((0, 10), (10, 20), (20, 30), (30, 40), (40, 50), (50, 60), (60, 70))
    assert history.efficiency_H.tolist() == pytest.approx([0.5] * 4 + [0.9] * 3)


def test_tensors_that_come_and_go_are_all_in_the_history():
    history = history_of([report(10, tensor("a"), tensor("b")), report(20, tensor("c"), tensor("a"))])
    assert history.table.name == ("c", "a", "b")
    absent = 7
    assert (history.health_PH == absent).tolist() == [[True, False], [False, False], [False, True]]


# --- rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 7, 40, 80])
def test_rows_hold_every_tensor_once_and_are_no_more_than_asked_for(limit):
    for specs in (gpt(), large(2000), tuple(Spec(f"p{i}", (1,), 1.0) for i in range(300))):
        names = [s.name for s in specs]
        layers = [name.rpartition(".")[0] for name in names]
        for rows in (layer_rows(names, layers, limit), kind_rows(names, limit)):
            assert sorted(i for members in rows.members for i in members) == list(range(len(names)))
            assert len(rows.labels) == len(rows.members) <= limit
            assert len(set(rows.labels)) == len(rows.labels)


# --- colours ------------------------------------------------------------------------------------------------


def _luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(a: str, b: str) -> float:
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", list(THEMES))
def test_the_worse_a_cell_of_the_heatmap_the_more_it_differs_from_the_page_in_lightness(theme):
    page = THEMES[theme]["page"]
    contrasts = [_contrast(THEMES[theme][f"class-{i}"], page) for i in range(len(CLASSES))]
    assert contrasts == sorted(contrasts, reverse=True)


@pytest.mark.parametrize("theme", list(THEMES))
def test_text_is_readable(theme):
    colors = THEMES[theme]
    assert _contrast(colors["text"], colors["page"]) > 7
    assert _contrast(colors["quiet"], colors["page"]) > 4.5
    assert _contrast(colors["quiet"], colors["panel"]) > 4.5
