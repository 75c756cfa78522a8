"""The class of a cell of map and heatmap: how a tensor fared, as a colour."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from update_watch.report import SEVERITY, Health

# worst first; a cell of several tensors has the class of the worst
CLASSES = ("broken", "stalled", "over half is lost", "part is lost", "arrives", "idle", "frozen", "unknown")
NO_CLASS = len(CLASSES)  # not there: the page shows through
_UNMEASURED = {Health.idle: 5, Health.frozen: 6, Health.unknown: 7}


def cell_class(health: NDArray[np.int8], efficiency: NDArray[np.floating[Any]]) -> NDArray[np.int8]:
    """Index in `CLASSES` of each cell. The verdict decides between well and not, the efficiency the shade."""
    classes = np.full(health.shape, NO_CLASS, dtype=np.int8)
    classes[health == SEVERITY.index(Health.healthy)] = 4
    classes[health == SEVERITY.index(Health.stalling)] = 3
    classes[(classes == 3) & (np.nan_to_num(efficiency, nan=1.0) < 0.5)] = 2
    classes[health == SEVERITY.index(Health.stalled)] = 1
    classes[health == SEVERITY.index(Health.broken)] = 0
    for state, code in _UNMEASURED.items():
        classes[health == SEVERITY.index(state)] = code
    return classes
