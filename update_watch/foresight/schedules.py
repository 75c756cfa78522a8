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
_MOST = 50_000  # steps that a scheduler is run ahead: a second


def schedule_of(given: Any, steps: int | None = None, period: int = 1, now: int | None = None) -> Schedule:
    """A `Schedule`, or one that is read from a copy of a torch scheduler, stepped to its end.

    `steps`: of the whole run, where the scheduler does not know. `period`: optimizer steps from one step of the scheduler to the
    next. `now`: optimizer steps made so far; None: as many as the scheduler's own, times `period`. The copy is of an optimizer
    that is none, so the real ones are not touched.

    Raises:
        TypeError: it is neither, or its rates depend on more than the step (ReduceLROnPlateau).
        ValueError: nobody knows how long the run is.
    """
    if isinstance(given, Schedule):
        return given
    begun = _steps_of(given)
    if not hasattr(given, "optimizer") or begun is None:
        raise TypeError(
            f"schedule={type(given).__name__}: expected update_watch.Schedule(rate, steps), or a torch scheduler whose rates "
            "depend on the step alone"
        )
    known = next((int(n) for name in _ENDS if (n := getattr(given, name, None))), None)
    steps = steps or (None if known is None else known * period)
    if steps is None:
        raise ValueError(
            f"schedule={type(given).__name__}: how long is the run? Give update_watch.Schedule(rate, steps=...)"
        )
    begun_at = begun * period if now is None else now
    ahead = -(-max(steps - begun_at, 0) // period)
    ask = _Copy(given, begun)
    is_at_will = ask.can_be_asked_at_will
    if not is_at_will and ahead > _MOST:
        raise ValueError(
            f"schedule={type(given).__name__}: {ahead:,} steps are too many to run ahead; give update_watch.Schedule(rate, steps)"
        )
    rates = [] if is_at_will else ask.run_ahead(ahead)

    def rate(step: int) -> float:
        index = max(step - begun_at, 0) // period
        return ask.at(begun + index) if is_at_will else rates[min(index, len(rates) - 1)]

    return Schedule(rate, steps)


def _steps_of(scheduler: Any) -> int | None:
    """A scheduler's own steps so far; None where its rates depend on more than that, or it is none."""
    inside = getattr(scheduler, "_schedulers", ())  # of those that are put together
    if any(hasattr(one, "num_bad_epochs") for one in (scheduler, *inside)):
        return None
    found = getattr(scheduler, "last_epoch", inside[0].last_epoch if inside else None)
    return None if found is None else int(found)


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


class _Copy:
    """A copy of a scheduler, to be asked for rates to come: the largest of any group."""

    def __init__(self, scheduler: Any, begun: int) -> None:
        self._stub, self._begun = _Stub(scheduler.optimizer), begun
        self._scheduler = copy.deepcopy(scheduler, {id(scheduler.optimizer): self._stub})
        self.can_be_asked_at_will = self._is_closed()

    def _largest(self) -> float:
        return max((float(group["lr"]) for group in self._stub.param_groups), default=math.nan)

    def _is_closed(self) -> bool:
        """Whether it has a formula of the step, and that gives the present rate."""
        try:
            return math.isclose(self.at(self._begun), self._largest(), rel_tol=1e-6, abs_tol=1e-12)
        except Exception:  # it has none; a scheduler may raise anything
            return False

    def at(self, step: int) -> float:
        """By the formula, at the scheduler's own step number."""
        one, was = self._scheduler, self._scheduler.last_epoch
        one.last_epoch = step
        try:
            # `get_lr` of LambdaLR is one; of most others it goes on from the rate before
            found = (
                one.get_lr() if hasattr(one, "lr_lambdas") and hasattr(one, "base_lrs") else one._get_closed_form_lr()
            )
        finally:
            one.last_epoch = was
        return max(map(float, found), default=math.nan)

    def run_ahead(self, steps: int) -> list[float]:
        """The rate now, and after each of so many steps of the scheduler."""
        rates = [self._largest()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no optimizer steps before it
            for _ in range(steps):
                self._scheduler.step()
                rates.append(self._largest())
        return rates
