"""What may leave its range beside weights and gradients: updates and optimizer state, the top of FP16, steps that are skipped."""

from __future__ import annotations

from typing import Any

import numpy as np

from update_watch.dashboards.report.charts.parts import Scales, Spec, nearest, number, step_axis, time_chart, times_axis
from update_watch.dashboards.report.history import History
from update_watch.dashboards.run_numbers import Floats

_LEAST = 1.25  # times: a chart of what hardly moves is flat


def drifts(history: History, scales: Scales) -> Spec | None:
    """Update over weight over learning rate, as times its median, and the state factor; None where the former is not known."""
    with np.errstate(divide="ignore", invalid="ignore"):
        update = history.of_run("ratio") / history.of_run("lr")
    state = np.array([ranges.state for ranges in history.ranges_H])
    update[~(np.isfinite(update) & (update > 0))] = np.nan
    if np.isnan(update).all():
        return None
    update = update / np.nanmedian(update)
    known = np.concatenate([values[np.isfinite(values)] for values in (update, state)])
    lines = [("update", "main", "updates for their rate", update)]
    if not np.isnan(state).all():
        lines.append(("state", "second", "optimizer state", state))
    return _chart(
        history,
        scales,
        "Updates for their learning rate, as times their median, and the state factor",
        lines,
        times_axis(known, _LEAST, "times", 4),
        at=1.0,
    )


def fp16_room(history: History, scales: Scales) -> Spec | None:
    """Doublings from the largest FP16 gradient to infinity; None where no weight is in FP16."""
    room = np.array([ranges.room for ranges in history.ranges_H])
    if np.isnan(room).all():
        return None
    domain = [min(0.0, float(np.nanmin(room))), max(4.0, float(np.nanmax(room)) + 1)]
    y = {
        "scale": {"domain": domain, "nice": False},
        "axis": {"title": "doublings", "tickCount": 4, "grid": False, "minExtent": 30},
    }
    line = ("room", "main", "doublings to infinity", room)
    return _chart(history, scales, "Doublings from the largest FP16 gradient to infinity", [line], y, at=0.0)


def skipped(history: History, scales: Scales) -> Spec | None:
    """Share of the steps that the gradient scaler skipped; None where it skipped none."""
    share = np.array([ranges.skipped for ranges in history.ranges_H])
    if not (share > 0).any():
        return None
    y = {
        "scale": {"domain": [0.0, float(share.max()) * 1.1], "nice": False},
        "axis": {"title": "of the steps", "format": "~%", "tickCount": 3, "grid": False, "minExtent": 30},
    }
    line = ("skipped", "second", "skipped steps", share)
    return _chart(history, scales, "Share of the steps that were skipped for overflow", [line], y)


def _chart(
    history: History,
    scales: Scales,
    title: str,
    lines: list[tuple[str, str, str, Floats]],
    y: dict[str, Any],
    at: float | None = None,
) -> Spec:
    """Lines (field, style, words, values) over the run, and a rule `at` a value."""
    values = [
        {"step": end, **{line[0]: number(line[3][h]) for line in lines}} for h, (_, end) in enumerate(history.spans)
    ]
    x = {"field": "step", **step_axis(scales)}
    rule: list[Spec] = []
    if at is not None:
        rule.append(
            {
                "data": {"values": [{"at": at}]},
                "mark": {"type": "rule", "style": "onset"},
                "encoding": {"y": {"field": "at", "type": "quantitative", **y}},
            }
        )
    drawn: list[Spec] = [
        {
            "mark": {"type": "line", "style": style},
            "encoding": {"x": x, "y": {"field": field, "type": "quantitative", **y}},
        }
        for field, style, _, _ in lines
    ]
    tooltip: list[Spec] = [{"field": "step", "type": "quantitative", "title": "up to step", "format": ","}]
    tooltip += [
        {"field": field, "type": "quantitative", "title": words, "format": ".3~g"} for field, _, words, _ in lines
    ]
    return time_chart(
        110,
        [*rule, *drawn, nearest(values, tooltip)],
        f"{title}, over the run of {history.name}",
        data={"values": values},
    )
