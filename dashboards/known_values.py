"""Statistics of values of which some are not known; None where none is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable


def known(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


def least(values: Iterable[float | None]) -> float | None:
    return min(known(values), default=None)


def median(values: Iterable[float | None]) -> float | None:
    found = known(values)
    return statistics.median(found) if found else None
