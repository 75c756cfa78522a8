"""What tells a stall by rounding from what only looks like one."""

from __future__ import annotations

from typing import Any

import numpy as np

from update_watch.evidence import TensorEvidence
from update_watch.judge.efficiency_grade import known, share
from update_watch.naming import family
from update_watch.report import HEADROOM_LOW

STEEP = 3.0  # rise of the learning rate within a window, or since the one before, that makes it a warm-up
WELL_ABOVE = 2 - HEADROOM_LOW  # first bin of the headroom histogram at four half gaps or more
# rounding loses none of the updates well above half a gap; so much more may be lost, since the histogram is of other steps
_OTHER_STEPS = 0.1
_OF_ONE = 1.0  # and of one element, which may be small in those and large in others; of n over the root of n


def is_norm_near_one(e: TensorEvidence) -> bool:
    """Whether its values lie where a norm's weight begins: around 1, where the gaps are wide for what is to be added."""
    stored = known(e.stored)
    return stored is not None and 0.5 < stored < 2 and len(e.shape) == 1 and family(e.name, e.shape) == "norm"


def share_well_above(histogram: tuple[float, ...] | None) -> float | None:
    """The share of updates of which rounding loses none."""
    if not histogram:
        return None
    total = sum(histogram)
    return share(sum(histogram[WELL_ABOVE:]) / total) if total > 0 else None


def most_lost(above: Any, numel: Any) -> Any:
    """[n] or of one: the largest lost fraction that rounding explains where so large a share of updates is well above half a gap."""
    return 1 - above + _OTHER_STEPS + _OF_ONE / np.sqrt(np.maximum(numel, 1))
