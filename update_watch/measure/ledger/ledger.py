"""The ledger of the model's own tensors: what the steps applied, what was written between them, what is left of it.

A few elements of every tensor are read before and after every step of whatever optimizer steps it (`sheet`).
Values are compared, not version counters: most code that averages weights writes through `.data`, which no counter sees.
Where an optimizer steps a master, the same elements of the master are read too. Tensors that no optimizer holds are read
with the steps of the one that leads.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from update_watch.measure.ledger.sheet import Line, Sheet, SheetWindow, can_be_read
from update_watch.measure.sampling import local
from update_watch.measure.transfer import Batch

logger = logging.getLogger("update_watch")

Owners = frozenset[Hashable]  # of the optimizers that step a tensor
Panel = tuple[Hashable, int | None]  # of which optimizer, which; its sheets are read in the windows of it


class Ledger:
    """All sheets of one watch."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._of_owner: dict[Hashable, list[Sheet]] = {}
        self._unowned: list[Sheet] = []
        self._plan: Any = None
        self._planned_for: tuple[object, object] = None, None
        self._is_complete = False  # all that there is can be read
        self._places: dict[int, int] = {}  # of states that hold all of a weight
        self.sheets: list[Sheet] = []
        self._panels: dict[Sheet, Panel | None] = {}
        self._open: dict[Hashable, int | None] = {}

    def is_planned_for(self, tensors: object, facts: object) -> bool:
        """Whether a plan would be what it was: of the same list, with equal facts, all of which can still be read."""
        known, self._planned_for = self._planned_for, (tensors, facts)
        is_as_it_was = known[0] is tensors and known[1] == facts and self._plan is not None and self._is_complete
        return is_as_it_was and not any(sheet.has_changed for sheet in self.sheets)

    def standing(self, states: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Those whose memory is where it was when this was asked before: some rules make their states anew in every step."""
        before, self._places = self._places, {key: local(state).data_ptr() for key, state in states.items()}
        return {key: state for key, state in states.items() if before.get(key) == self._places[key]}

    def open(self, panels: Mapping[Hashable, int | None]) -> None:
        """From now on read of each optimizer's tensors those of this panel; None: all."""
        if panels != self._open:
            self._open = dict(panels)
            self._turn()

    def _turn(self) -> None:
        for sheet, panel in self._panels.items():
            of_owner = None if panel is None else self._open.get(panel[0])
            sheet.turn(of_owner is None or panel is None or panel[1] in (None, of_owner))

    def plan(self, lines: Sequence[tuple[Line, Owners, bool, Panel | None]]) -> None:
        """What there is to read: lines, who steps them, whether their gradients are to be looked at, and their panel.

        Does nothing where that is as it was; else all sums begin anew.
        """
        readable = [one for one in lines if can_be_read(one[0].tensor) and (one[0].master is None or _is_alike(one[0]))]
        self._is_complete = len(readable) == len(lines)
        now = [
            (*map(id, line[::2]), line.names, owners, needs, panel, local(line.tensor).shape, line.tensor.dtype)
            for line, owners, needs, panel in readable
        ]
        if now == self._plan and not any(sheet.has_changed for sheet in self.sheets):
            return
        self._plan = now
        if not lines:  # it was for tensors that are to be let go of
            self._planned_for = None, None
        groups: dict[Any, list[Line]] = {}
        for line, owners, needs, panel in readable:
            master = None if line.master is None else line.master.dtype
            key = (owners, local(line.tensor).device, line.tensor.dtype, master, needs, panel)
            groups.setdefault(key, []).append(line)
        self._of_owner, self._unowned, self.sheets, self._panels = {}, [], [], {}
        for (owners, _, _, _, needs, panel), members in groups.items():
            sheet = Sheet(members, self._rng, bool(owners), needs)
            self.sheets.append(sheet)
            self._panels[sheet] = panel
            for owner in owners:
                self._of_owner.setdefault(owner, []).append(sheet)
            if not owners:
                self._unowned.append(sheet)
        self._turn()

    def before(self, owner: Hashable, outside: Iterable[Hashable], step: int, leads: bool) -> list[Sheet]:
        """Read just before `owner` steps, what no step around it has read. The result is for `after`."""
        sheets = self._of_owner.get(owner, [])
        around = [id(sheet) for outer in outside for sheet in self._of_owner.get(outer, ())]
        if around:
            sheets = [sheet for sheet in sheets if id(sheet) not in around]
        elif leads:
            sheets = sheets + self._unowned
        return [sheet for sheet in sheets if sheet.is_open and self._reads(sheet, sheet.before, step)]

    def miss(self, owner: Hashable, leads: bool) -> None:
        """A step of `owner` passes unseen."""
        for sheet in self._of_owner.get(owner, []) + (self._unowned if leads else []):
            sheet.miss()

    def after(self, sheets: list[Sheet]) -> None:
        """Read just after the step."""
        for sheet in sheets:
            self._reads(sheet, sheet.after)

    def _reads(self, sheet: Sheet, read: Callable[..., None], *args: Any) -> bool:
        """False: a tensor of the sheet cannot be read any more. The sheet is left out until the next plan."""
        try:
            read(*args)
        except Exception as error:
            if sheet.has_changed:  # as where a model is converted
                logger.debug("update-watch: a sheet of the ledger is planned anew, its tensors have another format")
            else:  # a tensor was changed in a way of its own: it costs its sheet
                logger.info("update-watch: a sheet of the ledger is left out: %r", error, exc_info=error)
            self.sheets.remove(sheet)
            for sheets in (self._unowned, *self._of_owner.values()):
                if sheet in sheets:
                    sheets.remove(sheet)
            self._plan = None
            return False
        return True

    def close_window(self, batch: Batch) -> tuple[SheetWindow, ...]:
        """Hand the sums to `batch` and start new ones."""
        windows = [sheet.close_window(batch) for sheet in self.sheets]
        return tuple(window for window in windows if window is not None)


def _is_alike(line: Line) -> bool:
    master = line.master
    return (
        master is not None
        and can_be_read(master)
        and local(master).shape == local(line.tensor).shape
        and local(master).stride() == local(line.tensor).stride()
        and local(master).device == local(line.tensor).device
    )
