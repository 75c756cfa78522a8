"""Arrays of large windows in base64: a million numbers are read in milliseconds, and take less room than as text.

`{"f4": text}` holds numbers of NumPy's type "f4", little-endian. Reading trusts nothing: what does not fit is a `ValueError` (or
one of the errors that `columns` names), and no array is larger than its text.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PACKED_FROM = 1_024  # entries of a column; a shorter one stays a list that people can read
TYPES = {kind: np.dtype(f"<{kind}") for kind in ("u1", "u2", "i4", "i8", "f4", "f8")}


def is_long(entries: int) -> bool:
    """Whether a column of so many is packed."""
    return entries >= PACKED_FROM


def packed(values: NDArray[Any], kind: str) -> dict[str, str]:
    return {kind: base64.b64encode(np.ascontiguousarray(values, dtype=TYPES[kind]).data).decode("ascii")}


def packed_floats(values: NDArray[np.float64], is_whole: bool = False) -> dict[str, str]:
    """In four bytes each where that keeps seven digits, of whole numbers all; NaN stays NaN."""
    sizes = np.abs(values[~np.isnan(values)])
    most, least = sizes.max(initial=0.0), sizes[sizes > 0].min(initial=1.0)
    return packed(values, "f4" if most < (2**24 if is_whole else 1e38) and least > 1e-37 else "f8")


def is_packed(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and not TYPES.keys().isdisjoint(value)


def unpacked(value: Any, kinds: str, count: int | None = None) -> NDArray[Any]:
    """Numbers of one of the `kinds` ("f", "iu"), `count` of them where that is known."""
    ((name, text),) = value.items()
    kind = TYPES[name]
    if kind.kind not in kinds or not isinstance(text, (str, memoryview)):
        raise ValueError("damaged window (packed numbers of another kind)")
    if count is not None and len(text) != 4 * -(-count * kind.itemsize // 3):
        raise ValueError("damaged window (length of packed numbers)")
    try:
        data = binascii.a2b_base64(text)  # passes over what is no base64: then it is too short
    except ValueError:
        data = b""
    if len(data) != len(text) // 4 * 3 - _filled(text) or len(data) % kind.itemsize:
        raise ValueError("damaged window (packed numbers)")
    found = np.frombuffer(data, dtype=kind)
    if count is not None and len(found) != count:
        raise ValueError("damaged window (length of packed numbers)")
    return found


def _filled(text: str | memoryview) -> int:
    """Signs that only fill it up."""
    return text[-2:].count("=") if isinstance(text, str) else bytes(text[-2:]).count(b"=")


# --- indices -------------------------------------------------------------------------------------------


def indices_line(indices: Any) -> Any:
    """A list, or packed."""
    return packed(np.asarray(indices), "i4") if is_long(len(indices)) else np.asarray(indices).tolist()


def indices_of(values: Any, count: int) -> Any:
    indices = unpacked(values, "iu") if is_packed(values) else np.array(values, dtype=None if len(values) else np.int64)
    if indices.dtype.kind not in "iu" or indices.ndim != 1:
        raise ValueError("damaged window (indices that are no whole numbers)")
    if len(indices) and (indices.min() < 0 or indices.max() >= count):
        raise ValueError("damaged window (index of a tensor)")
    return indices


# --- few values of many entries ------------------------------------------------------------------------


def kinds_line(values: Sequence[Hashable]) -> Any:
    """A list; of many entries `{"kinds": those there are, "of": the index of each}`."""
    if not is_long(len(values)):
        return list(values)
    kinds, of = numbered(values)
    return {"kinds": kinds, "of": indices_line(of)} if 2 * len(kinds) < len(values) else list(values)


def numbered(values: Sequence[Hashable]) -> tuple[list[Any], list[int]]:
    """The values there are, in order of appearance, and the index of each."""
    places: dict[Hashable, int] = {}
    of = [places.setdefault(value, len(places)) for value in values]
    return list(places), of


def kinds_of(line: Any, read: Callable[[Any], Sequence[Any]]) -> tuple[Any, ...]:
    """`read` checks entries, all at once; of packed ones each kind is looked at, and kept, once."""
    if not isinstance(line, dict):
        return tuple(read(line))
    found = read(line["kinds"])
    kinds = np.empty(len(found), dtype=object)
    for i, kind in enumerate(found):  # which may be tuples, and then are no rows of an array
        kinds[i] = kind
    return tuple(kinds[indices_of(line["of"], len(kinds))].tolist())
