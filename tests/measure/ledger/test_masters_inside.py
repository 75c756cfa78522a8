"""FP32 weights in an optimizer's state: seen in the ledger as other masters are, also where they are written to between steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import update_watch as uw
from tests.support.watch_nets import Net, backward, batches
from update_watch.report import Cause, Health, Report

BF16 = torch.bfloat16


class HoldsMasters(torch.optim.Optimizer):
    """Steps of one size on FP32 weights in its state, written to the model after every so many; `is_new`: by tensors made anew."""

    def __init__(self, params: Any, lr: float, every: int = 1, is_new: bool = False) -> None:
        super().__init__(params, {"lr": lr})
        self.every, self.is_new = every, is_new

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(steps=0, master=p.detach().float().clone(), momentum=torch.zeros_like(p).float())
                state["steps"] += 1
                update = state["momentum"].mul_(0.9).add_(p.grad.float()).sign() * group["lr"]
                state["master"] = state["master"] - update if self.is_new else state["master"].sub_(update)
                if state["steps"] % self.every == 0:
                    p.copy_(state["master"])


def run(is_robbed: bool = False, steps: int = 160, **options: Any) -> Report:
    model = Net(BF16)
    optimizer = HoldsMasters(model.parameters(), **options)
    with uw.watch(model, optimizer, window=32) as watch:
        for x in batches(steps, BF16):
            model.zero_grad()
            backward(model, x)
            optimizer.step()
            for p in model.parameters() if is_robbed else ():
                optimizer.state[p]["master"].copy_(p.detach())
        report = watch.flush()
    assert report is not None
    return report


@pytest.mark.parametrize("lr", [1e-6, 1e-5])
def test_masters_that_are_taken_from_the_weights_again_after_each_step_hold_nothing(lr: float) -> None:
    report = run(is_robbed=True, lr=lr)
    norm = next(t for t in report.tensors if t.name == "norm.weight")
    assert (norm.health, norm.cause) == (Health.stalled, Cause.overwritten)
    assert {t.cause for t in report.tensors} <= {None, Cause.overwritten}


@pytest.mark.parametrize("options", [{"every": 1}, {"every": 50}, {"is_new": True}], ids=str)
def test_masters_that_are_left_alone_are_healthy(options: dict[str, Any]) -> None:
    report = run(lr=1e-4, **options)
    assert {(t.health, t.cause) for t in report.tensors} == {(Health.healthy, None)}


def test_what_is_left_of_steps_that_come_every_fourth_time_is_all_of_them() -> None:
    report = run(lr=1e-3, every=4)
    assert all(t.net_efficiency == pytest.approx(1, abs=0.25) for t in report.tensors)


@pytest.mark.parametrize("lr", [1e-5, pytest.param(1e-4, marks=pytest.mark.slow), 1e-3])
@pytest.mark.parametrize("every", [2, pytest.param(4, marks=pytest.mark.slow), 8])
def test_masters_that_are_written_after_some_steps_take_what_all_elements_in_fp64_take(lr: float, every: int) -> None:
    model = Net(BF16)
    optimizer = HoldsMasters(model.parameters(), lr=lr, every=every)
    dots = {name: torch.zeros(2, dtype=torch.float64) for name, _ in model.named_parameters()}
    with uw.watch(model, optimizer, window=32, budget=None) as watch:
        for x in batches(32, BF16):
            model.zero_grad()
            backward(model, x)
            before = {name: p.detach().double() for name, p in model.named_parameters()}
            before |= {
                name: optimizer.state[p]["master"].double()
                for name, p in model.named_parameters()
                if optimizer.state[p]
            }
            optimizer.step()
            for name, p in model.named_parameters():
                state = optimizer.state[p]
                intended = -lr * state["momentum"].double().sign()
                applied = state["master"].double() - before[name]
                dots[name] += torch.stack([(applied * intended).sum(), intended.square().sum()])
        report = watch.flush()
    assert report is not None
    for t in report.tensors:
        applied, wanted = dots[t.name].tolist()
        assert t.efficiency == pytest.approx(applied / wanted, abs=0.005), t.name
        assert t.net_efficiency == pytest.approx(1, abs=0.05), t.name
        assert t.health is Health.healthy


def test_a_few_small_weights_that_travel_do_not_excuse_masters_taken_from_rounded_weights() -> None:
    """What rounding lets go gets far, as weights do that are normalised; those beside it are lost."""
    model = Net(BF16)
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-4)
    with uw.watch(model, window=32) as watch:
        for x in batches(160, BF16):
            model.zero_grad()
            backward(model, x)
            for p, master in zip(model.parameters(), masters, strict=True):
                master.grad = p.grad.float() if p.grad is not None else None
            optimizer.step()
            with torch.no_grad():
                for p, master in zip(model.parameters(), masters, strict=True):
                    p.copy_(master)
                    master.copy_(p)
        report = watch.flush()
    assert report is not None
    lost = [t for t in report.tensors if t.net_efficiency is not None and t.net_efficiency < 0.15]
    assert len(lost) >= 2
    assert {t.cause for t in lost} == {Cause.overwritten}
    assert {t.health for t in lost} <= {Health.stalled, Health.stalling}
