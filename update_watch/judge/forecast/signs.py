"""What a run that will blow up shows before its loss does, each as a function of the windows so far, the latest last.

The weights: updates that all point one way move them by at most the sum of the learning rates, so at a constant rate they grow at
most as the number of steps, and through a linear warm-up as its square. Weights that grow faster than that, for a while and ever
faster, are held by nothing. Where the rate itself climbs faster than a warm-up does, growth faster than the steps is enough.

The others say what has left its range; runs that stay well do that too, so they are told and not warned of.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from update_watch.foresight.divergence import Sign
from update_watch.judge.forecast.course import Point
from update_watch.wording import plural

_SPANS = (1, 2, 4, 8)  # windows in a third of what is looked at
_RUNS_AWAY = 2.5  # power of the steps: half of one above what a warm-up makes, for noise
_WITH_RATE = 0.8  # where the rate goes on climbing as the steps to more than
_CLIMBS = 1.5
_GROWN = 0.2  # doublings over what is looked at; and
_SCATTERS = 6.0  # times what single windows scatter by, since other elements are looked at in each
_USUAL_SCATTER, _ENOUGH = 0.03, 6  # of few windows
_RANGE = 8  # windows that make a range
_OUTSIDE = 1.0  # doublings beyond it
_NEAR_TOP = 3.0  # doublings
_AHEAD = 2  # times as long as it was seen to fall
_SKIPS, _MORE = 3, 3.0  # skipped steps in a window; times as many as before
_DRIFTS = 0.3  # doublings by which a state factor moves


def weight_growth(points: Sequence[Point]) -> float | None:
    """The power of the steps as which the weights grew over the latest three windows."""
    return None if len(points) < 4 else _power(points[-4], points[-1], "weight")


def weights(points: Sequence[Point]) -> Sign | None:
    """They run away."""
    scatter = _scatter([p.weight for p in points[:-3]])
    for span in _SPANS:
        if len(points) < 3 * span + 1:
            break
        four = [points[-1 - i * span] for i in (3, 2, 1, 0)]
        steps = [b.weight - a.weight for a, b in zip(four, four[1:], strict=False)]
        grown, power = sum(steps), _power(four[0], four[-1], "weight")
        climbs = (_power(a, b, "rate") for a, b in ((four[1], four[2]), (four[2], four[3])))  # twice: no jump
        limit = _WITH_RATE if all(climb is not None and climb > _CLIMBS for climb in climbs) else _RUNS_AWAY
        is_growth = min(steps) > 0 and steps[2] >= steps[0] and grown >= max(_GROWN, _SCATTERS * scatter)
        if is_growth and power is not None and power > limit:
            return Sign(
                "weights",
                True,
                f"the weights run away: they are {_times(grown):.1f} times as large as at step {four[0].step:,} and grow ever faster "
                f"(as the number of steps to the power of {power:.1f})",
            )
    return None


def _scatter(sizes: Sequence[float]) -> float:
    """Standard deviation of single windows about their neighbours, from what bends between three of them."""
    bends = [abs(a - 2 * b + c) for a, b, c in zip(sizes, sizes[1:], sizes[2:], strict=False)]
    return statistics.median(bends) / 0.6745 / 6**0.5 if len(bends) >= _ENOUGH else _USUAL_SCATTER


def _power(first: Point, last: Point, of: str) -> float | None:
    octaves = math.log2(last.middle / first.middle)
    found = (getattr(last, of) - getattr(first, of)) / octaves if octaves > 0 else math.nan
    return found if math.isfinite(found) else None


def _times(doublings: float) -> float:
    return float(2.0 ** min(doublings, 99.0))


def update_excess(points: Sequence[Point]) -> float | None:
    """Doublings of update / weight / learning rate above the highest of the windows before; below 0: within the range."""
    before = [p.update for p in points[:-1] if math.isfinite(p.update)]
    if len(before) < _RANGE or not math.isfinite(points[-1].update):
        return None
    return points[-1].update - max(before)


def updates(points: Sequence[Point]) -> Sign | None:
    """They have left the range they had, by more than the learning rate explains."""
    excess = update_excess(points)
    if excess is None or excess < _OUTSIDE:
        return None
    return Sign(
        "updates", False, f"updates are {_times(excess):.1f} times as large, for their learning rate, as they ever were"
    )


def gradient_growth(points: Sequence[Point]) -> float | None:
    """Doublings of the latest window's gradient above the median of those before."""
    before = [p.gradient for p in points[:-1] if math.isfinite(p.gradient)]
    if len(before) < _RANGE or not math.isfinite(points[-1].gradient):
        return None
    return points[-1].gradient - statistics.median(before)


def gradients(points: Sequence[Point]) -> Sign | None:
    """They grow from window to window, beyond all the run had."""
    growth = gradient_growth(points)
    if growth is None or growth < 2 * _OUTSIDE:
        return None
    latest = [p.gradient for p in points[-3:]]
    highest = max((p.gradient for p in points[:-3] if math.isfinite(p.gradient)), default=math.inf)
    if not latest[0] < latest[1] < latest[2] or latest[2] < highest + _OUTSIDE:
        return None
    risen, lowered = latest[2] - latest[0], points[-3].rate - points[-1].rate
    if lowered > risen / 2:  # a scale of the loss that rises, and a rate that makes up for it
        return None
    return Sign(
        "gradients",
        False,
        f"gradients grow from window to window and are {_times(growth):.1f} times as large as usual in this run",
    )


def state(points: Sequence[Point]) -> Sign | None:
    """The state factor drifts away from where it was."""
    known = [p.state for p in points if math.isfinite(p.state)]
    if len(known) < _RANGE:
        return None
    first, last = statistics.median(known[: _RANGE // 2]), known[-2:]
    moved = min(last, key=lambda x: abs(x - first)) - first
    if abs(moved) < _DRIFTS or any((x - first) * moved < 0 for x in last) or abs(last[-1]) < abs(first):
        return None
    return Sign(
        "state",
        False,
        f"the optimizer's state makes updates {_times(last[-1]):.2f} of what FP32 state gives, early in the run {_times(first):.2f}",
    )


def fp16_range(points: Sequence[Point]) -> Sign | None:
    """The largest FP16 gradient comes to the top of the format: from how it rose, it will be there soon."""
    for span in _SPANS:
        if len(points) < 3 * span + 1:
            break
        four = [points[-1 - i * span] for i in (3, 2, 1, 0)]
        steps = [a.headroom - b.headroom for a, b in zip(four, four[1:], strict=False)]
        fallen, left = sum(steps), four[-1].headroom
        if left < _NEAR_TOP and min(steps) > 0 and fallen > _OUTSIDE and left < _AHEAD * fallen:
            return Sign(
                "fp16_range",
                False,
                f"the largest FP16 gradient is {left:.1f} doublings below infinity, and rose by {fallen:.1f} since step {four[0].step:,}",
                (four[-1].highest,),
            )
    return None


def skipped(points: Sequence[Point]) -> Sign | None:
    """The gradient scaler skips more and more steps; it begins a run by finding its scale, which is none."""
    if len(points) < 5:
        return None
    usual = statistics.fmean(p.skipped / p.window for p in points[1:-2])
    latest = [p.skipped for p in points[-2:]]
    if min(latest) < 1 or sum(latest) < _SKIPS or sum(latest) < _MORE * usual * sum(p.window for p in points[-2:]):
        return None
    return Sign(
        "skipped",
        False,
        f"the gradient scaler skipped {plural(sum(latest), 'step')} of the latest two windows, more than before",
    )


def non_finite(points: Sequence[Point]) -> Sign | None:
    """Some of it is no number any more."""
    broken = points[-1].broken
    if not broken:
        return None
    return Sign("non_finite", False, f"there is NaN or infinity in {plural(len(broken), 'tensor')}", broken[:8])


ALL = (weights, fp16_range, skipped, updates, gradients, state, non_finite)
