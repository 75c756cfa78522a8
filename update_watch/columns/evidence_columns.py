"""A window's evidence as columns: the same number of all tensors side by side, so that thousands are judged as a few.

Tensors of one kind are a block, which knows its numbers as arrays or as objects. A `TensorEvidence` of each is only made where
somebody asks for it. Names are those of `TensorEvidence`, with a dot within its values: "numbers.efficiency".
"""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from update_watch.columns.late_rows import LateRows
from update_watch.evidence import AccumulatorEvidence, TensorEvidence
from update_watch.worker import rest

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]
_T = TypeVar("_T")


class Values(Protocol):
    """The values of some rows."""

    def raw(self, name: str) -> list[Any]:
        """As they are in the evidence."""

    def column(self, name: str) -> Array:
        """As numbers; NaN is what is not known."""


class Members(Values, Protocol):
    """The values of the accumulators of one name."""

    def member(self, row: int) -> Any:
        """All of one."""


class Part(NamedTuple):
    """One accumulator of the tensors that have it; names are those of `AccumulatorEvidence`."""

    rows: Rows
    values: Members


class Block(Values, Protocol):
    """Some tensors of a window."""

    def __len__(self) -> int: ...

    def tensor(self, row: int) -> TensorEvidence:
        """All of one."""

    def having(self, name: str, test: Callable[[Any], bool]) -> Mask:
        """[n] whether the value, of which there are few different ones, is as asked."""

    def histogram(self, name: str, length: int) -> Array:
        """[n, length] of shares; NaN of those that have none."""

    def parts(self) -> dict[str, Part]:
        """The accumulators, by name."""


def having(values: Sequence[Any], test: Callable[[Any], bool]) -> Mask:
    """[n] whether a value, of which there are few different ones, is as asked."""
    found = {value: bool(test(value)) for value in set(values)}
    return np.fromiter(map(found.__getitem__, values), bool, len(values))


class Lists:
    """Values that stay the same from window to window; what is made of them is kept."""

    def __init__(self, values: Mapping[str, list[Any]]) -> None:
        self.values = values
        self._columns: dict[str, Array] = {}
        self._codes: dict[str, tuple[Rows, list[Any]]] = {}

    def column(self, name: str) -> Array:
        """[n] as numbers; not to be written to."""
        found = self._columns.get(name)
        if found is None:
            found = self._columns[name] = np.array(self.values[name], dtype=np.float64)
        return found

    def having(self, name: str, test: Callable[[Any], bool]) -> Mask:
        """[n] whether the value is as asked."""
        known = self._codes.get(name)
        if known is None:
            values = self.values[name]
            code_of = {value: code for code, value in enumerate(dict.fromkeys(values))}
            codes = np.fromiter(map(code_of.__getitem__, values), np.intp, len(values))
            known = self._codes[name] = codes, list(code_of)
        codes, different = known
        return np.array([bool(test(value)) for value in different], bool)[codes]


class Objects:
    """Values of which each row is an object."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def member(self, row: int) -> Any:
        return self._rows[row]

    def raw(self, name: str) -> list[Any]:
        get = operator.attrgetter(name)
        return [get(row) for row in self._rows]

    def column(self, name: str) -> Array:
        values = self.raw(name)
        found = np.array(values, dtype=np.float64)  # None becomes NaN
        for i in np.flatnonzero(np.isnan(found)).tolist():
            if values[i] is not None:
                found[i] = np.inf  # known, and no number: a NaN means more than that there is none
        return found


class OneByOne(Objects):
    """A block of tensors that were made already."""

    _rows: Sequence[TensorEvidence]

    def __len__(self) -> int:
        return len(self._rows)

    def tensor(self, row: int) -> TensorEvidence:
        return self._rows[row]

    def having(self, name: str, test: Callable[[Any], bool]) -> Mask:
        return having(self.raw(name), test)

    def histogram(self, name: str, length: int) -> Array:
        found = np.full((len(self._rows), length), np.nan)
        for i, shares in enumerate(self.raw(name)):
            if shares:
                found[i] = 0.0
                found[i, : len(shares)] = shares[:length]
        return found

    def parts(self) -> dict[str, Part]:
        rows: dict[str, list[int]] = {}
        members: dict[str, list[AccumulatorEvidence]] = {}
        for i, tensor in enumerate(self._rows):
            for name, accumulator in tensor.accumulators.items():
                if name not in rows:
                    rows, members = (_with(known, tensor.accumulators) for known in (rows, members))
                rows[name].append(i)
                members[name].append(accumulator)
        return {name: Part(np.array(found, dtype=np.intp), Objects(members[name])) for name, found in rows.items()}


def _with(known: dict[str, list[_T]], names: Iterable[str]) -> dict[str, list[_T]]:
    """The lists by name, with empty ones for those that are new: in an order in which each follows what it followed here."""
    order, at = list(known), 0
    for name in names:
        if name in known:
            at = order.index(name) + 1
        else:
            order.insert(at, name)
            at += 1
    return {name: known.get(name, []) for name in order}


class _Joined:
    """Values of several blocks, one after the other."""

    def __init__(self, values: Sequence[Values]) -> None:
        self._values: Sequence[Any] = values

    def raw(self, name: str) -> list[Any]:
        return list(itertools.chain.from_iterable([one.raw(name) for one in self._values]))

    def column(self, name: str) -> Array:
        return np.concatenate([one.column(name) for one in self._values])


class _JoinedMembers(_Joined):
    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__([part.values for part in parts])
        self._starts = [0, *itertools.accumulate(len(part.rows) for part in parts)]

    def member(self, row: int) -> Any:
        at = bisect.bisect_right(self._starts, row) - 1
        return self._values[at].member(row - self._starts[at])


class _Some:
    """Some rows of others."""

    def __init__(self, values: Members, rows: Rows) -> None:
        self._values, self._rows = values, rows

    def member(self, row: int) -> Any:
        return self._values.member(int(self._rows[row]))

    def raw(self, name: str) -> list[Any]:
        values = self._values.raw(name)
        return [values[row] for row in self._rows.tolist()]

    def column(self, name: str) -> Array:
        found: Array = self._values.column(name)[self._rows]
        return found


class Columns:
    """All tensors of a window, in the order of its report."""

    def __init__(self, blocks: Iterable[Block], order: Rows | None = None) -> None:
        """`order`: for each place in the report a row of the blocks, counted through; None: as they come."""
        self._blocks = [block for block in blocks if len(block)]
        self._starts = [0, *itertools.accumulate(len(block) for block in self._blocks)]
        self.order = np.arange(self._starts[-1]) if order is None else order
        self._joined = _Joined(self._blocks)
        self._raw: dict[str, list[Any]] = {}
        self._columns: dict[str, Array] = {}

    def __len__(self) -> int:
        return len(self.order)

    def taken(self, places: Sequence[int]) -> Columns:
        """Those at some places."""
        return Columns(self._blocks, self.order[np.array(places, dtype=np.intp)])

    def raw(self, name: str) -> list[Any]:
        """[n] as they are in the evidence."""
        found = self._raw.get(name)
        if found is None:
            values = self._joined.raw(name)
            found = self._raw[name] = [values[row] for row in self.order.tolist()]
            rest()
        return found

    def column(self, name: str) -> Array:
        """[n] as numbers; NaN is what is not known."""
        found = self._columns.get(name)
        if found is None:
            found = np.zeros(0) if not self._blocks else self._joined.column(name)[self.order]
            self._columns[name] = found
            rest()
        return found

    def having(self, name: str, test: Callable[[Any], bool]) -> Mask:
        """[n] whether the value, of which there are few different ones, is as asked."""
        if not self._blocks:
            return np.zeros(0, bool)
        found: Mask = np.concatenate([block.having(name, test) for block in self._blocks])[self.order]
        return found

    def histogram(self, name: str, length: int) -> Array:
        """[n, length] of shares; NaN of those that have none."""
        if not self._blocks:
            return np.zeros((0, length))
        found: Array = np.concatenate([block.histogram(name, length) for block in self._blocks])[self.order]
        return found

    def parts(self) -> dict[str, Part]:
        """The accumulators by name; rows are places in the report."""
        place = np.full(self._starts[-1], -1, dtype=np.intp)
        place[self.order] = np.arange(len(self.order))
        found: dict[str, list[Part]] = {}
        for start, block in zip(self._starts, self._blocks, strict=False):
            of_block = block.parts()
            found = _with(found, of_block)
            for name, part in of_block.items():
                places = place[start + part.rows]
                kept = np.flatnonzero(places >= 0)
                if len(kept) == len(places):
                    found[name].append(Part(places, part.values))
                elif len(kept):
                    found[name].append(Part(places[kept], _Some(part.values, kept)))
        return {
            name: Part(np.concatenate([part.rows for part in parts]), _JoinedMembers(parts))
            for name, parts in found.items()
            if parts
        }

    def tensor(self, place: int) -> TensorEvidence:
        """All of one."""
        row = int(self.order[place])
        block = int(np.searchsorted(self._starts, row, "right")) - 1
        return self._blocks[block].tensor(row - self._starts[block])


class View:
    """One tensor of the columns: attributes as those of its `TensorEvidence`, apart from its numbers and accumulators.

    The first to ask for an attribute has it made for all.
    """

    __slots__ = ("_columns", "_place")

    def __init__(self, columns: Columns, place: int) -> None:
        self._columns, self._place = columns, place

    def __getattr__(self, name: str) -> Any:
        return self._columns.raw(name)[self._place]


class Tensors(LateRows[TensorEvidence]):
    """The tensors of a window, each made when it is asked for."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns)

    def row(self, at: int) -> TensorEvidence:
        return self.columns.tensor(at)


def columns_of(tensors: Sequence[TensorEvidence]) -> Columns:
    """The columns of a window's tensors."""
    return tensors.columns if isinstance(tensors, Tensors) else Columns([OneByOne(tensors)])
