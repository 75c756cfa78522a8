"""What the measured steps of a tensor stand for, where it sat others of the window out.

Tensors take turns, and a step that one of them sat out was measured of others: how large its updates were is known, by what
is usual. What rounding lets through depends on the size of an update, so each measured step stands for steps of about its
size: where the learning rate falls by 1,000 in a window, the few large ones that were met for all large ones. A step that is
far from all that were met (a loss spike) is stood for by all of them, and how much more arrives of it `arrivals` tells.

Legend: P parts of a window, J all steps of the window, as far as they are known, G sizes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from update_watch.measure.sums.error_bars import Array, ratio
from update_watch.measure.sums.step_sizes import ALIKE, Sizes
from update_watch.measure.sums.steps import Told

FINE = 4  # sizes in an octave of updates
HIGHEST = 8  # octaves
OCTAVES: Array = np.arange(-HIGHEST * FINE, HIGHEST * FINE + 1) / FINE
_NEAR = 0.5  # octaves: steps that differ by so much stand for each other,
_SPREAD = 2.0  # or by so many times what the nearest differs by


class Missed(NamedTuple):
    """What the measured parts of one cohort stand for. Octaves are those of updates above the mean measured step."""

    energy_P: Array  # |intended|^2 of all steps that a part stands for, its own included, by the part's own
    steps_P: Array  # how many they are, by the part's own
    own_P: Array  # octaves of the part
    stands_PG: Array  # `energy` by the size of the steps that are stood for
    top: float  # octaves of the largest step of the window


class Stood(NamedTuple):
    """What the measured parts of several cohorts stand for, of as many parts each, row by row."""

    cohorts: list[tuple[slice, Missed]]  # of which of the rows
    rows: slice | npt.NDArray[np.intp]  # these are among others
    energy_Pn: Array  # as in `Missed`
    steps_Pn: Array
    own_Pn: Array
    top_n: Array

    @classmethod
    def of(cls, missed: Sequence[tuple[slice, Missed]]) -> list[Stood]:
        """Of cohorts, each with where its rows are."""
        alike: dict[int, list[tuple[slice, Missed]]] = {}
        for rows, one in missed:
            alike.setdefault(len(one.steps_P), []).append((rows, one))
        return [cls._of(cohorts) for cohorts in alike.values()]

    @classmethod
    def _of(cls, cohorts: list[tuple[slice, Missed]]) -> Stood:
        counts = [rows.stop - rows.start for rows, _ in cohorts]
        stops = list(itertools.accumulate(counts))
        inside = [
            (slice(*ends), one) for ends, (_, one) in zip(zip([0, *stops], stops, strict=False), cohorts, strict=True)
        ]
        first, last = cohorts[0][0].start, cohorts[-1][0].stop
        are_neighbours = all(one[0].stop == other[0].start for one, other in itertools.pairwise(cohorts))
        rows = (
            slice(first, last) if are_neighbours else np.concatenate([np.arange(r.start, r.stop) for r, _ in cohorts])
        )

        def by_row(name: str) -> Array:
            of_cohorts_CP = np.array([getattr(one, name) for _, one in cohorts])
            of_rows: Array = np.repeat(of_cohorts_CP, counts, 0).T.copy()
            return of_rows

        return cls(inside, rows, by_row("energy_P"), by_row("steps_P"), by_row("own_P"), by_row("top"))


def missed_steps(
    known: list[Sizes], squared_rates: list[Array], window_steps: int, told: Sequence[Told] | None = None
) -> list[Missed | None]:
    """Per cohort of an optimizer; None where nothing is known of the steps that it sat out.

    `squared_rates[c]` [P]: of the learning rate, by which updates grow and fall. `told[c]`: of which steps its looks tell
    (None: they are at different ones of the same window).
    """
    sizes, told = _smooth(known, squared_rates), told or [Told.by_turns(of.count_P) for of in known]
    held = [_held(*each) for each in zip(known, sizes, told, strict=True)]
    found: list[Missed | None] = []
    for c, of in enumerate(known):
        others = [(*sizes[k], told[k].alone_P) for k in range(len(known)) if k != c]
        others_J, usual_J, count_J = (np.concatenate(each) for each in zip(*others, *held, strict=True))
        are_looks_J = np.arange(len(count_J)) < sum(len(alone_P) for *_, alone_P in others)
        found.append(_missed(sizes[c][0], of, told[c].has_asked, others_J, usual_J, count_J, are_looks_J, window_steps))
    return found


def _held(of: Sizes, sizes: tuple[Array, Array], told: Told) -> tuple[Array, Array, Array]:
    """[P] sizes, what is usual, and how many they are, of the steps beside each part's looks in which nobody was looked at."""
    size_P, usual_P = sizes
    # of a part of several looks it was one that was so large, and the steps beside the others were not
    is_mixed = (of.count_P > 1) & (size_P > ALIKE * usual_P)
    return np.where(is_mixed, usual_P, size_P) * told.growth_P, usual_P * told.growth_P, told.held_P


def _smooth(known: list[Sizes], squared_rates: list[Array]) -> list[tuple[Array, Array]]:
    """Per cohort the sizes without their noise, and what is usual at their rate."""
    sizes = [of.size_P for of in known]
    rates = [np.where(rate_P > 0, rate_P, 1.0) for rate_P in squared_rates]
    every = np.concatenate([size_P / rate_P for size_P, rate_P in zip(sizes, rates, strict=True)])
    usual = float(np.median(every[every > 0])) if (every > 0).any() else 0.0
    found = []
    for of, rate_P in zip(known, rates, strict=True):
        usual_P = usual * rate_P
        is_noise = (of.size_P < ALIKE * usual_P) & (of.size_P > usual_P / ALIKE) & (not of.are_remembered)
        found.append((np.where(is_noise, usual_P, of.size_P), usual_P))
    return found


def _missed(
    size_P: Array,
    known: Sizes,
    has_asked: bool,
    others_J: Array,
    usual_J: Array,
    count_J: Array,
    are_looks_J: npt.NDArray[np.bool_],
    window_steps: int,
) -> Missed | None:
    count_P = known.count_P
    own_P = (size_P > 0) & (count_P > 0)
    unmeasured, told = window_steps - float(count_P.sum()), float(count_J.sum())
    if not own_P.any() or unmeasured <= 0 or not told:
        return None
    count_J = count_J * (unmeasured / told)
    # of several steps in one part it was one that was so large
    is_mixed = are_looks_J & (count_J > 1) & (others_J > ALIKE * usual_J)
    one_J = np.where(is_mixed, others_J * count_J - usual_J * (count_J - 1), others_J)
    size_J = np.concatenate([size_P[own_P], one_J, usual_J[is_mixed]])
    count_J = np.concatenate([count_P[own_P], np.where(is_mixed, 1.0, count_J), count_J[is_mixed] - 1])
    size_J, count_J = size_J[size_J > 0], count_J[size_J > 0]
    at_J, at_P = 0.5 * np.log2(size_J), 0.5 * np.log2(np.where(own_P, size_P, 1.0))
    apart_JP = np.where(own_P, np.abs(at_J[:, None] - at_P), np.inf)
    if has_asked and own_P[-1] and own_P.sum() > 1:
        itself = own_P.sum() - 1
        apart_JP[itself, :-1] = apart_JP[:itself, -1] = apart_JP[itself + 1 :, -1] = np.inf
    nearest_J1 = apart_JP.min(1, keepdims=True)
    width_J1 = np.maximum(_NEAR, _SPREAD * nearest_J1)
    near_JP = np.exp(0.5 * ((nearest_J1 / width_J1) ** 2 - (apart_JP / width_J1) ** 2)) * count_P
    per_step_P = np.maximum(count_P, 1)
    steps_JP = count_J[:, None] * near_JP / near_JP.sum(1, keepdims=True) / per_step_P
    # by the ratio of sums: single steps of one tensor are far from what was usual then
    energy_JP = (count_J * size_J)[:, None] * near_JP / (near_JP * size_P).sum(1, keepdims=True) / per_step_P
    mean = 0.5 * np.log2((size_P * count_P)[own_P].sum() / count_P[own_P].sum())
    is_far_J = size_J > ALIKE * size_P[own_P].max()
    spread = known.spread * math.log(2)
    energy_JP *= _usual_share(count_J * size_J, is_far_J, spread)[:, None]
    # what the histogram holds came of a few steps, by their energy: its mean lies above that of a single step
    low_J = at_J - mean - np.where(is_far_J, spread**2 / math.log(2), 0.0)
    place_J = np.clip(np.rint((low_J + HIGHEST) * FINE), 0, len(OCTAVES) - 1).astype(int)
    stands_GP = np.zeros((len(OCTAVES), len(size_P)))
    np.add.at(stands_GP, place_J, energy_JP)
    energy_P = np.where(own_P, energy_JP.sum(0), 1.0)
    steps_P = np.where(own_P, steps_JP.sum(0), 1.0)
    return Missed(energy_P, steps_P, np.where(own_P, at_P - mean, 0.0), stands_GP.T, float(at_J.max() - mean))


def _usual_share(energy_J: Array, is_far_J: npt.NDArray[np.bool_], spread: float) -> Array:
    """[J] what to multiply the energy of steps far above all others by, that their share of all is right in the mean.

    `spread`: standard deviation of the logarithm of a tensor's updates from step to step. The energy of one step, e^(2 z) of
    the usual, has a mean of e^(2 spread^2): what many steps have, and one seldom. Its share is the logistic function of a
    normal number, whose mean is that of mu / sqrt(1 + pi / 8 sigma^2) (MacKay, The evidence framework, 1992, eq. 8).
    """
    far, rest = energy_J[is_far_J].sum(), energy_J[~is_far_J].sum()
    if not far or not rest:
        return np.ones(len(energy_J))
    sigma2 = (2 * spread) ** 2 * (energy_J[is_far_J] ** 2).sum() / far**2
    mu = math.log(far / rest) - sigma2 / 2
    factor = math.exp(mu / math.sqrt(1 + math.pi / 8 * sigma2)) * rest / far
    return np.where(is_far_J, factor, 1.0)


def all_pairs(sums_GGn: Array, single_Gn: Array, n_Gn: Array, whole_Gn: Array) -> Array:
    """[G, G, n] products of the sums over all steps of two groups, from those over measured ones.

    `sums`: products of sums over measured steps; `single`: of those, what pairs of a step with itself make.
    """
    share_Gn = ratio(whole_Gn, n_Gn)
    found: Array = np.nan_to_num(sums_GGn * share_Gn[:, None] * share_Gn[None])
    with np.errstate(all="ignore"):
        pairs_Gn = np.where(n_Gn > 1, whole_Gn * (whole_Gn - 1) / (n_Gn * (n_Gn - 1)), 0.0)
    for g, share in enumerate(share_Gn):
        other = sums_GGn[g, g] - single_Gn[g]
        found[g, g] = np.nan_to_num(pairs_Gn[g] * other + share * single_Gn[g])
    return found
