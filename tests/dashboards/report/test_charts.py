"""Chart specifications: their data is the run's, nothing bad is hidden, and Vega-Lite accepts and draws every one."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.run_samples import Spec, fully_filled_report, gpt, large, synthetic_run
from update_watch.dashboards import Journal
from update_watch.dashboards.report import drawing
from update_watch.dashboards.report.charts.classes import CLASSES
from update_watch.dashboards.report.charts.headroom import headroom_by_row
from update_watch.dashboards.report.charts.heatmap import heatmap
from update_watch.dashboards.report.charts.over_time import arrived
from update_watch.dashboards.report.charts.parts import scales_of
from update_watch.dashboards.report.charts.rates import tensors_by_rate
from update_watch.dashboards.report.charts.ratios import ratios
from update_watch.dashboards.report.charts.states import states
from update_watch.dashboards.report.first_screen import first_screen
from update_watch.dashboards.report.history import SPANS, History, history_of, read_history
from update_watch.dashboards.report.kind_map import MOST_COLUMNS, MOST_ROWS, kind_map
from update_watch.dashboards.report.palette import RUNS, THEMES, chart_config
from update_watch.dashboards.report.row_groups import Rows, kind_rows, tensor_rows
from update_watch.dashboards.report.traces import MOST_POINTS, map_traces, run_traces
from update_watch.foresight.divergence import Divergence
from update_watch.foresight.forecasts import Forecast
from update_watch.report import Health, Report, TensorReport

# of a run of 40 steps, made at step 20
FORECAST = Forecast(
    *(20, 40, (), 1.0, 0.5, 25, None, "At this schedule 100% of the parameters stall."),
    *(0.2, ((20, 0.9, 1.0), (30, 0.5, 0.5), (40, 0.1, 0.25))),
)
HOSTILE = "</script><img src=x onerror=alert(1)>"


def small_run(windows: int = 12) -> History:
    kinds = ("bf16", "frozen", "idle", "unknown", "broken", "fp32")
    specs = [dataclasses.replace(s, kind=kinds[i] if i < len(kinds) else "bf16") for i, s in enumerate(gpt(1))]
    return history_of(list(synthetic_run((*specs, Spec(HOSTILE, (4,), 1.0)), windows=windows)), "run")


def every_chart(history: History) -> dict[str, dict[str, Any]]:
    """Those of a page, those of two runs, and those that its script fills, filled."""
    found = dict(drawing.every_chart([history], [first_screen(history)]).charts)
    if "map-0" in found:
        cell = {"r": 0, "c": 0, "verdict": "stalled", "mark": "!", "name": HOSTILE, "efficiency": 0.1, "tensors": "1"}
        other = {**cell, "r": 1, "verdict": "arrives"}
        found["map-0"] = {**found["map-0"], "data": {"values": [cell, other]}}
    scales = scales_of([history])
    if not any(row.efficiency != row.efficiency for row in history.run_H):
        found["arrived-two"] = arrived([history, dataclasses.replace(history, name="b")], scales, [(0, "stalled")])
    found["heatmap-kinds"] = heatmap(history, kind_rows(history.table.name, 40), scales)
    return found


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


@pytest.mark.parametrize(
    ("shares", "sides"),
    [
        ((0.3,), "right"),
        ((0.9,), "left"),  # no room on the right
        ((0.617, 0.717), "left right"),  # both on the right: the first would run through the second's line
        ((0.1, 0.5), "right right"),
        ((0.85, 0.95), "left left"),
        ((0.4, 0.5, 0.6), "left right right"),
    ],
)
def test_the_words_of_what_began_are_where_no_other_line_is(shares, sides):
    history = small_run(40)
    scales = scales_of([history])
    first, last = scales.steps
    marks = [(round(first + share * (last - first)), f"word {share}") for share in shares]
    layers = [one for one in arrived([history], scales, marks[::-1])["layer"] if "onset" in str(one)]
    words = [one["layer"][-1] for one in layers]
    assert [one["data"]["values"][0]["text"] for one in layers] == [text for _, text in marks]
    assert [{"left": "right", "right": "left"}[one["mark"]["align"]] for one in words] == sides.split()
    assert len({one["encoding"]["y"]["value"] for one in words}) == len(shares)  # each on a line of its own


@pytest.mark.parametrize("theme", list(THEMES))
@pytest.mark.parametrize("name", list(every_chart(RUN)))
def test_every_chart_draws_marks_in_the_colours_of_its_theme(name, theme):
    svg = _svg(every_chart(RUN)[name], theme)
    assert svg.count("<path") > 3
    assert THEMES[theme]["quiet"] in svg  # the axis
    used = {color for color in (*THEMES[theme].values(), *RUNS[theme]) if f'"{color}"' in svg}
    assert len(used) >= 3
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
    assert HOSTILE in json.dumps(every_chart(RUN)["heatmap-0"])


# --- the heatmap -----------------------------------------------------------------------------------------------


def heat(history: History, rows: Rows) -> list[dict[str, Any]]:
    values: list[dict[str, Any]] = heatmap(history, rows, scales_of([history]))["layer"][0]["data"]["values"]
    return values


def cells(history: History, rows: Rows) -> list[tuple[Any, ...]]:
    return [(v["r"], v["begin"], v["end"], v["verdict"], v["efficiency"]) for v in heat(history, rows)]


def test_the_heatmap_says_from_when_to_when_each_tensor_was_in_what_state():
    run = [
        report(10, tensor("a", efficiency=0.99), tensor("b", Health.stalled, efficiency=0.05)),
        report(20, tensor("a", efficiency=0.97), tensor("b", Health.stalling, efficiency=0.3)),
        report(30, tensor("a", efficiency=0.9), tensor("b", Health.stalling, efficiency=0.6)),
        report(40, tensor("a", Health.frozen, efficiency=None), tensor("b", Health.broken, efficiency=None)),
    ]
    history = history_of(run)
    assert cells(history, tensor_rows(history.table.name)) == [
        (0, 0, 30, "arrives", 0.9),
        (0, 30, 40, "frozen", None),
        (1, 0, 10, "stalled", 0.05),
        (1, 10, 20, "over half is lost", 0.3),
        (1, 20, 30, "part is lost", 0.6),
        (1, 30, 40, "broken", None),
    ]


def test_a_row_of_several_tensors_shows_its_worst_and_names_it():
    run = [report(10, tensor("h.0.w"), tensor("h.1.w", Health.stalled, efficiency=0.01), tensor("h.2.w"))]
    history = history_of(run)
    (cell,) = heat(history, kind_rows(history.table.name, 10))
    assert (cell["verdict"], cell["name"], cell["efficiency"]) == ("stalled", "h.1.w", 0.01)


def test_a_stall_the_efficiency_does_not_show_is_shown_all_the_same():
    # drift lost under passing oscillation: efficiency 0.95, verdict stalling
    history = history_of([report(10, tensor("a", Health.stalling, efficiency=0.95))])
    assert cells(history, tensor_rows(("a",)))[0][3] == "part is lost"


@pytest.mark.parametrize("view", ["tensor", "kind"])
@pytest.mark.slow
def test_a_stall_of_one_window_among_thousands_is_in_the_heatmap(view):
    run = [report(10 * n, tensor("h.0.w", layer="h.0"), tensor("h.1.w", layer="h.1")) for n in range(1, 5001)]
    run[3210] = report(32_110, tensor("h.0.w"), tensor("h.1.w", Health.stalled, efficiency=0.02, layer="h.1"))
    history = history_of(run)
    names = history.table.name
    rows = {"tensor": tensor_rows(names), "kind": kind_rows(names, 10)}[view]
    stalled = [cell for cell in cells(history, rows) if cell[3] == "stalled"]
    assert len(stalled) == 1
    assert stalled[0][1] < 32_110 <= stalled[0][2]
    assert len(history.spans) <= 2 * SPANS


# --- the other charts ----------------------------------------------------------------------------------------


def test_the_efficiency_of_the_run_is_weighted_by_size():
    run = [report(10, tensor("a", efficiency=1.0, numel=300), tensor("b", Health.stalled, efficiency=0.0, numel=100))]
    history = history_of(run)
    values = arrived([history], scales_of([history]))["data"]["values"]
    assert [(v["step"], v["arrived"]) for v in values] == [(0, 0.75), (10, 0.75)]


def test_numbers_of_the_run_are_means_where_windows_are_joined_and_tensors_their_worst():
    windows = [report(10 * n, tensor("a", efficiency=0.2 if n % 2 else 1.0, numel=10)) for n in range(1, 401)]
    history = history_of(windows)
    assert history.windows_per_span > 1
    assert history.of_run("efficiency")[1:-1].tolist() == pytest.approx([0.6] * (len(history.spans) - 2), abs=0.05)
    assert history.series_PH["efficiency"].max() == pytest.approx(0.2)


def test_a_forecast_goes_on_to_the_end_of_the_schedule_with_its_band(tmp_path: Path) -> None:
    history = history_of([report(step, tensor(lr=1e-3, efficiency=0.9), forecast=FORECAST) for step in (10, 20)], "run")
    sink = Journal(tmp_path / "run.jsonl")
    for step in (10, 20):
        sink(report(step, tensor(lr=1e-3, efficiency=0.9), forecast=FORECAST))
    sink.close()
    assert read_history(tmp_path / "run.jsonl").last.outlook == history.last.outlook  # through a journal
    spec = arrived([history], scales_of([history]))
    assert spec["usermeta"]["until"] == 40 and spec["layer"][0]["encoding"]["x"]["scale"]["domain"][1] == 40
    (band,) = [layer for layer in spec["layer"] if layer["mark"].get("type") == "area"]
    told = [(v["step"], v["low"], v["high"], v["lr"]) for v in band["data"]["values"]]
    assert told == [(20, 0.7, 1.0, 1e-3), (30, 0.3, 0.7, 5e-4), (40, 0.0, 0.3, 2.5e-4)]
    assert first_screen(history).outlook == FORECAST.headline
    assert ">" in _svg(spec)


def test_a_forecast_that_has_come_to_pass_is_not_drawn() -> None:
    over = history_of([report(50, tensor(lr=1e-3), forecast=FORECAST)], "run")
    assert "until" not in arrived([over], scales_of([over]))["usermeta"] and first_screen(over).outlook == ""
    early = history_of(
        [report(20, tensor(lr=1e-3), forecast=FORECAST), report(40, tensor(lr=1e-3, efficiency=0.2))], "run"
    )
    assert first_screen(early).held == (
        "Forecast at step 20: at this schedule 100% of the parameters stall. At the end 20% of each update arrived; 10% was"
        " forecast."
    )
    assert first_screen(history_of([report(20, tensor(lr=1e-3), forecast=FORECAST)], "run")).held == ""


def test_what_leaves_its_range_is_drawn_where_it_is_known() -> None:
    def window(i: int, **fields: Any) -> Report:
        usual = {"weight_rms": 0.02, "update_ratio": 1e-3 * (i + 1), "lr": 1e-3, "trainable": True}
        return report(
            10 * (i + 1),
            tensor(**usual, **fields),
            skipped_steps=i,
            divergence=Divergence(10, overflow_doublings=9.0 - i),
        )

    found = drawing.every_chart(
        [run := history_of([window(i, state_factor=1 - 0.1 * i) for i in range(3)], "run")], [first_screen(run)]
    )
    values = {name: found.charts[f"{name}-0"]["data"]["values"] for name in ("drifts", "room", "skips")}
    assert [row["update"] for row in values["drifts"]] == pytest.approx([0.5, 1.0, 1.5])
    assert [row["state"] for row in values["drifts"]] == pytest.approx([1.0, 0.9, 0.8])
    assert [row["room"] for row in values["room"]] == [9.0, 8.0, 7.0]
    assert [row["skipped"] for row in values["skips"]] == pytest.approx([0.0, 0.1, 0.2])
    plain = history_of([report(10 * (i + 1), tensor(weight_rms=0.02, trainable=True)) for i in range(3)], "plain")
    assert not {"drifts-0", "room-0", "skips-0"} & set(every_chart(plain))


def test_ratios_over_the_run_are_quantiles_of_the_tensors():
    tensors = [tensor(f"t{i}", update_ratio=0.001 * (i + 1), applied_ratio=0.0005 * (i + 1)) for i in range(11)]
    history = history_of([report(10, *tensors)])
    values = ratios(history, scales_of([history]))["data"]["values"]
    assert values[-1] == {"step": 10, "low": 0.002, "median": 0.006, "high": 0.01, "applied": 0.003}


def test_the_ratio_chart_draws_epsilon_and_the_half_ulp_band_of_bf16():
    layers = every_chart(RUN)["ratios-0"]["layer"]
    drawn = [value for layer in layers if "data" in layer for value in layer["data"].get("values", [])]
    assert {"low": 2**-9, "high": 2**-8} in drawn
    assert {"at": 2**-7} in drawn


def test_headroom_of_a_kind_is_weighted_by_the_elements_that_should_have_changed():
    low, high = ([1.0 if i == k else 0.0 for i in range(32)] for k in (10, 20))
    run = [
        report(
            10,
            tensor("h.0.w", numel=100, wanted_fraction=0.5, headroom_histogram=tuple(low)),
            tensor("h.1.w", numel=150, wanted_fraction=1.0, headroom_histogram=tuple(high)),
        )
    ]
    history = history_of(run)
    spec = headroom_by_row(history, kind_rows(history.table.name, 10), scales_of([history]))
    assert spec["layer"][0]["data"]["values"] == [
        {"r": 0, "from": -6, "to": -5, "share": 0.25},
        {"r": 0, "from": 4, "to": 5, "share": 0.75},
    ]


def test_accumulators_show_the_lower_of_growth_and_decay():
    history = history_of([fully_filled_report()])
    (value,) = states(history)["data"]["values"]
    assert (value["at"], value["health"], value["dtype"]) == (0.01, "stalled", "bfloat16")


def test_tensors_that_can_take_a_learning_rate_are_those_whose_critical_rate_is_below():
    rates = [1e-5, 1e-4, 1e-4, 1e-2]
    history = history_of([report(10, *(tensor(f"t{i}", lr=1e-3, critical_lr=r) for i, r in enumerate(rates)))])
    spec = tensors_by_rate(history, {"now": 1e-3, "peak": 3e-3})
    assert spec is not None
    values = spec["layer"][0]["data"]["values"]

    def share_at(rate: float) -> float:
        return next(v["share"] for v in reversed(values) if v["lr"] <= rate)

    assert [share_at(rate) for rate in (9e-6, 2e-5, 1e-3, 1.5e-2)] == [0.0, 0.25, 0.75, 1.0]
    words = [v["text"] for layer in spec["layer"] for v in layer["data"]["values"] if "text" in v]
    assert list(dict.fromkeys(words)) == ["now", "peak"]


def test_no_chart_of_learning_rates_where_nothing_is_known_of_them():
    history = history_of([report(10, tensor("a"))])
    assert tensors_by_rate(history, {"now": 1e-3}) is None


# --- the map kind by layer ---------------------------------------------------------------------------------------


def test_the_map_has_kinds_as_rows_layers_as_columns_and_experts_in_one_cell():
    names = ["wte.weight"]
    names += [f"h.{i}.{p}.weight" for i in range(3) for p in ("attn.q", *(f"mlp.experts.{e}.w" for e in range(4)))]
    kinds = kind_map(names)
    assert kinds.rows == ("wte", "q", "experts.w")
    assert kinds.columns == ("", "0", "1", "2")
    members = {(c.row, c.column): [names[i] for i in c.members] for c in kinds.cells}
    assert members[0, 0] == ["wte.weight"]
    assert members[1, 3] == ["h.2.attn.q.weight"]
    assert members[2, 1] == [f"h.0.mlp.experts.{e}.w.weight" for e in range(4)]


def test_every_tensor_is_in_one_cell_of_the_map_and_the_map_is_bounded():
    deep = [f"layers.{i}.{p}.weight" for i in range(500) for p in ("a.q", "b.k")]
    many = [f"h.{i}.m{k}x.w.weight" for i in range(2) for k in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"]
    for names in (deep, many, [s.name for s in large(2000)], [f"p{i}" for i in range(300)]):
        kinds = kind_map(names)
        assert sorted(i for cell in kinds.cells for i in cell.members) == list(range(len(names)))
        assert len(kinds.rows) <= MOST_ROWS and len(kinds.columns) <= MOST_COLUMNS + 1
        assert all(kinds.rows)


def unpacked(coding: dict[str, Any]) -> list[float | None]:
    step = (coding["high"] - coding["low"]) / 254
    values = [None if code == 255 else coding["low"] + step * code for code in base64.b64decode(coding["bytes"])]
    return [None if v is None else 10**v for v in values] if coding["log"] else values


def test_a_cell_shows_its_worst_tensor_of_each_moment():
    run = [
        report(10, tensor("h.0.w", efficiency=0.99), tensor("h.1.w", Health.stalled, efficiency=0.05)),
        report(20, tensor("h.0.w", Health.stalling, efficiency=0.3), tensor("h.1.w", efficiency=0.97)),
    ]
    history = history_of(run)
    kinds = kind_map(history.table.name)
    found = map_traces(history, kinds)
    classes = [CLASSES[code] for code in base64.b64decode(found["class"])]
    assert classes == ["arrives", "over half is lost", "stalled", "arrives"]
    assert unpacked(found["efficiency"]) == pytest.approx([0.99, 0.3, 0.05, 0.97], abs=0.005)
    assert found["steps"] == [10, 20]


def test_traces_come_back_from_their_bytes():
    reports = list(synthetic_run(gpt(1), windows=30))
    history = history_of(reports)
    found = run_traces(history, [2, 0])
    expected = [[r.tensors[i] for r in reports] for i in (2, 0)]
    efficiencies = [t.efficiency for tensors in expected for t in tensors]
    assert unpacked(found["efficiency"]) == pytest.approx(efficiencies, abs=0.003)
    for name, values in (
        ("update_ratio", [t.update_ratio for tensors in expected for t in tensors]),
        ("margin", [t.lr / t.critical_lr for tensors in expected for t in tensors]),
        ("lr", [t.lr for tensors in expected for t in tensors]),
    ):
        assert unpacked(found[name]) == pytest.approx(values, rel=0.03), name
    assert found["times"][-1] == pytest.approx(reports[-1].time, abs=0.1)
    assert found["gradient_rms"] is None  # nothing was known of it


def test_gradients_and_the_bf16_copy_have_their_traces():
    numbers = {"gradient_rms": 3e-4, "gradient_spread": 0.4, "copy_changed": 0.02}
    run = [report(10 * n, tensor("w", **{name: value / n for name, value in numbers.items()})) for n in (1, 2)]
    found = run_traces(history_of(run), [0])
    for name, value in numbers.items():
        assert unpacked(found[name]) == pytest.approx([value, value / 2], rel=0.03), name


def test_traces_of_a_long_run_are_bounded_and_hold_its_end():
    history = history_of([report(10 * n, tensor("a")) for n in range(1, 1001)])
    found = run_traces(history, [0])
    assert len(found["steps"]) <= MOST_POINTS
    assert found["steps"][-1] == 10_000


def test_a_chart_of_two_thousand_tensors_stays_small():
    history = history_of(list(synthetic_run(large(2000), windows=3)))
    for name, spec in every_chart(history).items():
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
    assert history.of_run("efficiency").tolist() == pytest.approx([0.5] * 4 + [0.9] * 3)


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
        rows = kind_rows(names, limit)
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
    contrasts = [_contrast(THEMES[theme][f"class-{i}"], page) for i in range(CLASSES.index("arrives") + 1)]
    assert contrasts == sorted(contrasts, reverse=True)


@pytest.mark.parametrize("theme", list(THEMES))
def test_text_is_readable(theme):
    colors = THEMES[theme]
    assert _contrast(colors["text"], colors["page"]) > 7
    for name in ("quiet", "faint", "stalled", "stalling-strong", "accent"):
        assert _contrast(colors[name], colors["page"]) > 4.5, name
    assert _contrast(colors["quiet"], colors["panel"]) > 4.5


def test_what_is_missing_of_a_run_is_a_gap_in_its_charts():
    reports = list(synthetic_run(gpt(1), windows=40, precision="fp32"))
    whole, cut = history_of(reports), history_of(reports[:10] + reports[20:])
    gap = reports[9].step, reports[20].step - reports[20].window
    assert whole.gaps == [] and [cut.spans[h - 1][1] for h in cut.gaps] == [gap[0]]
    far_apart = [dataclasses.replace(report, step=report.step * 1000) for report in reports]  # numbered by tokens
    assert history_of(far_apart).gaps == [] and history_of(reports[:2]).gaps == []
    scales = scales_of([cut])
    cells = heatmap(cut, kind_rows(cut.table.name, 40), scales)["layer"][0]["data"]["values"]
    assert cells and [cell for cell in cells if cell["begin"] < gap[1] and cell["end"] > gap[0]] == []
    line = [(row["step"], row["arrived"] is None) for row in arrived([cut], scales)["data"]["values"]]
    assert (gap[0], True) in line and line[line.index((gap[0], True)) + 1] == (gap[1], False)
    assert [step for step, is_none in line if is_none] == [gap[0]]
