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

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_FAR = 4.0  # so many times the largest measured step: what happens there was not seen
# sizes of |intended|^2 within this factor of the usual are: what they differ by is noise of the few that tell
ALIKE = 4.0
_DEVIATION = 1.4826  # standard deviation by the median deviation, which a few large steps do not change
_OVERSHOOT = 0.2  # rounding to nearest makes up to so much more or less of other updates than of the largest


class Unseen(NamedTuple):
    """What was not measured of each row: shares of the window's energy, [n]. NaN where nothing is known of a row."""

    energy_n: Array  # in all of those steps
    largest_n: Array  # in the largest of them, or in all that are far above any that was measured
    usual_n: Array  # in all of them, of the other tensors alone


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

    `steps`: measured in each part. NaN where there are fewer than two parts.
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
        effective = below**2 / np.where(used, below_Pn**2 / np.maximum(steps_Pn, 1), 0.0).sum(0)
    known = (count >= 2) & np.isfinite(jackknife) & np.isfinite(effective)
    return np.where(known, jackknife, np.nan), np.where(known, effective, np.nan)


class Sizes(NamedTuple):
    """How large the steps of a cohort were, by what is usual for its tensors."""

    size_P: Array  # mean |intended|^2 of a step in each part of the window
    count_P: Array  # steps measured in it
    usual_n: Array  # of each row, per step and square of the learning rate; NaN where nothing was intended
    spread: float = 0.0  # standard deviation of the octaves by which updates of single steps differ from what is usual


def sizes_of(energy_Pn: Array, steps_Pn: Array, squared_rates_P: Array | None = None) -> Sizes:
    """`energy`: sum of |intended|^2 in each part; `steps`: measured of each row. A step's size is that of the tensors
    measured in it, each by its own usual size: the median, which one large step does not change. `squared_rates`: of the
    learning rate, by which updates grow and fall in a schedule; what is usual is meant beside them.
    """
    scale_P = np.ones(len(energy_Pn)) if squared_rates_P is None else squared_rates_P
    with np.errstate(all="ignore"):
        per_step = np.where(steps_Pn > 0, energy_Pn / np.maximum(steps_Pn, 1) / scale_P[:, None], np.nan)
        usual_n = _median(np.where(per_step > 0, per_step, np.nan), 0)
        alike_P = _median(per_step / usual_n, 1)
        size_P = np.nan_to_num(alike_P * scale_P)
        is_usual_P = (alike_P < ALIKE) & (alike_P > 1 / ALIKE)
        # means of k steps spread by 1 / sqrt(k) of what single ones do
        octaves_Pn = (0.5 * np.log2(per_step / usual_n) * np.sqrt(steps_Pn))[is_usual_P]
    away = np.abs(octaves_Pn[np.isfinite(octaves_Pn)])
    spread = _DEVIATION * float(np.median(away)) if away.size else 0.0
    return Sizes(size_P, steps_Pn.max(1, initial=0), usual_n, spread)


def unseen(energies: list[Array], steps: list[Array], window_steps: int, known: list[Sizes]) -> list[Unseen]:
    """Per cohort: what was not measured of its rows.

    `energies[c]` [P, n]: sum of |intended|^2 in each part; `steps[c]` [P, n]: steps measured of each row; `known[c]`: the
    sizes of both. Cohorts are measured in different steps of the same window.
    """
    sizes, counts, usuals, _ = (list(kind) for kind in zip(*known, strict=True))
    every_size, every_count = np.concatenate(sizes), np.concatenate(counts)
    seen, total = float(every_count.sum()), float((every_size * every_count).sum())
    if not seen or not total:
        return [Unseen(*np.array([np.nan, 0.0, np.nan])[:, None].repeat(e.shape[1], 1)) for e in energies]
    steps_for_one = max(window_steps / seen, 1.0)  # steps of the window that one of those seen stands for
    found: list[Unseen] = []
    start = 0
    for size_P, steps_Pn, energy_Pn, usual_n in zip(sizes, steps, energies, usuals, strict=True):
        stop = start + len(size_P)
        own_Pn = np.where(steps_Pn > 0, size_P[:, None], 0.0)
        other_Pn = np.where(steps_Pn > 0, 0.0, size_P[:, None])  # it sat those out
        elsewhere = np.concatenate([every_size[:start], every_size[stop:]])
        largest_n = np.maximum(other_Pn.max(0, initial=0.0), elsewhere.max(initial=0.0))
        far_n = _FAR * own_Pn.max(0, initial=0.0)
        every_own_n = np.where(other_Pn > far_n, other_Pn * counts[len(found)][:, None], 0.0).sum(0)
        energy = elsewhere * np.concatenate([every_count[:start], every_count[stop:]])
        beyond_n = every_own_n + np.where(elsewhere[:, None] > far_n, energy[:, None], 0.0).sum(0)
        largest_n = np.minimum(np.maximum(largest_n, beyond_n * steps_for_one) / (total * steps_for_one), 1.0)
        seen_n = (size_P[:, None] * steps_Pn).sum(0)
        beside_n = np.maximum(total * steps_for_one - seen_n, 0.0)
        others_n = usual_n * beside_n
        shares = ratio(others_n, energy_Pn.sum(0) + others_n), largest_n, ratio(beside_n, seen_n + beside_n)
        found.append(Unseen(*shares))
        start = stop
    return found


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


def _median(values: Array, axis: int) -> Array:
    """Median of what is known; NaN where nothing is."""
    ordered = np.sort(values, axis)  # NaN last
    known = np.isfinite(values).sum(axis)
    last = np.maximum(known - 1, 0)
    low = np.take_along_axis(ordered, np.expand_dims(last // 2, axis), axis)
    high = np.take_along_axis(ordered, np.expand_dims((last + 1) // 2, axis), axis)
    middle = np.squeeze((low + high) / 2, axis)
    return np.where(known > 0, middle, np.nan)
