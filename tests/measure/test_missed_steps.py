"""Steps that were sat out are stood for by those that were measured, held against all steps of the same windows."""

from __future__ import annotations

import random

import numpy as np
import pytest

from update_watch.measure.step_order import StepOrder
from update_watch.measure.sums.arrivals import Curves, tail
from update_watch.measure.sums.error_bars import Array, ratio
from update_watch.measure.sums.missed_steps import Missed, Stood, missed_steps
from update_watch.measure.sums.step_sizes import UsualSizes, sizes_of, sizes_of_each
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, PLACES

T, COHORTS, ROWS, ELEMENTS = 128, 8, 8, 32


def rounded(gaps: Array) -> Array:
    """What is kept of updates of so many gaps."""
    kept: Array = np.rint(gaps)
    return kept


def alone_of(missed: Missed, rows: int) -> Stood:
    """Of one cohort."""
    (found,) = Stood.of([(slice(0, rows), missed)])
    return found


def histogram(gaps: Array) -> tuple[Array, Array]:
    """[B] and [Q] of |intended|^2 by headroom: log2(update / half a gap)."""
    energy = gaps**2
    place = (
        np.floor((np.log2(2 * np.abs(gaps)) - HEADROOM_LOW) * PLACES).astype(int).clip(0, HEADROOM_BINS * PLACES - 1)
    )
    movement, places = np.zeros(HEADROOM_BINS), np.zeros(PLACES)
    np.add.at(movement, place // PLACES, energy)
    np.add.at(places, place % PLACES, energy)
    return movement, places


def window(
    sizes: Array, rates: Array, rng: np.random.Generator, spread: float = 0.3, usual: tuple[int, int] = (-4, 1)
) -> tuple[list[Array], list[Array], list[Array]]:
    """Per cohort, [ROWS]: efficiency of the measured steps alone, of all as they are told, and the truth."""
    order: StepOrder[int] = StepOrder(list(range(COHORTS)), T, random.Random(int(rng.integers(1 << 30))))
    turns = np.array([order.next()[0] for _ in range(T)])
    known, parts, scales, truths = [], [], [], []
    for c in range(COHORTS):
        noise = rng.lognormal(0, spread, (T, ROWS, 1))  # of gradients, of each tensor on its own
        usual_R1 = 2.0 ** rng.uniform(*usual, (ROWS, 1))
        gaps = usual_R1 * sizes[:, None, None] * noise * rng.standard_normal((T, ROWS, ELEMENTS))
        dot, want = (rounded(gaps) * gaps).sum(-1), (gaps**2).sum(-1)
        mine = np.flatnonzero(turns == c)
        at = mine[::8]  # looked at, all at the rate of the first
        looks = gaps[at] * (rates[at[0]] / rates[at])[:, None, None]
        counted = [histogram(looks[:, i]) for i in range(ROWS)]
        parts.append(
            (dot[mine], want[mine], np.stack([m for m, _ in counted]), np.stack([q for _, q in counted]), looks)
        )
        scales.append(rates[mine] ** 2)
        known.append(sizes_of(want[mine], np.ones_like(want[mine]), scales[-1]))
        truths.append(dot.sum(0) / want.sum(0))
    alone, told = [], []
    for (dot, want, movement, places, looks), missed in zip(parts, missed_steps(known, scales, T), strict=True):
        assert missed is not None
        alone.append(dot.sum(0) / want.sum(0))
        curves = Curves(movement, places, (looks**2).mean((0, 2)), want.sum(0) / (ELEMENTS * len(want)))
        stood = alone_of(missed, ROWS)
        curves.move(alone[-1], want, stood.cohorts)
        arrived = missed.energy_P @ dot + curves.more(want, stood).sum(0)
        told.append(arrived / (missed.energy_P @ want))
    return alone, told, truths


@pytest.mark.parametrize(("kind", "left"), [("falls", 0.8), ("spike", 0.2)])
def test_efficiency_of_all_steps_is_told(kind: str, left: float) -> None:
    """Of bias and scatter no more is left than so much of what the measured steps alone have."""
    rng = np.random.default_rng(0)
    alone, told = [], []
    for _ in range(3):
        rates = np.exp(-7 * np.arange(T) / T) if kind == "falls" else np.ones(T)
        sizes = 4 * rates if kind == "falls" else np.where(np.arange(T) == rng.integers(T), 30.0, 1.0)
        measured, of_all, truth = (np.concatenate(x) for x in window(sizes, rates, rng))
        alone.append(measured - truth)
        told.append(of_all - truth)
    assert abs(np.mean(alone)) > 0.02
    assert abs(np.mean(told)) < left * abs(np.mean(alone))
    assert np.sqrt(np.mean(np.square(told))) < left * np.sqrt(np.mean(np.square(alone)))


@pytest.mark.parametrize(
    ("spread", "usual", "most"),
    [(0.3, (-4, 1), 0.008), (0.5, (-4, 1), 0.008), (0.5, (-8, -4), 0.04)],
    ids=["0.3", "0.5", "spikes at the edge"],
)
def test_a_spike_that_was_missed_is_not_as_large_as_the_mean_of_many_would_be(
    spread: float, usual: tuple[int, int], most: float
) -> None:
    """Energies of single steps lie about their median, which is below their mean: with the mean 0.016 and 0.026 are too much.
    So do their updates, by which the histogram is moved: where a spike is near half a gap, 0.054."""
    rng = np.random.default_rng(0)
    off = []
    for _ in range(30):
        sizes = np.where(np.arange(T) == rng.integers(T), 30.0, 1.0)
        _, of_all, truth = (np.concatenate(x) for x in window(sizes, np.ones(T), rng, spread, usual))
        off.append(of_all - truth)
    assert abs(np.mean(off)) < most


def of_short_windows(remembers: bool) -> tuple[Array, Array]:
    """Bias of efficiencies in windows of 8 steps, in one of which each tensor is looked at: as told, and of that step alone.

    Sizes vary from step to step for all tensors alike, and for each on its own.
    """
    rng = np.random.default_rng(0)
    usual = [UsualSizes() for _ in range(COHORTS)]
    typical = 2.0 ** rng.uniform(-3, 1, (COHORTS, ROWS))
    alone, told = [], []
    for _ in range(60):
        common, own = rng.lognormal(0, 0.25, (8, 1, 1, 1)), rng.lognormal(0, 0.15, (8, COHORTS, ROWS, 1))
        gaps = typical[..., None] * common * own * rng.standard_normal((8, COHORTS, ROWS, 256))
        dot, want = (rounded(gaps) * gaps).sum(-1), (gaps**2).sum(-1)
        truth = dot.sum(0) / want.sum(0)
        order = rng.permutation(8)  # the step in which each cohort is looked at
        ones = np.ones((1, ROWS))
        energies = [want[order[c], c][None] for c in range(COHORTS)]
        known = [sizes_of(e, ones, np.ones(1), usual[c] if remembers else None) for c, e in enumerate(energies)]
        for c, missed in enumerate(missed_steps(known, [np.ones(1)] * COHORTS, 8)):
            assert missed is not None
            looked = gaps[order[c], c]
            movement, places = (np.stack(of) for of in zip(*map(histogram, looked), strict=True))
            single = dot[order[c], c] / energies[c][0]
            curves = Curves(movement, places, (looked**2).mean(1), (looked**2).mean(1))
            stood = alone_of(missed, len(single))
            curves.move(single, energies[c], stood.cohorts)
            arrived = missed.energy_P @ dot[order[c], c][None] + curves.more(energies[c], stood).sum(0)
            alone.append(single - truth[c])
            told.append(arrived / (missed.energy_P @ energies[c]) - truth[c])
    return np.concatenate(told), np.concatenate(alone)


def test_windows_of_one_look_tell_its_size_by_what_was_usual_in_those_before() -> None:
    """Of larger steps more arrives, and they count more: a look alone says too little, whichever step it was."""
    told, alone = of_short_windows(remembers=True)
    assert alone.mean() < -0.04
    assert abs(told.mean()) < 0.3 * abs(alone.mean())
    assert np.sqrt(np.mean(told**2)) < 0.6 * np.sqrt(np.mean(alone**2))
    unknown, _ = of_short_windows(remembers=False)
    assert unknown.mean() == pytest.approx(alone.mean(), abs=1e-9)


def test_what_is_usual_follows_the_training() -> None:
    """Of the last 8 looks or so, by rows; steps in which a row was not looked at, or wanted nothing, change nothing."""
    usual = UsualSizes()
    first, (was_known,) = UsualSizes.with_these([usual], [3], np.array([[4.0, np.nan, 0.0]]))
    assert not was_known
    assert first[0] == pytest.approx(4.0) and np.isnan(first[1:]).all()
    for _ in range(40):
        found, (was_known,) = UsualSizes.with_these([usual], [3], np.array([[1.0, 9.0, 0.0]]))
    assert was_known
    assert found[:2] == pytest.approx([1.0, 9.0], rel=0.05) and np.isnan(found[2])
    found, _ = UsualSizes.with_these([usual], [3], np.array([[np.nan, 9.0 * 2**9, 0.0]]))
    assert found[:2] == pytest.approx([1.0, 18.0], rel=0.05)


def known_of(sizes: list[list[float]]) -> list[Missed | None]:
    energies = [np.array(size)[:, None].repeat(3, 1) for size in sizes]
    return missed_steps(
        [sizes_of(e, np.ones_like(e)) for e in energies], [np.ones(len(e)) for e in energies], sum(map(len, sizes))
    )


def test_steps_that_are_alike_all_weigh_the_same() -> None:
    first, second = known_of([[1.0, 1.2, 0.8, 1.0], [1.0, 1.1, 0.9, 1.0]])
    assert first is not None and second is not None
    assert first.energy_P == pytest.approx(2.0) and first.steps_P == pytest.approx(
        2.0
    )  # 8 steps, of which 4 are its own
    assert (first.own_P == 0).all() and first.top == 0


def test_a_spike_is_not_laid_to_one_step_that_was_a_little_larger() -> None:
    spiked, _ = known_of([[1.0, 1.0, 6.0, 1.0], [1.0, 900.0, 1.0, 1.0]])
    assert spiked is not None
    assert 0.5 * np.log2(900) - 1 < spiked.top < 0.5 * np.log2(900)  # above its own mean step
    of_spike = spiked.stands_PG[:, -1 + np.flatnonzero(spiked.stands_PG.any(0))[-1] + 1]
    assert (of_spike[[0, 1, 3]] > 0.2 * of_spike[2]).all()
    total = (spiked.energy_P * [1, 1, 6, 1]).sum()
    assert total == pytest.approx(900 + 3 + 9, rel=0.05)


def test_one_of_two_steps_in_a_part_is_the_spike() -> None:
    energies = [np.full((4, 3), 2.0), np.array([[2.0], [2.0], [901.0], [2.0]]).repeat(3, 1)]
    twos = [np.full_like(e, 2.0) for e in energies]
    of_first, _ = missed_steps([sizes_of(*each) for each in zip(energies, twos, strict=True)], [np.ones(4)] * 2, 16)
    assert of_first is not None and of_first.top == pytest.approx(0.5 * np.log2(900), abs=0.01)
    assert of_first.energy_P.sum() * 2 == pytest.approx(915, rel=0.01)


def test_nothing_is_made_up_where_nobody_sat_out_or_nobody_tells() -> None:
    assert known_of([[1.0, 1.0]]) == [None]
    energy = np.ones((4, 2))
    alone = missed_steps([sizes_of(energy, energy)], [np.ones(4)], 16)
    assert alone == [None]
    still = missed_steps([sizes_of(0 * energy, energy)] * 2, [np.ones(4)] * 2, 8)
    assert still == [None, None]


@pytest.mark.parametrize(("gaps", "is_near"), [(0.2, True), (0.01, False)])
def test_where_nothing_moved_larger_steps_may_have_moved_it_only_if_they_come_near(gaps: float, is_near: bool) -> None:
    rng = np.random.default_rng(0)
    moves = gaps * rng.lognormal(0, 0.4, (16, 1, 1)) * np.ones((16, 1, 8))
    want = (moves**2).sum(-1)
    movement, places = histogram(moves[:2].ravel())
    curves = Curves(movement[None], places[None], (moves[:2] ** 2).mean((0, 2)), (moves**2).mean((0, 2)))
    missed = known_of([[1.0] * 16, [1.0] * 112])[0]
    assert missed is not None
    found = tail(curves, want, np.ones_like(want), alone_of(missed, 1))
    assert found[0] > 0.05 if is_near else found[0] == 0


def test_a_row_without_a_histogram_gets_nothing_from_it() -> None:
    nothing = Curves(np.zeros((1, HEADROOM_BINS)), np.zeros((1, PLACES)), ratio(np.zeros(1), np.zeros(1)), np.ones(1))
    missed = known_of([[1.0, 1.0], [1.0, 900.0]])[0]
    assert missed is not None and not nothing.is_known_n.any()
    stood = alone_of(missed, 1)
    assert (nothing.more(np.ones((2, 1)), stood) == 0).all()
    for want in (np.ones((2, 1)), np.zeros((2, 1))):
        assert (tail(nothing, want, np.ones((2, 1)), stood) == 0).all()


def test_a_curve_is_laid_where_it_says_what_was_measured() -> None:
    gaps = 0.25 * np.random.default_rng(0).standard_normal(4096)
    movement, places = histogram(gaps)
    truth = (rounded(gaps) * gaps).sum(keepdims=True) / (gaps**2).sum()
    looks = (gaps**2).mean(keepdims=True)
    curves = Curves(movement[None], places[None], looks, 4 * looks)  # as if those looked at were half as large as usual
    assert abs(curves.at(0.0) - truth)[0] > 0.2
    nothing_missed = Missed(np.ones(1), np.ones(1), np.zeros(1), np.zeros((1, 65)), 0.0)
    curves.move(truth, np.ones((1, 1)), [(slice(0, 1), nothing_missed)])
    assert abs(curves.at(0.0) - truth)[0] < 0.1


@np.errstate(all="ignore")
def test_cohorts_side_by_side_are_told_what_each_is_told_alone() -> None:
    """To the bit: of how many parts, of how many rows and how many together, changes nothing."""
    rng = np.random.default_rng(1)
    energies = [rng.lognormal(0, 1, (parts, rows)) for parts, rows in [(4, 7), (4, 3), (5, 7), (2, 6), (4, 7), (2, 1)]]
    energies[1][:, 2], energies[0][1, 3], energies[4][2] = 0.0, np.inf, 900.0
    steps = [np.where(rng.random(energy.shape) < 0.8, 2.0, 0.0) for energy in energies]
    scales = [rng.lognormal(0, 1, len(energy)) for energy in energies]
    usual = [[UsualSizes() for _ in energies] for _ in range(2)]
    for _ in range(3):  # what is usual is remembered from one to the next
        together = sizes_of_each(list(zip(energies, steps, scales, usual[0], strict=True)))
        for found, *given in zip(together, energies, steps, scales, usual[1], strict=True):
            for a, b in zip(found, sizes_of(*given), strict=True):
                np.testing.assert_array_equal(a, b)
    counts = [energy.shape[1] for energy in energies]
    starts = np.cumsum([0, *counts]).tolist()
    missed = missed_steps(together, scales, 64)
    every = [(slice(starts[c], starts[c + 1]), one) for c, one in enumerate(missed) if one is not None]
    movement, places = (np.stack(of) for of in zip(*map(histogram, rng.normal(0, 0.5, (starts[-1], 64))), strict=True))
    looked, want = rng.lognormal(0, 0.1, (2, starts[-1]))
    efficiency = rng.random(starts[-1])
    assert len(every) > 3 and len(Stood.of(every)) == 3

    def told(cohorts: list[tuple[slice, Missed]]) -> list[tuple[Array, ...]]:
        found = []
        for stood in Stood.of(cohorts):
            parts, rows = len(stood.own_Pn), np.concatenate([np.arange(each.start, each.stop) for each, _ in cohorts])
            rows = np.arange(starts[-1])[stood.rows]
            of_cohorts = [c for c, start in enumerate(starts[:-1]) if start in rows]
            energy, step = (np.concatenate([of[c] for c in of_cohorts], 1) for of in (energies, steps))
            curves = Curves(movement[rows], places[rows], looked[rows], want[rows])
            curves.move(efficiency[rows], energy, stood.cohorts)
            of_all = (
                stood.energy_Pn,
                curves.more(energy, stood),
                curves.reach(stood.top_n),
                tail(curves, energy, step, stood),
            )
            assert len(energy) == parts
            found += [tuple(values[..., inside] for values in of_all) for inside, _ in stood.cohorts]
        return found

    together_told = told(sorted(every, key=lambda one: len(one[1].own_P)))
    alone_told = [told([one])[0] for one in sorted(every, key=lambda one: len(one[1].own_P))]
    for together_one, alone_one in zip(together_told, alone_told, strict=True):
        for a, b in zip(together_one, alone_one, strict=True):
            np.testing.assert_array_equal(a, b)
