"""How large the updates of a window's steps were, also of those that a tensor sat out: what others, measured then, tell of them.

Tensors differ in the size of their updates, so each is taken by what is usual for it. Where a window looks at a tensor in a
step or two, these cannot tell that: what earlier windows saw is remembered.

All arrays have the rows last: [P, n] parts by rows, [n] rows. NaN is what is not known.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from update_watch.measure.sums.error_bars import Array, ratio
from update_watch.measure.sums.steps import Told

_FAR = 4.0  # so many times the largest measured step: what happens there was not seen
# sizes of |intended|^2 within this factor of the usual are: what they differ by is noise of the few that tell
ALIKE = 4.0
_DEVIATION = 1.4826  # standard deviation by the median deviation, which a few large steps do not change
_FEW_PARTS = 4  # a window of fewer does not tell by itself what is usual
_REMEMBERED = 8.0  # looks that what is usual is the mean of: it changes as training goes on


class Unseen(NamedTuple):
    """What was not measured of each row: shares of the window's energy, [n]. NaN where nothing is known of a row."""

    energy_n: Array  # in all of those steps
    largest_n: Array  # in the largest of them, or in all that are far above any that was measured
    usual_n: Array  # in all of them, of the other tensors alone
    unlooked_n: Array | float = 0.0  # share of the window's steps in which nobody was looked at


class Sizes(NamedTuple):
    """How large the steps of a cohort were, by what is usual for its tensors."""

    size_P: Array  # mean |intended|^2 of a step in each part of the window
    count_P: Array  # steps measured in it
    usual_n: Array  # of each row, per step and square of the learning rate; NaN where nothing was intended
    spread: float = 0.0  # standard deviation of the octaves by which updates of single steps differ from what is usual
    are_remembered: bool = False  # what is usual was known before: a step's size is more than noise


class UsualSizes:
    """What was usual for the updates of a cohort's rows in the windows before: the mean of logarithms over some looks."""

    def __init__(self) -> None:
        self._log_n, self._looks_n = np.zeros(0), np.zeros(0)

    @staticmethod
    def with_these(known: Sequence[UsualSizes], counts: Sequence[int], size_Pn: Array) -> tuple[Array, list[bool]]:
        """[n] usual sizes of the rows of some cohorts, so many of each, with these looks of a new window among them; and of
        which cohorts anything was known before.

        `size`: of one look, NaN where there was none. The new ones are remembered.
        """
        for one, count in zip(known, counts, strict=True):
            if len(one._log_n) != count:
                one._log_n, one._looks_n = np.zeros((2, count))
        were_known = [bool(one._looks_n.any()) for one in known]
        log_n, looks_n = (
            np.concatenate(each) for each in zip(*((one._log_n, one._looks_n) for one in known), strict=True)
        )
        with np.errstate(all="ignore"):
            log_Pn = np.log(size_Pn)
            is_known_Pn = np.isfinite(log_Pn)
            now_n = looks_n + is_known_Pn.sum(0)
            log_n = (log_n * looks_n + np.where(is_known_Pn, log_Pn, 0.0).sum(0)) / now_n
        log_n = np.where(now_n > 0, log_n, 0.0)
        for one, rows in zip(known, _side_by_side(counts), strict=True):
            one._log_n, one._looks_n = log_n[rows].copy(), np.minimum(now_n[rows], _REMEMBERED)
        return np.where(now_n > 0, np.exp(log_n), np.nan), were_known


Measured = tuple[Array, Array, Array | None, UsualSizes | None]  # of a cohort, as `sizes_of` has them


def sizes_of(
    energy_Pn: Array, steps_Pn: Array, squared_rates_P: Array | None = None, before: UsualSizes | None = None
) -> Sizes:
    """`energy`: sum of |intended|^2 in each part; `steps`: measured of each row. A step's size is that of the tensors
    measured in it, each by its own usual size: the median, which one large step does not change. `squared_rates`: of the
    learning rate, by which updates grow and fall in a schedule; what is usual is meant beside them. `before`: what was usual
    in earlier windows, for one of few looks.
    """
    return sizes_of_each([(energy_Pn, steps_Pn, squared_rates_P, before)])[0]


def sizes_of_each(cohorts: Sequence[Measured]) -> list[Sizes]:
    """The same of several cohorts: of those of as many parts together, since thousands of tensors are in a hundred of them."""
    found: dict[int, Sizes] = {}
    for parts in dict.fromkeys(len(energy_Pn) for energy_Pn, *_ in cohorts):
        alike = [i for i, (energy_Pn, *_) in enumerate(cohorts) if len(energy_Pn) == parts]
        found |= zip(alike, _sizes_of([cohorts[i] for i in alike], parts), strict=True)
    return [found[i] for i in range(len(cohorts))]


def _sizes_of(cohorts: Sequence[Measured], parts: int) -> list[Sizes]:
    """C cohorts of P parts."""
    counts, usual = [one[0].shape[1] for one in cohorts], [one[3] for one in cohorts]
    of_cohort_n = np.repeat(np.arange(len(cohorts)), counts)
    energy_Pn, steps_Pn = (np.concatenate(each, 1) for each in list(zip(*cohorts, strict=True))[:2])
    scale_CP = np.array([np.ones(parts) if rates_P is None else rates_P for _, _, rates_P, _ in cohorts])
    with np.errstate(all="ignore"):
        per_step = np.where(steps_Pn > 0, energy_Pn / np.maximum(steps_Pn, 1) / scale_CP[of_cohort_n].T, np.nan)
        usual_n = _median(np.where(per_step > 0, per_step, np.nan), 0)
        remembered_n, were_known = UsualSizes.with_these([one or UsualSizes() for one in usual], counts, per_step)
        are_few = [np.count_nonzero(one[1].any(1)) < _FEW_PARTS for one in cohorts]
        are_remembered = np.array(were_known) & np.array([one is not None for one in usual]) & np.array(are_few)
        usual_n = np.where(are_remembered[of_cohort_n], remembered_n, usual_n)
        alike_CP = _median(_apart(counts, per_step / usual_n), 2)
        size_CP = np.nan_to_num(alike_CP * scale_CP)
        is_usual_CP = (alike_CP < ALIKE) & (alike_CP > 1 / ALIKE)
        # means of k steps spread by 1 / sqrt(k) of what single ones do
        away_Pn = np.abs(0.5 * np.log2(per_step / usual_n) * np.sqrt(steps_Pn))
        away_Pn[~(np.isfinite(away_Pn) & is_usual_CP[of_cohort_n].T)] = np.nan
        spread_C = _DEVIATION * np.nan_to_num(_median(_apart(counts, away_Pn).reshape(len(cohorts), -1), 1))
    return [
        Sizes(size_P, one[1].max(1, initial=0), usual_n[rows], spread, is_remembered)
        for one, rows, size_P, spread, is_remembered in zip(
            cohorts, _side_by_side(counts), size_CP, spread_C.tolist(), are_remembered.tolist(), strict=True
        )
    ]


def _side_by_side(counts: Sequence[int]) -> list[slice]:
    """Where the rows of each cohort are, one after the other."""
    stops = list(itertools.accumulate(counts))
    return [slice(*ends) for ends in zip([0, *stops], stops, strict=False)]


def _apart(counts: Sequence[int], values: Array) -> Array:
    """[C, ..., m] of [..., n]: the rows of each cohort, with NaN up to the largest."""
    apart = np.full((len(counts), *values.shape[:-1], max(counts)), np.nan)
    for of_cohort, rows in zip(apart, _side_by_side(counts), strict=True):
        of_cohort[..., : rows.stop - rows.start] = values[..., rows]
    return apart


def aligned(known: Sequence[Sizes], told: Sequence[Told]) -> list[Sizes]:
    """The sizes of cohorts that are looked at equally often, of which each was taken by what is usual in its own steps.

    Where half of the window's steps are of another level, that may be the one level of some and the other of others, as chance
    has it. So it is compared in steps that both were looked at in or, where there is none, in neighbouring ones: the median of
    parts of the same number. What they differ by within `ALIKE` is noise.
    """
    found, first = [known[0]], known[0]
    for of, one in zip(known[1:], told[1:], strict=True):
        both = min(len(first.size_P), len(of.size_P))
        mine_P, its_P = first.size_P[:both], of.size_P[:both]
        if told[0].has_asked and one.has_asked:
            mine_P, its_P = first.size_P[-1:], of.size_P[-1:]
        is_known_P = (mine_P > 0) & (its_P > 0)
        apart = float(np.exp(np.median(np.log(mine_P[is_known_P] / its_P[is_known_P])))) if is_known_P.any() else 1.0
        if 1 / ALIKE < apart < ALIKE:
            apart = 1.0
        found.append(of._replace(size_P=of.size_P * apart, usual_n=of.usual_n / apart))
    return found


def unseen(
    energies: list[Array],
    steps: list[Array],
    window_steps: int,
    known: list[Sizes],
    told: Sequence[Told] | None = None,
    squared_rates: Sequence[Array] | None = None,
) -> list[Unseen]:
    """Per cohort: what was not measured of its rows.

    `energies[c]` [P, n]: sum of |intended|^2 in each part; `steps[c]` [P, n]: steps measured of each row; `known[c]`: the
    sizes of both; `told[c]`: of which steps those tell (None: cohorts are measured in different steps of the same window);
    `squared_rates[c]` [P]: see `sizes_of`.
    """
    told = told or [Told.by_turns(of.count_P) for of in known]
    held = _held(known, told, squared_rates or [np.ones(len(of.size_P)) for of in known])
    unlooked = min(sum(float(one.held_P.sum()) for one in told) / max(window_steps, 1), 1.0)
    found: list[Unseen] = []
    for c, (of, steps_Pn, energy_Pn) in enumerate(zip(known, steps, energies, strict=True)):
        size_P, usual_n = of.size_P, of.usual_n
        others = [(known[k].size_P, told[k].alone_P) for k in range(len(known)) if k != c]
        elsewhere, count = (np.concatenate(each) for each in zip(*others, *held, strict=True))
        elsewhere, count = elsewhere[count > 0], count[count > 0]
        seen = float(of.count_P.sum() + count.sum())
        total = float((size_P * of.count_P).sum() + (elsewhere * count).sum())
        if not seen or not total:
            found.append(Unseen(*np.array([np.nan, 0.0, np.nan, unlooked])[:, None].repeat(energy_Pn.shape[1], 1)))
            continue
        steps_for_one = max(window_steps / seen, 1.0)  # steps of the window that one of those known stands for
        own_Pn = np.where(steps_Pn > 0, size_P[:, None], 0.0)
        other_Pn = np.where(steps_Pn > 0, 0.0, size_P[:, None])  # it sat those out
        largest_n = np.maximum(other_Pn.max(0, initial=0.0), elsewhere.max(initial=0.0))
        far_n = _FAR * own_Pn.max(0, initial=0.0)
        every_own_n = np.where(other_Pn > far_n, other_Pn * of.count_P[:, None], 0.0).sum(0)
        energy = elsewhere * count
        beyond_n = every_own_n + np.where(elsewhere[:, None] > far_n, energy[:, None], 0.0).sum(0)
        largest_n = np.minimum(np.maximum(largest_n, beyond_n * steps_for_one) / (total * steps_for_one), 1.0)
        seen_n = (size_P[:, None] * steps_Pn).sum(0)
        beside_n = np.maximum(total * steps_for_one - seen_n, 0.0)
        others_n = usual_n * beside_n
        shares = ratio(others_n, energy_Pn.sum(0) + others_n), largest_n, ratio(beside_n, seen_n + beside_n)
        found.append(Unseen(*shares, np.full(len(usual_n), unlooked)))
    return found


def _held(known: Sequence[Sizes], told: Sequence[Told], squared_rates: Sequence[Array]) -> list[tuple[Array, Array]]:
    """Per cohort [P] sizes of the steps beside its looks in which nobody was looked at, and how many they are.

    What looks differ by within `ALIKE` is the noise of single steps: those beside them have the mean of all such looks.
    """
    rate_J, alone_J, growth_J, held_J = (
        np.concatenate(each)
        for each in (squared_rates, *zip(*[(one.alone_P, one.growth_P, one.held_P) for one in told], strict=True))
    )
    rate_J = np.where(rate_J > 0, rate_J, 1.0)
    size_J = np.concatenate([of.size_P for of in known]) / rate_J
    looked = size_J[(size_J > 0) & (alone_J > 0)]
    usual = float(np.median(looked)) if len(looked) else 0.0
    is_usual_J = (size_J < ALIKE * usual) & (size_J > usual / ALIKE)
    mean = float((size_J * alone_J)[is_usual_J].sum() / max(alone_J[is_usual_J].sum(), 1e-300))
    held_size_J = np.where(is_usual_J, mean, size_J) * rate_J * growth_J
    cohorts = _side_by_side([len(of.size_P) for of in known])
    return [(held_size_J[own], held_J[own]) for own in cohorts]


def _median(values: Array, axis: int) -> Array:
    """Median of what is known; NaN where nothing is."""
    ordered = np.sort(values, axis)  # NaN last
    known = np.isfinite(values).sum(axis)
    last = np.maximum(known - 1, 0)
    low = np.take_along_axis(ordered, np.expand_dims(last // 2, axis), axis)
    high = np.take_along_axis(ordered, np.expand_dims((last + 1) // 2, axis), axis)
    middle = np.squeeze((low + high) / 2, axis)
    return np.where(known > 0, middle, np.nan)


def median_of_each(cohorts: Sequence[slice], values_n: Array) -> Array:
    """[n] of the rows of each cohort, which follow each other, the median of what is known."""
    counts = [rows.stop - rows.start for rows in cohorts]
    return np.repeat(_median(_apart(counts, values_n), 1), counts)
