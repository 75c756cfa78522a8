"""What the host knows of the steps that a window's sums are of. NaN is what is not known.

Legend as in `layout`: P parts of a window, n rows, G groups of steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from update_watch.measure.sums.error_bars import Array


@dataclasses.dataclass(frozen=True)
class Steps:
    """What the host knows of the steps behind a window's sums."""

    parts_Pn: Array  # steps measured of each row, by part
    groups_Gn: Array  # the same, by group
    window_Gn: Array  # steps of the window in which the row had a gradient, as far as that was seen, by group
    checks_n: Array  # looks at the row's whole gradient
    squared_rates_P: Array  # mean square of the learning rate, by part; [P, n] of rows of several cohorts
    is_whole_n: npt.NDArray[np.bool_]  # all its elements are read
    is_plain_n: npt.NDArray[np.bool_]  # its steps are independent of each other: nothing is carried between them
    blind_n: Array  # steps that were looked at in which nobody saw the row's gradient, though it could have been

    def of(self, rows: Sequence[int] | npt.NDArray[np.intp] | slice, parts: int | None = None) -> Steps:
        """Those of some rows, of which so many parts are in use (None: all)."""
        kept = {
            field.name: getattr(self, field.name)[..., rows]
            for field in dataclasses.fields(self)
            if field.name != "squared_rates_P" or self.squared_rates_P.ndim > 1
        }
        return dataclasses.replace(self, **{**kept, "parts_Pn": kept["parts_Pn"][:parts]})

    @classmethod
    def side_by_side(cls, steps: Sequence[Steps]) -> Steps:
        """Those of several cohorts, whose rows follow each other."""
        parts = max(len(one.parts_Pn) for one in steps)
        found = {
            field.name: np.concatenate([getattr(one, field.name) for one in steps], -1)
            for field in dataclasses.fields(cls)
            if field.name not in ("parts_Pn", "squared_rates_P")
        }
        counts = [one.parts_Pn.shape[1] for one in steps]
        of_all: dict[str, Array] = {name: np.zeros((parts, sum(counts))) for name in ("parts_Pn", "squared_rates_P")}
        start = 0
        for one, count in zip(steps, counts, strict=True):
            own = slice(len(one.parts_Pn)), slice(start, start + count)
            of_all["parts_Pn"][own], of_all["squared_rates_P"][own] = one.parts_Pn, one.squared_rates_P[:, None]
            start += count
        found |= of_all
        return cls(**found)

    @property
    def measured_n(self) -> Array:
        """Steps measured of each row."""
        found: Array = self.parts_Pn.sum(0)
        return found

    def for_all(self, usual_n: Array) -> Array:
        """What to multiply a mean square of updates over measured steps by, to have that over all steps of the window.

        `usual`: share of the window's energy in the steps that were not measured, as the tensors measured then tell.
        """
        with np.errstate(all="ignore"):
            found = (1 - self.unmeasured_n) / (1 - usual_n)
        return np.where((self.unmeasured_n > 0) & np.isfinite(found), found, 1.0)

    @property
    def unmeasured_n(self) -> Array:
        """Share of the steps that were not measured."""
        found: Array = np.clip(1 - self.measured_n / np.maximum(self.window_Gn.sum(0), 1), 0.0, 1.0)
        return found
