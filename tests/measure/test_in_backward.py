"""One optimizer per parameter, stepped in hooks of the backward pass: hundreds of optimizers, one logical step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import update_watch as uw
from bench.shared.exact_rules import adamw

BLOCKS = 24  # 48 parameters, and as many optimizers


class Training:
    """Each parameter's optimizer steps as soon as its gradient is there."""

    def __init__(self, make: Callable[[list[Tensor]], Any] | None = None) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(*[m for _ in range(BLOCKS) for m in (nn.Linear(24, 24), nn.Tanh())]).bfloat16()
        create = make or (lambda params: torch.optim.AdamW(params, lr=2e-3))
        self.optimizers = {p: create([p]) for p in self.net.parameters()}
        self.before_step: Callable[[Tensor], None] = lambda p: None
        self.after_step: Callable[[Tensor], None] = lambda p: None
        for p in self.net.parameters():
            p.register_post_accumulate_grad_hook(self._step)

    def _step(self, p: Tensor) -> None:
        self.before_step(p)
        self.optimizers[p].step()
        self.after_step(p)
        self.optimizers[p].zero_grad()

    def run(self, steps: int) -> None:
        rng = torch.Generator().manual_seed(1)
        for _ in range(steps):
            x = torch.randn(8, 24, generator=rng).bfloat16()
            (self.net(x) - x).float().pow(2).mean().backward()

    def watch(self, **options: Any) -> Any:
        return uw.watch(self.net, list(self.optimizers.values()), **options)


@pytest.mark.parametrize("window", [1, 6])
@pytest.mark.slow
def test_a_window_counts_backward_passes_not_optimizers(window: int) -> None:
    training, reports = Training(), []
    with training.watch(window=window, sinks=[reports.append]) as watch:
        training.run(12)
        watch.flush()
    assert [(r.step, r.window) for r in reports] == [(i, window) for i in range(window, 13, window)]
    assert {len(r.tensors) for r in reports} == {2 * BLOCKS}


@pytest.mark.slow
def test_lost_updates_are_those_of_all_elements_though_optimizers_take_turns() -> None:
    training = Training()
    names = {id(p): name for name, p in training.net.named_parameters()}
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in names.values()}
    held: dict[int, tuple[Tensor, Tensor]] = {}

    def before(p: Tensor) -> None:
        optimizer, w = training.optimizers[p], p.detach().double()
        assert p.grad is not None
        held[id(p)] = w, adamw(w, p.grad.double(), optimizer.state[p], optimizer.param_groups[0])

    def after(p: Tensor) -> None:
        w, d = held[id(p)]
        a = p.detach().double() - w
        lost = (d != 0) & (a == 0)
        sums[names[id(p)]] += torch.stack([(a * d).sum(), (d * d).sum(), (d != 0).sum(), lost.sum()])

    training.run(8)
    training.before_step, training.after_step = before, after
    with training.watch(window=72) as watch:
        training.run(72)
        report = watch.flush()
    # a turn comes every sixth step: what differs between steps adds to what differs between elements
    errors, lost_errors = [], []
    for t in report.tensors:
        dot, want, wanted, lost = sums[t.name].tolist()
        assert t.efficiency == pytest.approx(dot / want, abs=0.1), t.name
        assert t.efficiency_error is not None and abs(t.efficiency - dot / want) < 3 * t.efficiency_error, t.name
        errors.append(abs(t.efficiency - dot / want))
        lost_errors.append(abs(t.lost_fraction - lost / wanted))
    assert sum(errors) / len(errors) < 0.02
    assert sum(lost_errors) / len(lost_errors) < 0.05  # in these first steps twice as many are lost at the end


@pytest.mark.slow
def test_most_optimizers_rest_in_a_step_and_alike_ones_share_a_trial() -> None:
    training = Training()
    started = time.perf_counter()
    watch = training.watch(window=48)
    attached = time.perf_counter() - started
    measured = []
    for watched in watch._model.watched.values():
        for cohort in watched.cohorts:
            add = cohort.before
            cohort.before = lambda *given, add=add: (measured.append(1), add(*given))[1]
    training.run(48)
    assert sum(watched.is_shadowed for watched in watch._model.watched.values()) == 4
    watch.close()
    assert len(measured) == 48 / 6 * 2 * BLOCKS  # 48 tensors, 8 of them in a step
    assert len([key for key in watch._model.found if key[0] == "rule"]) == 2  # matrices and vectors
    assert attached < 5


def test_optimizers_that_differ_do_not_share_a_trial() -> None:
    rates = iter(range(1, 100))
    training = Training(lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=next(rates) % 2))
    watch = training.watch()
    assert len([key for key in watch._model.found if key[0] == "rule"]) == 2  # decay 1: matrices, decay 0: vectors
    training.run(3)
    watch.close()
