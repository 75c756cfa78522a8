"""The reports of a window's tensors, of what the columns say; what few people look at is made when somebody does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from update_watch.columns.evidence_columns import Columns, View
from update_watch.columns.late_fields import made
from update_watch.evidence import TensorEvidence
from update_watch.judge import reasons
from update_watch.judge.accumulators import alert_level
from update_watch.judge.columns.accumulators import Verdicts as AccumulatorVerdicts
from update_watch.judge.columns.codes import CAUSES, HEALTHS, NONE, Codes
from update_watch.report import Health, TensorReport
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
_HEALTHS = {code: health for code, health in enumerate(HEALTHS)}
_CAUSES = {NONE: None, **dict(enumerate(CAUSES))}


class Late:
    """What is made of one tensor when somebody asks for it."""

    def __init__(
        self,
        columns: Columns,
        health: Codes,
        text: Callable[[int, TensorEvidence], str],
        parts: Sequence[AccumulatorVerdicts],
        first_step: int,
    ) -> None:
        self._columns, self._health, self._text, self._first_step = columns, health, text, first_step
        self.parts = parts
        self._parts = {part.name: part for part in parts}
        self._asked = 0
        self._rows: dict[str, dict[int, int]] = {}  # accumulator -> place in the window -> place in its part

    def __call__(self, place: int) -> Mapping[str, Any]:
        self._asked += 1
        if self._asked <= _FEW:
            e = self._columns.tensor(place)
            accumulators = {
                name: self._parts[name].report(self._row(name)[place], accumulator, e)
                for name, accumulator in e.accumulators.items()
            }
        else:  # somebody reads all of them: what is made for all at once costs a quarter
            e = cast(TensorEvidence, View(self._columns, place))
            rows = [(part, self._row(part.name).get(place)) for part in self.parts]
            accumulators = {part.name: part.report_from_lists(row, e) for part, row in rows if row is not None}
        text = self._text(place, e)
        if HEALTHS[self._health[place]] is Health.healthy and not text:
            if e.was_rounded:
                text = reasons.was_rounded(self._first_step)
            else:
                text = next((a.advice for a in accumulators.values() if alert_level(a.health, a.cause) is not None), "")
        return {"advice": text, "accumulators": accumulators, **{name: getattr(e, name) for name in _LATE}}

    def _row(self, name: str) -> dict[int, int]:
        """Place in the window -> place in the part of this name."""
        rows = self._rows.get(name)
        if rows is None:
            rows = self._rows[name] = {place: i for i, place in enumerate(self._parts[name].places.tolist())}
        return rows


class Judged(tuple[TensorReport, ...]):
    """The tensors of a report, with the verdicts on their accumulators by name; any copy of it is a plain tuple."""

    parts: Sequence[AccumulatorVerdicts]

    def __reduce__(self) -> Any:
        return tuple, (list(self),)


def reports_of(columns: Columns, health: Codes, cause: Codes, since: Any, late: Late) -> Judged:
    """One for each tensor of the window."""
    moved = [value if why else None for value, why in zip(columns.raw("moved"), columns.raw("reason"), strict=True)]
    values = [columns.raw(name) for name in _SAME] + [columns.raw(name) for name in _OF_EVIDENCE.values()]
    healths = [_HEALTHS[code] for code in health.tolist()]
    causes = [_CAUSES[code] for code in cause.tolist()]
    rows = zip(*values, moved, np.asarray(since).tolist(), healths, causes, strict=True)
    found = Judged(
        [made(TensorReport, dict(zip(_FIELDS, row, strict=True)), late, i) for i, row in enumerate(unhurried(rows))]
    )
    found.parts = late.parts
    return found
