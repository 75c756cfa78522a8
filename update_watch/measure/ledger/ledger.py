"""The ledger of the model's own tensors: what the steps applied, what was written between them, what is left of it.

A few elements of every tensor are read before and after every step of whatever optimizer steps it (`sheet`).
Values are compared, not version counters: most code that averages weights writes through `.data`, which no counter sees.
Where an optimizer steps a master, the same elements of the master are read too. Tensors that no optimizer holds are read
with the steps of the one that leads.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from update_watch.evidence import TensorEvidence, changed
from update_watch.measure.ledger.blocks import ELEMENTS
from update_watch.measure.ledger.sheet import Line, Sheet, SheetWindow, can_be_read
from update_watch.measure.ledger.sheet_sums import COLUMNS
from update_watch.measure.sampling import VARIED, local
from update_watch.measure.transfer import Batch
from update_watch.worker import unhurried

logger = logging.getLogger("update_watch")

_PART = 1e-4  # of what was applied: less of it says nothing
_FEW = 4  # elements
_OFTEN = 4  # writes of a window, from which on it tells by itself how far a tensor got,
_MORE_OFTEN = 1.25  # where it was written so many times as often as in the span
Owners = frozenset[Hashable]  # of the optimizers that step a tensor


class Ledger:
    """All sheets of one watch."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._of_owner: dict[Hashable, list[Sheet]] = {}
        self._unowned: list[Sheet] = []
        self._plan: Any = None
        self._planned_for: tuple[object, object] = None, None
        self._is_complete = False  # all that there is can be read
        self.sheets: list[Sheet] = []

    def is_planned_for(self, tensors: object, facts: object) -> bool:
        """Whether a plan would be what it was: of the same list, with equal facts, all of which can still be read."""
        known, self._planned_for = self._planned_for, (tensors, facts)
        is_as_it_was = known[0] is tensors and known[1] == facts and self._plan is not None and self._is_complete
        return is_as_it_was and not any(sheet.has_changed for sheet in self.sheets)

    def plan(self, lines: Sequence[tuple[Line, Owners, bool]]) -> None:
        """What there is to read: lines, who steps them, and whether their gradients are to be looked at.

        Does nothing where that is as it was; else all sums begin anew.
        """
        readable = [one for one in lines if can_be_read(one[0].tensor) and (one[0].master is None or _is_alike(one[0]))]
        self._is_complete = len(readable) == len(lines)
        now = [
            (id(line.tensor), id(line.master), line.names, owners, needs, local(line.tensor).shape, line.tensor.dtype)
            for line, owners, needs in readable
        ]
        if now == self._plan and not any(sheet.has_changed for sheet in self.sheets):
            return
        self._plan = now
        groups: dict[Any, list[Line]] = {}
        for line, owners, needs in readable:
            master = None if line.master is None else line.master.dtype
            key = (owners, local(line.tensor).device, line.tensor.dtype, master, needs)
            groups.setdefault(key, []).append(line)
        self._of_owner, self._unowned, self.sheets = {}, [], []
        for (owners, _, _, _, needs), members in groups.items():
            sheet = Sheet(members, self._rng, bool(owners), needs)
            self.sheets.append(sheet)
            for owner in owners:
                self._of_owner.setdefault(owner, []).append(sheet)
            if not owners:
                self._unowned.append(sheet)

    def before(self, owner: Hashable, outside: Iterable[Hashable], step: int, leads: bool) -> list[Sheet]:
        """Read just before `owner` steps, what no step around it has read. The result is for `after`."""
        sheets = self._of_owner.get(owner, [])
        around = [id(sheet) for outer in outside for sheet in self._of_owner.get(outer, ())]
        if around:
            sheets = [sheet for sheet in sheets if id(sheet) not in around]
        elif leads:
            sheets = sheets + self._unowned
        return [sheet for sheet in sheets if self._reads(sheet, sheet.before, step)]

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
        except Exception as error:  # a tensor was changed in a way of its own: it costs its sheet
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


# --- on the host ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor over a window: sums over its elements, see `sheet.COLUMNS`."""

    sums: Mapping[str, float]
    window: SheetWindow
    size: int
    looks: int

    @property
    def writes(self) -> tuple[int, float]:
        """When it was written; equal for tensors that were written together."""
        return int(self.sums["span_writes"]), round(self.sums["signature"], 3)

    def kept(self, prefix: str) -> tuple[float | None, float]:
        """Share of what the steps applied that is still there, and its standard error.

        Of the elements at no bound, or across the weights, whichever is more: what a projection takes back by design is
        not asked for.
        """
        s, square = self.sums, self.sums[f"{prefix}square"]
        if not square > 0 or not math.isfinite(square):
            return None, 0.0
        shares = []
        if self.size > _FEW:  # of fewer, all may be the smallest or the largest
            if not s[f"{prefix}free_square"] > _PART * square:
                return None, 0.0  # all that is read lies at a bound
            shares.append(s[f"{prefix}free_dot"] / s[f"{prefix}free_square"])
        if s[f"{prefix}across_square"] > _PART * square:
            shares.append(s[f"{prefix}across_dot"] / s[f"{prefix}across_square"])
        if not shares:
            shares.append(s[f"{prefix}dot"] / square)
        return max(shares), math.sqrt(max(s[f"{prefix}spread"], 0.0)) / square

    def travelled(self) -> float | None:
        """How far it got in the span, in what the steps from one write to the next can move it by: all in one direction.

        A grid that weights are rounded to moves them once, and may stretch with them: neither is a way.
        """
        s, steps = self.sums, len(self.window.run_steps)
        way = s["own_travelled"] if self.size > _FEW else s["own_moved"]
        found = _reached(way, steps, s["own_writes"], s["own_step_square"])
        is_new = s["writes"] * steps > _MORE_OFTEN * s["own_writes"] * self.window.steps
        if self.window.has_masters or s["writes"] < _OFTEN or not is_new:
            return found
        # what it travelled in the span is from before it was written
        lately = _reached(s["moved"], self.window.steps, s["writes"], s["step_square"])
        return found if found is None or lately is None else min(found, lately)

    def copied(self) -> float | None:
        """Masters: share of what they moved by that arrived in the model's tensor."""
        for prefix in ("", "span_"):
            if self.sums[f"{prefix}due"] > 0:
                return self.sums[f"{prefix}copied"] / self.sums[f"{prefix}due"]
        return None


def _reached(way: float, steps: int, writes: float, step_square: float) -> float | None:
    """A way (its square), in what the steps from one write to the next can move it by."""
    reach = steps / writes * math.sqrt(step_square / steps)
    return math.sqrt(way) / reach if reach > 0 else None


def with_ledger(tensors: list[TensorEvidence], windows: Iterable[SheetWindow]) -> list[TensorEvidence]:
    """The evidence with what the ledger saw. Runs on the background thread."""
    entries: dict[str, _Entry] = {}
    for window in windows:
        rows = window.transfer.wait().reshape(len(COLUMNS), len(window.names)).T.tolist()
        for i, names in enumerate(unhurried(window.names)):
            sums = dict(zip(COLUMNS, rows[i], strict=True))
            entries[names[0]] = _Entry(sums, window, window.sizes[i], window.looks[i])
    elsewhere = {
        (place, entry.writes)
        for name, entry in entries.items()
        if not entry.window.is_stepped and entry.sums["span_writes"] and entry.sums["span_moved"] > 0
        for place in _around(name, 2)
    }
    return [_with(t, entries[t.name], elsewhere) if t.name in entries else t for t in unhurried(tensors)]


def _around(name: str, levels: int) -> set[str]:
    """The modules a tensor lies in, the nearest ones."""
    parts = name.split(".")
    return {".".join(parts[:-k]) for k in range(1, min(levels, len(parts)) + 1)}


def _with(t: TensorEvidence, entry: _Entry, elsewhere: set[Any]) -> TensorEvidence:
    s, window = entry.sums, entry.window
    if not math.isfinite(s["span_square"]) or not math.isfinite(s["stored"]):
        return t
    stored = math.sqrt(s["stored"] / ELEMENTS)
    found: dict[str, Any] = {
        "written_steps": int(s["writes"]),
        "written_step": window.run_steps[int(s["last"]) - 1] - 1 if s["last"] else None,
        "written_between": math.sqrt(s["written"] / ELEMENTS / window.steps) / stored if stored else None,
        "moved": math.sqrt(s["moved"] / ELEMENTS) / stored if stored else float(s["moved"] > 0),
        "is_master": window.has_masters,
    }
    if window.is_full and window.is_stepped:
        found["copy_changed"] = s["copy_steps"] / ELEMENTS / window.steps
        found["copy_changed_window"] = s["copy_window"] / ELEMENTS
        found["was_rounded"] = not window.has_masters and s["coarse"] >= VARIED
    arrived = t.numbers.displacement_efficiency
    copied = entry.copied() if window.has_masters else None
    if not s["own_writes"]:
        found["net_efficiency"] = copied if window.has_masters else arrived
        found["undone_fraction"] = 0.0
    else:
        # what is written once in a window, or in some, may be a checkpoint: that it comes again shows over the span
        shares = [entry.kept(prefix) for prefix in ("", "span_")]
        found["written_steps"] = int(s["own_writes"])
        kept, error = min(shares, key=lambda share: math.inf if share[0] is None else share[0])
        if kept is not None:
            went = any((place, entry.writes) in elsewhere for place in _around(t.name, 3))
            found["travelled"] = entry.travelled()
            found["undone_fraction"] = 0.0 if went else min(max(1 - kept, 0.0), 1.0)
            net = kept if arrived is None else kept * arrived
            found["net_efficiency"] = net if copied is None else min(net, copied)
            found["net_efficiency_error"] = error
    if t.reason and window.is_stepped and not window.has_masters:  # no replay says it
        found["applied_ratio"] = math.sqrt(s["step_square"] / ELEMENTS / window.steps) / stored if stored else None
        found["unmoved_fraction"] = s["still"] / ELEMENTS
        found["stored"] = stored
    if entry.looks and not t.measured_steps:
        found["gradient_looks"] = entry.looks
        found["gradient_rms"] = math.sqrt(s["gradient"] / ELEMENTS / entry.looks)
        found["gradient_max"] = s["largest"]
    return changed(t, **found)
