"""What foresight finds: what the rest of the schedule will do (`judge.forecast`), what a cure would give (`what_if`), what to change (`plan`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from update_watch.columns.late_fields import allow

SURE = 0.05  # efficiency, by which the truth may be off what is said without doubt


@dataclasses.dataclass(frozen=True)
class TensorForecast:
    """What is to come for one tensor, along the schedule."""

    name: str
    stalling_step: int | None  # from which on its efficiency is below the limit of a partial stall, to the end
    stalled_step: int | None  # the same of a stall
    final_efficiency: float  # over the last twentieth of the run, before the rate is negligible
    efficiency: float  # of all movement that is still intended
    # nine of ten tensors keep to these: the step of `stalling_step` (None: not before the end), and the efficiency at the end
    earliest: int | None = None
    latest: int | None = None
    final_low: float = 0.0
    final_high: float = 1.0
    doubt: str = ""  # why it is not certain when, where `earliest` and `latest` are far from each other


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What is to come at the run's schedule, if gradients stay as they are. See docs/definitions.md."""

    step: int  # at which it was made
    until: int  # the schedule's last step
    tensors: tuple[TensorForecast, ...]
    stalling_share: float  # of the parameters, those that are below the limit at the end, 0..1
    lost_share: float  # of the movement that is still intended, per parameter, 0..1
    from_step: int | None  # at which the first tensor that is well now begins to stall
    floor: float | None  # learning rate, in the schedule's unit, that would keep moving all that move now
    headline: str
    error: float | None = (
        None  # 90% of this window's efficiencies are as near to what was forecast at half of the run so far
    )
    course: tuple[tuple[int, float, float], ...] = ()  # (step, efficiency of the run, learning rate over that of now)


allow(Forecast, ("tensors",))


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of training this run otherwise, at its present learning rates."""

    name: str  # "as it is", a `Cure`, "fp32_norms", "float16", "floor", "beta2"
    title: str  # "keep FP32 master weights"
    efficiency: float | None  # of the run: mean over tensors, by number of elements
    tensors: Mapping[str, float]  # of each tensor of which it is known
    bytes: int  # of memory, more than now
    # where gradients and states would change with it, and by how much is not known: nine of ten tensors lie between these
    ranges: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    low: float | None = None  # the same of the run
    high: float | None = None

    @property
    def in_doubt(self) -> tuple[str, ...]:
        """Tensors of which the efficiency may be more than 0.05 off what is said: they lie somewhere in their range."""
        return tuple(
            name
            for name, (low, high) in self.ranges.items()
            if max(self._said(name) - low, high - self._said(name)) > SURE
        )

    def _said(self, name: str) -> float:
        return min(max(self.tensors[name], 0.0), 1.0)


@dataclasses.dataclass(frozen=True)
class Change:
    """One thing to change, and what it does to what it is for."""

    cure: str  # a `cures.Cure`
    title: str  # "keep FP32 master weights"
    causes: tuple[str, ...]  # values of `report.Cause`
    tensors: tuple[str, ...]  # those that are not well for one of these causes
    efficiency: float | None  # of what is not well in these, now: mean by number of elements
    cured: float | None  # and then
    bytes: int  # of memory, more than now
    accumulators: tuple[str, ...] = ()  # what is changed of them, where it is not the weights: "exp_avg_sq"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cheapest set of changes after which nothing is lost. `print` it."""

    changes: tuple[Change, ...]
    bytes: int
    text: str

    def __str__(self) -> str:
        return self.text
