"""The size of weights and gradients over the run: a run that will blow up shows it here before its loss does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from update_watch.dashboards.report.charts.parts import Scales, Spec, nearest, number, step_axis, time_chart, times_axis
from update_watch.dashboards.report.history import History

_LEAST = 2.0  # times: a chart of what hardly moves is flat


def sizes(history: History, scales: Scales, marks: Sequence[int] = ()) -> Spec | None:
    """Weights and gradients of all that is trained, as times their median over the run; None where they are not known.

    Args:
        marks: steps at which it was warned that the run diverges.
    """
    weight, gradient = (history.of_run(name) for name in ("weight", "gradient"))
    if np.isnan(weight).all() or not (weight > 0).any():
        return None
    times = [found / np.nanmedian(found) if (found > 0).any() else found for found in (weight, gradient)]
    values = [
        {"step": end, "weight": number(w), "gradient": number(g), "weights": number(size), "gradients": number(slope)}
        for (_, end), w, g, size, slope in zip(history.spans, *times, weight, gradient, strict=True)
    ]
    known = np.concatenate([t[np.isfinite(t) & (t > 0)] for t in times])
    x = {"field": "step", **step_axis(scales)}
    y = {"type": "quantitative", **times_axis(known, _LEAST, "times its median", 5)}

    def line(field: str, style: str) -> Spec:
        return {"mark": {"type": "line", "style": style}, "encoding": {"x": x, "y": {"field": field, **y}}}

    warned: list[Spec] = [
        {
            "data": {"values": [{"step": step, "words": "diverges"}]},
            "mark": {"type": kind, **how},
            "encoding": {"x": x, **({"text": {"field": "words"}, "y": {"value": 10}} if kind == "text" else {})},
        }
        for step in marks
        for kind, how in (("rule", {"style": "epsilon"}), ("text", {"style": "note", "align": "right", "dx": -4}))
    ]
    tooltip = [
        {"field": "step", "type": "quantitative", "title": "up to step", "format": ","},
        {"field": "weights", "type": "quantitative", "title": "weights, rms", "format": ".2e"},
        {"field": "gradients", "type": "quantitative", "title": "gradients, rms", "format": ".2e"},
    ]
    return time_chart(
        160,
        [*warned, line("gradient", "second"), line("weight", "main"), nearest(values, tooltip)],
        f"Size of all weights and gradients over the run of {history.name}, as times their median",
        data={"values": values},
    )
