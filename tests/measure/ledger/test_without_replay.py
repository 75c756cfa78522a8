"""What is said of tensors whose rule cannot be replayed: everything that needs no replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import update_watch as uw
from update_watch.report import Cause, Health


class Noisy(torch.optim.SGD):
    """What it draws, no replay knows."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.grad[::2].add_(torch.randn(p.grad[::2].shape) * 0.1)
        return super().step(closure)


def rms(value: Tensor) -> float:
    return float(value.double().square().mean().sqrt())


def test_what_was_applied_is_reported_though_the_rule_is_not_known() -> None:
    torch.manual_seed(0)
    weights = {
        "w": torch.nn.Parameter(torch.randn(4, 4)),
        "b": torch.nn.Parameter(torch.randn(16)),
    }
    optimizer = Noisy(weights.values(), lr=3e-3)
    reports: list[Any] = []
    with uw.watch(list(weights.items()), optimizer, window=8, budget=None, sinks=[reports.append]) as watch:
        for step in range(24):
            if step % 8 == 0:
                begin, squares = {k: p.detach().clone() for k, p in weights.items()}, dict.fromkeys(weights, 0.0)
            for p in weights.values():
                p.grad = torch.randn(p.shape) * (1 + step // 8)  # windows differ
                p.grad[1::2] = 0
            before = {k: p.detach().clone() for k, p in weights.items()}
            optimizer.step()
            for k, p in weights.items():
                squares[k] += rms(p.detach().double() - before[k].double()) ** 2 / 8
        watch.flush()
    for tensor in reports[2].tensors:
        k, p = tensor.name, weights[tensor.name].detach()
        assert (tensor.health, tensor.cause) == (Health.unknown, Cause.not_replayable)
        assert tensor.efficiency is None and tensor.update_ratio is None
        assert tensor.applied_ratio == pytest.approx(squares[k] ** 0.5 / rms(begin[k]), rel=1e-4)
        assert tensor.moved == pytest.approx(rms(p.double() - begin[k].double()) / rms(begin[k]), rel=1e-4)
        assert tensor.unmoved_fraction == pytest.approx(float((p == begin[k]).double().mean()), abs=1e-6)
        assert tensor.applied_ratio > 0 and tensor.unmoved_fraction == 0.5


class HoldsMasters(torch.optim.SGD):
    """Steps FP32 weights in its state, and writes them to the model after every so many steps."""

    every = 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state.update(master=p.detach().float().clone(), steps=0)
            state["master"].add_(p.grad.float(), alpha=-group["lr"])
            state["steps"] += 1
            if state["steps"] % self.every == 0:
                p.copy_(state["master"])


@pytest.mark.parametrize("every", [1, 10**9])
def test_masters_in_the_state_that_are_never_copied_back_are_said(every: int) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(16, 16).to(torch.bfloat16))
    optimizer = HoldsMasters([weight], lr=1e-3)
    optimizer.every = every
    with uw.watch([("w", weight)], optimizer, window=32) as watch:
        for _ in range(96):
            weight.grad = torch.randn(16, 16).add(0.5).to(torch.bfloat16)
            optimizer.step()
        report = watch.flush()
    assert report is not None
    (tensor,) = report.tensors
    expected = (Health.healthy, None) if every == 1 else (Health.stalled, Cause.not_copied_back)
    assert (tensor.health, tensor.cause) == expected
