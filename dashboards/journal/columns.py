"""Columns of a journal line: numbers, histograms and sentences of all tensors, written in few bytes.

Reading trusts nothing: what does not fit is a `ValueError` (or one of the errors that taking plain data apart raises:
TypeError, KeyError, IndexError, AttributeError, OverflowError, which `lines` turns into one).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from update_watch.dashboards.frame import Floats, Outlook
from update_watch.dashboards.run_numbers import NUMBERS, RunNumbers
from update_watch.foresight.divergence import Divergence, Sign
from update_watch.report import HEADROOM_BINS, SEVERITY

_SHARE = 10_000  # headroom shares are stored as whole ten-thousandths
_SPARSE = 0.6  # from this share on, a column is stored as the exceptions from its most common value
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_HUGE = 1e60  # of a number; sums and squares of those below stay finite
_LONGEST = 200_000  # characters of a text
_OF_RUN = ("made_at", "stalling_share", "lost_share", "from_step", "floor")  # of a forecast
_HEADING = tuple(field.name for field in dataclasses.fields(Divergence) if field.name not in ("step", "signs"))
_POINTS = 1_000  # of a forecast
_SIGNS = 100  # of a divergence, and tensors of one
_SLOT = "\x1f"  # where a number stood in a sentence


def short(value: float | None) -> float | None:
    """Four significant digits."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def column_line(values: Floats, is_whole: bool = False) -> Any:
    """A list; or one value when all are the same; or the most common value and the exceptions from it."""
    items: list[Any] = values.tolist()
    if is_whole:
        items = [None if math.isnan(v) else int(v) for v in items]
    else:
        items = [None if math.isnan(v) else float(f"{v:.4g}") for v in items]
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


def column_of(column: Any, count: int) -> Floats:
    if isinstance(column, dict):
        values = np.full(count, _float(column["most"]))
        exceptions = np.array(column["are"], dtype=np.float64)
        if exceptions.ndim != 1 or len(exceptions) != len(column["at"]):
            raise ValueError("damaged window (exceptions of a column)")
        values[indices_of(column["at"], count)] = exceptions
    elif isinstance(column, list):
        values = np.array(column, dtype=np.float64)  # null becomes NaN
        if values.shape != (count,):
            raise ValueError("damaged window (length of a column)")
    else:
        values = np.full(count, _float(column))
    values[~(np.abs(values) < _HUGE)] = np.nan  # no measurement: damage, or a hostile hand
    return values


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)


def indices_of(values: Any, count: int) -> Any:
    indices = np.array(values, dtype=None if len(values) else np.int64)
    if indices.dtype.kind not in "iu" or indices.ndim != 1:
        raise ValueError("damaged window (indices that are no whole numbers)")
    if len(indices) and (indices.min() < 0 or indices.max() >= count):
        raise ValueError("damaged window (index of a tensor)")
    return indices


def headroom_lines(headroom: Floats) -> list[list[int] | None]:
    """Per tensor the first bin that is not empty, then ten-thousandths from there to the last that is not."""
    shares = np.rint(np.nan_to_num(headroom) * _SHARE).astype(int)
    filled = shares > 0
    known = np.logical_and(filled.any(axis=1), ~np.isnan(headroom).any(axis=1))
    first, beyond = filled.argmax(axis=1), filled.shape[1] - filled[:, ::-1].argmax(axis=1)
    rows: list[list[int]] = shares.tolist()
    return [[int(first[i]), *row[first[i] : beyond[i]]] if known[i] else None for i, row in enumerate(rows)]


def headroom_of(rows: Any, count: int, bins: int = HEADROOM_BINS) -> Floats:
    if len(rows) != count:
        raise ValueError("damaged window (histograms)")
    known = [i for i, row in enumerate(rows) if row is not None]
    headroom = np.full((count, bins), np.nan)
    if not known:
        return headroom
    kept = [rows[i] for i in known]
    first = wholes_of([row[0] for row in kept])
    lengths = np.fromiter(map(len, kept), dtype=np.int64, count=len(kept)) - 1
    flat = np.array(list(itertools.chain.from_iterable(kept)), dtype=np.float64)  # with the first of each row
    if flat.ndim != 1 or not np.isfinite(flat).all():
        raise ValueError("damaged window (histograms)")
    shares = np.delete(flat, np.cumsum(lengths + 1) - lengths - 1)
    if (first < 0).any() or (first + lengths > bins).any():
        raise ValueError("damaged window (bins of a histogram)")
    filled = np.zeros((len(known), bins))
    row = np.repeat(np.arange(len(known)), lengths)
    within = np.arange(len(shares)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    filled[row, first[row] + within] = shares
    total = filled.sum(axis=1, keepdims=True)
    if not (total > 0).all() or not np.isfinite(total).all():
        raise ValueError("damaged window (an empty histogram)")
    headroom[known] = filled / total
    return headroom


def advice_lines(advice: Mapping[int, str]) -> list[list[Any]]:
    """`[wording, tensors, numbers of slot 1, ...]` per wording: what many tensors say differs only in its numbers.

    Numbers that are the same for all of them stay in the wording; those of a slot stand in one text, with spaces.
    """
    groups: dict[str, list[tuple[int, list[str]]]] = {}
    parsed: dict[str, tuple[str, list[str]]] = {}
    for i, text in advice.items():
        if text not in parsed:
            numbers = [] if _SLOT in text else _NUMBER.findall(text)
            parsed[text] = (_NUMBER.sub(_SLOT, text) if numbers else text, numbers)
        wording, numbers = parsed[text]
        groups.setdefault(wording, []).append((i, numbers))
    lines: list[list[Any]] = []
    for wording, members in groups.items():
        slots = list(zip(*(numbers for _, numbers in members), strict=True))
        if not slots:
            lines.append([wording, [i for i, _ in members]])
            continue
        texts = wording.split(_SLOT)
        folded = texts[0]
        varying = []
        for slot, text in zip(slots, texts[1:], strict=True):
            is_same = len(set(slot)) == 1
            folded += (slot[0] if is_same else _SLOT) + text
            if not is_same:
                varying.append(" ".join(slot))
        lines.append([folded, [i for i, _ in members], *varying])
    return lines


class _Sentences(Mapping[int, str]):
    """Advice by tensor, put together as it is asked for: of a million sentences some are read."""

    def __init__(self, lines: Any, count: int) -> None:
        self._wordings: list[tuple[list[str], list[list[str]]]] = []  # texts between slots; the numbers of each slot
        self._wording = np.full(count, -1, dtype=np.int64)  # of each tensor; -1: nothing is said
        self._at = np.zeros(count, dtype=np.int64)  # its place among those of its wording
        for wording, tensors, *slots in lines:
            members = indices_of(tensors, count)
            texts = text_of(wording).split(_SLOT) if slots else [text_of(wording)]
            numbers = [slot.split(" ") for slot in slots]
            if len(texts) != len(slots) + 1 or any(len(column) != len(members) for column in numbers):
                raise ValueError("damaged window (advice)")
            self._wording[members] = len(self._wordings)
            self._at[members] = np.arange(len(members))
            self._wordings.append((texts, numbers))

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self._wording) or self._wording[i] < 0:
            raise KeyError(i)
        texts, numbers = self._wordings[int(self._wording[i])]
        at = int(self._at[i])
        return texts[0] + "".join(column[at] + text for column, text in zip(numbers, texts[1:], strict=True))

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(self._wording >= 0).tolist())

    def __len__(self) -> int:
        return int((self._wording >= 0).sum())


def advice_of(lines: Any, count: int) -> Mapping[int, str]:
    return _Sentences(lines, count)


def run_line(run: RunNumbers) -> dict[str, Any]:
    """What is known of a window's numbers for the run as a whole."""
    line: dict[str, Any] = {name: short(getattr(run, name)) for name in NUMBERS}
    return {**{k: v for k, v in line.items() if v is not None}, "counts": [round(n, 2) for n in run.counts]}


def run_of(line: Any) -> RunNumbers:
    counts = [float(n) for n in line["counts"]]
    values = [_float(line.get(name)) for name in NUMBERS]
    if len(counts) != len(SEVERITY) or any(abs(v) >= _HUGE for v in values) or not all(0 <= n < _HUGE for n in counts):
        raise ValueError("damaged window (numbers of the run)")
    return RunNumbers(**dict(zip(NUMBERS, values, strict=True)), counts=tuple(counts))


def outlook_line(outlook: Outlook) -> dict[str, Any]:
    """What a forecast says of the run, to four digits."""
    course = [[step, short(efficiency), short(rate)] for step, efficiency, rate in outlook.course]
    line = {"until": outlook.until, "headline": outlook.headline, "course": course, "error": short(outlook.error)}
    more = {name: getattr(outlook, name) for name in _OF_RUN}
    more = {name: value if isinstance(value, int) else short(value) for name, value in more.items()}
    return line | {name: value for name, value in more.items() if value is not None}


def outlook_of(line: Any) -> Outlook:
    course = tuple((whole_of(step), number_of(arrived), number_of(rate)) for step, arrived, rate in line["course"])
    if len(course) > _POINTS or any(a[0] >= b[0] for a, b in itertools.pairwise(course)):
        raise ValueError("damaged window (its forecast)")
    error = line.get("error")

    def said(name: str) -> float | None:
        return number_of(line[name]) if name in line else None

    def step(name: str) -> int | None:
        return whole_of(line[name]) if name in line else None

    return Outlook(
        whole_of(line["until"]),
        text_of(line["headline"]),
        course,
        None if error is None else number_of(error),
        step("made_at"),
        said("stalling_share"),
        said("lost_share"),
        step("from_step"),
        said("floor"),
    )


def divergence_line(found: Divergence) -> dict[str, Any]:
    """What is known of where the run is heading, to four digits."""
    line: dict[str, Any] = {name: short(getattr(found, name)) for name in _HEADING}
    line = {"step": found.step} | {name: value for name, value in line.items() if value is not None}
    if found.signs:
        line["signs"] = [[sign.name, sign.is_warning, sign.text, list(sign.tensors)] for sign in found.signs]
    return line


def divergence_of(line: Any) -> Divergence:
    known = {name: number_of(line[name]) for name in _HEADING if name in line}
    signs = line.get("signs", [])
    if len(signs) > _SIGNS or any(len(tensors) > _SIGNS for *_, tensors in signs):
        raise ValueError("damaged window (where the run is heading)")
    return Divergence(
        step=whole_of(line["step"]),
        **known,
        signs=tuple(
            Sign(text_of(name), bool(is_warning), text_of(text), tuple(texts_of(tensors)))
            for name, is_warning, text, tensors in signs
        ),
    )


# --- checks --------------------------------------------------------------------------------------------


def number_of(value: Any) -> float:
    number = float(value)
    if not abs(number) < _HUGE:
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
