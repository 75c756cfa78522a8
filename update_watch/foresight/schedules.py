"""The learning rate over a run, as far as it is known beforehand: what a forecast is made along."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """`rate(step)`: the learning rate of optimizer step number `step`, in any unit (only ratios count), to the run's last step.

    Example:
        >>> schedule = Schedule(lambda step: 0.5 * (1 + math.cos(math.pi * step / 60_000)), steps=60_000)
    """

    rate: Callable[[int], float]
    steps: int

    def __post_init__(self) -> None:
        if not callable(self.rate):
            raise TypeError(f"Schedule(rate={self.rate!r}) must be a function of the step that returns a learning rate")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"Schedule(steps={self.steps!r}) must be the run's number of optimizer steps, 1 or more")


# where torch's schedulers say how many steps they are for
_ENDS = ("total_steps", "T_max", "total_iters")
_MOST = 200_000  # steps that a scheduler is run ahead


def schedule_of(given: Any, steps: int | None = None) -> Schedule:
    """A `Schedule`, or one that is read from a torch scheduler by stepping a copy of it to its end.

    `steps`: of the whole run, where the scheduler does not know. The copy is made and run at once, on an optimizer that is
    none, so the real ones are not touched.

    Raises:
        TypeError: it is neither, or its rates depend on more than the step (ReduceLROnPlateau).
        ValueError: nobody knows how long the run is.
    """
    if isinstance(given, Schedule):
        return given
    if not hasattr(given, "optimizer") or not hasattr(given, "last_epoch") or hasattr(given, "num_bad_epochs"):
        raise TypeError(
            f"schedule={type(given).__name__}: expected update_watch.Schedule(rate, steps), or a torch scheduler whose rates "
            "depend on the step alone"
        )
    steps = steps or next((int(n) for name in _ENDS if (n := getattr(given, name, None))), None)
    if steps is None:
        raise ValueError(
            f"schedule={type(given).__name__}: how long is the run? Give update_watch.Schedule(rate, steps=...)"
        )
    rates = _run_ahead(given, min(steps, _MOST))
    return Schedule(lambda step: rates[min(max(step, 0), len(rates) - 1)], steps)


class _Stub:
    """Groups of hyperparameters, and nothing to step."""

    def __init__(self, optimizer: Any) -> None:
        self.param_groups = [
            {key: copy.copy(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        self.defaults = dict(optimizer.defaults)
        self._opt_called = True

    def step(self) -> None:
        """As schedulers expect of an optimizer."""


def _run_ahead(scheduler: Any, steps: int) -> list[float]:
    """The largest learning rate of any group in each step; those before now are taken as now."""
    stub = _Stub(scheduler.optimizer)
    ahead = copy.deepcopy(scheduler, {id(scheduler.optimizer): stub})

    def largest() -> float:
        return max((float(group["lr"]) for group in stub.param_groups), default=math.nan)

    rates = [largest()] * (int(scheduler.last_epoch) + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no optimizer steps before it
        while len(rates) < steps:
            ahead.step()
            rates.append(largest())
    return rates
