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


def summed(values_Xn: Array) -> Array:
    """[n] sums over X, one after the other: as numbers are added that come one by one."""
    found: Array = values_Xn[0]
    for values_n in values_Xn[1:]:
        found = found + values_n
    return found


def total(values_m: Array) -> float:
    """The sum, one after the other; it is the same whether or not more come later that are 0."""
    return 0.0 + float(values_m.cumsum()[-1]) if len(values_m) else 0.0
