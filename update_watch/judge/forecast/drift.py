"""What changes beside the learning rate: the size of updates over that of weights, for one unit of the rate, over the run.

Time is the sum of the learning rates (`clock`): what moves the weights, and late in a decay little of it is left.

Gradients shrink, moments settle, weights grow: quickly at first, then ever more slowly. So the trend is taken over the logarithm
of time, from the last three quarters of the run so far, and shrunk towards none (a ridge on its slope); single windows that
stray weigh less. It tells what the level of now is, and little of what is to come: it dies away (a damped trend, Gardner and McKenzie
1985), since one that goes on is off by half as much again over the really trained runs of bench/forecast.py. How far a level may be
off is learnt from the run itself: what the same fit, made at earlier windows, foretold of now.

Where updates are all of one size, what is lost next are those of the largest weights that still move, and their number falls faster
than weights grow: they walk until they are too large to move, and there they stay. Between a third and two thirds of an octave's
weights leave it in an octave of time (bench/forecast.py, Lion), which no trend of the sizes of all weights shows.

Legend: n tensors, w windows, S points of a schedule; sizes are log2, octaves those of time.
"""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_SINCE = 0.25  # of the run so far, from which on windows count
_SLOPE = 0.25  # octaves an octave: as large as slopes usually are
_DIES = 0.35  # octaves of time over which what is left of a trend halves
_WEIGHTS_DIE = 1.0  # of the weights' trend: they keep their direction for longer
# of tensors whose updates are of one size: octaves over an octave of time that weights walk by, its standard error, how much goes
# on beside it of the trend, and steps that count as passed before the first, since weights do not begin at 0
_WALK, _WALK_ERROR, _BESIDE_WALK, _BEFORE_WALK = 0.4, 0.2, 0.5, 128.0
_LEAST_NOISE = 0.05  # octaves
_HALF_LIFE = 0.3  # octaves, over which a window's weight in the present level halves
_STRAY = 3.0  # usual deviations from which on a window weighs less
_RECENT = 8  # windows that tell how much single ones scatter
_USUAL_WANDER = 0.15  # octaves, over one octave of time: before the run has told its own
_USUAL_WEIGHS = 2.0  # windows


@dataclasses.dataclass(frozen=True)
class Drift:
    """Of n tensors, as of one time. Sizes to come are `level + slope * _trend(log2(time / now))`."""

    time: float
    level_n: Array
    slope_n: Array
    noise_n: Array  # of single windows
    level_error_n: Array
    slope_error_n: Array
    weight_slope_n: Array | None = None  # of the weights alone, by which sizes are divided
    walks_n: npt.NDArray[np.bool_] | None = None  # updates are of one size, so that weights walk until they stand

    def change(self, times_S: Array) -> Array:
        """[n, S] from now to then."""
        found = self.measured(times_S)
        if self.walks_n is not None and self.walks_n.any():
            found[self.walks_n] = _BESIDE_WALK * found[self.walks_n] - _WALK * _octaves(
                times_S + _BEFORE_WALK, self.time + _BEFORE_WALK
            )
        return found

    def measured(self, times_S: Array) -> Array:
        """[n, S] what goes on of what was seen so far."""
        ahead = _octaves(times_S, self.time)
        found = self.slope_n[:, None] * _trend(ahead)
        if self.weight_slope_n is not None:
            found -= self.weight_slope_n[:, None] * (_trend(ahead, _WEIGHTS_DIE) - _trend(ahead))
        return found

    def error(self, times_S: Array, wander: float) -> Array:
        """[n, S] standard error of the size then; `wander`: octaves over an octave of time that no trend explains."""
        ahead = _octaves(times_S, self.time)
        squares = (
            self.level_error_n[:, None] ** 2 + (self.slope_error_n[:, None] * _trend(ahead)) ** 2 + wander**2 * ahead
        )
        if self.walks_n is not None and self.walks_n.any():
            strays = max(_BESIDE_WALK * wander, _WALK_ERROR)
            squares[self.walks_n] = self.level_error_n[self.walks_n, None] ** 2 + strays**2 * _octaves(
                times_S + _BEFORE_WALK, self.time + _BEFORE_WALK
            )
        found: Array = np.sqrt(squares)
        return found


def _octaves(times_S: Array, now: float) -> Array:
    found: Array = np.log2(np.maximum(times_S, now) / now)
    return found


def _trend(ahead_S: Array, dies: float = _DIES) -> Array:
    """[S] octaves by which a slope of one octave an octave has moved what is so far ahead."""
    found: Array = dies / np.log(2.0) * (1.0 - 2.0 ** (-ahead_S / dies))
    return found


def fit(middles_w: Array, sizes_wn: Array, now: float) -> Drift:
    """The drift as of the time `now`. `middles`: times in the middle of windows, above 0; `sizes`: NaN where not known."""
    is_late_w = middles_w >= _SINCE * now
    middles_w, sizes_wn = middles_w[is_late_w], sizes_wn[is_late_w]
    ago_wn = np.broadcast_to(np.log2(middles_w / now)[:, None], sizes_wn.shape)
    known_wn = np.isfinite(sizes_wn)
    sizes_wn = np.where(known_wn, sizes_wn, 0.0)
    count_n = known_wn.sum(0)
    residual_wn = sizes_wn - _median(sizes_wn, known_wn)
    for _ in range(3):
        far_wn = np.abs(residual_wn) / (_STRAY * np.maximum(_median(np.abs(residual_wn), known_wn), _LEAST_NOISE))
        weights_wn = known_wn / np.maximum(1.0, far_wn) ** 2
        total_n = np.maximum(weights_wn.sum(0), 1e-9)
        ago_n, size_n = (weights_wn * ago_wn).sum(0) / total_n, (weights_wn * sizes_wn).sum(0) / total_n
        spread_n = (weights_wn * (ago_wn - ago_n) ** 2).sum(0)
        product_n = (weights_wn * (ago_wn - ago_n) * (sizes_wn - size_n)).sum(0)
        residual_wn = sizes_wn - size_n - product_n / np.maximum(spread_n, 1e-9) * (ago_wn - ago_n)
    noise2_n = (weights_wn * residual_wn**2).sum(0) / np.maximum(count_n - 2, 1)
    noise2_n = np.where(count_n >= 3, np.maximum(noise2_n, _LEAST_NOISE**2), _SLOPE**2)
    slope_n = product_n / (spread_n + noise2_n / _SLOPE**2)
    slope_n = np.where(count_n >= 3, slope_n, 0.0)
    slope_error_n = np.sqrt(1 / (spread_n / noise2_n + 1 / _SLOPE**2))
    recent_wn = weights_wn * 0.5 ** (-ago_wn / _HALF_LIFE)
    total_n = np.maximum(recent_wn.sum(0), 1e-300)
    level_n = (recent_wn * (sizes_wn - slope_n * ago_wn)).sum(0) / total_n
    noise_n = _scatter((sizes_wn - level_n - slope_n * ago_wn)[-_RECENT:], known_wn[-_RECENT:])
    level_error_n = noise_n * np.sqrt((recent_wn**2).sum(0)) / total_n
    return Drift(now, np.where(count_n > 0, level_n, np.nan), slope_n, noise_n, level_error_n, slope_error_n)


def slope_of(middles_w: Array, sizes_wn: Array, now: float) -> Array:
    """[n] the slope alone of sizes that do not stray, as those of weights: at a tenth of the price."""
    is_late_w = middles_w >= _SINCE * now
    ago_w1, sizes_wn = np.log2(middles_w[is_late_w] / now)[:, None], sizes_wn[is_late_w]
    known_wn = np.isfinite(sizes_wn)
    count_n = np.maximum(known_wn.sum(0), 1)
    off_wn = np.where(known_wn, sizes_wn - np.where(known_wn, sizes_wn, 0.0).sum(0) / count_n, 0.0)
    apart_wn = known_wn * (ago_w1 - (known_wn * ago_w1).sum(0) / count_n)
    found: Array = (apart_wn * off_wn).sum(0) / ((apart_wn**2).sum(0) + (_LEAST_NOISE / _SLOPE) ** 2)
    return np.where(count_n >= 3, found, 0.0)


def _scatter(residual_wn: Array, known_wn: npt.NDArray[np.bool_]) -> Array:
    """[n] standard deviation, of few values drawn towards a tenth of an octave; what strays far counts as if it did less."""
    usual_n = _median(np.abs(residual_wn), known_wn)
    squares = (known_wn * np.minimum(np.abs(residual_wn), 4 * usual_n + 0.1) ** 2).sum(0) + 2 * 0.1**2
    found: Array = np.sqrt(squares / (known_wn.sum(0) + 1))
    return found


def _median(values_wn: Array, known_wn: npt.NDArray[np.bool_]) -> Array:
    """[n] of those that are known; 0 where none is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Array = np.nan_to_num(np.nanmedian(np.where(known_wn, values_wn, np.nan), axis=0))
    return found


def wander(earlier: list[Drift], now: Drift) -> float:
    """Octaves over an octave of time by which levels have strayed from earlier trends in this run."""
    squares, weight = _USUAL_WEIGHS * _USUAL_WANDER**2, _USUAL_WEIGHS
    for one in earlier:
        ahead = float(_octaves(np.array([now.time]), one.time)[0])
        if ahead < 0.25:  # hardly ahead: the same windows
            continue
        off_n = now.level_n - one.level_n - one.measured(np.array([now.time]))[:, 0]
        known_n = off_n[np.isfinite(off_n)]
        if known_n.size:
            # tensors stray together, so each window counts once; a tensor or two that is elsewhere does not widen all
            middle = np.quantile(np.abs(known_n), 0.68)
            squares, weight = squares + float(middle) ** 2 / ahead, weight + 1
    return float(np.sqrt(squares / weight))
