"""Where most steps look at nobody: which they are, what is told of them, and that a step unlike the others is never one."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import update_watch as uw
from tests.measure.samples.sgd_training import SgdTraining
from update_watch.measure.cohort import Cohort
from update_watch.measure.device import turns
from update_watch.measure.device.gradient_pace import GradientPace
from update_watch.measure.device.panels import Plan
from update_watch.measure.step_order import Roster
from update_watch.measure.sums.layout import COUNT
from update_watch.measure.sums.missed_steps import missed_steps
from update_watch.measure.sums.step_sizes import sizes_of, unseen
from update_watch.measure.sums.steps import Looks, Steps, Told
from update_watch.measure.window_evidence import CohortWindow


def params(dtype: torch.dtype, count: int = 12, shape: tuple[int, ...] = (50, 64)) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape).to(dtype)) for _ in range(count)]


def test_each_comes_once_in_a_cycle() -> None:
    roster: Roster[str] = Roster([("a",), ("b",)], 128, random.Random(0), cycle=8)
    order = [roster.next(1)[0] for _ in range(128)]
    assert [order.count(who) for who in (("a",), ("b",), ())] == [16, 16, 96]
    # of each group of neighbours, and never in the same places
    assert [[order[k : k + 32].count((who,)) for k in range(0, 128, 32)] for who in "ab"] == [[4] * 4] * 2
    assert len({i % 8 for i, who in enumerate(order) if who}) > 4


@pytest.mark.parametrize("count", [33, 68, 300])
def test_halves_are_fair_parts(count: int) -> None:
    """Of each shape, and of each place in blocks of some tensors: weight and bias in turns, the matrices of a block."""
    for period in (2, 3, 4, 6, 9):
        rows: list[Any] = [
            SimpleNamespace(param=torch.empty(1 + i % period // 2), place=i % period, i=i) for i in range(count)
        ]
        halves = turns.shared_out(rows, 2)
        assert sorted(row.i for half in halves for row in half) == list(range(count))
        assert all([row.i for row in half] == sorted(row.i for row in half) for half in halves)
        for place in range(period):
            own = [sum(row.place == place for row in half) for half in halves]
            assert abs(own[0] - own[1]) <= 3 * sum(own) ** 0.5, (period, place, own)
        for shape in range(1, 1 + period // 2):
            own = [sum(len(row.param) == shape for row in half) for half in halves]
            assert abs(own[0] - own[1]) <= 1, (period, shape, own)


def measured(parts: int, has_asked: bool = False) -> Steps:
    """At a learning rate of 1."""
    ones = np.ones((parts, 1))
    of_row = ones[0], np.ones(1, bool)
    return Steps(ones, ones, ones, of_row[0], np.ones(parts), of_row[1], of_row[1], of_row[0], has_asked)


def test_steps_between_two_looks_are_between_them() -> None:
    plan, rates = object.__new__(Plan), iter([1.0, 4.0, 9.0, 16.0])
    first, second = (object.__new__(Cohort) for _ in "ab")
    first.looks_told, second.looks_told = Looks(), Looks()
    plan._last, plan._between = None, [next(rates)]
    first.looks_told.add()
    plan._tell(first)  # what was before the first look is like it
    plan._between = [next(rates), next(rates)]
    second.looks_told.add()
    plan._tell(second)
    plan._between = [next(rates)]
    plan._tell(None)  # the window is closed: what comes after the last look is like it
    told = first.looks_told.told(1, 1, measured(1))
    assert told.held_P == pytest.approx([1 + 2 / 3 + 1 / 3]) and list(told.alone_P) == [1]
    assert told.growth_P * told.held_P == pytest.approx([1 + 2 / 3 * 4 + 1 / 3 * 9])
    other = second.looks_told.told(1, 1, measured(2, has_asked=True))
    assert other.held_P == pytest.approx([1 / 3 + 2 / 3 + 1, 0]) and other.has_asked
    assert other.growth_P * other.held_P == pytest.approx([1 / 3 * 4 + 2 / 3 * 9 + 16, 0])


def test_a_step_that_was_asked_for_or_wanted_nothing_tells_of_no_other() -> None:
    """Those before and after it lie between the looks around it, as if it were not there."""
    first, second = (object.__new__(Cohort) for _ in "ab")
    for cohort in (first, second):
        cohort.looks_told = Looks()
    rate = iter([1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    turn = iter([(first,), (), (), (second,), (second,), (), (second,)])
    asked = iter([False, False, False, True, False, False, False])
    plan = object.__new__(Plan)
    plan.cohorts, plan._last, plan._between = [first, second], None, []
    plan._rate_now = lambda: next(rate)  # type: ignore[method-assign]
    plan._pace = SimpleNamespace(is_unlike=lambda: next(asked))  # type: ignore[assignment]
    plan.roster = SimpleNamespace(next=lambda *given: (next(turn), 0))  # type: ignore[assignment]
    looks = [plan.next(1, False)[::2] for _ in range(7)]
    assert looks == [
        *[((first,), False), ((), False), ((), False), ([first, second], True)],
        *[((second,), False), ((), False), ((second,), False)],
    ]
    told = [cohort.looks_told.told(count, 1, measured(count)) for cohort, count in ((first, 1), (second, 2))]
    assert [one.held_P.tolist() for one in told] == [pytest.approx([1.5]), pytest.approx([0, 1.5])]


def test_steps_that_were_asked_for_count_once() -> None:
    """A sum of 2 in each of 128 steps but three, of which 60 each: 4 steps were drawn, and those three looked at."""
    parts_Pn, sums_PFn = (
        np.array([[2.0], [2.0], [3.0]]),
        np.array([4.0, 4.0, 180.0])[:, None, None] * np.ones((3, 12, 1)),
    )
    zero, none = np.zeros(1), np.zeros(1, bool)
    steps = Steps(parts_Pn, np.ones((4, 1)), np.full((4, 1), 32.0), zero, np.ones(3), none, ~none, zero, has_asked=True)
    fair = steps.fairly(sums_PFn).sum(0) / 4
    assert fair[0] == pytest.approx((125 * 2 + 180) / 125)
    assert steps.sampled_Pn.tolist() == [[2], [2], [0]] and steps.measured_n == 7
    kept = steps.of([0])
    assert kept.has_asked and Steps.side_by_side([kept, kept]).has_asked


def told(alone: list[float], held: list[float], has_asked: bool = False) -> Told:
    return Told(np.array(alone), np.array(held), np.ones(len(alone)), has_asked)


def test_steps_beside_looks_have_the_mean_of_looks_that_differ_by_noise() -> None:
    """Of 32 steps 4 each are looked at of two tensors. Of a look ten times the others' energy those beside it are like it."""
    ones = np.ones((4, 1))
    every = [told([1] * 4, [3] * 4)] * 2
    first, _ = unseen([ones, ones], [ones, ones], 32, [sizes_of(ones, ones)] * 2, every)
    assert first.usual_n == pytest.approx(28 / 32) and first.unlooked_n == pytest.approx(24 / 32)
    noisy = np.array([[0.5], [1.5], [0.5], [1.5]])
    mixed, _ = unseen([noisy] * 2, [ones] * 2, 32, [sizes_of(noisy, ones)] * 2, [told([1] * 4, [6, 0, 6, 0])] * 2)
    assert mixed.usual_n == pytest.approx(28 / 32)
    far = np.array([[1.0], [10.0], [1.0], [1.0]])
    large, _ = unseen([far] * 2, [ones] * 2, 32, [sizes_of(far, ones)] * 2, every)
    assert large.usual_n == pytest.approx((13 + 2 * 3 * 13) / (2 * 13 + 2 * 3 * 13))


@pytest.mark.parametrize("size", [1.5, 30.0])
def test_a_step_that_was_asked_for_stands_for_no_other(size: float) -> None:
    energy, counts = np.array([[1.0], [1.0], [1.0], [8 * size]]), np.array([[1.0], [1.0], [1.0], [8.0]])
    known, every = [sizes_of(energy, counts)] * 2, [told([1, 1, 1, 0], [7, 7, 4, 0], has_asked=True)] * 2
    for missed in missed_steps(known, [np.ones(4)] * 2, 50, every):
        assert missed is not None
        assert missed.steps_P[-1] == pytest.approx(1) and missed.energy_P[-1] == pytest.approx(1)
        assert missed.steps_P[:3].sum() == pytest.approx(50 - 8) and missed.energy_P[:3] == pytest.approx(42 / 3)


class Training(SgdTraining):
    """Whose loss is 30 times as large in some steps."""

    def __init__(self, spikes: set[int]) -> None:
        super().__init__()
        self._spikes, self._steps = spikes, 0

    def next_step(self) -> None:
        self.step(30.0 if self._steps in self._spikes else 1.0)
        self._steps += 1

    def true(self) -> Tensor:
        found = self.sums[0] / self.sums[1]
        self.sums.zero_()
        return found


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("window", [64, 256])
def test_a_loss_spike_is_seen_of_all_tensors(
    window: int, asks: bool, rows_read: list[int], last_closed: list[CohortWindow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in windows of more looks than parts. Twin: where nobody asks, half of the tensors or more are told wrong."""
    if not asks:
        monkeypatch.setattr(GradientPace, "is_unlike", lambda pace: False)
    training, found = Training({window + 21, window + 22, window + 50}), []
    with uw.watch(training.named, training.optimizer, window=window, budget=None, sinks=[found.append]) as watch:
        for _ in range(window):
            training.next_step()
        training.true()
        watch._judge.wait()
        for t in range(window):
            rows_read.clear()
            training.next_step()
            assert not asks or sum(rows_read) == 40 or t not in (21, 22, 50)
        true = training.true()
        watch.flush()
    off = [
        abs(float(t.efficiency) - float(true[i])) for i, t in enumerate(found[1].tensors) if t.efficiency is not None
    ]
    sure = [
        abs(float(t.efficiency) - float(true[i])) < 2 * t.efficiency_error + 0.01
        for i, t in enumerate(found[1].tensors)
    ]
    assert len(off) == 40 and float(true.min()) > 0.5
    if not asks:
        assert sum(one > 0.1 for one in off) >= 20
        return
    assert max(off) < 0.06 and sum(off) / 40 < 0.02 and sum(sure) >= 38
    # every step is one that a cohort was measured in, or that others tell it of
    cohorts = [(one.steps, one.told(one.steps)) for one in last_closed if one.told is not None]
    held = sum(one.held_P.sum() for _, one in cohorts)
    for k, (steps, _) in enumerate(cohorts):
        alone = sum(one.alone_P.sum() for j, (_, one) in enumerate(cohorts) if j != k)
        assert steps.measured_n == pytest.approx(window - held - alone)


def test_what_was_asked_for_is_in_a_part_of_its_own(last_closed: list[CohortWindow]) -> None:
    """In a window of more looks than parts, where two become one while such a step waits beside the others."""
    training = Training(set(range(10, 256, 3)))
    with uw.watch(training.named, training.optimizer, window=256, budget=None) as watch:
        for _ in range(256):
            training.next_step()
        watch.flush()
    assert len(last_closed) == 2
    for cohort in last_closed:
        steps = cohort.steps
        samples_Pn = cohort.of_all.sums.parts_PFn[: len(steps.parts_Pn), COUNT, cohort.place]
        assert steps.has_asked and steps.parts_Pn[0].min() > 1  # two have become one
        assert steps.parts_Pn[-1].min() >= 20 and samples_Pn == pytest.approx(256 * steps.parts_Pn)


def test_gradients_and_update_ratio_are_means_over_all_steps() -> None:
    """Twin: as the looks have them, of which a quarter are spikes, the gradient would be 15 times as large."""
    training, found = Training({128 + 40}), []
    with uw.watch(training.named, training.optimizer, window=128, budget=None, sinks=[found.append]) as watch:
        for _ in range(256):
            training.next_step()
        watch.flush()
    true = 2e-4 * ((127 + 900) / 128) ** 0.5
    for kind in ("gradient_rms", "update_ratio"):
        said = [getattr(tensor, kind) / true for tensor in found[1].tensors]
        assert sum(said) / 40 == pytest.approx(1, abs=0.03), kind
        assert 0.8 < min(said) and max(said) < 1.2  # 256 elements of the spike's gradient


def test_a_rule_that_cannot_wait_is_replayed_of_each_half_by_itself() -> None:
    """All tensors are measured in one step, half of them after the other; Adafactor's rule needs all of a tensor."""
    torch.manual_seed(0)
    members = params(torch.bfloat16, 40, (24, 32))
    optimizer, found = torch.optim.Adafactor(members, lr=1e-2), []
    with uw.watch(
        [(f"w{i}", p) for i, p in enumerate(members)], optimizer, window=32, budget=None, sinks=[found.append]
    ) as watch:
        for _ in range(32):
            for p in members:
                p.grad = torch.randn_like(p) * 1e-3
            optimizer.step()
        watch.flush()
    efficiencies = [t.efficiency for t in found[0].tensors]
    assert all(e is not None and 0.4 < e < 1.1 for e in efficiencies), efficiencies
