"""What changed between two checkpoints: tensor by tensor, the elements whose stored bits are the same.

Norms that are still exactly 1.0 after thousands of steps are the plainest sign of updates lost to rounding, and a
checkpoint shows them after the fact, without a watch. It cannot show more: unchanged bits are no proof of a fault.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from update_watch import formats
from update_watch.checkpoints.comparison import TensorDiff, compare_all
from update_watch.checkpoints.files import CheckpointError, read_tensors
from update_watch.wording import end_of, listed, percent, plural, printable, short

_NOTES = 20  # tensors with a note of their own

NOT_ALWAYS_A_FAULT = (
    "Unchanged bits are not always a fault: where the optimizer keeps FP32 master weights, a low-precision copy changes"
    " only when many updates have added up to its next value, and frozen tensors or embedding rows without tokens stay"
    " as they are. A watch on some hundred steps tells whether updates are lost: update_watch.watch(model, optimizer)."
)


@dataclasses.dataclass(frozen=True)
class Diff:
    """Two checkpoints compared. `print` it."""

    tensors: tuple[TensorDiff, ...]  # most alike first
    only_first: tuple[str, ...] = ()  # names that only the first checkpoint has
    only_second: tuple[str, ...] = ()

    @property
    def never_moved(self) -> tuple[str, ...]:
        """Floating-point tensors that are the same to the last bit."""
        return tuple(t.name for t in self.tensors if t.identical == 1 and t.change is not None)

    @property
    def findings(self) -> tuple[str, ...]:
        """What the comparison shows, in sentences."""
        weights = [t for t in self.tensors if t.change is not None]
        still = [t for t in weights if t.identical == 1]
        found: list[str] = []
        if weights and len(still) == len(weights):
            found.append(f"All {plural(len(weights), 'tensor')} are the same to the last bit.")
        elif still:
            found.append(f"{len(still)} of {plural(len(weights), 'tensor')} never moved: {_names(still)}.")
        found += _still_constant(still)
        moved = [t for t in weights if t.identical is not None and t.identical < 1]
        if moved:
            elements = sum(t.numel for t in moved)
            same = sum((t.identical or 0.0) * t.numel for t in moved) / elements
            found.append(
                f"Of the elements of the {plural(len(moved), 'tensor')} that moved, {percent(same)} have the same bits"
                " in both checkpoints."
            )
        full = [t for t in still if _is_full(t.dtype)]
        if full and moved:
            found.append(
                f"Rounding does not explain why {plural(len(full), 'full-precision tensor')} never moved: look whether"
                f" it is frozen, unused or in no optimizer ({_names(full)})."
            )
        if any(t.identical for t in weights if not _is_full(t.dtype)):
            found.append(NOT_ALWAYS_A_FAULT)
        noted = [t for t in self.tensors if t.note]
        found += [f"{t.name}: {t.note}." for t in noted[:_NOTES]]
        if len(noted) > _NOTES:
            found.append(f"{plural(len(noted) - _NOTES, 'more tensor')} could not be compared or hold such values.")
        for names, which in ((self.only_first, "first"), (self.only_second, "second")):
            if names:
                found.append(f"Only in the {which} checkpoint: {listed(names)}.")
        return tuple(printable(sentence) for sentence in found)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "tensors": [dataclasses.asdict(t) for t in self.tensors],
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
    is_collecting = gc.isenabled()
    gc.disable()  # looking for cycles among a million small objects, which all stay, takes as long as making them
    try:
        return diff_tensors(read_tensors(first), read_tensors(second), f"{first} and {second}")
    finally:
        if is_collecting:
            gc.enable()


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
    rows.sort(key=lambda t: -1.0 if t.identical is None else -t.identical)
    return Diff(
        tuple(rows),
        _without(first, common),
        _without(second, common),
    )


def _without(names: Mapping[str, Tensor], common: Sequence[str]) -> tuple[str, ...]:
    if len(names) == len(common):
        return ()
    known = set(common)
    return tuple(name for name in names if name not in known)


def _still_constant(still: list[TensorDiff]) -> list[str]:
    """Sentences on low-precision tensors that hold one value everywhere, then as now."""
    ones = [t for t in still if t.constant == 1.0 and not _is_full(t.dtype)]
    if not ones:
        return []
    form = formats.of(getattr(torch, ones[0].dtype))
    one, bound = torch.ones(1), ""
    if form is not None:
        down, up = (float(form.half_gap(one, sign * one)) for sign in (-1, 1))
        bound = f", and at 1.0 {short(form.name)} loses every update under {down:.2g} downwards and {up:.2g} upwards"
    which = "That one still holds" if len(still) == len(ones) == 1 else f"{len(ones)} of those still hold"
    return [
        f"{which} exactly 1.0 in every element, as norms do when they are made{bound}: if it should have been trained,"
        " its updates were probably rounded away."
    ]


def _names(tensors: list[TensorDiff]) -> str:
    return listed([t.name for t in tensors])


def _is_full(dtype: str) -> bool:
    return "float32" in dtype or "float64" in dtype


def _share(value: float) -> str:
    """A share that reads 100% and 0% only when it is."""
    text = f"{100 * value:.2f}%"
    if value < 1 and text == "100.00%":
        return ">99.99%"
    return "<0.01%" if value > 0 and text == "0.00%" else text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
