"""What arrives of a tensor's updates at a learning rate that is raised: by the rate, and by what the higher rate does beside it.

Updates scale with the rate, and beside it two things happen, the more of each the longer the window is:

* Gradients in a row agree less, so momentum adds up less of them. How much there is to lose is in the size of the updates: of
  gradients without memory the root mean square of m / sqrt(v) is sqrt((1 - b1) / (1 + b1)), of such that all agree 1; of SGD's
  buffer, over the gradient's, sqrt(1 / (1 - b^2)) and 1 / (1 - b). `agreement` is the octaves above the lower end. An octave of
  rate takes a tenth of an octave of size, and more where gradients agree. Where they nearly all agree (a run at its begin; rows of
  words that never come) a rate may take nothing, or much: that is not known.
* Updates that are all of one size, as of a rule that takes the sign, stay so. But weights walk: those that are small enough to move
  walk until they are too large to, about 256 updates in an octave of weight.

The shares, the spreads and the times are those of really trained runs: bench/what_if.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from update_watch.foresight.rounding_curve import efficiency_of
from update_watch.report import HEADROOM_LOW, TensorReport

_NINE_OF_TEN = 1.4  # standard errors that so many keep to: they are stated rather large
_TRIED = 12  # sizes between the smallest and the largest
_USUAL_MOMENTUM = 0.9  # b1, and SGD's
# lower ends, for that momentum; and where a number of octaves above it is none that the rule can have
_ADAM = math.sqrt((1 - _USUAL_MOMENTUM) / (1 + _USUAL_MOMENTUM))
_SGD = math.sqrt(1 / (1 - _USUAL_MOMENTUM**2))
_POSSIBLE = (-2.0, 2.4)
# octaves of size that an octave of rate takes: at no agreement, more for each octave of it, and where nearly all agree
_TAKES, _TAKES_MORE, _NEARLY_ALL, _TAKES_OF_ALL = 0.1, 0.07, 1.4, 0.15
_TAKES_SGD, _TAKES_MORE_SGD = 0.05, 0.15
_UNKNOWN = 0.125
# standard errors of these, in octaves for each octave of rate
_SPREAD, _SPREAD_OF_ALL, _SPREAD_SGD, _SPREAD_MORE_SGD, _SPREAD_UNKNOWN = 0.04, 0.2, 0.16, 0.05, 0.15
_SPREAD_OF_ONE = 1.0  # of one element; of n, over the root of n
_SETTLES = 40  # steps in which half of it has happened
_WALKS = 260  # updates of one size, in which half of the elements have left their octave
_FEWER, _MORE = 0.25, 2.5  # of them may have
# errors of the curves, in efficiency
_CURVE, _CURVE_OF_ALL, _CURVE_OF_ONE, _CURVE_ALIKE, _CURVE_GROWN = 0.012, 0.022, 0.15, 0.02, 0.06
_WINDOW = 64  # of the runs that the shares were taken from


class _Taken(NamedTuple):
    octaves: float  # of size, for each of rate
    error: float  # its standard error
    curve: float  # standard error of the curve, in efficiency


class Raised(NamedTuple):
    """An efficiency, and what nine of ten lie between."""

    efficiency: float
    low: float
    high: float


def raised(t: TensorReport, octaves: float, window: int) -> Raised | None:
    """At a learning rate so many octaves (> 0) above `t.lr`, kept over as many steps as the window has; None if not known."""
    if t.movement_histogram is None or not t.movement_lr or not t.lr:
        return None
    first, movement, places = HEADROOM_LOW + math.log2(t.lr / t.movement_lr), t.movement_histogram, t.places

    def at(grown: float) -> float:
        return min(efficiency_of(movement, first + grown, places) or 0.0, 1.0)

    if isinstance(places, float):
        walked = min(0.5 * octaves * window / (window + _WALKS), 1.0)
        said = _walked(at(octaves), at(octaves - 1), walked)
        ends = [_walked(at(octaves), at(octaves - 1), min(part * walked, 1.0)) for part in (_FEWER, _MORE)]
        # octaves that weights may grow by, were all updates of one sign; as large as their updates, they keep to them
        grown = math.log2(1 + window * (t.update_ratio or 0.0) * 2**octaves)
        return _between(said, [said, *ends], math.hypot(_CURVE_ALIKE, _CURVE_GROWN * grown * grown))
    taken, error, curve = _taken(t)
    of_few = 1 / math.sqrt(t.numel or 1)
    happened = window / (window + _SETTLES) * (_WINDOW + _SETTLES) / _WINDOW
    grown = octaves * (1 - taken * happened)
    widest = _NINE_OF_TEN * octaves * math.hypot(error, _SPREAD_OF_ONE * of_few)
    tried = [at(grown + widest * (2 * i / _TRIED - 1)) for i in range(_TRIED + 1)]
    return _between(at(grown), tried, math.hypot(curve, _CURVE_OF_ONE * of_few))


def agreement(t: TensorReport) -> float | None:
    """How far the updates are above what gradients without memory make, in octaves: of Adam's rule, and of SGD's momentum.

    None where the rule is another, or the sizes are not known.
    """
    if not (t.update_ratio and t.weight_rms and t.lr and t.movement_lr):
        return None
    usual_lr = math.sqrt((t.lr * t.lr + t.lr * t.movement_lr + t.movement_lr * t.movement_lr) / 3)
    size = t.update_ratio * t.weight_rms / usual_lr
    if "betas" in t.options:
        found = math.log2(size / _ADAM)
    elif _is_sgd(t.options) and t.gradient_rms:
        found = math.log2(size / t.gradient_rms / _SGD)
    else:
        return None
    return found if _POSSIBLE[0] < found < _POSSIBLE[1] else None


def _is_sgd(options: Sequence[str]) -> bool:
    """RMSprop and Muon have a momentum too; torch's SGD can be told `foreach` beside it, and no `alpha`."""
    names = {option.partition("=")[0] for option in options}
    return {"momentum", "foreach"} <= names and "alpha" not in names


def _taken(t: TensorReport) -> _Taken:
    """Octaves of size that an octave of rate takes, in a window as long as those it was taken from."""
    agree = agreement(t)
    if agree is None:
        return _Taken(_UNKNOWN, _SPREAD_UNKNOWN, _CURVE)
    above = max(agree, 0.0)
    if "betas" not in t.options:
        return _Taken(_TAKES_SGD + _TAKES_MORE_SGD * above, _SPREAD_SGD + _SPREAD_MORE_SGD * above, _CURVE)
    if agree > _NEARLY_ALL:
        return _Taken(_TAKES_OF_ALL, _SPREAD_OF_ALL, _CURVE_OF_ALL)
    return _Taken(_TAKES + _TAKES_MORE * above, _SPREAD, _CURVE)


def _walked(stays: float, next_octave: float, part: float) -> float:
    """Of elements of which a part has come to where updates are half as large, in gaps."""
    return (1 - part) * stays + part * next_octave


def _between(said: float, tried: list[float], curve: float) -> Raised:
    low = said - math.hypot(said - min(tried), _NINE_OF_TEN * curve)
    high = said + math.hypot(max(tried) - said, _NINE_OF_TEN * curve)
    return Raised(said, max(low, 0.0), min(high, 1.0))
