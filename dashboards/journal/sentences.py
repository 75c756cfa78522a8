"""What is said of tensors, in a journal's line: one entry per wording, with the numbers in which its sentences differ."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from update_watch.dashboards.journal.checks import text_of
from update_watch.dashboards.journal.packing import indices_line, indices_of

_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_SLOT = "\x1f"  # where a number stood in a sentence


def advice_lines(advice: Mapping[int, str]) -> list[list[Any]]:
    """`[wording, tensors, numbers of slot 1, ...]` per wording: what many tensors say differs only in its numbers.

    Numbers that are the same for all of them stay in the wording; those of a slot stand in one text, with spaces.
    """
    if not advice:
        return []
    texts: dict[str, int] = {}  # each is taken apart once, however many tensors say it
    text_n = np.array([texts.setdefault(text, len(texts)) for text in advice.values()], dtype=np.int64)
    tensor_n = np.fromiter(advice, dtype=np.int64, count=len(advice))
    codes: dict[tuple[str, int], int] = {}  # of wordings
    alike: list[list[list[str]]] = []  # by wording: the numbers of each of its texts
    wording_t, place_t = np.zeros(len(texts), dtype=np.int64), np.zeros(len(texts), dtype=np.int64)
    for t, text in enumerate(texts):
        numbers = [] if _SLOT in text else _NUMBER.findall(text)
        code = codes.setdefault((_NUMBER.sub(_SLOT, text) if numbers else text, len(numbers)), len(codes))
        alike += [[]] if code == len(alike) else []
        wording_t[t], place_t[t] = code, len(alike[code])
        alike[code].append(numbers)
    order = np.argsort(wording_t[text_n], kind="stable")
    ends = np.cumsum(np.bincount(wording_t[text_n], minlength=len(codes)))[:-1]  # of each wording's tensors
    lines: list[list[Any]] = []
    for (wording, _), found, inside in zip(codes, alike, np.split(order, ends), strict=True):
        parts = wording.split(_SLOT) if found[0] else [wording]
        places = place_t[text_n[inside]].tolist()
        folded = parts[0]
        varying = []
        for slot, part in zip(zip(*found, strict=True), parts[1:], strict=True):
            is_same = len(set(slot)) == 1
            folded += (slot[0] if is_same else _SLOT) + part
            if not is_same:
                varying.append(" ".join(map(slot.__getitem__, places)))
        lines.append([folded, indices_line(tensor_n[inside]), *varying])
    return lines


class _Wording:
    """A sentence with slots, and the numbers in them: their places are looked for when one of them is asked for."""

    def __init__(self, texts: list[str], slots: list[str], members: int) -> None:
        if len(texts) != len(slots) + 1 or any(slot.count(" ") + 1 != members for slot in slots):
            raise ValueError("damaged window (advice)")
        self._texts, self._slots = texts, slots
        self._columns: list[_Numbers] | None = None

    def sentence(self, at: int) -> str:
        """Of the member at this place."""
        if self._columns is None:
            self._columns = list(map(_Numbers, self._slots))
        texts = self._texts
        return texts[0] + "".join(column[at] + text for column, text in zip(self._columns, texts[1:], strict=True))


class _Numbers:
    """What stands between the spaces of a text, which may be a million."""

    def __init__(self, slot: str) -> None:
        self._bytes = slot.encode("utf-8", "surrogatepass")
        (spaces,) = np.nonzero(np.frombuffer(self._bytes, dtype=np.uint8) == ord(" "))
        self._ends = np.concatenate(([-1], spaces, [len(self._bytes)]))

    def __getitem__(self, at: int) -> str:
        return self._bytes[self._ends[at] + 1 : self._ends[at + 1]].decode("utf-8", "surrogatepass")


class _Sentences(Mapping[int, str]):
    """Advice by tensor, put together as it is asked for: of a million sentences some are read."""

    def __init__(self, lines: Any, count: int) -> None:
        self._wordings: list[_Wording] = []
        self._wording = np.full(count, -1, dtype=np.int64)  # of each tensor; -1: nothing is said
        self._at = np.zeros(count, dtype=np.int64)  # its place among those of its wording
        for wording, tensors, *slots in lines:
            members = indices_of(tensors, count)
            texts = text_of(wording).split(_SLOT) if slots else [text_of(wording)]
            self._wording[members] = len(self._wordings)
            self._at[members] = np.arange(len(members))
            self._wordings.append(_Wording(texts, slots, len(members)))

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self._wording) or self._wording[i] < 0:
            raise KeyError(i)
        return self._wordings[int(self._wording[i])].sentence(int(self._at[i]))

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(self._wording >= 0).tolist())

    def __len__(self) -> int:
        return int((self._wording >= 0).sum())


def advice_of(lines: Any, count: int) -> Mapping[int, str]:
    return _Sentences(lines, count)
