"""Weights that are put back where somebody wants them: at 0, within bounds, on a grid. The first time may be a jump."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import update_watch as uw
from tests.support.watch_nets import Net, backward, batches
from update_watch.report import Cause, Health, Report, TensorReport

WINDOW = 16


def adamw(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)


def run(
    between: Callable[[Any], Any], model: Net | None = None, rule: Callable[[Any], Optimizer] = adamw, every: int = 1
) -> list[Report]:
    """The reports of a training with something that is done to the model after every step, or after every so many."""
    reports: list[Report] = []
    model = model or Net()
    optimizer = rule(model.parameters())
    with uw.watch(model, optimizer, window=WINDOW, sinks=[reports.append]):
        for t, x in enumerate(batches(max(4 * WINDOW, 3 * every)), 1):
            model.zero_grad()
            backward(model, x)
            optimizer.step()
            if t % every == 0:
                with torch.no_grad():
                    between(model)
    return reports


def named(report: Report, name: str) -> TensorReport:
    return next(t for t in report.tensors if t.name == name)


def test_a_tensor_that_is_held_at_0_is_told_as_such_without_an_alarm() -> None:
    model = Net()
    nn.init.zeros_(model.leave.weight)
    reports = run(lambda model: model.leave.weight.zero_(), model=model)
    for report in reports[1:]:
        t = named(report, "leave.weight")
        assert (t.health, t.cause) == (Health.frozen, Cause.overwritten)
        assert "held at 0" in t.advice
    assert not [alert for report in reports for alert in report.alerts]


def test_a_tensor_that_is_held_at_anything_else_is_overwritten() -> None:
    model = Net()
    nn.init.constant_(model.leave.weight, 0.5)
    t = named(run(lambda model: model.leave.weight.fill_(0.5), model=model)[-1], "leave.weight")
    assert (t.health, t.cause) == (Health.stalled, Cause.overwritten)


@pytest.mark.parametrize("rule", [adamw, lambda params: torch.optim.SGD(params, lr=1e-3)], ids=["adamw", "sgd"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_tensor_that_presses_against_one_bound_everywhere_is_no_accusation(
    every: int, rule: Callable[[Any], Optimizer]
) -> None:
    reports = run(lambda model: [p.clamp_(max=-0.2) for p in model.parameters()], rule=rule, every=every)
    found = [t for report in reports for t in report.tensors]
    assert not [t for t in found if t.cause is Cause.overwritten and t.health is not Health.unknown]
    # a copy of it that is loaded again and again looks the same
    assert "in one direction, as a bound does" in named(reports[-1], "leave.weight").advice


def test_a_matrix_of_few_weights_beside_pruned_ones_trains() -> None:
    rng = torch.Generator().manual_seed(1)
    mask = (torch.rand(Net().enter.weight.shape, generator=rng) < 0.02).float()
    model = Net()
    with torch.no_grad():
        model.enter.weight.mul_(mask)
    reports = run(lambda model: model.enter.weight.mul_(mask), model=model)
    assert {named(report, "enter.weight").health for report in reports[1:]} == {Health.healthy}
    assert "held at 0" in named(reports[-1], "enter.weight").advice
    assert not [alert for report in reports for alert in report.alerts]


@pytest.mark.parametrize("rule", [adamw, lambda params: torch.optim.RMSprop(params, lr=5e-4)], ids=["adamw", "rmsprop"])
def test_weights_that_begin_far_outside_of_the_bounds_they_are_clipped_to_are_not_overwritten(
    rule: Callable[[Any], Optimizer],
) -> None:
    reports = run(lambda model: [p.clamp_(-0.01, 0.01) for p in model.parameters()], rule=rule)
    assert not [t.name for report in reports for t in report.tensors if t.cause is Cause.overwritten]
    assert not [alert for report in reports for alert in report.alerts]


@pytest.mark.parametrize("maximize", [False, True])
def test_what_a_grid_takes_is_seen_behind_the_jump_onto_it(maximize: bool) -> None:
    def put(model: nn.Module) -> None:
        for p in model.parameters():
            p.copy_(p.to(torch.float8_e4m3fn))

    report = run(put, rule=lambda params: torch.optim.SGD(params, lr=1e-6, maximize=maximize))[2]
    assert {t.name: t.cause for t in report.tensors} == {t.name: Cause.overwritten for t in report.tensors}


def test_rows_of_one_element_that_are_normalised_are_no_accusation() -> None:
    model = Net()
    model.gate = nn.Parameter(torch.randn(64, 1, generator=torch.Generator().manual_seed(0)))
    model.norm.register_forward_hook(lambda module, given, out: out * (1 + model.gate[:, 0]))
    for report in run(lambda model: model.gate.div_(model.gate.norm(dim=1, keepdim=True)), model=model)[1:]:
        t = named(report, "gate")
        assert (t.health, t.cause) == (Health.unknown, Cause.overwritten)
        assert "rows of one element" in t.advice


def test_a_tensor_that_is_pressed_against_two_bounds_with_all_of_its_elements_is_no_all_clear() -> None:
    def push(model: nn.Module) -> None:
        for p in model.parameters():
            p.clamp_(-1e-3, 1e-3)
            p.grad = None

    class Pushes(torch.optim.SGD):
        """Away from 0, each time."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                p.grad.copy_(-p.sign())
            return super().step(closure)

    for report in run(push, rule=lambda params: Pushes(params, lr=1e-4))[1:]:
        t = named(report, "leave.weight")
        assert t.health is Health.unknown, t


# --- after every so many steps ---------------------------------------------------------------------


def masks(model: nn.Module, kept: float) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [(torch.rand(p.shape, generator=rng) < kept).float() for p in model.parameters()]


def prune(kept: float) -> tuple[Net, Callable[[Any], Any]]:
    """A net of few weights, and what holds all others at 0."""
    model = Net()
    of_all = masks(model, kept)

    def between(model: nn.Module) -> None:
        for p, mask in zip(model.parameters(), of_all, strict=True):
            p.mul_(mask)

    with torch.no_grad():
        between(model)
    return model, between


@pytest.mark.parametrize("every", [2, 5, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kept", [0.5, 0.1, pytest.param(0.02, marks=pytest.mark.slow)])
def test_weights_that_are_pruned_again_after_some_steps_are_not_overwritten(kept: float, every: int) -> None:
    model, between = prune(kept)
    reports = run(between, model, every=every)
    for report in reports:
        for t in report.tensors:
            assert t.health not in (Health.stalled, Health.stalling), (report.step, t)
            assert t.cause is None or "set to exactly 0 again" in t.advice
    assert not [alert for report in reports for alert in report.alerts]


@pytest.mark.parametrize("every", [2, 5, pytest.param(50, marks=pytest.mark.slow)])
def test_weights_that_are_clipped_after_some_steps_are_not_overwritten(every: int) -> None:
    for bound in (0.005, 0.03):
        for rule in (adamw, lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9)):
            reports = run(
                lambda model, c=bound: [p.clamp_(-c, c) for p in model.parameters() if p is not model.norm.weight],
                rule=rule,
                every=every,
            )
            assert not [
                (t.name, t.advice) for report in reports for t in report.tensors if t.cause is Cause.overwritten
            ]


def test_a_tensor_of_which_all_is_set_to_0_after_some_steps_is_no_all_clear() -> None:
    reports = run(lambda model: model.leave.weight.zero_(), every=4)
    for report in reports[1:]:
        t = named(report, "leave.weight")
        assert (t.health, t.cause) == (Health.unknown, Cause.overwritten)
        assert "set to exactly 0 again" in t.advice
    assert not [alert for report in reports for alert in report.alerts]


@pytest.mark.parametrize("every", [1, 3])
def test_pruned_weights_that_are_loaded_again_and_again_are_overwritten(every: int) -> None:
    model, _ = prune(0.5)
    first = copy.deepcopy(list(model.parameters()))

    def load(model: nn.Module) -> None:
        for p, old in zip(model.parameters(), first, strict=True):
            p.copy_(old)

    report = run(load, model, every=every)[-1]
    assert {t.name: t.cause for t in report.tensors} == {t.name: Cause.overwritten for t in report.tensors}
