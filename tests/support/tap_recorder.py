"""A tap that keeps what it saw of SGD, where `after == before - LR * grad` holds bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.measure.hooks.tap import StepTap

LR = 0.125


class Recorder:
    """A tap that keeps (weight before, gradient, weight after) of every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self.errors: list[Exception] = []
        self.tap = StepTap(self.before, self.after, self.errors.append)

    def before(self, opt: Optimizer) -> tuple[Tensor, Tensor | None]:
        param = opt.param_groups[0]["params"][0]
        return param.clone(), None if param.grad is None else param.grad.clone()

    def after(self, opt: Optimizer, snapshot: tuple[Tensor, Tensor | None]) -> None:
        self.steps.append((*snapshot, opt.param_groups[0]["params"][0].clone()))

    def assert_sgd(self, count: int) -> None:
        assert not self.errors
        assert len(self.steps) == count
        for before, grad, after in self.steps:
            assert grad is not None
            assert torch.equal(after, before - LR * grad)
            assert not torch.equal(after, before)


def make_closure(param: Tensor, opt: Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = (param**3).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


def backward(param: Tensor) -> None:
    param.grad = None
    (param**3).sum().backward()  # type: ignore[no-untyped-call]


def hooks(opt: Optimizer) -> tuple[int, int]:
    return len(opt._optimizer_step_pre_hooks), len(opt._optimizer_step_post_hooks)
