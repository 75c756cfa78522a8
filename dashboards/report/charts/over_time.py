"""One number over the run: how much of each update arrived, with the learning rate beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from update_watch.dashboards.report.charts.parts import Scales, Spec, nearest, number, step_axis, time_chart
from update_watch.dashboards.report.history import History

_MARKS = 3
_WORD = 0.22  # of the chart's width: what a mark's word takes, and what is free around it


def arrived(
    histories: Sequence[History], scales: Scales, marks: Sequence[tuple[int, str]] = (), height: int = 150
) -> Spec:
    """Efficiency of the run (weighted by size), a line per run; of one run the learning rate too, in grey.

    Args:
        marks: (step, what began there).
    """
    values: list[dict[str, Any]] = []
    for run, history in enumerate(histories):
        rows = [
            {"step": end, "run": run, "name": history.name, "arrived": number(arrived), "lr": number(lr)}
            for (_, end), arrived, lr in zip(
                history.spans, history.of_run("efficiency"), history.of_run("lr"), strict=True
            )
        ]
        nothing: dict[str, Any] = {"run": run, "name": history.name, "arrived": None, "lr": None}
        for h in reversed(history.gaps):  # a line would say what nobody saw
            begin = history.spans[h][0]
            rows[h:h] = [{**nothing, "step": history.spans[h - 1][1]}, {**rows[h], "step": begin}]
        values += [{**rows[0], "step": history.first_step}, *rows]
    is_one = len(histories) == 1
    coming = _coming(histories[0]) if len(histories) == 1 else []
    if coming:
        scales = scales._replace(steps=(scales.steps[0], max(scales.steps[1], coming[-1]["step"])))
    x = {"field": "step", **step_axis(scales)}
    low = min((v["arrived"] for v in values if v["arrived"] is not None), default=0.0)
    y = {
        "field": "arrived",
        "type": "quantitative",
        "scale": {"domain": [min(0.0, low), 1.05], "nice": False},
        "axis": {"title": None, "format": "%", "values": [0, 0.25, 0.5, 0.75, 1]},
    }
    line: Spec = {
        "mark": {"type": "line", "style": "main", "interpolate": "linear"},
        "encoding": {"x": x, "y": y, "detail": {"field": "run"}},
    }
    if not is_one:
        line["mark"] = {"type": "line", "strokeWidth": 2}
        names = [history.name for history in histories]
        by_run = {"field": "name", "type": "nominal", "scale": {"domain": names, "range": "diverging"}, "legend": None}
        line["encoding"] |= {"color": by_run, "strokeDash": {**by_run, "scale": {"domain": names}}}
    layers = [line]
    if is_one and scales.lr is not None:
        rates = [v["lr"] for v in coming if v["lr"]]
        low_lr, high_lr = min([scales.lr[0], *rates]), max([scales.lr[1], *rates])
        rate = {
            "field": "lr",
            "type": "quantitative",
            "scale": {"type": "log", "domain": [low_lr / 1.3, high_lr * 1.3], "nice": False},
            "axis": {"title": None, "format": ".0e", "tickCount": 3, "grid": False, "orient": "right"},
        }
        layers = [
            {"mark": {"type": "line", "style": "rate"}, "encoding": {"x": x, "y": rate, "detail": {"field": "run"}}},
            line,
        ]
        if coming:
            layers += _forecast(coming, x, y, rate)
    tooltip = [
        *([] if is_one else [{"field": "name", "type": "nominal", "title": "run"}]),
        {"field": "arrived", "type": "quantitative", "title": "arrived", "format": ".1%"},
        {"field": "lr", "type": "quantitative", "title": "learning rate", "format": ".2e"},
        {"field": "step", "type": "quantitative", "title": "up to step", "format": ","},
    ]
    layers += _marks(sorted(marks[:_MARKS]), scales, height)
    layers.append(nearest(values, tooltip))
    names_ = ", ".join(history.name for history in histories)
    return time_chart(
        height,
        layers,
        f"Share of each update that arrived in the stored weights, and the learning rate, over the run ({names_})",
        until=coming[-1]["step"] if coming else None,
        data={"values": values},
        resolve={"scale": {"y": "independent"}},
    )


def _coming(history: History) -> list[dict[str, Any]]:
    """The forecast from the last window to the end of the schedule, with the band that earlier forecasts of the run kept to."""
    outlook, now = history.last.outlook, history.last.run
    if outlook is None or len(outlook.course) < 2 or outlook.until <= history.last_step:
        return []
    off = outlook.error or 0.0
    found = [
        {
            "step": step,
            "run": 0,
            "arrived": number(arrived),
            "low": number(max(0.0, arrived - off)),
            "high": number(min(1.0, arrived + off)),
            "lr": number(rate * now.lr),
        }
        for step, arrived, rate in outlook.course
    ]
    return found if all(v["arrived"] is not None for v in found) else []


def _forecast(coming: Sequence[dict[str, Any]], x: Spec, y: Spec, rate: Spec) -> list[Spec]:
    data = {"values": list(coming)}
    y, rate = {**y, "axis": None}, {**rate, "axis": None}  # those of the measured lines stand there
    tooltip = [
        {"field": "arrived", "type": "quantitative", "title": "forecast: arrives", "format": ".1%"},
        {"field": "lr", "type": "quantitative", "title": "learning rate", "format": ".2e"},
        {"field": "step", "type": "quantitative", "title": "at step", "format": ","},
    ]
    dashed = {"type": "line", "strokeDash": [5, 4]}
    band = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}}
    return [
        {"data": data, "mark": {**dashed, "style": "rate"}, "encoding": {"x": x, "y": rate}},
        {"data": data, "mark": {"type": "area", "style": "spread"}, "encoding": band},
        {"data": data, "mark": {**dashed, "style": "main"}, "encoding": {"x": x, "y": y}},
        nearest(coming, tooltip),
    ]


def _marks(marks: Sequence[tuple[int, str]], scales: Scales, height: int) -> list[Spec]:
    """A line at each step, with its word on the side on which no other line is: on the right where both are free."""
    first, last = scales.steps
    at = [0.0, *[(step - first) / max(1, last - first) for step, _ in marks], 1.0]
    found = []
    for i, (step, text) in enumerate(marks):
        on_left, on_right = at[i + 1] - at[i], at[i + 2] - at[i + 1]
        found.append(_mark(step, text, height - 13 * i, on_right >= min(_WORD, on_left)))
    return found


def _mark(step: int, text: str, y: int, is_right: bool) -> Spec:
    align, dx = ("left", 4) if is_right else ("right", -4)
    x = {"field": "step", "type": "quantitative"}
    encoding = {"x": x, "y": {"value": y}, "text": {"field": "text"}}
    word = {"type": "text", "align": align, "baseline": "bottom", "dx": dx, "dy": -3}
    return {
        "data": {"values": [{"step": step, "text": text}]},
        "layer": [
            {"mark": {"type": "rule", "style": "onset"}, "encoding": {"x": x}},
            # where a curve or another line runs through it all the same
            *({"mark": {**word, "style": style}, "encoding": encoding} for style in ("halo", "note")),
        ],
    }
