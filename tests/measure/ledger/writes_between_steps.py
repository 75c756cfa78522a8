"""Trainings in which something else may write to the model between steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import update_watch as uw
from tests.support.watch_nets import Net, backward, batches
from update_watch.report import Report

WINDOW = 16
Between = Callable[[int, nn.Module], None]  # after step i


def adamw(params: Any) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)


def sgd(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9)


def run(
    make: Callable[[Net], Between],
    steps: int = 4 * WINDOW,
    rule: Callable[[Any], Optimizer] = adamw,
    dtype: torch.dtype = torch.float32,
    first: int = 0,
    budget: float | None = 0.01,
) -> list[Report]:
    """The reports of a training. `first`: the number of its first step."""
    reports: list[Report] = []
    model = Net(dtype)
    between = make(model)
    optimizer = rule(model.parameters())
    with uw.watch(model, optimizer, window=WINDOW, sinks=[reports.append], budget=budget):
        for i, x in enumerate(batches(steps, dtype), first):
            model.zero_grad()
            backward(model, x)
            optimizer.step()
            with torch.no_grad():
                between(i, model)
    return reports


def kept(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def put(model: nn.Module, values: list[Tensor]) -> None:
    for p, value in zip(model.parameters(), values, strict=True):
        p.data.copy_(value)  # no version counter sees it
