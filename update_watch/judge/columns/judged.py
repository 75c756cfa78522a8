"""The tensors of a report as columns: what is said of the run as a whole is made of them, and of no object per tensor.

A report that the diagnosis made holds its columns till somebody asks for its tensors; of the tensors of any other they are made.

Legend: n tensors, in the order of the report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from update_watch.columns.evidence_columns import Columns, OneByOne, having
from update_watch.columns.late_fields import maker_of
from update_watch.columns.products import total
from update_watch.cures import Cure, extra_bytes
from update_watch.foresight.what_if import BITS, is_beside
from update_watch.judge.accumulators import alert_level
from update_watch.judge.columns.codes import CAUSE_CODES, CAUSES, HEALTH_CODES, HEALTHS, NONE, Array, Codes, Mask, Rows
from update_watch.naming import model_words
from update_watch.report import SEVERITY, Level, Report, TensorReport

LEVELS = (None, Level.info, Level.warn, Level.error)  # by code, the louder the higher
_OF_ACCUMULATORS = np.array(  # by health and cause, of which none is the last
    [[LEVELS.index(alert_level(health, cause)) for cause in (*CAUSES, None)] for health in HEALTHS], np.int8
)
_RANKS = np.array([SEVERITY.index(health) for health in HEALTHS])  # by code: the worse, the lower


class Accumulators(Protocol):
    """Those of one name: where their tensors are among the n, and the verdicts on them."""

    name: str
    places: Rows
    health: Codes
    cause: Codes

    def raw(self, name: str) -> list[Any]:
        """A field of `AccumulatorReport`."""


def levels_of(part: Accumulators) -> Codes:
    """How loud they are, by the index in `LEVELS`."""
    found: Codes = _OF_ACCUMULATORS[part.health, part.cause]
    return found


class Judged:
    """Verdicts by their codes, and any other field of a `TensorReport` that is known of all at once by its name."""

    parts: Sequence[Accumulators]

    def __init__(self, columns: Columns, health: Codes, cause: Codes, fields: Mapping[str, str]) -> None:
        """`fields`: what the columns call those that have another name there."""
        self._columns, self._fields = columns, fields
        self.health, self.cause = health, cause

    def __len__(self) -> int:
        return len(self.health)

    def raw(self, field: str) -> list[Any]:
        """[n] as they are in a `TensorReport`."""
        return self._columns.raw(self._fields.get(field, field))

    def column(self, field: str) -> Array:
        """[n] as numbers; NaN is what is not known."""
        return self._columns.column(self._fields.get(field, field))

    def histogram(self, field: str, length: int) -> Array:
        """[n, length] of shares; NaN of those that have none."""
        return self._columns.histogram(field, length)

    def having(self, field: str, test: Callable[[Any], bool]) -> Mask:
        """[n] whether the value, of which there are few different ones, is as asked."""
        return self._columns.having(self._fields.get(field, field), test)

    def tensor(self, place: int) -> TensorReport:
        """All of one."""
        raise NotImplementedError

    def advice(self, place: int) -> str:
        """What is said of one."""
        return self.tensor(place).advice

    @property
    def names(self) -> list[str]:
        return self.raw("name")

    @property
    def trainable(self) -> Mask:
        found: Mask = self.column("trainable") != 0
        return found

    @property
    def since(self) -> Array:
        """[n] steps; NaN where that is not known."""
        found: Array = self.column("since_step")
        return found

    @property
    def ranks(self) -> npt.NDArray[np.int64]:
        """[n] of their healths, the worst first."""
        found: npt.NDArray[np.int64] = _RANKS[self.health]
        return found

    def is_caused(self, *causes: Any) -> Mask:
        """[n] whether the cause is one of these."""
        found: Mask = np.isin(self.cause, [CAUSE_CODES[cause] for cause in causes])
        return found

    def numel(self, places: Rows | Mask | slice = slice(None)) -> int:
        """Elements of all of these together."""
        return int(self.column("numel")[places].sum())

    def mean(self, field: str, places: Rows | Mask) -> float | None:
        """As `weighted_mean` by elements, of these."""
        values, weights = self.column(field)[places], self.column("numel")[places]
        known = np.isfinite(values)
        if not known.any():
            return None
        above, weight = total(values[known] * weights[known]), total(weights[known])
        return above / weight if weight else None

    def worst_first(self, places: Rows) -> Rows:
        """These by severity, then by efficiency, then the larger ones first."""
        efficiency = self.column("efficiency")[places]
        efficiency = np.where(np.isnan(efficiency), 1.0, efficiency)
        found: Rows = places[np.lexsort((-self.column("numel")[places], efficiency, self.ranks[places]))]
        return found

    def words(self, places: Rows, limit: int = 3) -> list[str]:
        """As `group_words`."""
        return model_words(tuple(self.names), tuple(self.raw("shape"))).group(np.unique(places), limit)

    def cost_of(self, cure: Cure, places: Rows | Mask, dtypes: Mask | None = None) -> int:
        """Bytes of memory that a cure takes for these; those in full precision cost nothing.

        `dtypes`: [n] which are in less; None: by the format of the weights.
        """
        is_low = self.having("dtype", BITS.__contains__) if dtypes is None else dtypes
        is_there = np.zeros(len(self), bool)
        is_there[places] = True
        states = self._low_states
        return sum(
            extra_bytes(cure, self.numel(is_there & is_low & (states == count)), int(count))
            for count in np.unique(states[is_there & is_low])
        )

    @functools.cached_property
    def _low_states(self) -> Array:
        """[n] states in 16 bits."""
        found: Array = self.column("low_states").copy()
        unknown = np.isnan(found)
        if unknown.any():
            found[unknown] = 0.0
            for part in self.parts:
                if not is_beside(part.name):
                    is_low = having(part.raw("dtype"), BITS.__contains__)
                    found[part.places[is_low & unknown[part.places]]] += 1
        return found


class OfReports(Judged):
    """Of tensors that were made already."""

    def __init__(self, tensors: Sequence[TensorReport]) -> None:
        columns = Columns([OneByOne(tensors)])
        super().__init__(columns, _healths(columns.raw("health")), _causes(columns.raw("cause")), {})
        self._tensors = tensors

    @functools.cached_property
    def parts(self) -> Sequence[Accumulators]:  # type: ignore[override]
        return [_Made(name, part.rows, part.values.raw) for name, part in self._columns.parts().items()]

    def tensor(self, place: int) -> TensorReport:
        return self._tensors[place]


class _Made:
    """Accumulators of tensors that were made already."""

    def __init__(self, name: str, places: Rows, raw: Callable[[str], list[Any]]) -> None:
        self.name, self.places, self.raw = name, places, raw
        self.health, self.cause = _healths(raw("health")), _causes(raw("cause"))


def _healths(values: list[Any]) -> Codes:
    return np.array([HEALTH_CODES[value] for value in values], np.int8)


def _causes(values: list[Any]) -> Codes:
    return np.array([NONE if value is None else CAUSE_CODES[value] for value in values], np.int8)


def judged_of(report: Report) -> Judged:
    """The tensors of a report as columns."""
    made = getattr(maker_of(report), "judged", None)
    return made if isinstance(made, Judged) else OfReports(report.tensors)
