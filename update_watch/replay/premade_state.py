"""What an optimizer holds of a parameter before its first step is tried: made in its constructor, or in steps before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.odd_tensors import unreadable
from update_watch.replay.attribute_copy import Copier

_ENOUGH = 4096  # elements to take an average of


class Uniform(NamedTuple):
    """A state of its parameter's shape that holds one value."""

    value: float
    dtype: torch.dtype | None  # None: its parameter's

    def like(self, param: Tensor) -> Tensor:
        """The state of a parameter of another shape."""
        return torch.full_like(param, self.value, dtype=self.dtype)


def premade_state(optimizer: Optimizer, group: int) -> dict[str, Any]:
    """What is in a parameter's state before its first step: numbers and settings, as the seed of a projection.

    Empty where there are tensors of values: then steps have been taken, or see `made_before`.
    """
    _, state = _first(optimizer, group)
    return {} if any(map(_holds_values, state.values())) else state


def made_before(optimizer: Optimizer, group: int) -> dict[str, Any]:
    """The same with tensors of the parameter's shape, each as large as it is on average.

    For rules that cannot begin with an empty state, as they make it in `__init__` (Adagrad before torch 2.7). Empty where
    there are tensors of other shapes, whose place in a parameter of another shape is not known.
    """
    param, state = _first(optimizer, group)
    made: dict[str, Any] = {}
    for name, value in state.items():
        made[name] = value
        if isinstance(value, Tensor) and (unreadable(value) or value.numel() != 1):
            if param is None or unreadable(value) or value.shape != param.shape or not value.is_floating_point():
                return {}
            mean = float(value.detach().reshape(-1)[:_ENOUGH].double().mean())
            made[name] = Uniform(mean, None if value.dtype == param.dtype else value.dtype)
        elif _holds_values(value):
            return {}
    return made


def state_for(param: Tensor, made: Mapping[str, Any], copier: Copier) -> dict[str, Any]:
    """Such a state of a parameter of any shape."""
    copies = {name: copier.copy(value, f"state '{name}'") for name, value in made.items()}
    return {name: value.like(param) if isinstance(value, Uniform) else value for name, value in copies.items()}


def _holds_values(state: Any) -> bool:
    """Whether there are tensors of more than a number in it, or in the containers that it is."""
    if isinstance(state, Tensor):
        return bool(unreadable(state)) or state.numel() != 1
    if isinstance(state, Mapping):
        return any(map(_holds_values, state.values()))
    return isinstance(state, (list, tuple)) and any(map(_holds_values, state))


def _first(optimizer: Optimizer, group: int) -> tuple[Tensor | None, dict[str, Any]]:
    """The first parameter that has a state. Of one element, a state of values looks like a number."""
    for param in optimizer.param_groups[group]["params"]:
        state = optimizer.state.get(param) or {}
        if state and not unreadable(param) and param.numel() > 1:
            return param, dict(state)
    return None, {}
