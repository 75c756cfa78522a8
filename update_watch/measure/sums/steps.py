"""What the host knows of the steps that a window's sums are of. NaN is what is not known.

Legend as in `layout`: P parts of a window, n rows, G groups of steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from update_watch.measure.sums.error_bars import Array
from update_watch.measure.sums.layout import CROSS, SQUARE


class Told(NamedTuple):
    """What the looks of a cohort tell of steps that others of its optimizer sat out, by part."""

    alone_P: Array  # its looks at steps in which none of the others was looked at
    # steps beside its looks in which nobody was: between two looks updates go from the size of one to that of the other
    held_P: Array
    growth_P: Array  # by how much |intended|^2 is larger in those, by the learning rate
    has_asked: bool = False  # the last part is of steps measured for what they are: it stands for no others

    @classmethod
    def by_turns(cls, count_P: Array) -> Told:
        """Of so many looks, where it is somebody's turn in every step."""
        return cls(count_P, np.zeros(len(count_P)), np.ones(len(count_P)))


class Looks:
    """Those at a cohort in the open window, in the order of time; all but those that were asked for."""

    def __init__(self) -> None:
        self._held: list[list[float]] = []  # of each look: steps beside it, and squares of their learning rates

    def add(self) -> None:
        """One more, at nobody else."""
        self._held.append([0.0, 0.0])

    def hold(self, squared_rate: float, share: float) -> None:
        """A share of a step beside the last one, in which nobody is looked at."""
        last = self._held[-1]
        last[0] += share
        last[1] += share * squared_rate

    def told(self, count: int, per_part: int, steps: Steps) -> Told:
        """By part, of so many looks each. `count`: looks that are in the sums; `steps`: that were measured."""
        rates_P, parts = steps.squared_rates_P, len(steps.squared_rates_P) - steps.has_asked
        looks_L3 = np.zeros((parts * per_part, 3))
        looks_L3[:count, 0] = 1
        looks_L3[:count, 1:] = np.array(self._held[:count]).reshape(-1, 2)
        looks_P3 = np.zeros((len(rates_P), 3))
        looks_P3[:parts] = looks_L3.reshape(-1, per_part, 3).sum(1)
        alone_P, held_P, squares_P = looks_P3.T
        has_rate_P = (held_P > 0) & (rates_P > 0)
        growth_P = squares_P / np.where(has_rate_P, held_P * rates_P, 1.0)
        return Told(alone_P, held_P, np.where(has_rate_P, growth_P, 1.0), steps.has_asked)


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
    has_asked: bool = False  # the last part is of steps that were measured because they were unlike the others

    def of(self, rows: Sequence[int] | npt.NDArray[np.intp] | slice, parts: int | None = None) -> Steps:
        """Those of some rows, of which so many parts are in use (None: all)."""
        kept = {
            field.name: getattr(self, field.name)[..., rows]
            for field in dataclasses.fields(self)
            if field.name != "has_asked" and (field.name != "squared_rates_P" or self.squared_rates_P.ndim > 1)
        }
        return dataclasses.replace(self, **{**kept, "parts_Pn": kept["parts_Pn"][:parts]})

    @classmethod
    def side_by_side(cls, steps: Sequence[Steps]) -> Steps:
        """Those of several cohorts, whose rows follow each other."""
        parts = max(len(one.parts_Pn) for one in steps)
        found = {
            field.name: np.concatenate([getattr(one, field.name) for one in steps], -1)
            for field in dataclasses.fields(cls)
            if field.name not in ("parts_Pn", "squared_rates_P", "has_asked")
        }
        counts = [one.parts_Pn.shape[1] for one in steps]
        of_all: dict[str, Array] = {name: np.zeros((parts, sum(counts))) for name in ("parts_Pn", "squared_rates_P")}
        start = 0
        for one, count in zip(steps, counts, strict=True):
            own = slice(len(one.parts_Pn)), slice(start, start + count)
            of_all["parts_Pn"][own], of_all["squared_rates_P"][own] = one.parts_Pn, one.squared_rates_P[:, None]
            start += count
        found |= of_all
        return cls(**found, has_asked=any(one.has_asked for one in steps))

    @property
    def measured_n(self) -> Array:
        """Steps measured of each row."""
        found: Array = self.parts_Pn.sum(0)
        return found

    @property
    def sampled_Pn(self) -> Array:
        """Of `parts_Pn`, those that were drawn from the steps of the window, as a sample is."""
        if not self.has_asked:
            return self.parts_Pn
        found: Array = self.parts_Pn.copy()
        found[-1] = 0.0
        return found

    def fairly(self, parts_PFn: Array) -> Array:
        """[P, F, n]: sums of which those over steps that were asked for count as what they are, one step each: each of the others
        stands for several."""
        if not self.has_asked:
            return parts_PFn
        asked_n, sampled_n = self.parts_Pn[-1], self.parts_Pn[:-1].sum(0)
        others_n = np.maximum(self.window_Gn.sum(0) - asked_n, sampled_n)
        found: Array = parts_PFn.copy()
        weight_n = np.where(sampled_n > 0, sampled_n / np.maximum(others_n, 1), 1.0)
        found[-1] *= weight_n
        found[-1, [CROSS, SQUARE]] *= weight_n  # of products of two
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
