"""Whose turn it is: which rows of an optimizer are measured in the next step.

Legend: a window's steps are in at most G groups of neighbours (`sums.layout.GROUPS`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Generic, TypeVar

from update_watch.measure.sums.layout import GROUPS

T = TypeVar("T")
_LONGEST = 128  # steps of a group


class StepOrder(Generic[T]):
    """Turns of some members in the steps of a window of `window` steps.

    In a group each comes as often as any other, in an order in which all pairs of its steps are equally likely to fall to
    one member: sums over all steps are made up for from those of the measured ones (`window_sums`). Rounds in which each
    comes once would never measure a tensor in two steps that follow each other, and a fixed order could beat in time with
    training that does one thing in even steps and another in odd ones.
    """

    def __init__(self, members: Sequence[T], window: int, rng: random.Random) -> None:
        self._members, self._window, self._rng = members, window, rng
        self._rests = 0
        self.open_window()

    def open_window(self) -> None:
        """Start a new window."""
        self._queue: list[T | None] = []
        self._steps = 0
        self.group_steps = [0] * GROUPS  # of this window

    def pass_by(self, steps: int = 1) -> None:
        """Steps in which nobody is measured, though it was somebody's turn."""
        length = self._group_length()
        while steps:
            group, inside = divmod(self._steps, length)
            here = min(steps, length - inside)
            self.group_steps[group % GROUPS] += here
            self._steps += here
            steps -= here

    def next(self, rests: int = 0) -> tuple[T | None, int]:
        """Who is measured in the next step, and which group the step belongs to.

        `rests`: steps in which nobody is, beside one for each member.
        """
        self._rests = max(rests, 0)
        length = self._group_length()
        group, inside = divmod(self._steps, length)
        if not self._queue:
            once: list[T | None] = [*self._members, *[None] * self._rests]
            everybody = once * max((length - inside) // len(once), 1)
            self._queue = self._rng.sample(everybody, len(everybody))
        self._steps += 1
        self.group_steps[group % GROUPS] += 1
        return self._queue.pop(), group % GROUPS

    def _group_length(self) -> int:
        """Steps of a group: a quarter of the window, or more where each member would not come twice in it."""
        groups = min(max(self._window // (2 * (max(len(self._members) + self._rests, 1))), 1), GROUPS)
        return min(-(-self._window // groups), _LONGEST)


class Roster(Generic[T]):
    """Who is measured in the steps of each window: all in turns or, of many, one panel of them.

    Each panel has one window of as many as there are panels, in an order that is drawn anew every time round: no panel is
    always met by what training does in every so manieth window.
    """

    def __init__(
        self,
        everybody: Sequence[Sequence[T]],
        window: int,
        rng: random.Random,
        panels: Sequence[Sequence[T]] = (),
        cycle: int = 0,
    ) -> None:
        """`everybody`: the turns in which all are measured. `cycle`: steps in which each of a panel comes once, or of all where
        there is no panel."""
        self._everybody, self._panels, self._cycle = everybody, panels, cycle
        self._window, self._rng = window, rng
        self.panel: int | None = None  # whose window it is; None: everybody's
        self._left: list[int] = []  # panels that are still to come in this round
        self._order: StepOrder[Sequence[T]] = StepOrder(everybody, window, rng)

    def open_window(self, is_full: bool = True) -> None:
        """Start a new window. `is_full`: all are measured in it."""
        if is_full or len(self._panels) < 2:
            if self.panel is None:
                self._order.open_window()
                return
            self.panel, turns = None, self._everybody
        else:
            if not self._left:
                self._left = self._rng.sample(range(len(self._panels)), len(self._panels))
            self.panel = self._left.pop()
            turns = [(one,) for one in self._panels[self.panel]]
        self._order = StepOrder(turns, self._window, self._rng)

    def pass_by(self, steps: int) -> None:
        """Steps in which nobody is measured, though it was somebody's turn."""
        self._order.pass_by(steps)

    def next(self, turns: int) -> tuple[Sequence[T], int]:
        """Who are measured in the next step, and which group the step belongs to. `turns`: steps in which each of all comes
        once, if that is more than they need."""
        if self.panel is None:
            cycle = 0 if self._panels else self._cycle
            found, group = self._order.next(max(turns, cycle) - len(self._everybody))
        else:
            found, group = self._order.next(self._cycle - len(self._panels[self.panel]))
        return found or (), group

    @property
    def group_steps(self) -> list[int]:
        """Of the open window."""
        return self._order.group_steps


class OneOf:
    """Says yes once in every so many steps, each time at another place, drawn at random.

    At a fixed place it could beat in time with training that does one thing in even steps and another in odd ones.
    """

    def __init__(self, every: int, rng: random.Random) -> None:
        self._every, self._rng = every, rng
        self._at = self._place = 0

    def now(self) -> bool:
        """Whether it is this step."""
        if self._at == 0:
            self._place = self._rng.randrange(self._every)
        found = self._at == self._place
        self._at = (self._at + 1) % self._every
        return found
