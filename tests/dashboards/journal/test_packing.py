"""Columns of large windows in base64: they say what lists say, and damage of them is named."""

from __future__ import annotations

import base64
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.dashboards.million import laid_over, names_of
from tests.support.journals import assert_same_tensors, is_close, write
from tests.support.run_samples import fully_filled_report, synthetic_run
from update_watch.dashboards.frame import Frame, frame_of
from update_watch.dashboards.journal import JournalReader, packing, read_journal, scanning
from update_watch.dashboards.journal.columns import column_line, column_of
from update_watch.dashboards.journal.histograms import histogram_lines, histograms_of
from update_watch.dashboards.journal.lines import AT_HISTOGRAMS, AT_MOVEMENT, decode, encode, frame_of_line, window_line
from update_watch.dashboards.journal.packing import PACKED_FROM, indices_of, kinds_line, kinds_of, packed, unpacked
from update_watch.dashboards.journal.scanning import WHOLE
from update_watch.dashboards.journal.table import table_line, table_of
from update_watch.dashboards.report.history import read_history
from update_watch.report import Report

MANY = PACKED_FROM + 76


def _frame() -> Frame:
    """A window of a real kind, of many tensors."""
    return laid_over(frame_of(list(synthetic_run(windows=3))[2]), names_of(MANY))


def _read(frame: Frame) -> tuple[Frame, bytes]:
    table = table_line(frame.table)
    raw = encode(window_line(frame, table["table"]))
    return frame_of_line(decode(raw), {table["table"]: table_of(decode(encode(table)))}), raw


def test_a_packed_window_says_what_a_window_of_lists_says(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = _frame()
    found, raw = _read(frame)
    monkeypatch.setattr(packing, "PACKED_FROM", sys.maxsize)
    listed, text = _read(frame)
    assert len(raw) < len(text) and found.table == listed.table == frame.table
    assert_same_tensors(found, listed, rtol=6e-4)
    for name, values in listed.what_if.items():
        np.testing.assert_allclose(found.what_if[name], values, rtol=6e-4)


def test_a_report_of_which_all_is_packed_comes_back(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PACKED_FROM", 1)
    report = fully_filled_report()
    path = write(tmp_path / "j.jsonl", report)
    assert path.read_bytes().count(b'{"f4":"') > 2
    (back,) = read_journal(path)
    assert is_close(report.to_dict(), back.to_dict())


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(0, 1, MANY),
        np.where(np.arange(MANY) % 3 == 0, np.nan, np.linspace(1e-30, 1e-3, MANY)),
        np.where(np.arange(MANY) % 50 == 0, 0.5, 1.0),
        np.where(np.arange(MANY) % 50 == 0, 0.5, np.nan),
        np.full(MANY, np.nan),
        np.full(MANY, 3e-4),
        np.geomspace(1e-50, 1e50, MANY),
        np.array([1e-40, *[1.0] * (MANY - 1)]),
    ],
    ids=["each", "some not known", "most are one", "most not known", "none known", "one", "wide", "small"],
)
def test_every_kind_of_column_comes_back(values: Any) -> None:
    line = json.loads(json.dumps(column_line(values), allow_nan=False))
    np.testing.assert_allclose(column_of(line, MANY), values, rtol=1e-6)
    assert len(json.dumps(line)) < 11 * MANY


@pytest.mark.parametrize("most", [2**24 - 1, 2**24 + 1, 2**53 - 1])
def test_a_whole_number_comes_back_to_the_last_digit(most: int) -> None:
    values = np.arange(most - MANY + 1, most + 1, dtype=np.float64)
    np.testing.assert_array_equal(column_of(column_line(values, is_whole=True), MANY), values)


def _text(values: Any, kind: str = "f4") -> str:
    return packed(np.asarray(values), kind)[kind]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ({"f4": _text(np.ones(MANY - 1))}, "length"),
        ({"f4": _text(np.ones(2 * MANY))}, "length"),
        ({"f8": _text(np.ones(MANY))}, "length"),
        ({"i4": _text(np.ones(MANY), "i4")}, "another kind"),
        ({"f4": "!" + _text(np.ones(MANY))[1:]}, "packed numbers"),
        ({"f4": _text(np.ones(MANY))[:-4] + "===="}, "packed numbers"),
        ({"f4": "\u00fc" * len(_text(np.ones(MANY)))}, "packed numbers"),
        ({"f4": 7}, "another kind"),
        ({"most": 1.0, "at": {"i4": _text([MANY], "i4")}, "are": [0.5]}, "index"),
        ({"most": 1.0, "at": {"i4": _text([-1], "i4")}, "are": [0.5]}, "index"),
        ({"most": 1.0, "at": {"f4": _text([1.0])}, "are": [0.5]}, "another kind"),
        ({"most": 1.0, "at": {"i4": _text([1, 2], "i4")}, "are": {"f4": _text([0.5])}}, "length"),
    ],
)
def test_damage_of_a_packed_column_is_named(column: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        column_of(column, MANY)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e61, 1e300])
def test_a_packed_number_out_of_range_is_not_known(value: float) -> None:
    assert np.isnan(column_of({"f8": _text(np.full(MANY, value), "f8")}, MANY)).all()


def _histograms() -> np.ndarray:
    rows = np.random.default_rng(0).dirichlet(np.full(32, 0.1), MANY)
    rows[::7] = np.nan
    return rows


def test_packed_histograms_come_back_to_three_decimals() -> None:
    rows = _histograms()
    np.testing.assert_allclose(histograms_of(decode(encode(histogram_lines(rows))), MANY), rows, atol=5e-4)


@pytest.mark.parametrize(
    "damage",
    [
        {"first": {"u1": _text(np.full(MANY, 31), "u1")}},
        {"bins": {"u1": _text(np.full(MANY, 255), "u1")}},
        {"bins": {"u1": _text(np.zeros(MANY), "u1")}},
        {"first": {"i4": _text(np.full(MANY, -1), "i4")}},
        {"shares": {"u2": _text([1, 2], "u2")}},
        {"shares": {"f8": _text(np.full(MANY, np.nan), "f8")}},
        {"shares": [1, 2]},
    ],
)
def test_damage_of_packed_histograms_is_named(damage: dict[str, Any]) -> None:
    line = histogram_lines(_histograms())
    with pytest.raises((ValueError, AttributeError), match="damaged|attribute"):
        histograms_of({**line, **damage}, MANY)
    empty = {**line, "shares": {"u2": _text(np.zeros(unpacked(line["shares"], "u").size), "u2")}}
    with pytest.raises(ValueError, match="an empty histogram"):
        histograms_of(empty, MANY)


def test_few_values_of_many_tensors_are_kept_once() -> None:
    values = [("float32", "bfloat16")[i % 2] for i in range(MANY)]
    line = kinds_line(values)
    assert line["kinds"] == ["float32", "bfloat16"] and kinds_of(line, list) == tuple(values)
    with pytest.raises(ValueError, match="index"):
        kinds_of({**line, "kinds": ["float32"]}, list)
    assert kinds_line(list(range(MANY))) == list(range(MANY))  # nothing would be gained


def test_packed_indices_hold_no_more_than_their_text() -> None:
    assert indices_of({"i8": base64.b64encode(np.array([5], "<i8")).decode()}, 6).tolist() == [5]
    with pytest.raises(ValueError, match="packed numbers"):
        indices_of({"i4": "AAA="}, 6)


# --- long lines are looked through, and cut ----------------------------------------------------------------


@pytest.mark.parametrize("until", [None, b"", b"x-y", b"z"])
def test_lines_longer_than_a_block_are_scanned_as_short_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: bytes | None
) -> None:
    monkeypatch.setattr(scanning, "_BLOCK", 16)
    monkeypatch.setattr(scanning, "_HEAD", 4)
    rng = np.random.default_rng(0)
    for k in range(60):
        lines = [b"x" * n + b"-yz" + b"}" * (n % 3) + b"\n" for n in rng.integers(0, 60, 12).tolist()] + [b"\n"]
        lines += [b"y" * (k % 20)] if k % 20 else []
        path = tmp_path / str(k)
        path.write_bytes(b"".join(lines))
        with path.open("rb") as file:
            found = list(scanning.scan(file, lambda number, head: until))
        assert [(s.number, s.size) for s in found] == [(i, len(line)) for i, line in enumerate(lines, start=1)]
        assert [s.is_ended for s in found] == [line.endswith(b"\n") for line in lines]
        for s, line in zip(found, lines, strict=True):
            if until and len(line) > 16 and until in line and line.endswith(b"}\n"):
                assert s.is_cut and s.text == line[: line.index(until)]
            else:
                assert not s.is_cut and s.text == (line if until is not None else line[: len(s.text)])
            assert len(s.text) >= min(4, len(line)) or s.is_cut


@pytest.fixture
def long_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PACKED_FROM", 1)
    monkeypatch.setattr(scanning, "_BLOCK", 150)


def _stated(*names: str) -> Report:
    report = fully_filled_report()
    first, *others = report.tensors
    state = next(iter(first.accumulators.values()))
    states = {name: dataclasses.replace(state, name=name) for name in names}
    return dataclasses.replace(report, tensors=(dataclasses.replace(first, accumulators=states), *others))


@pytest.mark.usefixtures("long_lines")
@pytest.mark.parametrize("end", [WHOLE, AT_HISTOGRAMS, AT_MOVEMENT])
def test_a_long_line_is_cut_where_its_own_parts_begin(tmp_path: Path, end: bytes) -> None:
    names = ("accumulators", "headroom", "movement", "tensors", "first")  # states of a hostile rule
    path = write(tmp_path / "j.jsonl", _stated(*names), dataclasses.replace(_stated(*names), step=99_999))
    reader = JournalReader(path)
    frames = list(reader.frames(numbers=("efficiency",)))
    assert len(frames) == 2 and not frames[0].accumulators and set(frames[0].tensors.numbers) == {"efficiency"}
    last = reader.newest(frames[-1], end)
    assert set(last.accumulators) == set(names) and not reader.damaged
    assert (last.headroom is None) == (end == AT_HISTOGRAMS) and (last.movement is None) == (end != WHOLE)
    assert last.tensors.advice[0]


@pytest.mark.usefixtures("long_lines")
def test_of_a_long_line_whose_end_is_damaged_the_numbers_are_read_and_it_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "j.jsonl", fully_filled_report())
    path.write_bytes(path.read_bytes().replace(b'"accumulators":{', b'"accumulators":{,'))
    found = read_history(path)
    assert found.damaged == 1 and not found.last.accumulators
    assert found.last.tensors.numbers["update_ratio"][0] == pytest.approx(
        fully_filled_report().tensors[0].update_ratio, rel=1e-6
    )


def test_the_last_window_is_found_where_the_file_was_thinned_in_between(tmp_path: Path) -> None:
    path = write(tmp_path / "j.jsonl", fully_filled_report())
    reader = JournalReader(path)
    (frame,) = reader.frames(numbers=())
    header, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(header + b'{"kind":"note"}\n' + b"".join(others))
    assert reader.newest(frame).tensors.advice[0] and not reader.damaged
    path.write_bytes(header)
    assert reader.newest(frame).step == frame.step and reader.damaged == [(3, "its line is no longer there")]
