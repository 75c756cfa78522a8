"""The lines of a journal: JSON objects from and to frames. The schema is described in docs/journal.md.

A line stands alone but for the table of tensors it names, so a damaged line costs its own window and no other.
Decoding trusts nothing: whatever a line holds, the answer is a value or a `ValueError`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from update_watch.dashboards.frame import (
    ACCUMULATOR_NUMBERS,
    CAUSES,
    NO_CODE,
    TENSOR_NUMBERS,
    WHOLE_NUMBERS,
    Columns,
    Frame,
    TensorTable,
)
from update_watch.dashboards.journal.checks import number_of, text_of, texts_of, whole_of
from update_watch.dashboards.journal.columns import column_line, column_of
from update_watch.dashboards.journal.histograms import histogram_lines, histograms_of
from update_watch.dashboards.journal.of_run import (
    divergence_line,
    divergence_of,
    outlook_line,
    outlook_of,
    run_line,
    run_of,
    short,
)
from update_watch.dashboards.journal.packing import indices_line, indices_of, kinds_line, kinds_of
from update_watch.dashboards.journal.parsing import parsed
from update_watch.dashboards.journal.sentences import advice_lines, advice_of
from update_watch.dashboards.run_numbers import run_numbers
from update_watch.report import PLACES, SEVERITY, Alert, Cause, Health, Level

SCHEMA = 2  # 1 had no packed columns; it is still read
FORMAT = "update-watch journal"
START = b'{"kind":"header","format":"update-watch journal",'  # how every journal begins
WINDOW_START = b'{"kind":"window",'  # how the line of a window begins

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
_LETTER_BYTES = np.frombuffer((_LETTERS + ABSENT).encode("ascii"), dtype=np.uint8)  # by code; NO_CODE is the last
_LEFT_OUT = frozenset({"headroom", "movement", "places", "what_if"})  # of a window not read as a whole
# up to which a long line may be read
AT_TENSORS, AT_ACCUMULATORS = b',"tensors":{', b',"accumulators":{'
AT_HISTOGRAMS, AT_MOVEMENT = b',"headroom":{"first":', b',"movement":{"first":'
_NO_LETTER = NO_CODE - 1
_CODE_OF = np.full(256, _NO_LETTER, dtype=np.int8)  # byte of a letter -> code
_CODE_OF[[ord(letter) for letter in ABSENT + _LETTERS]] = range(NO_CODE, len(_LETTERS))


def encode(line: Mapping[str, Any]) -> bytes:
    """One line of ASCII, with its newline."""
    return json.dumps(line, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def decode(raw: bytes, end: bytes = b"") -> dict[str, Any]:
    """The object of a line and its `end`.

    Raises:
        ValueError: it is not one.
    """
    try:
        line = parsed(raw, end)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004  # damage is one kind of error
    return line


# --- header --------------------------------------------------------------------------------------------


def header_line(run: Mapping[str, Any], time: float) -> dict[str, Any]:
    return {"kind": "header", "format": FORMAT, "schema": SCHEMA, "time": round(time, 3), "run": dict(run)}


def missing_line(windows: int) -> dict[str, Any]:
    """So many windows before the next one could not be written."""
    return {"kind": "missing", "windows": windows}


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
        "cost_ms": short(frame.cost_ms),
        "skipped_steps": frame.skipped_steps,
        "layers": frame.has_layers,
        "run": run_line(frame.run),
        "alerts": _alert_lines(frame.alerts, frame.table),
    }
    if frame.observed_steps is not None:
        line["observed_steps"] = frame.observed_steps
    if frame.observed_at is not None:
        line["observed_at"] = frame.observed_at
    if (share := short(frame.cost_share)) is not None:
        line["cost_share"] = share
    if frame.outlook is not None:
        line["forecast"] = outlook_line(frame.outlook)
    if frame.divergence is not None:
        line["divergence"] = divergence_line(frame.divergence)
    # what grows with the model comes last, and what is left out from `AT_...` on behind the rest
    line["tensors"] = _columns_line(frame.tensors)
    line["accumulators"] = {name: _columns_line(columns) for name, columns in frame.accumulators.items()}
    if frame.headroom is not None:
        line["headroom"] = histogram_lines(frame.headroom)
    if frame.movement is not None:
        line["movement"] = histogram_lines(frame.movement)
    if frame.places is not None:
        line["places"] = histogram_lines(frame.places)
    if frame.what_if:
        line["what_if"] = {name: column_line(values) for name, values in frame.what_if.items()}
    return line


def frame_of_line(
    line: Mapping[str, Any],
    tables: Mapping[str, TensorTable],
    numbers: Collection[str] | None = None,
    drawn: Collection[str] | None = None,
) -> Frame:
    """The frame in a "window" line; ValueError when it is damaged or its table is missing.

    `numbers`: of the tensors these alone (`TENSOR_NUMBERS`), without sentences, headroom, accumulators and what-ifs, which is
    many times faster. `drawn`: the numbers of tensors and accumulators that are read, all by default; others are not known.
    """
    if numbers is not None:
        line = {key: value for key, value in line.items() if key not in _LEFT_OUT}
        line["accumulators"] = {}
        if isinstance(line.get("tensors"), dict):
            line["tensors"] = {key: value for key, value in line["tensors"].items() if key != "advice"}
    try:
        has_run = line.get("run") is not None  # else it is worked out from all that there is
        read = TENSOR_NUMBERS if numbers is None or not has_run else numbers
        return _frame(line, tables, read, drawn if has_run else None)
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"damaged window ({error!r})") from None


def _frame(
    line: Mapping[str, Any], tables: Mapping[str, TensorTable], numbers: Collection[str], drawn: Collection[str] | None
) -> Frame:
    digest = line["table"]
    if digest not in tables:
        raise ValueError(f"its table of tensors, {digest!r}, is missing")
    table = tables[digest]
    count = len(table.name)
    headroom, movement, places = (line.get(name) for name in ("headroom", "movement", "places"))
    cost, share = (line.get(name) for name in ("cost_ms", "cost_share"))
    seen, seen_at = (line.get(name) for name in ("observed_steps", "observed_at"))
    tensors = _columns(line["tensors"], count, numbers, drawn, has_dtype=False)
    run = line.get("run")  # early journals have none: it is worked out from the tensors
    return Frame(
        step=whole_of(line["step"]),
        window=whole_of(line["window"]),
        windows=_positive(line["windows"]),
        time=number_of(line["time"]),
        health=Health(line["health"]),
        headline=text_of(line["headline"]),
        cost_ms=None if cost is None else number_of(cost),
        cost_share=None if share is None else number_of(share),
        observed_steps=None if seen is None else whole_of(seen),
        observed_at=None if seen_at is None else whole_of(seen_at),
        skipped_steps=whole_of(line["skipped_steps"]),
        alerts=tuple(_alert(alert, table) for alert in line["alerts"]),
        table=table,
        tensors=tensors,
        headroom=None if headroom is None else histograms_of(headroom, count),
        movement=None if movement is None else histograms_of(movement, count),
        places=None if places is None else histograms_of(places, count, PLACES),
        what_if={text_of(k): column_of(v, count) for k, v in line.get("what_if", {}).items()},
        accumulators={
            text_of(name): _columns(columns, count, ACCUMULATOR_NUMBERS, drawn, has_dtype=True)
            for name, columns in line["accumulators"].items()
        },
        has_layers=bool(line["layers"]),
        run=run_numbers(table.numel, tensors.health, tensors.numbers) if run is None else run_of(run),
        outlook=outlook_of(line["forecast"]) if "forecast" in line else None,
        divergence=divergence_of(line["divergence"]) if "divergence" in line else None,
    )


def _positive(value: Any) -> int:
    if whole_of(value) < 1:
        raise ValueError("damaged window (of no window)")
    return whole_of(value)


def _columns_line(columns: Columns) -> dict[str, Any]:
    line: dict[str, Any] = {"health": _LETTER_BYTES[columns.health].tobytes().decode("ascii")}
    present = columns.health != NO_CODE
    causes = [code for code in np.unique(columns.cause).tolist() if code != NO_CODE]
    if causes:
        line["cause"] = {CAUSES[code].value: indices_line(np.flatnonzero(columns.cause == code)) for code in causes}
    if columns.dtype:
        dtypes = list(itertools.compress(columns.dtype, present.tolist()))
        line["dtype"] = kinds_line(dtypes) if len(set(dtypes)) > 1 else "".join(dtypes[:1])
    for name, values in columns.numbers.items():
        if not np.isnan(values).all():
            line[name] = column_line(values[present], name in WHOLE_NUMBERS)
    if columns.advice:
        line["advice"] = advice_lines(columns.advice)
    return line


def _columns(
    line: Mapping[str, Any], count: int, fields: Collection[str], drawn: Collection[str] | None, has_dtype: bool
) -> Columns:
    health = _CODE_OF[np.frombuffer(line["health"].encode("ascii"), dtype=np.uint8)]
    if (health == _NO_LETTER).any():
        raise ValueError("damaged window (letters of healths)")
    present = np.flatnonzero(health != NO_CODE)
    if len(health) != count or (not has_dtype and len(present) != count):
        raise ValueError("damaged window (healths)")
    cause = np.full(count, NO_CODE, dtype=np.int8)
    for name, indices in line.get("cause", {}).items():
        cause[indices_of(indices, count)] = CAUSES.index(Cause(name))
    dtype: tuple[str, ...] = ()
    if has_dtype:
        kinds = line["dtype"]
        dtype = texts_of([kinds]) * len(present) if isinstance(kinds, str) else kinds_of(kinds, texts_of)
        if len(dtype) != len(present):
            raise ValueError("damaged window (formats)")
        if len(present) < count:
            each = np.full(count, "", dtype=object)
            each[present] = np.array(dtype, dtype=object)
            dtype = tuple(each.tolist())
    numbers = {}
    for name in fields:
        values = column_of(line.get(name) if drawn is None or name in drawn else None, len(present))
        if len(present) < count:
            numbers[name] = np.full(count, np.nan)
            numbers[name][present] = values
        else:
            numbers[name] = values
    advice = advice_of(line["advice"], count) if "advice" in line else {}
    return Columns(health, cause, numbers, advice, dtype)


def _alert_lines(alerts: Sequence[Alert], table: TensorTable) -> list[dict[str, Any]]:
    """Tensors of the table are named by their index."""
    named = {name for alert in alerts for name in alert.tensors}
    places = {name: i for i, name in enumerate(table.name) if name in named} if named else {}
    lines = []
    for alert in alerts:
        line: dict[str, Any] = {
            "step": alert.step,
            "level": alert.level.value,
            "title": alert.title,
            "text": alert.text,
        }
        line["tensors"] = [places.get(name, name) for name in alert.tensors]
        if alert.cause is not None:
            line["cause"] = alert.cause.value
        lines.append({**line, "model": alert.model} if alert.model else line)
    return lines


def _alert(line: Mapping[str, Any], table: TensorTable) -> Alert:
    cause = line.get("cause")
    names = [name if isinstance(name, str) else table.name[whole_of(name)] for name in line["tensors"]]
    return Alert(
        step=whole_of(line["step"]),
        level=Level(line["level"]),
        title=text_of(line["title"]),
        text=text_of(line["text"]),
        tensors=tuple(names),
        cause=None if cause is None else Cause(cause),
        model=text_of(line.get("model", "")),
    )
