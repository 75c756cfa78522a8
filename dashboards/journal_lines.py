"""The lines of a journal: JSON objects from and to frames. The schema is described in docs/journal.md.

A line stands alone but for the table of tensors it names, so a damaged line costs its own window and no other.
Decoding trusts nothing: whatever a line holds, the answer is a value or a `ValueError`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from update_watch.dashboards.frame import (
    ACCUMULATOR_NUMBERS,
    CAUSES,
    NO_CODE,
    TENSOR_NUMBERS,
    WHOLE_NUMBERS,
    Columns,
    Floats,
    Frame,
    TensorTable,
)
from update_watch.report import HEADROOM_BINS, SEVERITY, Alert, Cause, Health, Level

SCHEMA = 1
FORMAT = "update-watch journal"
START = b'{"kind":"header","format":"update-watch journal",'  # how every journal begins

HEALTH_LETTERS = {
    Health.broken: "b",
    Health.stalled: "s",
    Health.stalling: "g",
    Health.unknown: "u",
    Health.idle: "i",
    Health.frozen: "f",
    Health.healthy: "h",
}
ABSENT = "-"  # in the place of a letter: the tensor has no such accumulator
_LETTERS = "".join(HEALTH_LETTERS[h] for h in SEVERITY)
_CODES = {letter: code for code, letter in enumerate(_LETTERS)} | {ABSENT: NO_CODE}

_SHARE = 10_000  # headroom shares are stored as whole ten-thousandths
_SPARSE = 0.6  # from this share on, a column is stored as the exceptions from its most common value
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_SLOT = "\x1f"  # where a number stood in a sentence


def encode(line: Mapping[str, Any]) -> bytes:
    """One line of ASCII, with its newline."""
    return json.dumps(line, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def decode(raw: bytes) -> dict[str, Any]:
    """The object of a line.

    Raises:
        ValueError: it is not one.
    """
    try:
        line = json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")
    return line


# --- header and table of tensors -------------------------------------------------------------------


def header_line(run: Mapping[str, Any], time: float) -> dict[str, Any]:
    return {"kind": "header", "format": FORMAT, "schema": SCHEMA, "time": round(time, 3), "run": dict(run)}


def table_line(table: TensorTable) -> dict[str, Any]:
    text = json.dumps(table)
    return {
        "kind": "tensors",
        "table": hashlib.sha256(text.encode("ascii")).hexdigest()[:12],
        "name": table.name,
        "names": {str(i): names for i, names in enumerate(table.names) if names},
        "layer": table.layer,
        "optimizer_group": table.optimizer_group,
        "dtype": table.dtype,
        "shape": table.shape,
        "numel": table.numel,
        "trainable": table.trainable,
    }


def table_of(line: Mapping[str, Any]) -> TensorTable:
    """The table in a "tensors" line; ValueError when it is damaged."""
    try:
        count = len(line["name"])
        names = line["names"]
        table = TensorTable(
            name=tuple(_text(x) for x in line["name"]),
            names=tuple(tuple(_text(x) for x in names.get(str(i), ())) for i in range(count)),
            layer=tuple(_text(x) for x in line["layer"]),
            optimizer_group=tuple(_text(x) for x in line["optimizer_group"]),
            dtype=tuple(_text(x) for x in line["dtype"]),
            shape=tuple(tuple(_whole(n) for n in shape) for shape in line["shape"]),
            numel=tuple(_whole(n) for n in line["numel"]),
            trainable=tuple(bool(x) for x in line["trainable"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged table of tensors ({error!r})") from None
    if any(len(column) != count for column in table):
        raise ValueError("damaged table of tensors (columns of different length)")
    return table


# --- windows -----------------------------------------------------------------------------------------


def window_line(frame: Frame, table: str) -> dict[str, Any]:
    """`table` is the digest of its table's line. `step` and `windows` come first: thinning reads them unparsed."""
    line: dict[str, Any] = {
        "kind": "window",
        "step": frame.step,
        "windows": frame.windows,
        "window": frame.window,
        "table": table,
        "time": round(frame.time, 3),
        "health": frame.health.value,
        "headline": frame.headline,
        "cost_ms": _short(frame.cost_ms),
        "skipped_steps": frame.skipped_steps,
        "layers": frame.has_layers,
        "alerts": [_alert_line(alert) for alert in frame.alerts],
        "tensors": _columns_line(frame.tensors),
        "accumulators": {name: _columns_line(columns) for name, columns in frame.accumulators.items()},
    }
    if frame.headroom is not None:
        line["headroom"] = [_histogram_line(row) for row in frame.headroom]
    if frame.what_if:
        line["what_if"] = {name: _column(values) for name, values in frame.what_if.items()}
    return line


def frame_of_line(line: Mapping[str, Any], tables: Mapping[str, TensorTable]) -> Frame:
    """The frame in a "window" line; ValueError when it is damaged or its table is missing."""
    try:
        return _frame(line, tables)
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"damaged window ({error!r})") from None


def _frame(line: Mapping[str, Any], tables: Mapping[str, TensorTable]) -> Frame:
    digest = line["table"]
    if digest not in tables:
        raise ValueError(f"its table of tensors, {digest!r}, is missing")
    table = tables[digest]
    count = len(table.name)
    headroom = line.get("headroom")
    cost = line.get("cost_ms")
    return Frame(
        step=_whole(line["step"]),
        window=_whole(line["window"]),
        windows=_whole(line["windows"]),
        time=float(line["time"]),
        health=Health(line["health"]),
        headline=_text(line["headline"]),
        cost_ms=None if cost is None else float(cost),
        skipped_steps=_whole(line["skipped_steps"]),
        alerts=tuple(_alert(alert) for alert in line["alerts"]),
        table=table,
        tensors=_columns(line["tensors"], count, TENSOR_NUMBERS, has_dtype=False),
        headroom=None if headroom is None else _headroom(headroom, count),
        what_if={_text(k): _numbers(v, count) for k, v in line.get("what_if", {}).items()},
        accumulators={
            _text(name): _columns(columns, count, ACCUMULATOR_NUMBERS, has_dtype=True)
            for name, columns in line["accumulators"].items()
        },
        has_layers=bool(line["layers"]),
    )


def _columns_line(columns: Columns) -> dict[str, Any]:
    line: dict[str, Any] = {"health": "".join(_LETTERS[c] if c != NO_CODE else ABSENT for c in columns.health.tolist())}
    causes: dict[str, list[int]] = {}
    for i in np.flatnonzero(columns.cause != NO_CODE).tolist():
        causes.setdefault(CAUSES[columns.cause[i]].value, []).append(i)
    if causes:
        line["cause"] = causes
    if columns.dtype:
        kinds = set(columns.dtype)
        line["dtype"] = columns.dtype if len(kinds) > 1 else kinds.pop()
    for name, values in columns.numbers.items():
        if not np.isnan(values).all():
            line[name] = _column(values, name in WHOLE_NUMBERS)
    if columns.advice:
        line["advice"] = _advice_line(columns.advice)
    return line


def _columns(line: Mapping[str, Any], count: int, fields: Sequence[str], has_dtype: bool) -> Columns:
    health = np.array([_CODES[letter] for letter in line["health"]], dtype=np.int8)
    if len(health) != count or (not has_dtype and (health == NO_CODE).any()):
        raise ValueError("damaged window (healths)")
    cause = np.full(count, NO_CODE, dtype=np.int8)
    for name, indices in line.get("cause", {}).items():
        cause[_indices(indices, count)] = CAUSES.index(Cause(name))
    dtype: tuple[str, ...] = ()
    if has_dtype:
        kinds = line.get("dtype", "")
        dtype = (kinds,) * count if isinstance(kinds, str) else tuple(_text(x) for x in kinds)
        if len(dtype) != count:
            raise ValueError("damaged window (dtypes)")
    return Columns(
        health=health,
        cause=cause,
        numbers={name: _numbers(line.get(name), count) for name in fields},
        advice=_advice(line["advice"], count) if "advice" in line else {},
        dtype=dtype,
    )


def _alert_line(alert: Alert) -> dict[str, Any]:
    line = {
        "step": alert.step,
        "level": alert.level.value,
        "title": alert.title,
        "text": alert.text,
        "tensors": alert.tensors,
    }
    return line if alert.cause is None else {**line, "cause": alert.cause.value}


def _alert(line: Mapping[str, Any]) -> Alert:
    cause = line.get("cause")
    return Alert(
        step=_whole(line["step"]),
        level=Level(line["level"]),
        title=_text(line["title"]),
        text=_text(line["text"]),
        tensors=tuple(_text(x) for x in line["tensors"]),
        cause=None if cause is None else Cause(cause),
    )


# --- columns of numbers ------------------------------------------------------------------------------


def _short(value: float | None) -> float | None:
    """Four significant digits."""
    return None if value is None or value != value else float(f"{value:.4g}")


def _column(values: Floats, is_whole: bool = False) -> Any:
    """A list; or one value when all are the same; or the most common value and the exceptions from it."""
    items: list[Any] = values.tolist()
    if is_whole:
        items = [None if v != v else int(v) for v in items]
    else:
        items = [None if v != v else float(f"{v:.4g}") for v in items]
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


def _numbers(column: Any, count: int) -> Floats:
    if isinstance(column, dict):
        values = np.full(count, _float(column["most"]))
        exceptions = np.array(column["are"], dtype=np.float64)
        if exceptions.ndim != 1 or len(exceptions) != len(column["at"]):
            raise ValueError("damaged window (exceptions of a column)")
        values[_indices(column["at"], count)] = exceptions
    elif isinstance(column, list):
        values = np.array(column, dtype=np.float64)  # null becomes NaN
        if values.shape != (count,):
            raise ValueError("damaged window (length of a column)")
    else:
        values = np.full(count, _float(column))
    values[np.isinf(values)] = np.nan
    return values


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _indices(values: Any, count: int) -> Any:
    indices = np.array([_whole(v) for v in values], dtype=np.int64)
    if len(indices) and (indices.min() < 0 or indices.max() >= count):
        raise ValueError("damaged window (index of a tensor)")
    return indices


# --- headroom ------------------------------------------------------------------------------------------


def _histogram_line(row: Floats) -> list[int] | None:
    """The first bin that is not empty, then ten-thousandths from there to the last that is not."""
    if np.isnan(row).any():
        return None
    shares = np.rint(row * _SHARE).astype(int)
    filled = np.flatnonzero(shares)
    if not len(filled):
        return None
    first, last = int(filled[0]), int(filled[-1])
    return [first, *shares[first : last + 1].tolist()]


def _headroom(rows: Any, count: int) -> Floats:
    if len(rows) != count:
        raise ValueError("damaged window (number of histograms)")
    headroom = np.full((count, HEADROOM_BINS), np.nan)
    for i, row in enumerate(rows):
        if row is None:
            continue
        first, shares = _whole(row[0]), np.array(row[1:], dtype=np.float64)
        total = float(shares.sum())
        if first < 0 or first + len(shares) > HEADROOM_BINS or not total > 0 or not np.isfinite(total):
            raise ValueError("damaged window (histogram)")
        headroom[i] = 0.0
        headroom[i, first : first + len(shares)] = shares / total
    return headroom


# --- sentences -----------------------------------------------------------------------------------------


def _advice_line(advice: Mapping[int, str]) -> dict[str, Any]:
    """Sentences once per wording: those of many tensors differ only in their numbers."""
    wordings: dict[str, int] = {}
    said = []
    for i, text in advice.items():
        if _SLOT in text:  # not ours; kept as it is
            said.append([i, wordings.setdefault(text, len(wordings)), None])
            continue
        wording = _NUMBER.sub(_SLOT, text)
        said.append([i, wordings.setdefault(wording, len(wordings)), *_NUMBER.findall(text)])
    return {"wordings": list(wordings), "said": said}


def _advice(line: Mapping[str, Any], count: int) -> dict[int, str]:
    wordings = [_text(wording) for wording in line["wordings"]]
    advice = {}
    for i, which, *numbers in line["said"]:
        _indices([i], count)
        wording = wordings[_whole(which)]
        if numbers == [None]:
            advice[i] = wording
            continue
        parts = wording.split(_SLOT)
        if len(parts) != len(numbers) + 1:
            raise ValueError("damaged window (advice)")
        fill = [*(_text(number) for number in numbers), ""]
        advice[i] = "".join(part + number for part, number in zip(parts, fill, strict=True))
    return advice


# --- checks --------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a text was expected, not {type(value).__name__}")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > 2**62:
        raise ValueError("a whole number was expected")
    return value
