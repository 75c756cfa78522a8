"""What arrives of many tensors' updates, were all of them so and so many times as large: a curve over octaves for each tensor.

Legend: n tensors, B octaves of headroom, Q parts of an octave, G points of a curve, S points of a schedule.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from update_watch.columns.products import product
from update_watch.foresight.rounding_curve import efficiency_of
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, PLACES

Array = npt.NDArray[np.float64]

_FINE = 8  # points in an octave
_SHRINK, _GROW = 13, 9  # octaves that updates may
_OCTAVES = np.arange(-_SHRINK * _FINE, _GROW * _FINE + 1) / _FINE  # [G]
_AT_ONE_PLACE = 0.6  # share in a quarter of every octave from which on a tensor's updates are taken to be alike


@functools.cache
def _table() -> Array:
    """[B * Q, G]: what arrives of the updates of one part of one octave, were they 2^octaves as large."""
    alone = np.eye(PLACES).tolist()
    found = [
        [efficiency_of((1.0,), HEADROOM_LOW + octave + shift, place) or 0.0 for shift in _OCTAVES.tolist()]
        for octave in range(HEADROOM_BINS)
        for place in alone
    ]
    return np.array(found)


def curves(movement_nB: Array, places_nQ: Array, place_n: Array) -> Array:
    """[n, G] efficiency where all updates are 2^octaves as large as when the histograms were taken.

    `place`: where in an octave all updates lie, where that is known exactly; NaN: `places` are its shares by part.
    """
    found = product((movement_nB[:, :, None] * places_nQ[:, None, :]).reshape(len(movement_nB), -1), _table())
    exact_n = np.flatnonzero(np.isfinite(place_n))
    if len(exact_n):
        lowest_B = HEADROOM_LOW + np.arange(HEADROOM_BINS)
        for place in np.unique(place_n[exact_n]):  # those of one group share it, nearly
            gaps_BG = 0.5 * 2.0 ** np.clip(lowest_B[:, None] + place + _OCTAVES, -60.0, 60.0)
            same_n = exact_n[place_n[exact_n] == place]
            found[same_n] = movement_nB[same_n] @ (np.rint(gaps_BG) / gaps_BG)
    return found


def are_alike(places_nQ: Array) -> npt.NDArray[np.bool_]:
    """[n] whether a tensor's updates lie at one place of every octave, since they are of one size and gaps are powers of two.

    What drifts then is how many of them lie in which octave: not their place within it.
    """
    found: npt.NDArray[np.bool_] = places_nQ.max(1) > _AT_ONE_PLACE
    return found


def read(curves_nG: Array, octaves_nS: Array) -> Array:
    """[n, S] the curves at these octaves, between points along a line."""
    at = np.clip((octaves_nS + _SHRINK) * _FINE, 0, len(_OCTAVES) - 1.001)
    below = at.astype(np.intp)
    at -= below
    below += np.arange(len(curves_nG))[:, None] * curves_nG.shape[1]
    flat = np.ascontiguousarray(curves_nG).reshape(-1)
    low = flat.take(below)
    below += 1
    found: Array = flat.take(below)
    found -= low
    found *= at
    found += low
    return found


def read_drifted(curves_nG: Array, octaves_nS: Array, drift_nS: Array, alike_n: npt.NDArray[np.bool_]) -> Array:
    """The same at `octaves + drift`; where updates are alike, a drift takes a part of them to the next octave."""
    drift_nS = np.broadcast_to(drift_nS, octaves_nS.shape)
    found = np.empty(octaves_nS.shape)
    for is_alike, rows in ((False, np.flatnonzero(~alike_n)), (True, np.flatnonzero(alike_n))):
        if not len(rows):
            continue
        if len(rows) == len(found):
            rows = slice(None)  # type: ignore[assignment]
        some_nG, octaves, drift = curves_nG[rows], octaves_nS[rows], drift_nS[rows]
        if not is_alike:
            found[rows] = read(some_nG, octaves + drift)
            continue
        whole = np.floor(drift)
        octaves = octaves + whole
        low = read(some_nG, octaves)
        high = read(some_nG, octaves + 1.0)
        high -= low
        high *= drift - whole
        high += low
        found[rows] = high
    return found


def moved(curves_nG: Array, octaves_n: Array, drift_n: Array, alike_n: npt.NDArray[np.bool_]) -> Array:
    """[n, G] the curves of updates that are 2^(octaves + drift) as large."""
    found = _moved(curves_nG, np.where(alike_n, octaves_n, octaves_n + drift_n))
    if alike_n.any():
        whole_n = np.floor(drift_n[alike_n])
        low, high = (_moved(curves_nG[alike_n], octaves_n[alike_n] + whole_n + more) for more in (0.0, 1.0))
        found[alike_n] = low + (drift_n[alike_n] - whole_n)[:, None] * (high - low)
    return found


def _moved(curves_nG: Array, octaves_n: Array) -> Array:
    points = curves_nG.shape[1]
    whole_n = np.floor(octaves_n * _FINE)
    part_n1 = (octaves_n * _FINE - whole_n)[:, None]
    index = np.clip(np.arange(points + 1) + whole_n.astype(np.intp)[:, None], 0, points - 1)
    index += np.arange(len(curves_nG))[:, None] * points
    taken = np.ascontiguousarray(curves_nG).reshape(-1).take(index)
    found: Array = taken[:, :-1] + part_n1 * (taken[:, 1:] - taken[:, :-1])
    return found


def first_octave(curves_nG: Array, efficiency: float) -> Array:
    """[n] the smallest of the octaves from which on a curve stays at `efficiency` or above; infinite where none does."""
    stays = np.logical_and.accumulate((curves_nG >= efficiency)[:, ::-1], axis=1)[:, ::-1]
    return np.where(stays.any(1), _OCTAVES[stays.argmax(1)], np.inf)
