"""Stated errors cover the truth: windows drawn again and again, each with the sums of all its steps beside it."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch

from update_watch.measure.position_weights import PositionWeights
from update_watch.measure.positions import share
from update_watch.measure.sampling import Sampler
from update_watch.measure.step_order import StepOrder
from update_watch.measure.sums.added_steps import AddedSteps, Slot
from update_watch.measure.sums.device_sums import DeviceSums
from update_watch.measure.sums.error_bars import (
    Array,
    reach,
    spread_over_steps,
    standard_error,
)
from update_watch.measure.sums.layout import GROUPS, WANT
from update_watch.measure.sums.missed_steps import all_pairs
from update_watch.measure.sums.packing import packed
from update_watch.measure.sums.step_sizes import Sizes, sizes_of, unseen
from update_watch.measure.sums.steps import Steps
from update_watch.measure.sums.window_sums import WindowSums

T, COHORTS, ROWS = 128, 8, 4


def window(kind: str, rng: np.random.Generator) -> tuple[Array, Array]:
    """[T, rows] dot and want of every step: energy and efficiency differ between steps."""
    want = rng.lognormal(0.0, 0.7, (T, 1)) * rng.lognormal(0.0, 0.3, (T, ROWS * COHORTS))
    efficiency = np.clip(0.5 + 0.2 * rng.standard_normal((T, 1)) + 0.1 * rng.standard_normal(want.shape), 0, 1.5)
    if kind == "falls":  # the learning rate, to a thousandth; what is smaller is lost
        size = np.exp(-7 * np.arange(T) / T)[:, None]
        want, efficiency = want * size**2, np.clip(efficiency * (0.3 + 1.4 * size), 0, 1.2)
    if kind == "spikes":
        at = rng.choice(T, 4, replace=False)
        want[at], efficiency[at] = want[at] * 900, 1.0
    return efficiency * want, want


def sizes(energies: list[Array], steps: list[Array], rates: list[Array] | None = None) -> list[Sizes]:
    scales = [np.ones(len(e)) for e in energies] if rates is None else rates
    return [sizes_of(*each) for each in zip(energies, steps, scales, strict=True)]


def read_in_turns(dot: Array, want: Array, rng: random.Random, rates: Array) -> tuple[Array, Array, Array]:
    """[rows]: efficiency as measured in an eighth of the steps, its error, the truth."""
    order: StepOrder[int] = StepOrder(list(range(COHORTS)), T, rng)
    turns = np.array([order.next()[0] for _ in range(T)])
    energies, steps, found, jackknives, effective = [], [], [], [], []
    for c in range(COHORTS):
        rows = slice(c * ROWS, (c + 1) * ROWS)
        mine = turns == c
        energies.append(want[mine, rows])
        steps.append(np.ones_like(energies[-1]))
        found.append(dot[mine, rows].sum(0) / energies[-1].sum(0))
        spread = spread_over_steps(dot[mine, rows], energies[-1], steps[-1])
        jackknives.append(spread[0])
        effective.append(spread[1])
    scales = [rates[turns == c] ** 2 for c in range(COHORTS)]
    missed, exact = unseen(energies, steps, T, sizes(energies, steps, scales)), np.ones(ROWS, bool)
    errors = [standard_error(jackknives[c], effective[c], *missed[c][:2], np.ones(ROWS), exact) for c in range(COHORTS)]
    return np.concatenate(found), np.concatenate(errors), dot.sum(0) / want.sum(0)


@pytest.mark.parametrize("kind", ["steady", "falls", "spikes"])
def test_two_standard_errors_cover_the_truth(kind: str) -> None:
    rng, order = np.random.default_rng(0), random.Random(0)
    covered, errors = [], []
    rates = np.exp(-7 * np.arange(T) / T) if kind == "falls" else np.ones(T)
    for _ in range(60):
        value, error, truth = read_in_turns(*window(kind, rng), order, rates)
        covered += list(np.abs(value - truth) <= 2 * error)
        errors += list(error)
    assert np.mean(covered) >= 0.93
    assert min(errors) > 0
    assert kind != "steady" or np.median(errors) < 0.15  # they say something


def test_a_spike_that_was_measured_leaves_little_unseen_and_one_that_was_not_leaves_nearly_all() -> None:
    want = np.ones((T, 2 * ROWS))
    want[17] = 900.0
    mine = np.arange(T) % 2 == 1  # the second cohort measures step 17
    cohorts = [want[~mine, :ROWS], want[mine, ROWS:]]
    ones = [np.ones_like(x) for x in cohorts]
    without, with_it = unseen(cohorts, ones, T, sizes(cohorts, ones))
    total = 900.0 + T - 1
    assert without.usual_n == pytest.approx(1 - 64 / total) and with_it.usual_n == pytest.approx(64 / total)
    assert without.energy_n == pytest.approx(1 - 64 / total) and without.largest_n == pytest.approx(900 / total)
    assert with_it.energy_n == pytest.approx(64 / total) and with_it.largest_n == pytest.approx(1 / total)


def test_updates_of_all_steps_are_told_from_measured_ones_by_what_others_did_in_the_rest() -> None:
    want = np.ones((T, 2))
    want[::16] = 20.0  # all of these are measured of the first tensor, none of the second
    mine = np.arange(T) % 4 == 0
    cohorts = [want[mine, :1], want[~mine, 1:]]
    ones = [np.ones_like(x) for x in cohorts]
    missed, _ = unseen(cohorts, ones, T, sizes(cohorts, ones))
    one, none = np.ones(1), np.zeros(1)
    steps = Steps(mine[mine, None] * 1.0, none[None], np.full((1, 1), float(T)), none, one, one > 0, one > 0, none)
    told = want[mine, 0].mean() * steps.for_all(missed.usual_n)
    assert told == pytest.approx(want[:, 0].mean(), rel=1e-6) and want[mine, 0].mean() != pytest.approx(told, rel=0.1)
    assert steps.for_all(np.array([np.nan])) == 1.0


def test_of_larger_updates_no_smaller_part_arrives() -> None:
    """Under rounding to nearest a healthy tensor stays one whatever step was missed; a stalled one may have moved in it."""
    found = reach(np.array([1.0, 0.5, 0.0, 0.0, np.nan]), np.array([True, True, True, False, True]))
    assert found == pytest.approx([0.2, 0.7, 1.0, 1.0, 1.0])


def test_meta_the_spread_alone_does_not_cover_a_spike_that_was_not_met() -> None:
    rng, order = np.random.default_rng(0), random.Random(0)
    covered = []
    for _ in range(40):
        dot, want = window("spikes", rng)
        turns: StepOrder[int] = StepOrder(list(range(COHORTS)), T, order)
        mine = np.array([turns.next()[0] for _ in range(T)]) == 0
        jackknife, _ = spread_over_steps(dot[mine, :ROWS], want[mine, :ROWS], np.ones((mine.sum(), ROWS)))
        value, truth = (x[:, :ROWS] for x in (dot, want)), (dot.sum(0) / want.sum(0))[:ROWS]
        above, below = value
        off = above[mine].sum(0) / below[mine].sum(0) - truth
        covered += list(np.abs(off) <= 2 * np.sqrt(jackknife))
    assert np.mean(covered) < 0.8


def test_one_step_says_nothing_of_how_steps_differ() -> None:
    one = np.ones((1, 2))
    jackknife, effective = spread_over_steps(0.5 * one, one, one)
    assert np.isnan(jackknife).all() and np.isnan(effective).all()
    some = np.array([0.9, 0.0])  # of the first row's steps most were not measured, of the second's none
    error = standard_error(jackknife, effective, some, np.zeros(2), np.ones(2), np.ones(2, bool))
    assert np.isnan(error[0]) and error[1] == 0


def test_a_sampled_tensor_of_which_nothing_moved_is_not_said_to_be_exact() -> None:
    nothing, want = np.zeros((16, 1)), np.ones((16, 1))
    jackknife, effective = spread_over_steps(nothing, want, np.ones((16, 1)))
    error = standard_error(jackknife, effective, np.zeros(1), np.zeros(1), np.full(1, 100.0), np.zeros(1, bool))
    assert error[0] == pytest.approx(0.005)


# --- the way over all steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.0, 0.9, -0.5])
def test_net_progress_of_all_steps_is_told_without_bias_from_an_eighth_of_them(correlation: float) -> None:
    """Updates that swing, that go on as with momentum, that are independent: |sum|^2 needs pairs at every distance."""
    rng, draw = np.random.default_rng(1), random.Random(1)
    above, below, exact = [], [], []
    tensors, size = 10, 64
    for _ in range(15):
        noise, d = rng.standard_normal((T, tensors, size)), np.zeros((T, tensors, size))
        for t in range(T):
            d[t] = correlation * d[t - 1] + noise[t] if t else noise[t]
        d += 0.2
        a = d * (rng.random(d.shape) < 0.7)
        order: StepOrder[int] = StepOrder(list(range(COHORTS)), T, draw)
        sums = DeviceSums(0, tensors, size, torch.device("cpu"))
        groups = np.zeros((GROUPS, tensors))
        for t in range(T):
            member, group = order.next()
            if member == 0:
                new, stored = (torch.tensor(x[t][None], dtype=torch.float32) for x in (d, a))
                slot = Slot(slice(0, tensors), 0, 0, group)
                ones = torch.ones(tensors, size)
                sums.add(AddedSteps(torch.zeros_like(new), new, stored[0], None, ones, None, None, [slot]))
                groups[group] += 1
        read = WindowSums.unpack(packed(sums, 1, None, None, []).numpy(), sums.layout(1))
        whole = np.array(order.group_steps, dtype=float)[:, None]
        sides = zip((read.arrived_GGn, read.meant_GGn), read.single_G2n.swapaxes(0, 1), strict=True)
        for kept, (products_GGn, single_Gn) in zip((above, below), sides, strict=True):
            kept.append(all_pairs(products_GGn, single_Gn, groups, np.repeat(whole, tensors, 1)).sum())
        exact.append(((a.sum(0) * d.sum(0)).sum(), (d.sum(0) ** 2).sum()))
    true_above, true_below = np.mean(exact, 0)
    assert np.mean(below) == pytest.approx(true_below, rel=0.1)
    assert np.mean(above) / np.mean(below) == pytest.approx(true_above / true_below, abs=0.03)


# --- turns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_steps", [8, 32, 48, 128])
@pytest.mark.parametrize("members", [1, 3, 8])
def test_everybody_is_measured_equally_often(members: int, window_steps: int) -> None:
    order: StepOrder[int] = StepOrder(list(range(members)), window_steps, random.Random(0))
    counts = Counter(order.next()[0] for _ in range(window_steps))
    assert len(counts) == members and max(counts.values()) - min(counts.values()) <= GROUPS
    assert sum(order.group_steps) == window_steps


@pytest.mark.parametrize("period", [2, 4, 8])
def test_no_step_of_a_period_is_passed_by_for_ever(period: int) -> None:
    order: StepOrder[int] = StepOrder(list(range(8)), 128, random.Random(0))
    met = set()
    for _ in range(8):
        order.open_window()
        met |= {t % period for t in range(128) if order.next()[0] == 0}
    assert met == set(range(period))


# --- weights ------------------------------------------------------------------------------------------------


def test_weights_on_the_device_are_those_of_the_positions() -> None:
    shapes = [(64, 64), (256, 32), (50_257,), (30, 512), (100,)]
    samplers = [Sampler(torch.zeros(shape), 256, 2) for shape in shapes]
    weights = PositionWeights(samplers, 987_654_321, torch.device("cpu"))
    for turn in (0, 1, 7, 8, 9, 1000, 10**6):
        found = weights.at(turn).repeat_interleave(weights.cell, 1)
        for row, sampler in zip(found, samplers, strict=True):
            p = sampler.positions
            expected = torch.ones(128)
            if p is not None:
                ways = p.multiplicities(share(987_654_321, turn))
                expected = 1 / torch.tensor([m for m in ways for _ in range(p.block)], dtype=torch.float32)
            assert torch.equal(row, expected)


def test_meta_rows_of_weights_differ() -> None:
    sampler = Sampler(torch.zeros(64, 64), 256, 2)
    found = [PositionWeights([sampler], 5, torch.device("cpu")).at(turn) for turn in range(50)]
    assert {float(x) for w in found for x in w.flatten()} > {1.0}
    assert WANT == 1
