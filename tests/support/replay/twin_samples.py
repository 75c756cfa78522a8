"""A rule to give attributes to, and one parameter's run as a twin is handed it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.replay.twin import Run, Twin


class Plain(Optimizer):
    """SGD with whatever attributes a test gives it."""

    def __init__(self, params: Any, lr: float = 0.1, **attributes: Any) -> None:
        super().__init__(params, {"lr": lr})
        vars(self).update(attributes)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(param.grad, alpha=-group["lr"])


def parameter(*shape: int, seed: int = 0) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 100))
    return param


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def run_of(optimizer: Optimizer, param: Tensor, at: Any = slice(None)) -> Run:
    """The parameter's elements `at`, and their state."""
    state = {
        name: value.reshape(-1)[at].clone()
        if isinstance(value, Tensor) and value.shape == param.shape
        else copied(value)
        for name, value in optimizer.state.get(param, {}).items()
    }
    assert param.grad is not None
    return Run(0, param.detach().reshape(-1)[at].clone(), param.grad.reshape(-1)[at].clone(), state)


def replayed(optimizer: Optimizer, param: Tensor) -> Tensor:
    return Twin(optimizer).replay([run_of(optimizer, param)])[0].param
