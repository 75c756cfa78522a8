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

# shares that sum to 1 of the parts of an octave, the same in every octave; one place, 0 to 1, where all lie there; None: even
Places = Sequence[float] | float | None

_FINE = 16  # points in an octave
ALIKE = 0.6  # share in one part of every octave from which on updates are taken to be of one size
_BESIDE = 0.06  # octaves beside that part at which they may lie, as rates differ a little within a window
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


def _octave(low: float, places: Places) -> float:
    """Mean arriving share of headroom from `low` to one octave more, of which the parts weigh so."""
    if places is None:
        return _mean(low, _FINE)
    if isinstance(places, float):
        return arriving_share(0.5 * 2 ** (low + places))
    parts = len(places)
    return sum(share * _mean(low + i / parts, _FINE // parts) for i, share in enumerate(places))


def efficiency_of(movement: Sequence[float], first: float, places: Places = None) -> float | None:
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


def octaves_for(movement: Sequence[float], first: float, efficiency: float, places: Places = None) -> float | None:
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


def keeps_all(scheme: str) -> bool:
    """Whether under this scheme what rounding takes of an update arrives in the end."""
    return scheme == "stochastic" or scheme.startswith("carried")


def place_of(
    places: Sequence[float] | None,
    update_ratio: float | None,
    weight_rms: float | None,
    wanted: float | None,
    lr: float | None,
    movement_lr: float | None,
) -> Places:
    """Where in an octave updates lie: exactly, where the shares tell that all are of one size, and their rms is there too.

    Gaps between stored values are powers of two, so the headroom of an update is log2 of its size and a whole number. The rms is
    over the window, in which the rate went from `movement_lr`, that of the shares, to `lr`; of the share `wanted` of the elements.
    """
    if places is None or max(places) <= ALIKE:
        return places
    if not (update_ratio and weight_rms and wanted and lr and movement_lr):
        return places
    usual_lr = math.sqrt((lr * lr + lr * movement_lr + movement_lr * movement_lr) / 3)
    size = update_ratio * weight_rms / math.sqrt(wanted) * movement_lr / usual_lr
    if not 0 < size < math.inf:
        return places
    parts = len(places)
    middle = (max(range(parts), key=places.__getitem__) + 0.5) / parts
    off = (math.log2(size) - middle + 0.5) % 1.0 - 0.5
    # of the same octave as the part, so it may lie a little outside of 0 to 1
    return middle + off if abs(off) <= 0.5 / parts + _BESIDE else places
