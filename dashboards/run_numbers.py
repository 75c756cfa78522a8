"""The numbers of a window for the run as a whole, kept per journal line.

Where windows are joined, a tensor is shown as in its worst one, but these are means: so a thinned journal has no kink
where thinning begins. NaN stands for "not known".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from update_watch.report import SEVERITY

Floats = NDArray[np.float64]
_NAN = float("nan")


class RunNumbers(NamedTuple):
    """One window, or the mean of several."""

    efficiency: float = _NAN  # weighted by number of elements
    lost: float = _NAN  # lost over wanted elements, 0..1
    lr: float = _NAN  # largest of the tensors
    ratio_low: float = _NAN  # intended update over weight: 10% of the tensors are below
    ratio: float = _NAN  # the median
    ratio_high: float = _NAN  # 90% are below
    applied: float = _NAN  # applied update over weight, median
    weight: float = _NAN  # rms of all weights together
    gradient: float = _NAN  # and of their gradients
    counts: tuple[float, ...] = (0.0,) * len(SEVERITY)  # tensors per health, in the order of SEVERITY


NUMBERS: tuple[str, ...] = RunNumbers._fields[:-1]


def run_numbers(numel: Sequence[int], health: NDArray[np.int8], numbers: Mapping[str, Floats]) -> RunNumbers:
    """Of one window, from the columns of its tensors."""
    sizes = np.array(numel, dtype=np.float64)
    asked, got = _known(numbers["update_ratio"]), _known(numbers["applied_ratio"])
    low, middle, high = np.quantile(asked, (0.1, 0.5, 0.9)).tolist() if len(asked) else (_NAN,) * 3
    rates = _known(numbers["lr"])
    return RunNumbers(
        weighted(numbers["efficiency"], sizes),
        weighted(numbers["lost_fraction"], sizes * np.nan_to_num(numbers["wanted_fraction"])),
        float(rates.max()) if len(rates) else _NAN,
        low,
        middle,
        high,
        float(np.median(got)) if len(got) else _NAN,
        weighted(numbers["weight_rms"] ** 2, sizes) ** 0.5,
        weighted(numbers["gradient_rms"] ** 2, sizes) ** 0.5,
        tuple(np.bincount(health, minlength=len(SEVERITY)).astype(float).tolist()),
    )


def mean_of(values: Sequence[RunNumbers], windows: Sequence[int]) -> RunNumbers:
    """The mean over windows; what one does not know does not count."""
    weights = np.array(windows, dtype=np.float64)
    means = [weighted(np.array([getattr(v, name) for v in values]), weights) for name in NUMBERS]
    counts: Any = np.average(np.array([v.counts for v in values]), axis=0, weights=weights)
    return RunNumbers(**dict(zip(NUMBERS, means, strict=True)), counts=tuple(counts.tolist()))


def weighted(values: Floats, weights: Floats) -> float:
    """Weighted mean of what is known; NaN where nothing is."""
    known = ~np.isnan(values)
    total = float(weights[known].sum())
    return float((values[known] * weights[known]).sum() / total) if total else _NAN


def _known(values: Floats) -> Floats:
    return values[~np.isnan(values)]
