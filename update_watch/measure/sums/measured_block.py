"""The evidence of a cohort's measured tensors as columns: the numbers stay arrays, until somebody asks for one tensor.

Legend: n tensors, S states, B bins of headroom, Q parts of an octave. NaN is what is not known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from update_watch.columns.evidence_columns import Lists, Mask, Objects, Part, Rows, having
from update_watch.columns.products import summed
from update_watch.evidence import AccumulatorEvidence, Numbers, TensorEvidence, made
from update_watch.measure.sums.error_bars import Array
from update_watch.measure.sums.steps import Steps
from update_watch.measure.sums.window_sums import WindowSums
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, PLACES

_NOTHING = Numbers()
_OF_NUMBERS = tuple(f"numbers.{name}" for name in Numbers._fields)
_HISTOGRAMS = ("headroom_histogram", "movement_histogram", "movement_places")


_DEFAULTS: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(TensorEvidence)
    if field.default is not dataclasses.MISSING
}


class StateFacts(NamedTuple):
    """A state of the tensors that have it and whose replay of it is exact."""

    rows: Rows
    dtypes: list[str]
    rates: list[float | None]  # 1 - beta, where it is known


@dataclasses.dataclass(frozen=True)
class CohortFacts:
    """What the host knows of tensors when their window closes: a value of each in every list."""

    given: Mapping[str, list[Any]]  # identity, settings and counters, by the names of `TensorEvidence`; no numbers yet
    sizes: list[int]  # real samples per step
    states: Mapping[str, StateFacts]
    first_rates: list[float | None]  # learning rate at the window's first look at headroom
    stays: Lists = dataclasses.field(
        default_factory=lambda: Lists({})
    )  # of `given`, what was the same in the window before

    def __len__(self) -> int:
        return len(self.sizes)

    def evidence(self, row: int) -> TensorEvidence:
        """Of one tensor."""
        return made(**{name: values[row] for name, values in self.given.items()})


def values_of(column: npt.NDArray[Any]) -> list[Any]:
    """None for what is not known."""
    values: list[Any] = column.tolist()
    if column.dtype == np.float64:
        for i in np.flatnonzero(np.isnan(column)).tolist():
            values[i] = None
    return values


class MeasuredBlock:
    """Tensors of one cohort that were measured."""

    def __init__(
        self, sums: WindowSums, steps: Steps, numbers: Mapping[str, Array], facts: CohortFacts, skipped: int
    ) -> None:
        """`numbers`: of the weights, from `sums`."""
        self._given, self._stays, self._count = dict(facts.given), facts.stays, len(facts)
        self._columns: dict[str, npt.NDArray[Any]] = {
            f"numbers.{name}" if name in Numbers._fields else name: column for name, column in numbers.items()
        }
        self._what_if = self._columns.pop("what_if")
        n = self._count
        headroom_2nB = sums.headroom_2nB
        movement_nB, places_nQ = sums.movement_nB, sums.places_nQ
        first_rate = np.array([rate or np.nan for rate in facts.first_rates], dtype=np.float64)
        moved = summed(np.ascontiguousarray(movement_nB.T))
        moved = np.where((moved > 0) & np.isfinite(moved) & ~np.isnan(first_rate), moved, np.nan)
        counted = summed(np.ascontiguousarray(headroom_2nB[0].T))
        with np.errstate(all="ignore"):
            self._histograms = {
                "headroom_histogram": headroom_2nB[0] / np.where(counted != 0, counted, np.nan)[:, None],
                "movement_histogram": movement_nB / moved[:, None],
                "movement_places": places_nQ / moved[:, None],
            }
            critical = first_rate * 2.0 ** -median_headrooms(headroom_2nB[1])
        has_states = np.zeros(n, bool)
        for state in facts.states.values():
            has_states[state.rows] = True
        is_untouched = sums.is_untouched() & steps.is_whole_n & has_states
        measured = np.rint(steps.measured_n).astype(np.int64)
        sizes = np.array(facts.sizes)
        self._columns |= {
            "measured_steps": measured,
            "gradient_looks": np.rint(np.maximum(steps.measured_n, steps.checks_n)).astype(np.int64),
            "gradient_blind": np.where(is_untouched, 0, np.rint(steps.blind_n)).astype(np.int64),
            "skipped_steps": np.full(n, skipped),
            "finite": sums.is_finite(),
            "movement_lr": np.where(np.isnan(moved), np.nan, first_rate),
            "critical_lr": critical,
            "displacement_evidence": sums.evidence_n / np.where(steps.is_whole_n, sizes, sizes // 2),
        }
        self._parts: dict[str, _Accumulators | _Told] = {}

    @classmethod
    def unmeasured(cls, given: Mapping[str, list[Any]]) -> MeasuredBlock:
        """A block of tensors of which no more is known than what is `given`, as in `CohortFacts`."""
        new = object.__new__(cls)
        new._stays = Lists({})
        new._given, new._count, new._columns, new._parts = dict(given), len(given["name"]), {}, {}
        new._what_if = np.full(new._count, np.nan)
        lengths = (HEADROOM_BINS, HEADROOM_BINS, PLACES)
        new._histograms = {
            name: np.broadcast_to(np.nan, (new._count, length))
            for name, length in zip(_HISTOGRAMS, lengths, strict=True)
        }
        return new

    def add_states(self, sums: WindowSums, states: Sequence[str], facts: CohortFacts) -> None:
        """The numbers of these states, and those of the decay."""
        parts = sums.state_numbers()
        for k, name in enumerate(states):
            state = facts.states[name]
            numbers = [{field: values_Sn[k] for field, values_Sn in part.items()} for part in parts]
            self._add(name, state.rows, numbers, state.dtypes, state.rates)
        decay = sums.decay_numbers()
        rows = np.flatnonzero(~np.isnan(decay["wanted_fraction"]))
        formats = [self._given["dtype"][i] for i in rows.tolist()]
        self._add("weight_decay", rows, [decay, {}, {}], formats, [None] * len(rows))

    def _add(
        self,
        name: str,
        rows: Rows,
        numbers: Sequence[Mapping[str, Array]],
        dtypes: list[str],
        rates: list[float | None],
    ) -> None:
        if len(rows):
            of_rows = [{field: column[rows] for field, column in part.items()} for part in numbers]
            self._parts[name] = _Accumulators(name, rows, of_rows, dtypes, rates)

    def put(self, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        """Put these in the place of what is known under their names."""
        self._columns |= columns

    def put_some(self, rows: list[int], name: str, values: list[Any]) -> None:
        """Put these of some rows in the place of what is known under this name."""
        default = _default(name)
        if (
            name in self._columns
            or name in self._given
            or {*map(type, values)} != {float if default is None else type(default)}
        ):
            column = np.array(self.raw(name), dtype=object)
        else:  # numbers
            column = np.full(self._count, np.nan if default is None else default)
        column[rows] = values
        self._columns[name] = column

    def add(self, name: str, rows: Rows, members: Sequence[AccumulatorEvidence]) -> None:
        """Accumulators that others than the optimizer have, of these rows, rising."""
        self._parts[name] = _Told(name, rows, members)

    # --- as a block of a window --------------------------------------------------------------------

    def __len__(self) -> int:
        return self._count

    def raw(self, name: str) -> list[Any]:
        column = self._columns.get(name)
        if column is not None:
            return values_of(column)
        if name in _HISTOGRAMS:
            shares_nB = self._histograms[name].tolist()
            return [None if shares[0] != shares[0] else tuple(shares) for shares in shares_nB]
        if name == "what_if":
            return [None if value is None else {"bfloat16": value} for value in values_of(self._what_if)]
        return self._given[name] if name in self._given else [_default(name)] * self._count

    def column(self, name: str) -> Array:
        column = self._columns.get(name)
        if column is None and self._does_stay(name):
            return self._stays.column(name)
        if column is None and name not in self._given:
            default = _default(name)
            return np.full(self._count, np.nan if default is None else default, dtype=np.float64)
        found: Array = np.array(self.raw(name) if column is None else column, dtype=np.float64)
        return found

    def having(self, name: str, test: Callable[[Any], bool]) -> Mask:
        return self._stays.having(name, test) if self._does_stay(name) else having(self.raw(name), test)

    def _does_stay(self, name: str) -> bool:
        return name not in self._columns and self._stays.values.get(name) is self._given.get(name, _NOTHING)

    def histogram(self, name: str, length: int) -> Array:
        found: Array = self._histograms[name]
        assert found.shape[1] == length
        return found

    def parts(self) -> dict[str, Part]:
        return {name: Part(part.rows, part) for name, part in self._parts.items()}

    def tensor(self, row: int) -> TensorEvidence:
        fields = {name: values[row] for name, values in self._given.items()}
        fields |= {name: _value(column, row) for name, column in self._columns.items() if name not in _OF_NUMBERS}
        of_numbers = (self._columns.get(name) for name in _OF_NUMBERS)
        for name in _HISTOGRAMS:
            shares = self._histograms[name][row].tolist()
            fields[name] = None if shares[0] != shares[0] else tuple(shares)
        what_if = _value(self._what_if, row)
        accumulators = {
            name: part.member(at) for name, part in self._parts.items() if (at := part.place(row)) is not None
        }
        fields["accumulators"] = {**fields.get("accumulators", {}), **accumulators}
        return made(
            **fields,
            numbers=Numbers._make(None if column is None else _value(column, row) for column in of_numbers),
            what_if=None if what_if is None else {"bfloat16": what_if},
        )

    # --- tensors that more is known of -------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return self._given["name"]

    def kept(self, rows: Rows) -> MeasuredBlock:
        """Those of these rows."""
        new = object.__new__(MeasuredBlock)
        at = rows.tolist()
        new._stays = Lists({})
        new._given, new._count = {name: [values[row] for row in at] for name, values in self._given.items()}, len(at)
        new._columns = {name: column[rows] for name, column in self._columns.items()}
        new._what_if = self._what_if[rows]
        new._histograms = {name: values[rows] for name, values in self._histograms.items()}
        new._parts = {name: kept for name, part in self._parts.items() if len((kept := part.kept(rows)).rows)}
        return new


class _Accumulators:
    """One accumulator of some tensors of a block."""

    def __init__(
        self,
        name: str,
        rows: Rows,
        numbers: Sequence[Mapping[str, Array]],
        dtypes: list[str],
        rates: list[float | None],
    ) -> None:
        """`rows`: of the block, rising; `numbers`: of all changes, of growth, of decay."""
        self.name, self.rows = name, rows
        self._dtypes, self._rates = dtypes, rates
        self._parts = dict(zip(("numbers", "growth", "decay"), numbers, strict=True))

    def place(self, row: int) -> int | None:
        return _place(self.rows, row)

    def kept(self, rows: Rows) -> _Accumulators:
        """Those of the block's rows, which are rising, as they are counted from now on."""
        places = np.flatnonzero(np.isin(self.rows, rows))
        numbers = [{name: column[places] for name, column in part.items()} for part in self._parts.values()]
        at = places.tolist()
        dtypes, rates = [self._dtypes[i] for i in at], [self._rates[i] for i in at]
        return _Accumulators(self.name, np.searchsorted(rows, self.rows[places]), numbers, dtypes, rates)

    def member(self, at: int) -> AccumulatorEvidence:
        numbers, growth, decay = (
            Numbers(**{name: _value(column, at) for name, column in part.items()}) for part in self._parts.values()
        )
        return AccumulatorEvidence(self.name, self._dtypes[at], numbers, growth, decay, rate=self._rates[at])

    def raw(self, name: str) -> list[Any]:
        part, _, field = name.rpartition(".")
        if part:
            column = self._parts[part].get(field)
            return [None] * len(self.rows) if column is None else values_of(column)
        if name in ("dtype", "rate"):
            return self._dtypes if name == "dtype" else self._rates
        return [self.name if name == "name" else _OF_ACCUMULATOR[name]] * len(self.rows)

    def column(self, name: str) -> Array:
        part, _, field = name.rpartition(".")
        column = self._parts[part].get(field) if part else None
        return np.array(self.raw(name), dtype=np.float64) if column is None else column


class _Told(Objects):
    """One accumulator of some tensors of a block, each an object."""

    _rows: Sequence[AccumulatorEvidence]

    def __init__(self, name: str, rows: Rows, members: Sequence[AccumulatorEvidence]) -> None:
        super().__init__(members)
        self.name, self.rows = name, rows

    def place(self, row: int) -> int | None:
        return _place(self.rows, row)

    def kept(self, rows: Rows) -> _Told:
        """As `_Accumulators.kept`."""
        places = np.flatnonzero(np.isin(self.rows, rows))
        members = [self._rows[i] for i in places.tolist()]
        return _Told(self.name, np.searchsorted(rows, self.rows[places]), members)


def _place(rows: Rows, row: int) -> int | None:
    """Of a row among some that are rising."""
    at = int(np.searchsorted(rows, row))
    return at if at < len(rows) and rows[at] == row else None


_OF_ACCUMULATOR = AccumulatorEvidence._field_defaults


def _default(name: str) -> Any:
    """Of what nobody gave."""
    return None if name in _OF_NUMBERS else _DEFAULTS[name]


def _value(column: npt.NDArray[Any], row: int) -> Any:
    value = column[row]
    value = value.item() if isinstance(value, np.generic) else value
    return None if value != value else value


def median_headrooms(counts_nB: Array) -> Array:
    """[n] as `evidence.median_headroom`; NaN of those that are empty."""
    counts_Bn = np.ascontiguousarray(counts_nB.T)
    sums_Bn = counts_Bn.cumsum(0)
    half_n = sums_Bn[-1] / 2
    is_past_Bn = (counts_Bn > 0) & (sums_Bn >= half_n)
    first_n, rows_n = is_past_Bn.argmax(0), np.arange(len(half_n))
    below_n = np.where(first_n > 0, sums_Bn[first_n - 1, rows_n], 0.0)
    with np.errstate(all="ignore"):
        found = HEADROOM_LOW + first_n + (half_n - below_n) / counts_Bn[first_n, rows_n]
    return np.where(is_past_Bn.any(0), found, np.nan)
