"""What changed between two checkpoints: tensor by tensor, the elements whose stored bits are the same.

Norms that are still exactly 1.0 after thousands of steps are the plainest sign of updates lost to rounding, and a
checkpoint shows them after the fact, without a watch. It cannot show more: unchanged bits are no proof of a fault.
"""

from __future__ import annotations

import dataclasses
import math
import os
import textwrap
from typing import Any

import torch
from torch import Tensor

from update_watch import formats
from update_watch.checkpoints.files import CheckpointError, read_tensors
from update_watch.wording import listed, percent, plural, short

_CHUNK = 2**22  # elements compared at once
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

NOT_ALWAYS_A_FAULT = (
    "Unchanged bits are not always a fault: where the optimizer keeps FP32 master weights, a low-precision copy changes"
    " only when many updates have added up to its next value, and frozen tensors or embedding rows without tokens stay"
    " as they are. A watch on some hundred steps tells whether updates are lost: update_watch.watch(model, optimizer)."
)


@dataclasses.dataclass(frozen=True)
class TensorDiff:
    """One tensor that is in both checkpoints."""

    name: str
    dtype: str  # "bfloat16"; "float32 -> bfloat16" where the formats differ
    numel: int
    identical: float | None = None  # share of elements with the same bits (the same value where the formats differ)
    change: float | None = None  # L2 norm of the difference; None for integers and where a value is not finite
    relative_change: float | None = None  # the same over the L2 norm of the first; None where that is 0
    constant: float | None = None  # the one value that all elements of both have
    note: str = ""  # why it could not be compared, or what is wrong with its values

    @property
    def has_moved(self) -> bool:
        """Some element differs."""
        return self.identical is not None and self.identical < 1


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
        found += [f"{t.name}: {t.note}." for t in self.tensors if t.note]
        for names, which in ((self.only_first, "first"), (self.only_second, "second")):
            if names:
                found.append(f"Only in the {which} checkpoint: {listed(names)}.")
        return tuple(found)

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
        width = max((len(t.name) for t in shown), default=6)
        kind = max((len(t.dtype) for t in shown), default=6)
        lines = [f"{'tensor':{width}}  {'format':{kind}}  {'elements':>12}  {'identical':>9}  {'change':>8}  relative"]
        lines.append("-" * len(lines[0]))
        for t in shown:
            same = "-" if t.identical is None else _share(t.identical)
            cells = f"{same:>9}  {_number(t.change):>8}  {_number(t.relative_change):>8}"
            constant = f"  all {t.constant:g}" if t.constant is not None else ""
            lines.append(f"{t.name:{width}}  {t.dtype:{kind}}  {t.numel:>12,}  {cells}{constant}")
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


def diff_tensors(first: dict[str, Tensor], second: dict[str, Tensor], label: str = "the checkpoints") -> Diff:
    """The same for tensors by name."""
    common = [name for name in first if name in second]
    if not common:
        raise CheckpointError(
            f"{label} have no tensor name in common: the first has {listed(tuple(first), 3)}; the second has"
            f" {listed(tuple(second), 3)}"
        )
    rows = [_compare(name, first[name], second[name]) for name in common]
    rows.sort(key=lambda t: -1.0 if t.identical is None else -t.identical)
    return Diff(
        tuple(rows),
        tuple(name for name in first if name not in second),
        tuple(name for name in second if name not in first),
    )


def _compare(name: str, first: Tensor, second: Tensor) -> TensorDiff:
    kinds = [str(t.dtype).removeprefix("torch.") for t in (first, second)]
    row = TensorDiff(name, kinds[0] if kinds[0] == kinds[1] else " -> ".join(kinds), first.numel())
    problem = ""
    if first.shape != second.shape:
        problem = f"its shape {tuple(first.shape)} became {tuple(second.shape)}"
    elif first.is_complex() != second.is_complex():
        problem = "one is complex, the other real"
    elif not first.numel():
        problem = "it has no elements"
    if problem:
        return dataclasses.replace(row, note=f"not compared: {problem}")
    if first.is_complex():
        first, second = torch.view_as_real(first), torch.view_as_real(second)
    same, change, norm, low, high = 0, 0.0, 0.0, math.inf, -math.inf
    floating = first.is_floating_point() and second.is_floating_point()
    parts = zip(torch.split(first.reshape(-1), _CHUNK), torch.split(second.reshape(-1), _CHUNK), strict=True)
    for a, b in parts:
        same += int((_bits(a) == _bits(b)).sum()) if a.dtype == b.dtype else int((a.double() == b.double()).sum())
        if floating:
            wide_a, wide_b = a.double(), b.double()
            change += float((wide_b - wide_a).square().sum())
            norm += float(wide_a.square().sum())
            low = min(low, float(wide_a.min()), float(wide_b.min()))
            high = max(high, float(wide_a.max()), float(wide_b.max()))
    identical = same / first.numel()
    if not floating:
        return dataclasses.replace(row, identical=identical)
    if not math.isfinite(change) or not math.isfinite(norm):
        return dataclasses.replace(row, identical=identical, note="it holds NaN or infinity")
    relative = math.sqrt(change / norm) if norm else None
    constant = low if low == high and first.numel() > 1 else None
    return dataclasses.replace(
        row, identical=identical, change=math.sqrt(change), relative_change=relative, constant=constant
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])


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
    return listed(tuple(t.name for t in tensors))


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
