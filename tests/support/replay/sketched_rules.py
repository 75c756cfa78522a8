"""Optimizers whose rule is a function that a test gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.replay.rule import Rule
from update_watch.replay.rule_kind import find_rule

Update = Callable[["Sketch", dict[str, Any], list[torch.nn.Parameter]], None]


class Sketch(Optimizer):
    """A rule given as a function of the optimizer, a group, and the parameters that have gradients."""

    def __init__(self, params: Any, update: Update, **settings: Any) -> None:
        self.update = update
        super().__init__(params, {"lr": 0.01, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self.update(self, group, [p for p in group["params"] if p.grad is not None])

    def count(self, param: Tensor) -> int:
        self.state[param]["step"] = self.state[param].get("step", 0) + 1
        return int(self.state[param]["step"])


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape))


def probed(update: Update, shape: tuple[int, ...] = (300, 40), **settings: Any) -> Rule:
    return find_rule(Sketch([parameter(*shape), parameter(*shape)], update, **settings), 0, len(shape), shape=shape)


def descend(group: dict[str, Any], param: torch.nn.Parameter, direction: Tensor) -> None:
    param.add_(direction, alpha=-float(group["lr"]))
