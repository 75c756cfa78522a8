"""Steps on their way to a window's sums.

Legend as in `device_sums`: S optimizer states, R rows of the steps, K samples per row, J cells of one set of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from update_watch.formats import Format


class Slot(NamedTuple):
    """One step among those that are added together, or neighbours that go to the same place."""

    rows: slice  # of the sums, that were measured in it
    start: int  # of these rows among the R
    part: int  # of the window
    group: int  # of neighbouring steps of the window
    steps: int = 1

    @property
    def stop(self) -> int:
        """The end of its rows among the R."""
        rows: int = self.rows.stop - self.rows.start
        return self.start + self.steps * rows


class Look(NamedTuple):
    """Neighbouring rows of the R whose headroom is counted."""

    rows: slice
    format: Format
    octaves: float  # by which the learning rate is above that of the window's first look


class AddedSteps(NamedTuple):
    """Some steps as they are added to a window's sums: R rows side by side, those of one step next to each other."""

    before_ARK: Tensor  # A arrays: weights, then states
    intended_ARK: Tensor  # the replayed values
    after_RK: Tensor  # weights as they were stored
    states_SRK: Tensor | None  # what was stored of the states, of the first of the rows: those are compared in full
    gradient_RK: Tensor
    mask_RK: Tensor | None  # 0 for padding and for rows that took no part in their step
    weights_R2J: Tensor | None  # of samples, see `PositionWeights`; None: 1
    slots: Sequence[Slot]
    looks: Sequence[Look] = ()  # rows whose headroom is counted,
    looked: Sequence[Slot] = ()  # which are those of these steps
    whole_R1: Tensor | None = None  # rows that are read whole, where only some are
    are_drawn: bool = False  # some samples were drawn by size, and counts of headroom are weighted too


def merged(slots: Sequence[Slot], place: Callable[[Slot], Any] = lambda slot: None) -> list[Slot]:
    """Neighbours with the same rows that go to the same place as one."""
    found: list[Slot] = []
    for slot in slots:
        last = found[-1] if found else None
        if last is not None and (last.rows, place(last), last.stop) == (slot.rows, place(slot), slot.start):
            found[-1] = last._replace(steps=last.steps + slot.steps)
        else:
            found.append(slot)
    return found
