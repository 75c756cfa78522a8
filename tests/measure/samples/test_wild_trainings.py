"""Trainings whose steps differ wildly, half of whose tensors are looked at in two of eight steps, against all elements of all steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import update_watch as uw
from tests.measure.samples.sgd_training import SgdTraining
from update_watch.measure.device.gradient_pace import GradientPace
from update_watch.measure.device.panels import Plan
from update_watch.measure.sums.step_sizes import Sizes, aligned
from update_watch.measure.sums.steps import Told

WINDOW = 128
Sized = Callable[[int], float]  # of a step


class Trained:
    """Some windows of 40 tensors under plain SGD: what was said of the last one, what is true of it, rows read per step."""

    def __init__(
        self, size: Sized, rate: Sized = lambda step: 1.0, window: int = WINDOW, windows: int = 2, seed: int = 0
    ) -> None:
        training, found = SgdTraining(0.5, seed), list[uw.Report]()
        group = training.optimizer.param_groups[0]
        settings: dict[str, Any] = {"window": window, "budget": None, "seed": seed, "sinks": [found.append]}
        with uw.watch(training.named, training.optimizer, **settings) as watch:
            for step in range(window * windows):
                if step % window == 0:
                    training.sums.zero_()
                    watch._judge.wait()
                group["lr"] = rate(step)
                training.step(size(step))
            watch.flush()
        self.said = found[-1].tensors
        dot, want, before = training.sums
        self.efficiency, self.ratio = dot / want, (want / before).sqrt()

    def off(self, kind: str, true: Tensor) -> Tensor:
        """[40]"""
        return torch.tensor([getattr(tensor, kind) for tensor in self.said], dtype=torch.float64) - true


@pytest.mark.parametrize("seed", range(3))
def test_a_step_at_a_learning_rate_of_0_is_no_large_one(seed: int) -> None:
    """Of a rate that is not read, 1 is taken; 0 beside 1e-3 was so too, and a step that nobody saw the largest of all."""
    trained = Trained(lambda step: 1e3, lambda step: 0.0 if step % 8 == 5 else 1e-3, seed=seed)
    off, ratio_off = trained.off("efficiency", trained.efficiency), trained.off("update_ratio", trained.ratio)
    assert abs(float(off.mean())) < 0.03 and float(off.abs().max()) < 0.1
    assert float((ratio_off / trained.ratio).abs().max()) < 0.3


def test_a_rate_that_cannot_be_read_is_the_one_before() -> None:
    plan = object.__new__(Plan)
    plan._optimizer, plan._squared_rate = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.5), 1.0
    seen = []
    for rate in (0.5, "x", float("nan"), 0.0, 0.25):
        plan._optimizer.param_groups[0]["lr"] = rate
        seen.append(plan._rate_now())
    assert seen == [0.25, 0.25, 0.25, 0.0, 0.0625]


@pytest.mark.parametrize("seed", range(3))
def test_halves_that_met_two_levels_unequally_are_told_one(seed: int) -> None:
    """100 times the gradients from a little behind the middle of a window on: of one half most looks are before it."""
    trained = Trained(lambda step: 1.0 if step < WINDOW + 72 else 100.0, seed=seed)
    assert float((trained.off("update_ratio", trained.ratio) / trained.ratio).abs().max()) < 0.3
    assert all(tensor.health is uw.Health.healthy for tensor in trained.said)


def test_sizes_are_compared_in_common_steps_or_in_neighbouring_ones() -> None:
    """Two cohorts, by what was usual in most of their own looks: 1 for the first, 1e4 for the second."""

    def sizes(*values: float) -> Sizes:
        return Sizes(np.array(values), np.ones(len(values)), np.array([3.0]))

    def told(has_asked: bool) -> list[Told]:
        return [Told(np.ones(4), np.ones(4), np.ones(4), has_asked)] * 2

    asked = aligned([sizes(1, 1, 1e4, 1e4), sizes(1e-4, 1, 1, 1)], told(True))
    assert asked[0].size_P.tolist() == [1, 1, 1e4, 1e4] and asked[1].size_P == pytest.approx([1, 1e4, 1e4, 1e4])
    assert asked[1].usual_n == pytest.approx([3e-4])
    apart = aligned([sizes(1, 1, 1, 1e4), sizes(1e-4, 1e-4, 1, 1)], told(False))
    assert apart[1].size_P == pytest.approx([1, 1, 1e4, 1e4])
    noise = aligned([sizes(1, 1, 1, 1), sizes(0.4, 0.5, 30, 0.6)], told(False))
    assert noise[1].size_P.tolist() == [0.4, 0.5, 30, 0.6]


@pytest.mark.parametrize("seed", range(3))
def test_what_alternates_is_asked_for_seldom_and_told_right(seed: int, rows_read: list[int]) -> None:
    """4 times as large in odd steps, some of which were asked for: the even ones beside a look at another odd one are small."""
    trained = Trained(lambda step: 4.0 if step % 2 else 1.0, windows=3, seed=seed)
    assert sum(rows_read) / (3 * WINDOW) < 1.6 * 40 / 5
    off, ratio_off = trained.off("efficiency", trained.efficiency), trained.off("update_ratio", trained.ratio)
    assert float(off.abs().mean()) < 0.06
    assert float((ratio_off / trained.ratio).abs().max()) < 0.35


@pytest.mark.parametrize(("window", "is_asked"), [(4, False), (19, False), (20, True)])
def test_in_short_windows_a_fifth_is_looked_at_in_every_step(
    window: int, is_asked: bool, rows_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, of = list[int](), GradientPace.of
    monkeypatch.setattr(GradientPace, "of", lambda *args: made.append(1) or of(*args))
    Trained(lambda step: 1.0, window=window, windows=2)
    assert bool(made) == is_asked and set(rows_read) == ({20} if is_asked else {8})
    assert is_asked or len(rows_read) == 2 * window
