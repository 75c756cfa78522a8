"""The dotted names of a model as a tree, a level at a time: what `kinds` reads its structure from.

Names are looked at as bytes, those of a million side by side, so that no text is made but one of each part that differs from all
others. P is the number of names; node 0 is the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# parts of a path that stand for a wrapper and not for a module of the model
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_DEEPEST = 64  # parts of a name that are told apart; what is behind them is one
_WORD = 8  # bytes
_LONG = 8 * _WORD  # a part of more bytes is taken by itself

Ints = NDArray[np.int64]
Marks = NDArray[np.uint64]


class Level(NamedTuple):
    """The nodes of one depth, those of one parent side by side."""

    first: int  # number of the first
    parent: Ints
    part: Ints  # index of its text


def levels_of(names: Sequence[str]) -> tuple[list[str], list[Level], Ints]:
    """The texts of parts, the nodes by depth, and the node of each name."""
    lines = _Lines([".".join(_parts(name)) for name in names] if _has_wrappers(names) else names)
    codes: dict[str, int] = {}
    node_P = np.zeros(len(names), dtype=np.int64)
    levels: list[Level] = []
    count = 1
    for depth in range(min(int(lines.length_P.max(initial=0)), _DEEPEST + 1)):
        alive = np.flatnonzero(lines.length_P > depth)
        texts, at = lines.parts(alive, depth)
        code = np.array([codes.setdefault(text, len(codes)) for text in texts], dtype=np.int64)[at]
        paths, at = distinct(node_P[alive] * len(codes) + code)
        levels.append(Level(count, paths // len(codes), paths % len(codes)))
        node_P[alive] = count + at
        count += len(paths)
    return list(codes), levels, node_P


def distinct(values: NDArray[Any]) -> tuple[NDArray[Any], Ints]:
    """The distinct ones in order, and where each of `values` is among them. Neighbours are often the same."""
    if not len(values):
        return values, np.zeros(0, dtype=np.int64)
    begins = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
    runs = values[begins]
    if (runs[1:] > runs[:-1]).all():
        found, at = runs, np.arange(len(runs))
    else:
        found = np.unique(runs)
        at = np.searchsorted(found, runs)  # faster than what `unique` would say: few are distinct, or all are in order
    return found, np.repeat(at, np.diff(np.append(begins, len(values))))


def mixed(first: NDArray[Any], second: NDArray[Any]) -> Marks:
    """A number for each pair, so that sums of them are the same for the same pairs only."""
    found = (
        first.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
        + second.astype(np.uint64)
        + np.uint64(0x9E3779B97F4A7C15)
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        found = (found ^ found >> np.uint64(shift)) * np.uint64(factor)
    last: Marks = found ^ found >> np.uint64(31)
    return last


def _has_wrappers(names: Sequence[str]) -> bool:
    return "_mod" in "\n".join(names)


def _parts(name: str) -> list[str]:
    return [part for part in name.split(".", _DEEPEST) if part not in WRAPPERS] or [name]


class _Lines:
    """Names one behind the other, a dot behind each."""

    def __init__(self, names: Sequence[str]) -> None:
        text = ".".join(names) + "."
        if text.isascii():
            size_P = np.fromiter(map(len, names), dtype=np.int64, count=len(names))
        else:
            size_P = np.array([len(name.encode("utf-8", "surrogatepass")) for name in names], dtype=np.int64)
        # some more, so that a word can be read at the last byte, too
        self._bytes = np.frombuffer(text.encode("utf-8", "surrogatepass") + bytes(_WORD), dtype=np.uint8)
        self._words = np.ndarray((len(self._bytes) - _WORD,), "<u8", self._bytes, strides=(1,))  # at every byte
        self._dots = np.flatnonzero(self._bytes == ord("."))
        end_P = np.cumsum(size_P + 1) - 1
        self._begin_P = end_P - size_P
        last_P = np.searchsorted(self._dots, end_P)
        self._dot_P = np.concatenate(([0], last_P[:-1] + 1))[: len(names)]  # the first of each name
        self._end_P = end_P
        self.length_P: Ints = last_P - self._dot_P + 1  # parts of each

    def parts(self, which: Ints, depth: int) -> tuple[list[str], Ints]:
        """The parts at a depth of these names, which are deep enough: their texts, and which of them each has."""
        dot = self._dot_P[which] + depth
        begin = self._dots[dot - 1] + 1 if depth else self._begin_P[which]
        size = (self._end_P[which] if depth == _DEEPEST else self._dots[dot]) - begin
        marks, at = distinct(self._marks(begin, size))
        sample = np.empty(len(marks), dtype=np.int64)
        sample[at[::-1]] = np.arange(len(at))[::-1]  # the first of each
        order = np.argsort(sample)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        texts = [self._text(int(begin[i]), int(size[i])) for i in sample[order].tolist()]
        return texts, place[at]

    def _marks(self, begin: Ints, size: Ints) -> Marks:
        """A number for each text."""
        found = mixed(size, self._word(begin, size))
        for done in range(_WORD, min(_LONG, int(size.max())), _WORD):
            rest = np.flatnonzero(size > done)
            found[rest] = mixed(found[rest], self._word(begin[rest] + done, size[rest] - done))
        for i in np.flatnonzero(size > _LONG).tolist():
            found[i] = hash(self._text(int(begin[i]), int(size[i]))) % 2**64
        return found

    def _word(self, begin: Ints, size: Ints) -> Marks:
        """Its first bytes, at most a word of them."""
        kept = np.array([2 ** (8 * n) - 1 for n in range(_WORD + 1)], dtype=np.uint64)
        found: Marks = self._words[begin] & kept[np.minimum(size, _WORD)]
        return found

    def _text(self, begin: int, size: int) -> str:
        return self._bytes[begin : begin + size].tobytes().decode("utf-8", "surrogatepass")
