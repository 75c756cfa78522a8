"""Which sums there are, and how a window's lie in the vector that leaves the device.

Legend: P parts of a window, F sums, S states, n rows (parameters), G groups of steps.
"""

from __future__ import annotations

from typing import NamedTuple

from update_watch.report import HEADROOM_BINS

# the F sums of a row; weighted, over its samples
DOT = 0  # <applied, intended>
WANT = 1  # |intended|^2
WANTED = 2  # intended is not 0
LOST = 3  # wanted, and nothing applied
MOVED = 4  # |applied|^2
CHANGED = 5  # something applied
COUNT = 6  # samples
BEFORE = 7  # |before|^2
GRADIENT = 8  # |gradient|^2
NONZERO = 9  # gradients that are not 0
SQUARE = 10  # squares of the cells' |intended|^2: how few of them carry it
F = 11
STATE_SUMS = 8  # DOT to LOST of a state, and the same of its changes towards zero
PARTS = 16  # of a window, kept apart: how much the steps differ
GROUPS = 4  # neighbouring steps of a window, whose summed updates are kept apart


class Layout(NamedTuple):
    """What the vector's length depends on."""

    parts: int
    states: int
    rows: int
    has_clusters: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The arrays of `WindowSums`, in the order of the vector."""
        n, groups = self.rows, GROUPS
        shapes: dict[str, tuple[int, ...]] = {
            "parts_PFn": (self.parts, F, n),
            "states_FSn": (STATE_SUMS, self.states, n),
            "full_n": (n,),
            "gradient_max_n": (n,),
            "touched_n": (n,),
            "headroom_2nB": (2, n, HEADROOM_BINS),
            "movement_nB": (n, HEADROOM_BINS),
            "what_if_2n": (2, n),
            "decay_5n": (5, n),
            "arrived_GGn": (groups, groups, n),
            "meant_GGn": (groups, groups, n),
            "single_G2n": (groups, 2, n),
            "cells_3n": (3, n),
            "evidence_n": (n,),
            "state_way_2Sn": (2, self.states, n),
            "units_3n": (3, n),
            "state_units_2Sn": (2, self.states, n),
        }
        if self.has_clusters:
            shapes |= {"elements_3n": (3, n), "both_3n": (3, n)}
        return shapes
