"""A window's sums on the host, and the ratios that are made of them, in FP64.

Legend as in `device_sums`: A accumulators (0 is the weight, then the optimizer states), n rows, F sums per row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from update_watch.evidence import Numbers
from update_watch.measure.device_sums import DOT, LOST, MOVED, SHRINK, VARIANCE, WANT, WANTED, F
from update_watch.report import HEADROOM_BINS

_DECAY_EVIDENCE = 12.0  # changes that should have been seen: by chance none of them is, e^-12


class WindowSums(NamedTuple):
    """What `DeviceSums.pack` sent, on the host, in FP64."""

    sums_FAn: npt.NDArray[np.float64]
    variance_3n: npt.NDArray[np.float64]
    gradient_3n: npt.NDArray[np.float64]
    stored_n: npt.NDArray[np.float64]
    headroom_nB: npt.NDArray[np.float64]
    what_if_2n: npt.NDArray[np.float64]
    displacement_3An: npt.NDArray[np.float64]
    evidence_n: npt.NDArray[np.float64]
    scale_An: npt.NDArray[np.float64]
    decay_5n: npt.NDArray[np.float64]

    @classmethod
    def unpack(cls, flat: npt.NDArray[np.float64], accumulators: int, rows: int) -> WindowSums:
        shapes = (
            (F, accumulators, rows),
            (VARIANCE, rows),
            (3, rows),
            (rows,),
            (rows, HEADROOM_BINS),
            (2, rows),
            (3, accumulators, rows),
            (rows,),
            (accumulators, rows),
            (5, rows),
        )
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        if ends[-1] != flat.size:
            raise ValueError(f"the vector of sums has {flat.size} values, {ends[-1]} expected")
        parts = np.split(flat, ends[:-1])
        return cls(*(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))

    def numbers(self, accumulator: int, row: int, sampled: float) -> Numbers:
        """The numbers of one accumulator of one row. `sampled`: elements looked at over the window."""
        s = self.sums_FAn[:, accumulator, row]
        dot, want, unit = self.displacement_3An[:, accumulator, row]
        numbers = _numbers(s[DOT], s[WANT], s[WANTED], s[LOST], sampled, self.scale_An[accumulator, row])
        error = None
        if accumulator == 0 and numbers.efficiency is not None:
            dot2, dot_want, want2 = self.variance_3n[:, row]
            eta = numbers.efficiency
            spread = dot2 - 2 * eta * dot_want + eta * eta * want2
            error = float(np.sqrt(max(spread, 0.0)) / s[WANT])
        return Numbers(
            numbers.efficiency,
            error,
            _ratio(dot, want),
            numbers.wanted_fraction,
            numbers.lost_fraction,
            numbers.weight,
            float(want / unit**2 / sampled) if unit and sampled else None,
        )

    def growth_and_decay(self, accumulator: int, row: int, sampled: float) -> tuple[Numbers, Numbers]:
        """The same of a state, apart for changes away from zero and towards zero."""
        s, unit = self.sums_FAn[:, accumulator, row], self.scale_An[accumulator, row]
        decay = s[SHRINK:]
        growth = s[: LOST + 1] - decay
        return (
            _numbers(growth[DOT], growth[WANT], growth[WANTED], growth[LOST], sampled, unit),
            _numbers(decay[DOT], decay[WANT], decay[WANTED], decay[LOST], sampled, unit),
        )

    def weight_decay(self, row: int, sampled: float) -> Numbers | None:
        """The numbers of the decay alone; None when too little of it was to be seen."""
        dot, want, wanted, lost, expected = self.decay_5n[:, row]
        if not expected >= _DECAY_EVIDENCE:
            return None
        return _numbers(dot, want, wanted, lost, wanted)

    def root_mean_squares(self, row: int, sampled: float) -> tuple[float, float]:
        """rms of the weight's intended and applied change, per element and step."""
        s, scale = self.sums_FAn[:, 0, row], self.scale_An[0, row]
        if not sampled or not scale:
            return 0.0, 0.0
        return tuple(float(np.sqrt(s[i] / sampled) / scale) for i in (WANT, MOVED))  # type: ignore[return-value]

    def gradients(self, row: int, sampled: float) -> tuple[float | None, float | None, float | None]:
        """Share of gradients that are 0, their rms, the largest. `sampled`: elements looked at in full steps."""
        if not sampled:
            return None, None, None
        nonzero, squares, largest = (float(x) for x in self.gradient_3n[:, row])
        is_finite = bool(np.isfinite(squares))  # squares beyond FP32 are not known
        return 1 - nonzero / sampled, float(np.sqrt(squares / sampled)) if is_finite else None, largest

    def stored(self, row: int, sampled: float) -> float:
        """rms of the weight before the steps. `sampled`: elements looked at in full steps."""
        return float(np.sqrt(self.stored_n[row] / sampled)) if sampled else 0.0

    def is_finite(self, row: int) -> bool:
        return bool(np.isfinite(self.sums_FAn[:, 0, row]).all())


def _numbers(dot: float, want: float, wanted: float, lost: float, sampled: float, unit: float | None = None) -> Numbers:
    return Numbers(
        efficiency=_ratio(dot, want),
        wanted_fraction=_ratio(wanted, sampled),
        lost_fraction=_ratio(lost, wanted),
        weight=float(want / unit**2 / sampled) if unit and sampled else None,
    )


def _ratio(a: float, b: float) -> float | None:
    if not b > 0 or not np.isfinite(a) or not np.isfinite(b):
        return None
    return float(a / b)
