"""What a comparison found of each tensor, in columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from update_watch.checkpoints.header import IntArray
from update_watch.checkpoints.rows import Floats, number_at
from update_watch.columns.late_rows import LateRows


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


_NUMBERS = ("identical", "change", "relative_change", "constant")


@dataclasses.dataclass(frozen=True, eq=False)
class TensorDiffs(LateRows[TensorDiff]):
    """Those of n tensors: the fields of `TensorDiff` as arrays (n,). NaN stands for None."""

    names: Sequence[str]
    dtypes: list[str]  # those there are
    dtype: IntArray  # the place of each tensor's in `dtypes`
    numel: IntArray
    numbers: Mapping[str, Floats]  # by name of the field
    notes: dict[int, str]  # by tensor, where there is one

    @classmethod
    def none(cls, names: Sequence[str]) -> TensorDiffs:
        """Of tensors with these names nothing so far."""
        count = len(names)
        numbers = {field: np.full(count, np.nan) for field in _NUMBERS}
        return cls(names, [], np.zeros(count, np.int64), np.zeros(count, np.int64), numbers, {})

    def put(self, at: int, row: TensorDiff) -> None:
        """Of one tensor."""
        given = {field: value for field in _NUMBERS if (value := getattr(row, field)) is not None}
        self.put_together(np.array([at]), row.dtype, row.numel, given, {at: row.note} if row.note else {})

    def put_together(
        self, at: IntArray, dtype: str, numel: int, numbers: Mapping[str, Any], notes: Mapping[int, str]
    ) -> None:
        """Of tensors of one format and size, which stand at these places."""
        if dtype not in self.dtypes:
            self.dtypes.append(dtype)
        self.dtype[at] = self.dtypes.index(dtype)
        self.numel[at] = numel
        for field, values in numbers.items():
            self.numbers[field][at] = values
        self.notes.update(notes)

    def in_order(self, order: IntArray) -> TensorDiffs:
        """The same in another order: of each its place in this one."""
        names = list(map(self.names.__getitem__, order.tolist()))
        numbers = {field: values[order] for field, values in self.numbers.items()}
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        notes = {int(places[i]): note for i, note in self.notes.items()}
        return TensorDiffs(names, self.dtypes, self.dtype[order], self.numel[order], numbers, notes)

    def row(self, at: int) -> TensorDiff:
        numbers = {field: number_at(values, at) for field, values in self.numbers.items()}
        dtype, note = self.dtypes[self.dtype[at]], self.notes.get(at, "")
        return TensorDiff(self.names[at], dtype, int(self.numel[at]), **numbers, note=note)

    def __len__(self) -> int:
        return len(self.names)
