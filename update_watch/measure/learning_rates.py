"""The learning rates of an optimizer's groups: last and largest of a window, whether one has jumped, and what else is said of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from update_watch.cures import options_of

_JUMP = 1.5  # from one step to the next


class LearningRates:
    """Looked at in every step, those that pass unseen included. Sizes: a rate below 0 climbs by as much."""

    def __init__(self) -> None:
        self._seen: dict[int, list[float]] = {}  # of the open window: last, largest
        self._last: dict[int, float] = {}

    def note(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Learn the rates as they are now. Returns whether one has jumped since the last step."""
        has_jumped = False
        for i, group in enumerate(groups):
            given = group.get("lr")
            rate = given if type(given) is float else as_number(given)
            rate = rate if rate is None else abs(rate)
            if rate is not None and (rate != self._last.get(i) or i not in self._seen):
                before = self._last.get(i, rate)
                has_jumped = has_jumped or max(rate, before) > _JUMP * min(rate, before)
                self._last[i] = rate
                self._seen[i] = [rate, max(rate, self._seen[i][1])] if i in self._seen else [rate, rate]
        return has_jumped

    def of(self, group: int) -> tuple[float | None, float | None]:
        """The window's last rate of a group, and its largest."""
        seen = self._seen.get(group)
        return (seen[0], seen[1]) if seen else (None, None)

    def facts(
        self,
        groups: Sequence[dict[str, Any]],
        all_groups: Sequence[dict[str, Any]],
        used: Iterable[int],
        optimizer: int,
        steps: int,
    ) -> dict[int, dict[str, Any]]:
        """What is said of the tensors of each of some groups, as it is now. `all_groups`: of the optimizer, by which they are
        numbered; `groups` may be a part of them."""
        facts = {}
        for index in used:
            group = groups[index] if index < len(groups) else {}  # taken away since
            lr, lr_max = self.of(index)
            number = next((i for i, other in enumerate(all_groups) if other is group), index)
            facts[index] = {
                "optimizer_group": f"{optimizer}/{number}",
                "steps": steps,
                "lr": lr,
                "lr_max": lr_max,
                "weight_decay": as_number(group.get("weight_decay")),
                "options": options_of(group),
            }
        return facts

    def open_window(self) -> None:
        """Forget what was seen in the last one."""
        self._seen = {}


def as_number(value: Any) -> float | None:
    """A setting as a float; None for values on a device, which must not be read."""
    if isinstance(value, Tensor):
        return float(value) if value.device.type == "cpu" and value.numel() == 1 else None
    return float(value) if isinstance(value, (int, float)) else None


def rate_size(value: Any) -> float | None:
    """The size of a learning rate that can be read without asking a device; None also for 0."""
    rate = as_number(value)
    return abs(rate) if rate and math.isfinite(rate) else None
