"""Headroom of many tensors together: wanted elements per octave of log2(|intended| / half a gap)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from update_watch.report import HEADROOM_BINS, TensorReport


def headroom_counts(tensors: Iterable[TensorReport]) -> npt.NDArray[np.float64]:
    """[HEADROOM_BINS]: wanted elements per octave over `tensors`, whole numbers."""
    known = [t for t in tensors if t.headroom_histogram]
    if not known:
        return np.zeros(HEADROOM_BINS)
    wanted = [t.numel * (1.0 if t.wanted_fraction is None else t.wanted_fraction) for t in known]
    counts: npt.NDArray[np.float64] = (np.array(wanted) @ np.array([t.headroom_histogram for t in known])).round()
    return counts
