"""What a run that leaves its range looks like before its loss does: what `judge.forecast` finds, as values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Sign:
    """One thing that has left the range it had over the run."""

    name: str  # "weights", "updates", "gradients", "state", "fp16_range", "skipped", "non_finite"
    is_warning: bool  # of this kind a warning came in time, and none where the run stayed well: see docs/divergence.md
    text: str  # what was seen, in one sentence
    tensors: tuple[str, ...] = ()  # those that show it most, where it is not of the run as a whole


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where a run is heading, as of one window. None is what is not known (yet)."""

    step: int
    weight_rms: float | None = None  # of all weights that are trained
    gradient_rms: float | None = None  # as the optimizer got them
    weight_growth: float | None = (
        None  # the weights grow as the number of steps to this power: above 2.5 for long nothing holds them
    )
    gradient_growth: float | None = None  # doublings over the latest windows, above the usual of the run
    update_excess: float | None = None  # doublings of update / weight / learning rate beyond the range of the run
    overflow_doublings: float | None = None  # after which the largest FP16 gradient is infinite
    signs: tuple[Sign, ...] = ()

    @property
    def is_warning(self) -> bool:
        """Whether a sign is there that runs which stay well do not show."""
        return any(sign.is_warning for sign in self.signs)

    @property
    def headline(self) -> str:
        """What is seen, in one sentence, what is warned of first; "" where nothing is."""
        said = "; ".join(sign.text for sign in sorted(self.signs, key=lambda sign: not sign.is_warning))
        return f"{said[:1].upper()}{said[1:]}." if said else ""


def divergence_of(data: Mapping[str, Any] | None) -> Divergence | None:
    """From plain data, as `dataclasses.asdict` makes it; unknown keys are ignored."""
    if data is None:
        return None
    signs = tuple(Sign(**{**_of(Sign, one), "tensors": tuple(one.get("tensors", ()))}) for one in data.get("signs", ()))
    return Divergence(**{**_of(Divergence, data), "signs": signs})


def _of(cls: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: data[field.name] for field in dataclasses.fields(cls) if field.name in data}
