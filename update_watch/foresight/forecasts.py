"""What a forecast holds: for each tensor and for the run, what the rest of the schedule will do. See `judge.forecast`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TensorForecast:
    """What is to come for one tensor, along the schedule."""

    name: str
    stalling_step: int | None  # from which on its efficiency is below the limit of a partial stall, to the end
    stalled_step: int | None  # the same of a stall
    final_efficiency: float  # at the end, before the rate is negligible
    efficiency: float  # of all movement that is still intended


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
