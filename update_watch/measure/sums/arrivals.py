"""How much arrives of a row's updates in steps that were not measured, from the histogram of those that were.

Rounding to nearest keeps of an update of u gaps rint(u) gaps (`foresight.rounding_curve`). A row's |intended|^2 is counted by
octave of headroom; in a step whose updates are twice as large, all of it lies an octave higher. Only a few steps are looked at
so, and the curve may lie off by some octaves: it is moved to where it says what was measured.

Legend: P parts of a window, n rows, B bins of headroom, Q places in an octave, S octaves that updates are larger, G sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from update_watch.columns.products import product
from update_watch.foresight.rounding_curve import efficiency_of
from update_watch.measure.sums.error_bars import Array, ratio
from update_watch.measure.sums.missed_steps import FINE, HIGHEST, OCTAVES, Missed, Stood
from update_watch.measure.sums.step_sizes import median_of_each
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, PLACES

_FURTHEST = HIGHEST + 8  # octaves up and down that a curve is known for
_MOVES = np.arange(-3 * FINE, 3 * FINE + 1) / FINE  # that it may lie off
_RELUCTANCE = 0.1  # of efficiency, for each octave that it is moved
_AROUND: Array = np.array([0.0, -0.75, -1.5, 1.0])  # octaves that the size of a step may be off
_LEAST, _PART = 0.1, 0.8  # how far an efficiency told so may be off, at least and of what it changes by within those


class Curves:
    """Of n rows, the efficiency by how much larger than in the mean measured step their updates are."""

    def __init__(self, movement_nB: Array, places_nQ: Array, looked_n: Array, want_n: Array) -> None:
        """`looked`: mean |intended|^2 of the wanted elements in the histogram; `want`: of all that were measured."""
        shares_nB = movement_nB / np.maximum(movement_nB.sum(1, keepdims=True), 1e-300)
        places_nQ = places_nQ / np.maximum(places_nQ.sum(1, keepdims=True), 1e-300)
        self.is_known_n = np.isfinite(looked_n) & (looked_n > 0) & (movement_nB.sum(1) > 0)
        shares_nX = (shares_nB[:, :, None] * places_nQ[:, None]).reshape(len(shares_nB), -1)
        curve_nS = product(shares_nX, _table())
        self._curve, self._most = curve_nS.ravel(), curve_nS.shape[1] - 1.001
        self._begin_n = np.arange(len(curve_nS)) * curve_nS.shape[1]
        with np.errstate(all="ignore"):
            first_n = 0.5 * np.log2(want_n / looked_n)
        self._first_n = np.where(np.isfinite(first_n), np.clip(first_n, -HIGHEST, HIGHEST), 0.0)
        self._at_n = self._first_n

    def move(self, efficiency_n: Array, want_Pn: Array, cohorts: Sequence[tuple[slice, Missed]]) -> None:
        """Lay the curves where they say the efficiency that was measured in the parts, whose sizes are `own_P` of each cohort's."""
        # parts of about one size together: there are few sizes, whole numbers of steps of one width, as moves are
        sizes_CP = np.rint(np.array([one.own_P for _, one in cohorts]) * FINE).astype(int)
        lowest, highest = int(sizes_CP.min()), int(sizes_CP.max())
        part_Pn = np.nan_to_num(want_Pn / np.maximum(want_Pn.sum(0), 1e-300))
        share_Gn = np.zeros((highest - lowest + 1, len(efficiency_n)))
        for (rows, _), size_P in zip(cohorts, sizes_CP, strict=True):
            sizes, group_P = np.unique(size_P, return_inverse=True)
            is_of = (group_P == np.arange(len(sizes))[:, None]).astype(float)
            share_Gn[sizes - lowest, rows] = is_of @ part_Pn[:, rows]
        places = _MOVES[0] + np.arange(lowest, highest + len(_MOVES)) / FINE
        value_Kn = self._value(self._first_n + places[:, None])
        said_Mn = np.zeros((len(_MOVES), len(efficiency_n)))
        for step in np.flatnonzero(share_Gn.any(1)).tolist():
            said_Mn += share_Gn[step] * value_Kn[step : step + len(_MOVES)]
        off_Mn = np.abs(said_Mn - efficiency_n) + _RELUCTANCE * np.abs(_MOVES)[:, None]
        off_Mn = np.where(np.isnan(off_Mn), np.inf, off_Mn)
        moved_n = self._first_n + _MOVES[off_Mn.argmin(0)]
        self._at_n = np.where(off_Mn.min(0) < np.inf, moved_n, self._at_n)

    def at(self, octaves: Array | float) -> Array:
        """[..., n] efficiency of updates so many octaves larger than those of the mean measured step."""
        return self._value(self._at_n + octaves)

    def more(self, want_Pn: Array, stood: Stood) -> Array:
        """[P, n] what arrives of the steps that each part stands for beyond as large a part as of its own |intended|^2."""
        used = np.flatnonzero(np.any([one.stands_PG.any(0) for _, one in stood.cohorts], 0))
        there_Gn, own_Pn = self.at(OCTAVES[used][:, None]), self.at(stood.own_Pn)
        beyond_Pn = np.empty_like(want_Pn)
        for rows, one in stood.cohorts:
            own = np.flatnonzero(one.stands_PG.any(0))
            stands_PG = one.stands_PG[:, own]
            arrives_Pn = stands_PG @ there_Gn[np.searchsorted(used, own), rows]
            beyond_Pn[:, rows] = arrives_Pn - stands_PG.sum(1, keepdims=True) * own_Pn[:, rows]
        return np.where(self.is_known_n, want_Pn * beyond_Pn, 0.0)

    def reach(self, octave_n: Array) -> Array:
        """[n] how far the efficiency in a step of that size may be from what the curve says."""
        there_n, *others = self.at(octave_n + _AROUND[:, None])
        found: Array = np.clip(_LEAST + _PART * np.abs(np.stack(others) - there_n).max(0), 0.0, 1.0)
        return found

    def beyond(self, largest_n: Array, by: Array) -> Array:
        """[n] how much more arrives of updates that are `by` [n] octaves larger than those of the largest measured step."""
        return np.maximum(self.at(largest_n + by) - self.at(largest_n), 0.0)

    def _value(self, octaves: Array) -> Array:
        """[..., n] as the octaves are."""
        place = np.clip((octaves + _FURTHEST) * FINE, 0.0, self._most)
        low = place.astype(np.intp)
        part, at = place - low, self._begin_n + low
        found: Array = (1 - part) * self._curve.take(at) + part * self._curve.take(at + 1)
        return found


def tail(curves: Curves, energy_Pn: Array, steps_Pn: Array, stood: Stood, sampled_Pn: Array | None = None) -> Array:
    """[n] what steps larger than any that was measured may have made of the efficiency: of n steps alike one more is larger
    than all with the chance 1 / n, by twice what sizes spread. `sampled`: of `steps` those that are a sample (None: all)."""
    sampled_Pn = steps_Pn if sampled_Pn is None else sampled_Pn
    with np.errstate(all="ignore"):
        per_step_Pn = np.where(sampled_Pn > 0, energy_Pn / np.maximum(steps_Pn, 1), np.nan)
        octave_Pn = 0.5 * np.log2(per_step_Pn / ratio(energy_Pn.sum(0), steps_Pn.sum(0)))
    known_n = np.isfinite(octave_Pn).any(0)
    octave_Pn = np.where(np.isfinite(octave_Pn), octave_Pn, np.nan)
    largest_n = np.where(known_n, np.fmax.reduce(octave_Pn, 0), 0.0)
    spread_n = np.full(known_n.shape, np.nan)
    spread_n[known_n] = _deviation((octave_Pn - stood.own_Pn)[:, known_n])
    by_n = 2 * np.nan_to_num(median_of_each([rows for rows, _ in stood.cohorts], spread_n))
    odds_n = 4.0 ** (largest_n + by_n) / np.maximum(steps_Pn.sum(0), 1)
    return np.where(curves.is_known_n, curves.beyond(largest_n, by_n) * odds_n / (1 + odds_n), 0.0)


def _deviation(values_Pn: Array) -> Array:
    """[n] as `np.nanstd` over P."""
    known_Pn = ~np.isnan(values_Pn)
    count_n = known_Pn.sum(0)
    mean_n = np.where(known_Pn, values_Pn, 0.0).sum(0) / count_n
    away_Pn = np.where(known_Pn, values_Pn - mean_n, 0.0)
    found: Array = np.sqrt((away_Pn * away_Pn).sum(0) / count_n)
    return found


@functools.cache
def _table() -> Array:
    """[B Q, S] efficiency of updates in each place of each bin, where they are so many octaves larger."""
    assert PLACES % FINE == 0
    alone = [1.0, *[0.0] * (PLACES - 1)]
    octaves = np.arange(-_FURTHEST * FINE, _FURTHEST * FINE + 1) / FINE
    places = (HEADROOM_LOW + np.arange(HEADROOM_BINS * PLACES) / PLACES)[:, None] + octaves
    values = {at: efficiency_of([1.0], at, alone) or 0.0 for at in np.unique(places).tolist()}
    return np.array([[values[at] for at in row] for row in places.tolist()])
