"""Columns of a journal line: one number of all tensors, written in few bytes.

Reading trusts nothing: what does not fit is a `ValueError` (or one of the errors that taking plain data apart raises:
TypeError, KeyError, IndexError, AttributeError, OverflowError, which `lines` turns into one).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from update_watch.dashboards.frame import Floats
from update_watch.dashboards.journal.checks import HUGE, float_of
from update_watch.dashboards.journal.packing import (
    indices_line,
    indices_of,
    is_long,
    is_packed,
    packed_floats,
    unpacked,
)

_SPARSE = 0.6  # from this share on, a column is stored as the exceptions from its most common value


def column_line(values: Floats, is_whole: bool = False) -> Any:
    """A list; or one value when all are the same; or the most common value and the exceptions from it.

    A long one is packed, in seven digits; in a list there are four.
    """
    if is_long(len(values)):
        return _long_column_line(values, is_whole)
    items = _items(values, is_whole)
    counts: dict[Any, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    most = max(counts, key=counts.__getitem__, default=None)
    if len(counts) <= 1:
        return most
    if counts[most] < _SPARSE * len(items):
        return items
    at = [i for i, item in enumerate(items) if item != most]
    return {"most": most, "at": at, "are": [items[i] for i in at]}


def _items(values: Floats, is_whole: bool) -> list[Any]:
    if is_whole:
        return [None if math.isnan(v) else int(v) for v in values.tolist()]
    return [None if math.isnan(v) else float(f"{v:.4g}") for v in values.tolist()]


def _long_column_line(values: Floats, is_whole: bool) -> Any:
    missing = np.isnan(values)
    known = values[~missing]
    most, is_most = None, missing
    if 2 * len(known) > len(values):
        # a value that more than half of them have is the one in the middle
        middle = float(np.partition(known, len(known) // 2)[len(known) // 2])
        most, is_most = int(middle) if is_whole else middle, values == middle
    count = int(is_most.sum())
    if count == len(values):
        return most
    if count < _SPARSE * len(values):
        return packed_floats(values, is_whole)
    others = values[~is_most]
    are = packed_floats(others, is_whole) if is_long(len(others)) else _items(others, is_whole)
    return {"most": most, "at": indices_line(np.flatnonzero(~is_most)), "are": are}


def column_of(column: Any, count: int) -> Floats:
    if is_packed(column):
        found = unpacked(column, "f", count)
        values = found.astype(np.float64)
        if found.itemsize == 4 and not np.isinf(found).any():  # of these none is as large
            return values
    elif isinstance(column, list):
        values = _entries_of(column, count)
    elif isinstance(column, dict):
        values = np.full(count, float_of(column["most"]))
        at = indices_of(column["at"], count)
        values[at] = _entries_of(column["are"], len(at))
    else:
        value = float_of(column)
        return np.broadcast_to(
            value if abs(value) < HUGE else np.nan, count
        )  # of many tensors most columns are such ones
    values[~(np.abs(values) < HUGE)] = np.nan  # no measurement: damage, or a hostile hand
    return values


def _entries_of(column: Any, count: int) -> Floats:
    if is_packed(column):
        return unpacked(column, "f", count).astype(np.float64)
    values = np.array(column, dtype=np.float64)  # null becomes NaN
    if values.shape != (count,):
        raise ValueError("damaged window (length of a column)")
    return values
