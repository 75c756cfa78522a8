"""Which sums there are, and how a window's lie in one vector, on the device and on its way to the host.

Legend: P parts of a window, F sums, S states, n rows (parameters), G groups of steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from update_watch.report import HEADROOM_BINS, PLACES

# the F sums of a row; weighted, over its samples. In this order one operator makes four of them, another three
DOT = 0  # <applied, intended>
WANT = 1  # |intended|^2
MOVED = 2  # |applied|^2
GRADIENT = 3  # |gradient|^2
BEFORE = 4  # |before|^2
WANTED = 5  # intended is not 0
CHANGED = 6  # something applied
NONZERO = 7  # gradients that are not 0
LOST = 8  # wanted, and nothing applied
COUNT = 9  # samples
CROSS = 10  # products of the cells' <applied, intended> and |intended|^2: whether those that carry it arrive better
SQUARE = 11  # squares of the cells' |intended|^2: how few of them carry it
F = 12
# of a state, and the same of its changes towards zero
STATE_DOT, STATE_WANT, STATE_LOST, STATE_WANTED = range(4)
STATE_SUMS = 8
PARTS = 16  # of a window at most, kept apart: how much the steps differ
GROUPS = 4  # neighbouring steps of a window, whose summed updates are kept apart


def parts_for(steps: int) -> int:
    """Parts of a window in which a tensor is measured in so many steps: one for each, and some for a window that is longer, in
    which two become one when all are in use; an even number. Where a step may be measured because it is unlike the others,
    one more, the last, is for such steps."""
    return min(steps + steps % 2 + 2, PARTS)


def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the host they are made where they are written to first: most parts of a window never are."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, np.float64 if dtype is torch.float64 else np.float32))


class Layout(NamedTuple):
    """What the vector's length depends on."""

    parts: int
    states: int
    rows: int
    has_clusters: bool
    has_way: bool = True  # what is made of the kept samples has a place

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The arrays of `WindowSums`, in the order of the vector. Parts that no step has come to yet are at its end."""
        n, groups = self.rows, GROUPS
        shapes: dict[str, tuple[int, ...]] = {
            "states_FSn": (STATE_SUMS, self.states, n),
            "full_n": (n,),
            "gradient_max_n": (n,),
            "touched_n": (n,),
            "headroom_2nB": (2, n, HEADROOM_BINS),
            "movement_nB": (n, HEADROOM_BINS),
            "places_nQ": (n, PLACES),
            "what_if_2n": (2, n),
            "decay_5n": (5, n),
        }
        if self.has_way:
            shapes |= {
                "single_G2n": (groups, 2, n),
                "meant_GGn": (groups, groups, n),
                "arrived_GGn": (groups, groups, n),
                "cells_3n": (3, n),
                "evidence_n": (n,),
                "state_way_2Sn": (2, self.states, n),
            }
        if self.has_clusters:
            shapes |= {"both_3n": (3, n), "elements_3n": (3, n)}
        return shapes | {"parts_PFn": (self.parts, F, n)}

    def spans(self) -> dict[str, slice]:
        """Where in the vector each of them is."""
        spans, start = {}, 0
        for name, shape in self.shapes().items():
            spans[name] = slice(start, start + math.prod(shape))
            start = spans[name].stop
        return spans
