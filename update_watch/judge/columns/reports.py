"""The reports of a window's tensors, of what the columns say; what few people look at is made when somebody does."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from update_watch.columns.evidence_columns import Columns, View
from update_watch.columns.late_fields import made
from update_watch.evidence import TensorEvidence
from update_watch.judge import reasons
from update_watch.judge.accumulators import alert_level
from update_watch.judge.columns.accumulators import Verdicts as AccumulatorVerdicts
from update_watch.judge.columns.codes import HEALTHS, HEALTHY, Array, Codes, cause_of
from update_watch.judge.columns.judged import Judged
from update_watch.judge.layers import by_layer
from update_watch.report import AccumulatorReport, TensorReport
from update_watch.worker import unhurried

# fields of a report, and where they are in the evidence if not under the same name
_OF_EVIDENCE = {
    "efficiency": "numbers.efficiency",
    "efficiency_error": "numbers.efficiency_error",
    "displacement_efficiency": "numbers.displacement_efficiency",
    "lost_fraction": "numbers.lost_fraction",
    "lost_fraction_error": "numbers.lost_fraction_error",
    "wanted_fraction": "numbers.wanted_fraction",
    "weight_rms": "stored",
    "gradient_zeros": "zero_gradient_fraction",
}
_SAME = (
    *("name", "names", "layer", "optimizer_group", "dtype", "shape", "numel", "trainable"),
    *(
        "net_efficiency",
        "net_efficiency_error",
        "update_ratio",
        "update_ratio_error",
        "applied_ratio",
        "written_between",
    ),
    *("unmoved_fraction", "gradient_rms", "gradient_max", "gradient_spread", "copy_changed", "copy_changed_window"),
    *("was_rounded", "movement_lr", "lr", "critical_lr", "state_factor", "state_factor_error"),
    *("scheme", "low_states", "options"),
)
_FIELDS = (*_SAME, *_OF_EVIDENCE, "moved", "since_step", "health", "cause")
_LATE = ("what_if", "headroom_histogram", "movement_histogram", "movement_places")
_FEW = 32  # tensors


class OfWindow(Judged):
    """The tensors of a window that were just judged. What is said of each is made when somebody asks for it."""

    def __init__(
        self,
        columns: Columns,
        health: Codes,
        cause: Codes,
        text: Callable[[int, TensorEvidence], str],
        parts: Sequence[AccumulatorVerdicts],
        since: npt.NDArray[np.int64],
        first_step: int,
    ) -> None:
        """`text`: place -> the sentence on it."""
        super().__init__(columns, health, cause, _OF_EVIDENCE)
        self.parts = self._parts = parts
        self._text, self._since, self._first_step = text, since, first_step
        self._asked = 0
        self._rows: dict[str, dict[int, int]] = {}  # accumulator -> place in the window -> place in its part

    @property
    def since(self) -> Array:
        return self._since.astype(np.float64)

    @functools.cached_property
    def tensors(self) -> tuple[TensorReport, ...]:
        """All of them."""
        raw, why = self._columns.raw, self._columns.raw("reason")
        values = [raw(name) for name in _SAME] + [raw(name) for name in _OF_EVIDENCE.values()]
        moved = [value if reason else None for value, reason in zip(raw("moved"), why, strict=True)]
        healths, causes = map(HEALTHS.__getitem__, self.health.tolist()), map(cause_of, self.cause.tolist())
        rows = zip(*values, moved, self._since.tolist(), healths, causes, strict=True)
        fields = (dict(zip(_FIELDS, row, strict=True)) for row in unhurried(rows))
        return tuple([made(TensorReport, of_one, self._late, place) for place, of_one in enumerate(fields)])

    def tensor(self, place: int) -> TensorReport:
        e = self._evidence(place)
        values = [operator.attrgetter(name)(e) for name in (*_SAME, *_OF_EVIDENCE.values())]
        values += [e.moved if e.reason else None, int(self._since[place])]
        values += [HEALTHS[self.health[place]], cause_of(self.cause[place])]
        return made(TensorReport, dict(zip(_FIELDS, values, strict=True)), self._late, place)

    def advice(self, place: int) -> str:
        e = self._evidence(place)
        return self._text(place, e) or self._beside(place, e, self._accumulators(place, e))

    def _evidence(self, place: int) -> TensorEvidence:
        """Of one; once somebody reads all of them, what is made for all at once costs a quarter."""
        self._asked += 1
        return self._columns.tensor(place) if self._asked <= _FEW else cast(TensorEvidence, View(self._columns, place))

    def _late(self, place: int) -> Mapping[str, Any]:
        e = self._evidence(place)
        accumulators = self._accumulators(place, e)
        text = self._text(place, e) or self._beside(place, e, accumulators)
        return {"advice": text, "accumulators": accumulators, **{name: getattr(e, name) for name in _LATE}}

    def _accumulators(self, place: int, e: TensorEvidence) -> dict[str, AccumulatorReport]:
        rows = [(part, self._row(part).get(place)) for part in self._parts]
        return {
            part.name: part.report(row, e.accumulators[part.name], e)
            if isinstance(e, TensorEvidence)
            else part.report_from_lists(row, e)
            for part, row in rows
            if row is not None
        }

    def _beside(self, place: int, e: TensorEvidence, accumulators: Mapping[str, AccumulatorReport]) -> str:
        """What is said of a tensor of which nothing else is to be told."""
        if self.health[place] != HEALTHY:
            return ""
        if e.was_rounded:
            return reasons.was_rounded(self._first_step)
        return next((a.advice for a in accumulators.values() if alert_level(a.health, a.cause) is not None), "")

    def _row(self, part: AccumulatorVerdicts) -> dict[int, int]:
        """Place in the window -> place in the part."""
        rows = self._rows.get(part.name)
        if rows is None:
            rows = self._rows[part.name] = {place: i for i, place in enumerate(part.places.tolist())}
        return rows


@dataclasses.dataclass(frozen=True)
class LateReport:
    """What of a report is made when somebody asks for it."""

    judged: OfWindow

    def __call__(self, place: int) -> Mapping[str, Any]:
        return {"tensors": self.judged.tensors, "layers": by_layer(self.judged.tensors)}
