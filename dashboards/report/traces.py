"""Series of all tensors over the run in few bytes: one byte a value, base64, for the page's script to unpack.

A run of 200 spans and 2,000 tensors would be megabytes as text. Linear series run from `low` to `high` in 254 steps,
logarithmic ones do so in the logarithm; 255 stands for "not known".
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from update_watch.dashboards.report.charts.classes import cell_class
from update_watch.dashboards.report.charts.tensor import CHARTS
from update_watch.dashboards.report.history import History
from update_watch.dashboards.report.kind_map import KindMap

MOST_POINTS = 96
DRAWN = tuple(series for series, *_ in CHARTS)
_STEPS = 254
_UNKNOWN = 255
_EFFICIENCY = (-0.1, 1.17)  # what is beyond lies at its end


def points_of(history: History) -> list[int]:
    """Indices of the spans that are shown: all of them, or evenly spread, the last always."""
    count = len(history.spans)
    if count <= MOST_POINTS:
        return list(range(count))
    return sorted({round(i * (count - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)})


def run_traces(history: History, tensors: Sequence[int]) -> dict[str, Any]:
    """What the script needs of a run to draw any tensor over time; a row of bytes per tensor in `tensors`."""
    points = points_of(history)
    at = np.ix_(np.array(tensors, dtype=np.intp), np.array(points, dtype=np.intp))
    found: dict[str, Any] = {
        "steps": [history.spans[h][1] for h in points],
        "first": history.first_step,
        "times": [round(history.times[h], 1) for h in points],
        "class": _text(classes_PH(history)[at].astype(np.uint8)),
    }
    for name in DRAWN:
        values = history.series_PH[name][at].astype(np.float64)
        found[name] = _coded(values, is_log=name != "efficiency")
    return found


def map_traces(history: History, kinds: KindMap) -> dict[str, Any]:
    """Class and efficiency of every cell of the map at every point of the run, of its worst tensor then."""
    points = points_of(history)
    classes = classes_PH(history)[:, points]
    efficiency = history.series_PH["efficiency"][:, points].astype(np.float64)
    # one number to order by: class, then efficiency
    order = classes * 100.0 + np.clip(np.nan_to_num(efficiency, nan=9.0), -9.0, 9.0)
    shape = (len(kinds.cells), len(points))
    cell_class_CH, cell_efficiency_CH = np.zeros(shape, dtype=np.uint8), np.full(shape, np.nan)
    worst_C = []
    for c, cell in enumerate(kinds.cells):
        members = np.array(cell.members)
        worst_H = members[order[members].argmin(axis=0)]
        cell_class_CH[c] = classes[worst_H, range(len(points))]
        cell_efficiency_CH[c] = efficiency[worst_H, range(len(points))]
        worst_C.append(int(worst_H[-1]))
    return {
        "steps": [history.spans[h][1] for h in points],
        "class": _text(cell_class_CH),
        "efficiency": _coded(cell_efficiency_CH, is_log=False),
        "worst": worst_C,
    }


def classes_PH(history: History) -> NDArray[np.int8]:
    """Index in `CLASSES` of every tensor in every span."""
    return cell_class(history.health_PH, history.series_PH["efficiency"])


def _coded(values: NDArray[np.float64], is_log: bool) -> dict[str, Any] | None:
    """`bytes` with `low`, `high` and `log`; None where nothing is known."""
    known = np.isfinite(values) & ((values > 0) if is_log else True)
    if not known.any():
        return None
    if is_log:
        scaled = np.log10(np.where(known, values, 1.0))
        low, high = float(scaled[known].min()), float(scaled[known].max())
    else:
        scaled, (low, high) = np.where(known, values, 0.0), _EFFICIENCY
    high = high if high > low else low + 1.0
    codes = np.rint((np.clip(scaled, low, high) - low) / (high - low) * _STEPS)
    codes = np.where(known, codes, _UNKNOWN).astype(np.uint8)
    assert math.isfinite(low) and math.isfinite(high)
    return {"bytes": _text(codes), "low": round(low, 6), "high": round(high, 6), "log": is_log}


def _text(values: NDArray[np.uint8]) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")
