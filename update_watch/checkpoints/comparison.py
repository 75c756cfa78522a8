"""Two tensors compared element by element, whatever kinds of tensors they are and without trusting their sizes.

A file of a kilobyte may hold a tensor of 10^12 elements (expanded), or one whose elements nothing can compute with
(sparse, quantised, four-bit). Work is bounded by what the files store; what cannot be compared says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from update_watch.checkpoints.differences import TensorDiff, TensorDiffs
from update_watch.checkpoints.header import IntArray
from update_watch.checkpoints.rows import batches
from update_watch.checkpoints.stored import Kind, StoredTensors
from update_watch.wording import first_line

_CHUNK = 2**22  # elements compared at once
_SMALL = 2**14  # elements of a tensor up to which it is compared together with others of its kind
_TOGETHER = 2**15 - 1  # elements of those: they stay in the processor's cache, and torch starts no threads for so few
BECAME = " -> "  # between two formats
_TOO_LARGE, _NOT_FINITE = "its numbers are too large to be squared", "it holds NaN or infinity"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compare_all(first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Sequence[str]) -> TensorDiffs:
    """`compare` for tensors with these names, in this order; small ones of one kind together."""
    found = TensorDiffs.none(names)
    kinds: dict[Kind, int] = {}
    sides = _Side(first, names, kinds), _Side(second, names, kinds)
    codes = np.where(sides[0].codes == sides[1].codes, sides[0].codes, -1)
    most = [max(1, _TOGETHER // kind.numel) if _is_small(kind) else 0 for kind in kinds]
    kind_of, alone = list(kinds), np.ones(len(names), dtype=bool)
    for code, at in batches(codes, most):
        with contextlib.suppress(Exception):  # of formats that torch can hold and not compute with: one by one
            _compare_together(kind_of[code], sides[0].rows(at), sides[1].rows(at), found, at)
            alone[at] = False
    for i in np.flatnonzero(alone).tolist():
        found.put(i, compare(names[i], first[names[i]], second[names[i]]))
    return found


class _Side:
    """The tensors of one checkpoint in the order of the names."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Sequence[str], kinds: dict[Kind, int]) -> None:
        self._tensors, self._names = tensors, names
        # the kind of each as its number in `kinds`, which grows; -1 where it must be compared by itself
        self.codes: IntArray
        if isinstance(tensors, StoredTensors):
            known = np.array([kinds.setdefault(kind, len(kinds)) for kind in tensors.kinds], np.int64)
            self._places = tensors.places(names)
            self.codes = known[tensors.codes(self._places)]
        else:
            each = (_kind(tensors[name]) for name in names)
            self.codes = np.array(
                [-1 if kind is None else kinds.setdefault(kind, len(kinds)) for kind in each], np.int64
            )

    def rows(self, which: IntArray) -> Tensor:
        """Tensors of one kind, a row each."""
        if isinstance(self._tensors, StoredTensors):
            return self._tensors.rows(self._places[which])
        return torch.stack([self._tensors[self._names[i]].reshape(-1) for i in which.tolist()])


def _kind(tensor: Tensor) -> Kind | None:
    if type(tensor) is not Tensor or tensor.is_nested or tensor.layout is not torch.strided:
        return None
    if tensor.is_meta or tensor.is_quantized or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return None
    return Kind(tensor.dtype, tuple(tensor.shape), tensor.numel())


def _is_small(kind: Kind) -> bool:
    return 0 < kind.numel <= _SMALL and not kind.dtype.is_complex


def _compare_together(kind: Kind, first: Tensor, second: Tensor, found: TensorDiffs, at: IntArray) -> None:
    """Tensors of one kind, a row each, which stand at these places of what is found. In NumPy, which starts no threads."""
    dtype, numel = str(kind.dtype).removeprefix("torch."), kind.numel
    same = np.count_nonzero(_bits(first).numpy() == _bits(second).numpy(), axis=1)
    numbers = {"identical": same / numel}
    notes: dict[int, str] = {}
    if kind.dtype.is_floating_point and _widens(kind.dtype):
        a, b = first.double().numpy(), second.double().numpy()
        with np.errstate(all="ignore"):
            change, norm = np.square(b - a).sum(1), np.square(a).sum(1)
            low, high = np.minimum(a.min(1), b.min(1)), np.maximum(a.max(1), b.max(1))
            fine = np.isfinite(change) & np.isfinite(norm)
            numbers["change"] = np.where(fine, np.sqrt(change), np.nan)
            numbers["relative_change"] = np.where(fine & (norm > 0), np.sqrt(change / norm), np.nan)
            numbers["constant"] = np.where(fine & (low == high) & (numel > 1), low, np.nan)
        if not fine.all():
            is_finite = np.isfinite(a).all(1) & np.isfinite(b).all(1)
            notes = {int(at[k]): _TOO_LARGE if is_finite[k] else _NOT_FINITE for k in np.flatnonzero(~fine)}
    elif kind.dtype.is_floating_point:
        notes = dict.fromkeys(at.tolist(), f"torch cannot compute with {dtype}: its bits alone are compared")
    found.put_together(at, dtype, numel, numbers, notes)


def compare(name: str, first: Tensor, second: Tensor) -> TensorDiff:
    """What of `first` is the same in `second`; never raises for what they hold."""
    kinds = [str(t.dtype).removeprefix("torch.") for t in (first, second)]
    row = TensorDiff(name, kinds[0] if kinds[0] == kinds[1] else BECAME.join(kinds), 0)
    try:
        row = dataclasses.replace(row, numel=first.numel())
        problem = _obstacle(first, second)
        return dataclasses.replace(row, note=f"not compared: {problem}") if problem else _measured(row, first, second)
    except Exception as error:  # of formats that torch can hold and not compute with
        return dataclasses.replace(row, note=f"not compared: {first_line(error)}")


def _obstacle(first: Tensor, second: Tensor) -> str:
    """Why two tensors cannot be compared; "" where they can."""
    for tensor in (first, second):
        if tensor.is_quantized or tensor.is_nested or tensor.layout is not torch.strided:
            kind = "quantised" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
            return f"it is {kind.removeprefix('torch.').replace('_', ' ')}, and only dense tensors are compared"
        if tensor.is_meta:
            return "it has a shape and no values (meta)"
    if first.shape != second.shape:
        return f"its shape {tuple(first.shape)} became {tuple(second.shape)}"
    if first.is_complex() != second.is_complex():
        return "one is complex, the other real"
    if not first.numel():
        return "it has no elements"
    first, second, _ = _without_expansion(first, second)
    stored = max(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in (first, second))
    if first.numel() > stored:
        return f"its {first.numel():,} elements are views of {stored:,} stored ones"
    return ""


def _without_expansion(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both without the dimensions along which both repeat themselves, and how often they do."""
    repeats = 1
    for dim in range(first.dim()):
        if first.shape[dim] > 1 and first.stride(dim) == 0 == second.stride(dim):
            repeats *= first.shape[dim]
            first, second = first.narrow(dim, 0, 1), second.narrow(dim, 0, 1)
    return first, second, repeats


def _measured(row: TensorDiff, first: Tensor, second: Tensor) -> TensorDiff:
    first, second, repeats = _without_expansion(first, second)
    if first.is_complex():
        first, second = torch.view_as_real(first.resolve_conj()), torch.view_as_real(second.resolve_conj())
    same, change, norm, low, high = 0, 0.0, 0.0, math.inf, -math.inf
    is_finite = True
    floating = first.is_floating_point() and second.is_floating_point()
    has_values = floating and _widens(first.dtype) and _widens(second.dtype)
    parts = zip(torch.split(first.reshape(-1), _CHUNK), torch.split(second.reshape(-1), _CHUNK), strict=True)
    for a, b in parts:
        same += int((_bits(a) == _bits(b)).sum()) if a.dtype == b.dtype else int((a.double() == b.double()).sum())
        if has_values:
            wide_a, wide_b = a.double(), b.double()
            change += float((wide_b - wide_a).square().sum())
            norm += float(wide_a.square().sum())
            is_finite &= bool(wide_a.isfinite().all()) and bool(wide_b.isfinite().all())
            low = min(low, float(wide_a.min()), float(wide_b.min()))
            high = max(high, float(wide_a.max()), float(wide_b.max()))
    row = dataclasses.replace(row, identical=same / first.numel())
    if not floating:
        return row
    if not has_values:
        return dataclasses.replace(row, note=f"torch cannot compute with {row.dtype}: its bits alone are compared")
    row = dataclasses.replace(row, identical=same / first.numel())
    if not math.isfinite(change) or not math.isfinite(norm):
        return dataclasses.replace(row, note=_TOO_LARGE if is_finite else _NOT_FINITE)
    relative = math.sqrt(change / norm) if norm else None
    constant = low if low == high and row.numel > 1 else None
    return dataclasses.replace(row, change=math.sqrt(change * repeats), relative_change=relative, constant=constant)


@functools.lru_cache
def _widens(dtype: torch.dtype) -> bool:
    """Whether torch turns its numbers into FP64."""
    try:
        torch.zeros(dtype.itemsize, dtype=torch.uint8).view(dtype).double()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])
