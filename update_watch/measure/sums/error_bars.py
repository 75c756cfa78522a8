"""How far ratios of sums may be from the truth: the steps of a window as the sample they are.

The efficiency of a window is a ratio of sums over its steps, and as a rule only some of the steps were measured. What the
others would have said is told by how much the measured ones differ: the jackknife takes out one part of the window after the
other. What it cannot know is added:

- few steps may carry the whole sum (a warm-up): n_eff = W^2 / sum w_t^2 of them speak, and where others were not measured
  these are taken to differ by 0.5 / n_eff;
- the largest step may be one that was not measured (a loss spike), or there may be several far above any that was: their
  share of the window's energy, lambda, is known from the tensors that were measured then, and what happened in them may be
  anything from 0 to 1: 0.5 lambda. Less where rounding is to nearest: of larger updates no smaller part arrives, so what
  was measured of smaller ones is the least;
- few elements may carry the sum of a tensor that is sampled: n_eff of its cells in the same way, 0.5 / n_eff;
- one part alone says nothing of how parts differ: the error is unknown, not 0.

A tensor that is read whole is known where it was measured; only the steps that were not are in doubt: their share of the
window's energy, phi, which is 1 - n / T where steps are alike. With n = T the number is exact for its window and the error is 0.

All arrays have the rows last: [P, n] parts by rows, [n] rows. NaN is what is not known.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_OVERSHOOT = 0.2  # rounding to nearest makes up to so much more or less of other updates than of the largest


def ratio(above: Array, below: Array) -> Array:
    """above / below where that is a finite number and something was below."""
    with np.errstate(all="ignore"):
        found = np.where(below > 0, above / below, np.nan)
    return np.where(np.isfinite(found), found, np.nan)


def too_low(dot_n: Array, want_n: Array, cross_n: Array, square_n: Array) -> Array:
    """[n] what the ratio dot / want of a few sampled cells is too low by, in the mean: where those that carry most arrive better,
    samples that met fewer of them count as much.

    `cross`, `square`: sums of dot * want and want^2 of single cells. To first order in 1 / n_eff (Cochran, Sampling Techniques,
    1977, 6.8), and as much more as it would be of cells that are alike.
    """
    alone = ratio(square_n, want_n**2)
    return np.nan_to_num(ratio(cross_n - ratio(dot_n, want_n) * square_n, want_n**2 * (1 - np.minimum(alone, 0.5))))


def spread_over_steps(above_Pn: Array, below_Pn: Array, steps_Pn: Array) -> tuple[Array, Array]:
    """[n] variance of sum above / sum below from its spread over parts of the window, and n_eff of the steps.

    `steps`: measured in each part, those of parts that are no sample of the window's steps left out. NaN where there are fewer
    than two parts.
    """
    used = steps_Pn > 0
    count = used.sum(0)
    above, below = above_Pn.sum(0), below_Pn.sum(0)
    value = ratio(above, below)
    with np.errstate(all="ignore"):
        left_out = (above - above_Pn) / (below - below_Pn)
        # one part that carries all of it leaves nothing to compare with: n_eff is 1 then, which says it
        differences = np.where(used & (below - below_Pn > 1e-12 * below), left_out - value, 0.0)
        jackknife = (count - 1) / count * (differences**2).sum(0)
        of_used = np.where(used, below_Pn, 0.0).sum(0)
        effective = of_used**2 / np.where(used, below_Pn**2 / np.maximum(steps_Pn, 1), 0.0).sum(0)
    known = (count >= 2) & np.isfinite(jackknife) & np.isfinite(effective)
    return np.where(known, jackknife, np.nan), np.where(known, effective, np.nan)


def spread_beside_asked(
    spread_n: Array,
    dot_n: Array,
    want_n: Array,
    cells_n: Array,
    whole_want_n: Array,
    unseen_n: Array,
    is_exact_n: npt.NDArray[np.bool_],
) -> Array:
    """[n] variance of a ratio where some steps were measured because they are unlike the others: the others are the sample.

    `dot`, `want`, `cells`: of those that were asked for, n_eff of their cells; `whole_want`: of all; `unseen`: its share in
    steps that were not measured. Of a row that is sampled few elements speak for such a step: at most as many of them arrive
    whole, and the others not at all, e (1 - e) by their n_eff.
    """
    share_n = np.nan_to_num(ratio(want_n, whole_want_n))
    efficiency_n = np.clip(np.nan_to_num(ratio(dot_n, want_n)), 0.0, 1.0)
    of_elements_n = np.nan_to_num(ratio(share_n**2 * efficiency_n * (1 - efficiency_n), cells_n))
    # `standard_error` takes of a row read whole the unseen share: here that of the sample, not of all
    return np.where(is_exact_n, ratio(spread_n, 1 - np.minimum(share_n, 1 - unseen_n)), spread_n + of_elements_n)


def spread_of_rms(squares_Pn: Array, counts_Pn: Array) -> Array:
    """[n] standard deviation of the root mean square over the parts of the window, by its mean."""
    rms_Pn = np.sqrt(ratio(squares_Pn, counts_Pn))
    parts = (counts_Pn > 0).sum(0)
    mean = ratio(np.nansum(rms_Pn, 0), parts)
    variance = ratio(np.nansum((rms_Pn - mean) ** 2, 0), parts - 1)
    return np.where(parts > 1, ratio(np.sqrt(variance), mean), np.nan)


def reach(efficiency_n: Array, is_plain_n: npt.NDArray[np.bool_]) -> Array:
    """[n] how far the efficiency of larger steps may be from that of the measured ones: 1, or less where it can but grow."""
    return np.where(is_plain_n, np.clip(1 - np.nan_to_num(efficiency_n), 0.0, 1.0 - _OVERSHOOT) + _OVERSHOOT, 1.0)


def standard_error(
    jackknife_n: Array,
    effective_n: Array,
    unseen_n: Array,
    doubt_n: Array,
    cells_n: Array,
    is_exact_n: npt.NDArray[np.bool_],
) -> Array:
    """[n] from the spread over steps and n_eff of them, the share of the energy that was not measured, and what the largest
    of those steps may make of it: their share times how far they may be off.

    `is_exact`: rows of which nothing but those steps is unknown, as all their elements are read. Of others `cells` is the
    n_eff of what was sampled.
    """
    with np.errstate(all="ignore"):
        spread = np.where(is_exact_n, unseen_n, 1.0)
        # exact where every step of a whole tensor was measured, also if it was a single one
        steps = np.where(spread > 0, spread * jackknife_n, 0.0)
        others = np.where(unseen_n > 0, unseen_n * (0.5 / effective_n) ** 2 + (0.5 * doubt_n) ** 2, 0.0)
        elements = np.where(is_exact_n, 0.0, (0.5 / cells_n) ** 2)
        found: Array = np.sqrt(steps + others + elements)
    return found
