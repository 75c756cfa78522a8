"""Rows that are kept as columns: of a million tensors all are counted, and some are looked at."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import TypeVar, overload

import numpy as np
import numpy.typing as npt

from update_watch.checkpoints.header import IntArray

_Row = TypeVar("_Row")
Floats = npt.NDArray[np.float64]


class Rows(Sequence[_Row]):
    """Objects that are made as they are asked for."""

    def row(self, at: int) -> _Row:
        """That at this place, from 0 on."""
        raise NotImplementedError

    @overload
    def __getitem__(self, at: int) -> _Row: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[_Row, ...]: ...

    def __getitem__(self, at: int | slice) -> _Row | tuple[_Row, ...]:
        found = range(len(self))[at]
        return self.row(found) if isinstance(found, int) else tuple(map(self.row, found))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Rows, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    def __hash__(self) -> int:
        return hash(self[:])


def number_at(values: Floats, at: int) -> float | None:
    """NaN stands for None."""
    value = float(values[at])
    return None if math.isnan(value) else value


def batches(codes: IntArray, most: Sequence[int]) -> Iterator[tuple[int, IntArray]]:
    """Each code from 0 on with the places at which it stands, `most[code]` of them at a time; none where that is 0."""
    (places,) = np.nonzero(codes >= 0)
    places = places[np.argsort(codes[places], kind="stable")]
    for alike in np.split(places, np.flatnonzero(np.diff(codes[places])) + 1) if len(places) else []:
        code = int(codes[alike[0]])
        for begin in range(0, len(alike) if most[code] else 0, most[code] or 1):
            yield code, alike[begin : begin + most[code]]
