"""Products of matrices that stay on one thread, and sums in a fixed order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_ROWS = 32  # at once: BLAS takes more threads for more


def product(a_nX: Array, b_XS: Array) -> Array:
    """[n, S] as `a @ b`. For small matrices BLAS wakes threads that spin while they wait, on the cores that train: 5 ms each time."""
    found = np.empty((len(a_nX), b_XS.shape[1]))
    for start in range(0, len(a_nX), _ROWS):
        np.matmul(a_nX[start : start + _ROWS], b_XS, out=found[start : start + _ROWS])
    return found


def summed(values_nX: Array) -> Array:
    """[n] sums over X, one after the other: as numbers are added that come one by one."""
    found = np.zeros(len(values_nX))
    for values_n in np.ascontiguousarray(values_nX.T):
        found = found + values_n
    return found
