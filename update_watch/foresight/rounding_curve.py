"""How much of an update arrives in a stored weight, by its size; and so how much of a tensor's at another learning rate.

Updates scale with the learning rate, so a movement histogram (shares of sum of intended^2 by octave of headroom) moves by the
log2 of the ratio of two rates. Of an update of u gaps, rounding to nearest keeps rint(u) gaps, ties to even: its share
rint(u) / u is 0 below half a gap, above 1 where it is rounded up, and 1 far above. Headroom is log2(u / 0.5), with the gap on
the update's side, which below a power of two is half as wide. Shares weigh by movement, not by number: tiny weights are many
and carry nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

_FINE = 16  # points in an octave
_LOWEST, _HIGHEST = -1, 12  # octaves of headroom: nothing arrives below, everything above


def arriving_share(gaps: float) -> float:
    """Of an update of so many gaps (> 0), the share that is stored: 0 to 2."""
    return round(gaps) / gaps  # Python rounds half to even, as the formats do


@functools.cache
def _curve() -> tuple[float, ...]:
    """Running sums of the arriving share over points of headroom from _LOWEST on."""
    sums = [0.0]
    for i in range((_HIGHEST - _LOWEST) * _FINE):
        headroom = _LOWEST + (i + 0.5) / _FINE
        sums.append(sums[-1] + arriving_share(0.5 * 2**headroom))
    return tuple(sums)


def _mean(low: float, width: int) -> float:
    """Mean arriving share of headroom from `low` to `width` points more."""
    start = round((low - _LOWEST) * _FINE)
    if start <= -width:
        return 0.0
    sums = _curve()
    if start >= len(sums) - 1 - width:
        return 1.0
    return (sums[start + width] - sums[max(start, 0)]) / width


def _octave(low: float, places: Sequence[float] | None) -> float:
    """Mean arriving share of headroom from `low` to one octave more, of which the parts weigh so."""
    if places is None:
        return _mean(low, _FINE)
    parts = len(places)
    return sum(share * _mean(low + i / parts, _FINE // parts) for i, share in enumerate(places))


def efficiency_of(movement: Sequence[float], first: float, places: Sequence[float] | None = None) -> float | None:
    """Efficiency of updates whose movement lies so; None of a histogram that is empty.

    `movement`: shares of sum of intended^2 in one-octave bins of headroom, of which the first begins at `first`. Where all
    updates are twice as large, it begins one higher. `places`: shares that sum to 1 of the parts of an octave, the same in
    every octave; None: even. Where all updates are alike (a rule that takes the sign), weights' gaps being powers of two, they
    all lie at one place.
    """
    total = sum(movement)
    if not total > 0 or not math.isfinite(total):
        return None
    return sum(share * _octave(first + i, places) for i, share in enumerate(movement) if share) / total


def octaves_for(
    movement: Sequence[float], first: float, efficiency: float, places: Sequence[float] | None = None
) -> float | None:
    """How far updates may shrink (or must grow) so that the efficiency stays at `efficiency` or above from there on.

    The smallest such log2 factor, to an eighth of an octave; None where no factor from 2^-40 to 2^40 gives it.
    """
    found = None
    for eighths in range(40 * 8, -40 * 8 - 1, -1):
        reached = efficiency_of(movement, first + eighths / 8, places)
        if reached is None or reached < efficiency:
            break
        found = eighths / 8
    return found
