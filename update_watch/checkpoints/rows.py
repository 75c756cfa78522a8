"""Rows that are kept as columns: of a million tensors all are counted, and some are looked at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from update_watch.checkpoints.header import IntArray

Floats = npt.NDArray[np.float64]


def number_at(values: Floats, at: int) -> float | None:
    """NaN stands for None."""
    value = float(values[at])
    return None if math.isnan(value) else value


def batches(codes: IntArray, most: Sequence[int]) -> Iterator[tuple[int, IntArray]]:
    """Each code from 0 on with the places at which it stands, `most[code]` of them at a time; none where that is 0."""
    (places,) = np.nonzero(codes >= 0)
    places = places[np.argsort(codes[places], kind="stable")]
    for alike in np.split(places, np.flatnonzero(np.diff(codes[places])) + 1) if len(places) else []:
        code = int(codes[alike[0]])
        for begin in range(0, len(alike) if most[code] else 0, most[code] or 1):
            yield code, alike[begin : begin + most[code]]
