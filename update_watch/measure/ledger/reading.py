"""What the ledger's sums say of a window's tensors, on the host: of one, or of all of a block that nothing wrote to in between."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from update_watch import formats
from update_watch.evidence import TensorEvidence, changed
from update_watch.measure.ledger.blocks import ELEMENTS
from update_watch.measure.ledger.sheet import SheetWindow
from update_watch.measure.ledger.sheet_sums import COLUMNS
from update_watch.measure.sampling import VARIED

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
_PART = 1e-4  # of what was applied: less of it says nothing
_AT_BOUNDS = 1 / 8  # the same of elements at no bound: of 16 more than two, which may have come there together
_UNDOING = -1.0  # what was written is twice what was applied: it does something else than to take that back
_FEW = 4  # elements
_OFTEN = 4  # writes of a window, from which on it tells by itself how far a tensor got,
_MORE_OFTEN = 1.25  # where it was written so many times as often as in the span
_LEFT = 0.05  # of what was applied: who takes the same share of it back everywhere leaves that much, or means to leave nothing
_HARDLY = 0.2  # of what was applied: less of it is left where it is undone
_ALIKE = 1e-4  # of what elements moved by (squares): how far they may be from one share of what was applied to each
_ROUNDINGS = 4 / 12 * ELEMENTS  # times the square of a gap: of both ends, and of each write
_HIDDEN = 0.1  # as the former, from which on the gaps of a format hide whether they are
_WHOLE = 0.95  # of the elements that steps moved: who writes so many of them leaves none alone,
_PUT_BACK = 0.5  # and puts them back, where so many are to the bit what they were,
# of those it puts elsewhere: so many are moved further than the steps had moved them where it rounds at random,
_BY_CHANCE = 1 / 4
_ON_AVERAGE = 0.5  # and so much may be left of what is applied to all tensors that are rounded, within two errors
_OVER = 2  # times the usual steps between two writes: none comes any more
_PLACE = {name: i for i, name in enumerate(COLUMNS)}


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor over a window: sums over its elements, see `sheet_sums.COLUMNS`."""

    sums: Mapping[str, float]
    window: SheetWindow
    size: int
    looks: int
    is_thin: bool

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
        if self.is_put_back:  # a grid has values of its own, and no bounds
            shares.append(s[f"{prefix}dot"] / square)
        elif self.size > _FEW:  # of fewer, all may be the smallest or the largest
            if not s[f"{prefix}free_square"] > _AT_BOUNDS * square:
                return None, 0.0  # nearly all that is read lies at a bound
            shares.append(s[f"{prefix}free_dot"] / s[f"{prefix}free_square"])
        if not self.is_put_back and s[f"{prefix}across_square"] > _PART * square:
            shares.append(s[f"{prefix}across_dot"] / s[f"{prefix}across_square"])
        if not shares:
            shares.append(s[f"{prefix}dot"] / square)
        return max(shares), math.sqrt(max(s[f"{prefix}spread"], 0.0)) / square

    def alike(self) -> tuple[bool, bool]:
        """Whether the same share of what was applied is left of each element; and whether its format may hide that."""
        s = self.sums
        square, moved = s["span_square"], s["own_moved"]
        if self.size <= _FEW or s["own_writes"] < 2 or not s["span_dot"] > _LEFT * square or not moved > 0:
            return False, False
        apart = moved - s["span_dot"] ** 2 / square
        is_half = self.window.dtype in formats.HALVES and not self.window.has_masters
        fmt = formats.of(self.window.dtype) if is_half else None
        octave = math.floor(math.log2(s["stored"] / ELEMENTS) / 2) if s["stored"] > 0 else -math.inf
        gap = (fmt or formats.FP32).epsilon * 2.0**octave
        rounded = _ROUNDINGS * gap**2 * (s["own_writes"] + 1)
        is_alike = apart <= _ALIKE * moved + rounded
        return is_alike and rounded <= _HIDDEN * moved, is_alike and rounded > _HIDDEN * moved

    @property
    def is_held(self) -> bool:
        """Steps move it, and nothing is where it was put elsewhere than it was put first."""
        return self.sums["own_writes"] >= 2 and self.sums["own_moved"] == 0 < self.sums["span_square"]

    @property
    def is_put_back(self) -> bool:
        """Whether writes put it back to the bit: all of it, or what a grid is too coarse for. Nothing that scales or turns does."""
        return bool(_are_put_back(self.sums))

    @property
    def held(self) -> float | None:
        """Share of its elements that each write puts back to the bit, where it leaves the others alone."""
        s = self.sums
        is_part = s["put_back"] >= _WHOLE * s["rewritten"] > 0 and s["rewritten"] <= _WHOLE * s["tries"]
        return s["rewritten"] / s["tries"] if is_part and s["tries"] >= ELEMENTS else None

    @property
    def is_over(self) -> bool:
        """It was written in the span, and for so long has not been that no more is to come."""
        looks, last = len(self.window.run_steps), self.sums["last"]
        return looks - last > max(_OVER * last / self.sums["own_writes"], self.window.steps)

    @property
    def is_at_zero(self) -> bool:
        """All that moves of what is read is only ever written to 0."""
        return 0 < self.sums["span_zero_square"] == self.sums["span_square"]

    def travelled(self) -> float | None:
        """How far it got in the span, in what the steps from one write to the next can move it by: all in one direction.

        A grid that weights are rounded to moves them once, and may stretch with them: neither is a way.
        """
        s, steps = self.sums, len(self.window.run_steps)
        way = s["own_travelled"] if self.size > _FEW else s["own_moved"]
        found = _reached(way, steps, s["own_writes"], s["own_step_square"])
        is_new = s["writes"] * steps > _MORE_OFTEN * s["own_writes"] * self.window.steps
        # further than all steps together in one direction: it was put there
        is_new = is_new or (found is not None and found > s["own_writes"])
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


def _are_put_back(s: Mapping[str, Any]) -> Any:
    """See `_Entry.is_put_back`; of one tensor or of many."""
    is_whole = s["rewritten"] > _WHOLE * s["tries"]
    return is_whole & (s["put_back"] >= _PUT_BACK * s["tries"]) & (s["tries"] > 0)


def _reached(way: float, steps: int, writes: float, step_square: float) -> float | None:
    """A way (its square), in what the steps from one write to the next can move it by."""
    reach = steps / writes * math.sqrt(step_square / steps)
    return math.sqrt(way) / reach if reach > 0 else None


class Reading:
    """The sheets of one window. Made on the background thread."""

    def __init__(self, windows: Iterable[SheetWindow]) -> None:
        self._windows = list(windows)
        # [COLUMNS, n] each
        self._sums = [window.transfer.wait().reshape(len(COLUMNS), -1) for window in self._windows]
        self._places: dict[str, tuple[int, int]] = {}  # name -> which sheet, and which of its tensors
        for w, window in enumerate(self._windows):
            self._places.update({names[0]: (w, i) for i, names in enumerate(window.names)})
        self._is_undoing, self._is_random = self._undoes(), self._rounds_at_random()
        self._elsewhere = {(place, entry.writes) for name, entry in self._written() for place in _around(name, 2)}

    def _undoes(self) -> bool:
        """Whether any tensor is put back, or nearly all of it undone, in both directions: who does that is no bound, and may do it to all."""
        for window, sums in zip(self._windows, self._sums, strict=True):
            s = dict(zip(COLUMNS, sums, strict=True))
            is_free = s["span_free_square"] > _AT_BOUNDS * s["span_square"]
            is_undone = is_free & (s["span_free_dot"] < _HARDLY * s["span_free_square"]) & (s["own_writes"] >= 2)
            found = np.flatnonzero((is_undone | _are_put_back(s)) & (s["one_sided"] == 0))
            if not all(window.are_thin[i] for i in found.tolist()):
                return True
        return False

    def _rounds_at_random(self) -> bool:
        """Whether chance decides what is put back: in some it may have let nothing go yet."""
        asked = [_PLACE[name] for name in ("tries", "put_back", "passed", "span_dot", "span_square", "span_spread")]
        of_all = np.zeros(len(asked))
        for sums in self._sums:
            if sums[asked[0]].any():
                found = _are_put_back(dict(zip(COLUMNS, sums, strict=True)))
                of_all += sums[asked][:, found].sum(1)
        tries, put_back, passed, dot, square, spread = of_all.tolist()
        return bool(passed > _BY_CHANCE * (tries - put_back) and dot + 2 * math.sqrt(spread) > _ON_AVERAGE * square)

    def _written(self) -> Iterable[tuple[str, _Entry]]:
        """Tensors that nobody steps and somebody wrote to."""
        for w, (window, sums) in enumerate(zip(self._windows, self._sums, strict=True)):
            if not window.is_stepped:
                was_written = (sums[_PLACE["span_writes"]] != 0) & (sums[_PLACE["span_moved"]] > 0)
                for i in np.flatnonzero(was_written).tolist():
                    if self._places[name := window.names[i][0]] == (w, i):
                        yield name, self._entry(w, i)

    def _entry(self, w: int, i: int) -> _Entry:
        window = self._windows[w]
        sums = dict(zip(COLUMNS, self._sums[w][:, i].tolist(), strict=True))
        return _Entry(sums, window, window.sizes[i], window.looks[i], window.are_thin[i])

    def of(self, tensor: TensorEvidence) -> TensorEvidence:
        """The evidence with what the ledger saw."""
        place = self._places.get(tensor.name)
        if place is None:
            return tensor
        return _with(tensor, self._entry(*place), self._elsewhere, self._is_undoing, self._is_random)

    def of_all(self, names: Sequence[str], arrived_n: Array) -> tuple[dict[str, npt.NDArray[Any]], Mask]:
        """[n] the same for measured tensors, by the names of `TensorEvidence`; and those that only `of` can tell of.

        `arrived`: their displacement efficiencies. What is written between steps, or copied from a master, is told one by one.
        """
        n, nowhere = len(names), (-1, -1)
        places = itertools.chain.from_iterable([self._places.get(name, nowhere) for name in names])
        sheet_n, place_n = np.fromiter(places, np.intp, 2 * n).reshape(n, 2).T
        found: dict[str, npt.NDArray[Any]] = {
            name: np.full(n, np.nan) for name in ("written_between", "moved", "net_efficiency", "undone_fraction")
        }
        found |= {name: np.full(n, np.nan) for name in ("copy_changed", "copy_changed_window")}
        found |= {"written_steps": np.zeros(n, np.int64), "was_rounded": np.zeros(n, bool)}
        found["written_step"] = np.full(n, None, dtype=object)
        alone_n = np.zeros(n, bool)
        for w in np.unique(sheet_n[sheet_n >= 0]).tolist():
            at = np.flatnonzero(sheet_n == w)
            alone_n[at] = self._of_sheet(self._windows[w], self._sums[w][:, place_n[at]], arrived_n[at], at, found)
        return found, alone_n

    def _of_sheet(
        self,
        window: SheetWindow,
        sums_Cn: Array,
        arrived_n: Array,
        at: npt.NDArray[np.intp],
        found: dict[str, npt.NDArray[Any]],
    ) -> Mask:
        """Fill in the tensors `at` of one sheet; [n] whether only `of` can tell of them."""
        s = dict(zip(COLUMNS, sums_Cn, strict=True))
        alone_n: Mask = (s["own_writes"] != 0) | window.has_masters
        is_known = np.isfinite(s["span_step_square"]) & np.isfinite(s["stored"]) & ~alone_n
        with np.errstate(all="ignore"):
            stored_n = np.sqrt(s["stored"] / ELEMENTS)
            is_there = stored_n != 0
            between_n = np.where(is_there, np.sqrt(s["written"] / ELEMENTS / window.steps) / stored_n, np.nan)
            moved_n = np.where(is_there, np.sqrt(s["moved"] / ELEMENTS) / stored_n, s["moved"] > 0)
        columns: dict[str, npt.NDArray[Any]] = {
            "written_steps": s["writes"].astype(np.int64),
            "written_between": between_n,
            "moved": moved_n,
            "net_efficiency": arrived_n,
            "undone_fraction": np.zeros(len(at)),
        }
        if window.is_full and window.is_stepped:
            columns["copy_changed"] = s["copy_steps"] / ELEMENTS / window.steps
            columns["copy_changed_window"] = s["copy_window"] / ELEMENTS
            columns["was_rounded"] = s["coarse"] >= VARIED
        for name, column in columns.items():
            found[name][at[is_known]] = column[is_known]
        for i in np.flatnonzero(is_known & (s["last"] != 0)).tolist():
            found["written_step"][at[i]] = window.run_steps[int(s["last"][i]) - 1] - 1
        return alone_n


def _lowest(shares: Iterable[tuple[float | None, float]]) -> tuple[float | None, float]:
    """The share that is lowest for certain, with its error; not of what does something else than to take back."""
    known = [(share, error) for share, error in shares if share is not None and share + 2 * error > _UNDOING]
    return min(known, key=lambda found: found[0] + 2 * found[1], default=(None, 0.0))


def _around(name: str, levels: int) -> set[str]:
    """The modules a tensor lies in, the nearest ones."""
    parts = name.split(".")
    return {".".join(parts[:-k]) for k in range(1, min(levels, len(parts)) + 1)}


def _with(t: TensorEvidence, entry: _Entry, elsewhere: set[Any], is_undoing: bool, is_random: bool) -> TensorEvidence:
    s, window = entry.sums, entry.window
    if not all(math.isfinite(s[name]) for name in ("span_step_square", "span_square", "stored")):
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
    if not s["own_writes"] or entry.is_over:
        found["net_efficiency"] = copied if window.has_masters else arrived
        found["undone_fraction"] = 0.0
    else:
        # what is written once in a window, or in some, may be a checkpoint: that it comes again shows over the span
        found["written_steps"] = int(s["own_writes"])
        found["written_every"] = (found["written_step"] + 2 - window.run_steps[0]) / s["own_writes"]
        found["is_at_zero"] = entry.is_at_zero
        is_by_chance = is_random and entry.is_put_back
        found["is_put_back"] = entry.is_put_back and not is_by_chance
        found["held_fraction"] = entry.held
        found["is_alike"], found["may_be_alike"] = (False, False) if entry.is_put_back else entry.alike()
        found["touched_fraction"] = s["touched"] / ELEMENTS
        found["is_one_sided"] = bool(s["one_sided"]) and s["own_writes"] >= 2 and not is_undoing
        found["may_be_zero"] = (t.update_ratio or 0.0) * len(window.run_steps) >= s["own_writes"]
        kept, error = _lowest(entry.kept(prefix) for prefix in ("", "span_"))
        if entry.is_at_zero:
            kept = 0.0
        if entry.is_held and (kept is None or entry.is_thin):
            kept, found["is_one_sided"] = 0.0, not is_undoing
        if kept is not None:
            went = any((place, entry.writes) in elsewhere for place in _around(t.name, 3))
            found["travelled"] = entry.travelled()
            found["undone_fraction"] = 0.0 if went or is_by_chance else min(max(1 - kept, 0.0), 1.0)
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
