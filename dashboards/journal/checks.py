"""What a journal holds, looked at before it is used: a value of the kind that is expected, or an error."""

from __future__ import annotations

from typing import Any

import numpy as np

HUGE = 1e60  # of a number; sums and squares of those below stay finite
_LONGEST = 200_000  # characters of a text


def float_of(value: Any) -> float:
    """NaN where it is not known."""
    return float("nan") if value is None else float(value)


def number_of(value: Any) -> float:
    number = float(value)
    if not abs(number) < HUGE:
        raise ValueError(f"a number was expected, not {number}")
    return number


def text_of(value: Any) -> str:
    text: str = texts_of([value])[0]
    return text


def texts_of(values: Any) -> Any:
    """Many texts, looked at together."""
    found = tuple(values)
    wrong = set(map(type, found)) - {str}
    if wrong:
        raise TypeError(f"a text was expected, not {min(kind.__name__ for kind in wrong)}")
    longest = max(map(len, found), default=0)
    if longest > _LONGEST:
        raise ValueError(f"a text of {longest} characters")
    return found


def whole_of(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > 2**62:
        raise ValueError("a whole number was expected")
    return value


def wholes_of(values: Any) -> Any:
    """Many of them, as an array."""
    found = list(values)
    if set(map(type, found)) - {int} or (found and not -(2**62) <= min(found) <= max(found) <= 2**62):
        raise ValueError("whole numbers were expected")
    return np.array(found, dtype=np.int64)
