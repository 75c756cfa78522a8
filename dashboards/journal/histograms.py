"""Histograms of all tensors in a journal's line: of each the bins from the first to the last that is not empty."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from update_watch.dashboards.frame import Floats
from update_watch.dashboards.journal.checks import wholes_of
from update_watch.dashboards.journal.packing import is_long, packed, unpacked
from update_watch.report import HEADROOM_BINS

_SHARE = 10_000  # shares are stored as whole ten-thousandths
_BLOCK = 2**13  # tensors at a time: what is made on the way is many times as large as they are


def histogram_lines(histograms: Floats) -> Any:
    """Per tensor the first bin that is not empty, then ten-thousandths from there to the last that is not.

    Of many tensors packed: the first bins, how many bins of each (0: not known), and the shares of all in a row.
    """
    if is_long(len(histograms)):
        return _packed_lines(histograms)
    shares, first, beyond, known = _parts(histograms)
    rows: list[list[int]] = shares.tolist()
    return [[int(first[i]), *row[first[i] : beyond[i]]] if known[i] else None for i, row in enumerate(rows)]


def _packed_lines(histograms: Floats) -> dict[str, Any]:
    found = []
    for start in range(0, len(histograms), _BLOCK):
        shares, first, beyond, known = _parts(histograms[start : start + _BLOCK])
        lengths = np.where(known, beyond - first, 0)
        found.append(
            (first.astype(np.uint8), lengths.astype(np.uint8), shares[_within(first, lengths, shares.shape[1])])
        )
    first, lengths, shares = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return {"first": packed(first, "u1"), "bins": packed(lengths, "u1"), "shares": packed(shares, "u2")}


def _parts(histograms: Floats) -> tuple[Any, Any, Any, Any]:
    """Shares; the first bin that is not empty and the one beyond the last; whether it is known."""
    shares = np.rint(np.nan_to_num(histograms) * _SHARE).astype(np.int64)
    filled = shares > 0
    known = np.logical_and(filled.any(axis=1), ~np.isnan(histograms).any(axis=1))
    return shares, filled.argmax(axis=1), filled.shape[1] - filled[:, ::-1].argmax(axis=1), known


def _within(first: Any, lengths: Any, bins: int) -> Any:
    """Which bins are stored, (tensors, bins)."""
    places = np.arange(bins, dtype=np.int16)
    return (places >= first[:, None]) & (places < (first + lengths)[:, None])


def histograms_of(line: Any, count: int, bins: int = HEADROOM_BINS) -> Floats:
    known, first, lengths, shares = _packed_rows(line, count) if isinstance(line, dict) else _rows(line, count)
    if (first < 0).any() or (first + lengths > bins).any():
        raise ValueError("damaged window (bins of a histogram)")
    found = np.full((count, bins), np.nan) if len(known) < count else np.empty((count, bins))
    end_K = np.cumsum(lengths)
    for start in range(0, len(known), _BLOCK):
        block = slice(start, start + _BLOCK)
        mine = slice(int(end_K[start] - lengths[start]), int(end_K[block][-1]))
        filled = np.zeros((len(known[block]), bins))
        filled[_within(first[block], lengths[block], bins)] = shares[mine]
        total = filled.sum(axis=1, keepdims=True)
        if not (total > 0).all() or not np.isfinite(total).all():
            raise ValueError("damaged window (an empty histogram)")
        if len(known) == count:
            np.divide(filled, total, out=found[block])
        else:
            found[known[block]] = filled / total
    return found


def _rows(rows: Any, count: int) -> tuple[Any, Any, Any, Any]:
    """Of the tensors of which it is known: which, their first bins, how many; the shares of all."""
    if len(rows) != count:
        raise ValueError("damaged window (histograms)")
    known = [i for i, row in enumerate(rows) if row is not None]
    kept = [rows[i] for i in known]
    first = wholes_of([row[0] for row in kept])
    lengths = np.fromiter(map(len, kept), dtype=np.int64, count=len(kept)) - 1
    flat = np.array(list(itertools.chain.from_iterable(kept)), dtype=np.float64)  # with the first of each row
    if flat.ndim != 1 or not np.isfinite(flat).all():
        raise ValueError("damaged window (histograms)")
    return known, first, lengths, np.delete(flat, np.cumsum(lengths + 1) - lengths - 1)


def _packed_rows(line: Any, count: int) -> tuple[Any, Any, Any, Any]:
    first, lengths = (unpacked(line[key], "u", count).astype(np.int64) for key in ("first", "bins"))
    shares = unpacked(line["shares"], "u", int(lengths.sum()))
    known = np.flatnonzero(lengths)
    return known, first[known], lengths[known], shares
