"""An optimizer that is stepped in parts: each step sees a few of its parameters, and all parts make one logical step.

DeepSpeed does so. ZeRO-1/2 gives the optimizer one parameter group after the other, ZeRO-3 one flat tensor after the other,
and takes it away after the step. Each part is watched by itself, like an optimizer of its own; a part is known by its
first parameter. An optimizer that gains or loses parameters goes on being one part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from update_watch.measure.watched_optimizer import Watched

Make = Callable[[int, dict[Any, Any]], Watched]  # from the part's number and where findings of probes are kept


class Parts:
    """The parts of one optimizer that were met so far."""

    def __init__(self, first: Watched, make: Make) -> None:
        self.all = [first]
        self._make = make
        self._made = 1

    def current(self, optimizer: Optimizer) -> Watched:
        """The part that is about to be stepped. One that is new is planned now: that takes a moment, once."""
        first = next((param for group in optimizer.param_groups for param in group["params"]), None)
        for part in self.all:
            if first is None or part.first is first:
                return part
        members = {id(param) for group in optimizer.param_groups for param in group["params"]}
        for part in self.all:
            if not part.ids or not members.isdisjoint(part.ids):
                return part  # it has changed, and is planned anew
        groups = optimizer.param_groups
        # what probes found out is kept by the place of a group
        like = next((part for part in self.all if _are_same(part.groups, groups)), None)
        part = self._make(self._made, {} if like is None else like.found)
        self._made += 1
        self.all.append(part)
        return part

    def read_counters(self) -> None:
        """See `Watched.read_counters`."""
        for part in self.all:
            part.read_counters()

    def forget_unused(self) -> list[Watched]:
        """Drop the parts that were not stepped in this window while others were; returns them."""
        if len(self.all) == 1 or not any(part.window_steps for part in self.all):
            return []
        unused = [part for part in self.all if not part.window_steps]
        self.all = [part for part in self.all if part.window_steps]
        return unused


def _are_same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return len(a) == len(b) and all(one is other for one, other in zip(a, b, strict=True))
