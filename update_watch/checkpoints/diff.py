"""What changed between two checkpoints: tensor by tensor, the elements whose stored bits are the same.

Norms that are still exactly 1.0 after thousands of steps are the plainest sign of updates lost to rounding, and a
checkpoint shows them after the fact, without a watch. It cannot show more: unchanged bits are no proof of a fault.
"""

from __future__ import annotations

import dataclasses
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from update_watch import formats
from update_watch.checkpoints.comparison import BECAME, compare_all
from update_watch.checkpoints.differences import TensorDiffs
from update_watch.checkpoints.files import CheckpointError, read_tensors
from update_watch.wording import end_of, listed, percent, plural, printable, short

Flags = npt.NDArray[np.bool_]
_NOTES = 20  # tensors with a note of their own

NOT_ALWAYS_A_FAULT = (
    "Unchanged bits are not always a fault: where the optimizer keeps FP32 master weights, a low-precision copy changes"
    " only when many updates have added up to its next value, and frozen tensors or embedding rows without tokens stay"
    " as they are. A watch on some hundred steps tells whether updates are lost: update_watch.watch(model, optimizer)."
)


@dataclasses.dataclass(frozen=True)
class Diff:
    """Two checkpoints compared. `print` it."""

    tensors: TensorDiffs  # a `TensorDiff` each, most alike first
    only_first: tuple[str, ...] = ()  # names that only the first checkpoint has
    only_second: tuple[str, ...] = ()

    @property
    def never_moved(self) -> tuple[str, ...]:
        """Floating-point tensors that are the same to the last bit."""
        identical, change = (self.tensors.numbers[field] for field in ("identical", "change"))
        return tuple(map(self.tensors.names.__getitem__, np.flatnonzero((identical == 1) & ~np.isnan(change)).tolist()))

    @property
    def findings(self) -> tuple[str, ...]:
        """What the comparison shows, in sentences."""
        rows = self.tensors
        identical, full = rows.numbers["identical"], _is_full(rows)
        weights = ~np.isnan(rows.numbers["change"])
        still, moved = weights & (identical == 1), weights & (identical < 1)
        many, never = int(weights.sum()), int(still.sum())
        found: list[str] = []
        if never and never == many:
            found.append(f"All {plural(many, 'tensor')} are the same to the last bit.")
        elif never:
            found.append(f"{never} of {plural(many, 'tensor')} never moved: {_names(rows, still)}.")
        found += _still_constant(rows, still, full)
        if moved.any():
            elements = int(rows.numel[moved].sum())
            same = float((identical * rows.numel)[moved].sum()) / elements
            found.append(
                f"Of the elements of the {plural(int(moved.sum()), 'tensor')} that moved, {percent(same)} have the same"
                " bits in both checkpoints."
            )
        if moved.any() and (still & full).any():
            found.append(
                f"Rounding does not explain why {plural(int((still & full).sum()), 'full-precision tensor')} never"
                f" moved: look whether it is frozen, unused or in no optimizer ({_names(rows, still & full)})."
            )
        if (weights & ~full & (identical > 0)).any():
            found.append(NOT_ALWAYS_A_FAULT)
        found += [f"{rows.names[i]}: {rows.notes[i]}." for i in sorted(rows.notes)[:_NOTES]]
        if len(rows.notes) > _NOTES:
            found.append(
                f"{plural(len(rows.notes) - _NOTES, 'more tensor')} could not be compared or hold such values."
            )
        for names, which in ((self.only_first, "first"), (self.only_second, "second")):
            if names:
                found.append(f"Only in the {which} checkpoint: {listed(names)}.")
        return tuple(printable(sentence) for sentence in found)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "tensors": list(map(vars, self.tensors)),
            "never_moved": list(self.never_moved),
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "findings": list(self.findings),
        }

    def text(self, limit: int | None = None) -> str:
        """The tensors as a table, at most `limit` of them, and the findings."""
        shown = self.tensors[:limit]
        names = [end_of(t.name) for t in shown]
        width = max((len(name) for name in names), default=6)
        kind = max((len(t.dtype) for t in shown), default=6)
        lines = [f"{'tensor':{width}}  {'format':{kind}}  {'elements':>12}  {'identical':>9}  {'change':>8}  relative"]
        lines.append("-" * len(lines[0]))
        for name, t in zip(names, shown, strict=True):
            same = "-" if t.identical is None else _share(t.identical)
            cells = f"{same:>9}  {_number(t.change):>8}  {_number(t.relative_change):>8}"
            constant = f"  all {t.constant:g}" if t.constant is not None else ""
            lines.append(f"{name:{width}}  {t.dtype:{kind}}  {t.numel:>12,}  {cells}{constant}")
        if len(shown) < len(self.tensors):
            lines.append(f"... and {len(self.tensors) - len(shown)} more, less alike")
        for sentence in self.findings:
            lines += ["", *textwrap.wrap(sentence, 116, initial_indent="- ", subsequent_indent="  ")]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def diff(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> Diff:
    """Compare two checkpoints, the earlier one first. Nothing in the files is run.

    Raises:
        FileNotFoundError: one of them does not exist.
        CheckpointError: one of them is no checkpoint, or they have no tensor in common.
    """
    return diff_tensors(read_tensors(first), read_tensors(second), f"{first} and {second}")


def diff_tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor], label: str = "the checkpoints") -> Diff:
    """The same for tensors by name."""
    inside = set(second)
    common = [name for name in first if name in inside]
    if not common:
        raise CheckpointError(
            f"{label} have no tensor name in common: the first has {listed(list(first), 3)}; the second has"
            f" {listed(list(second), 3)}"
        )
    rows = compare_all(first, second, common)
    identical = rows.numbers["identical"]
    rows = rows.in_order(np.argsort(np.where(np.isnan(identical), -1.0, -identical), kind="stable"))
    return Diff(rows, _without(first, common), _without(second, common))


def _without(names: Mapping[str, Tensor], common: Sequence[str]) -> tuple[str, ...]:
    if len(names) == len(common):
        return ()
    known = set(common)
    return tuple(name for name in names if name not in known)


def _still_constant(rows: TensorDiffs, still: Flags, full: Flags) -> list[str]:
    """Sentences on low-precision tensors that hold one value everywhere, then as now."""
    (ones,) = np.nonzero(still & ~full & (rows.numbers["constant"] == 1.0))
    if not len(ones):
        return []
    form = formats.of(getattr(torch, rows.dtypes[rows.dtype[ones[0]]].rpartition(BECAME)[2]))
    one, bound = torch.ones(1), ""
    if form is not None:
        down, up = (float(form.half_gap(one, sign * one)) for sign in (-1, 1))
        bound = f", and at 1.0 {short(form.name)} loses every update under {down:.2g} downwards and {up:.2g} upwards"
    which = "That one still holds" if int(still.sum()) == len(ones) == 1 else f"{len(ones)} of those still hold"
    return [
        f"{which} exactly 1.0 in every element, as norms do when they are made{bound}: if it should have been trained,"
        " its updates were probably rounded away."
    ]


def _names(rows: TensorDiffs, which: Flags) -> str:
    return listed(list(map(rows.names.__getitem__, np.flatnonzero(which).tolist())))


def _is_full(rows: TensorDiffs) -> Flags:
    is_full = np.array(["float32" in dtype or "float64" in dtype for dtype in rows.dtypes], dtype=bool)
    found: Flags = is_full[rows.dtype]
    return found


def _share(value: float) -> str:
    """A share that reads 100% and 0% only when it is."""
    text = f"{100 * value:.2f}%"
    if value < 1 and text == "100.00%":
        return ">99.99%"
    return "<0.01%" if value > 0 and text == "0.00%" else text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
