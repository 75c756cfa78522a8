"""Objects of rows that are kept as columns, each made when it is asked for."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import TypeVar, overload

_Row = TypeVar("_Row")


class LateRows(Sequence[_Row]):
    """A sequence of them; who inherits says how many there are and what a `row` is."""

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

    def __iter__(self) -> Iterator[_Row]:
        return map(self.row, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (LateRows, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    def __hash__(self) -> int:
        return hash(self[:])
