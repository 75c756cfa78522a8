"""Long lines, whose packed numbers stay where they stand: they say what `json.loads` says."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from bench.dashboards.million import laid_over, names_of
from tests.support.journals import assert_same_tensors
from tests.support.run_samples import synthetic_run
from update_watch.dashboards.frame import Frame, frame_of
from update_watch.dashboards.journal import parsing
from update_watch.dashboards.journal.lines import decode, encode, frame_of_line, window_line
from update_watch.dashboards.journal.packing import PACKED_FROM, packed, unpacked
from update_watch.dashboards.journal.table import table_line, table_of

NUMBERS = packed(np.arange(40.0), "f8")


@pytest.fixture(autouse=True)
def short_lines_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "_LONG_LINE", 0)
    monkeypatch.setattr(parsing, "_LONG_TEXT", 8)


def as_text(value: Any) -> Any:
    if isinstance(value, memoryview):
        return bytes(value).decode()
    if isinstance(value, dict):
        return {key: as_text(one) for key, one in value.items()}
    return [as_text(one) for one in value] if isinstance(value, list) else value


def views(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(views, value.values()))
    return sum(map(views, value)) if isinstance(value, list) else isinstance(value, memoryview)


@pytest.mark.parametrize(
    ("line", "left_out"),
    [
        pytest.param({"a": NUMBERS, "b": [NUMBERS, 1, {"c": NUMBERS}], "d": "x" * 20}, 3, id="packed"),
        pytest.param({"a": {**NUMBERS, "b": 1}}, 0, id="with-another-key"),
        pytest.param({"a": {"f3": "A" * 20}}, 0, id="no-kind-of-numbers"),
        pytest.param({"f8": "A" * 20, "b": 1}, 0, id="in-an-object-of-more"),
        pytest.param({"f8": "A" * 20}, 1, id="the-line-itself"),
        pytest.param({"a": {"f8": "A" * 7}}, 0, id="short"),
        pytest.param({"a": {"f8": 'AAAA"":":":"}"AAAA'}}, 0, id="escapes"),
        pytest.param({'{"f8':'":"AAAAAAAAAAA"}'}, 0, id="escapes-without"),
        pytest.param({"a\":\"b": "c\":\"", "d": NUMBERS}, 1, id="escapes-before"),
        pytest.param({"a": [{"f4": ""}, {"f4": 12}, {"f4": None}, "\x00"]}, 0, id="other-values"),
        pytest.param(["é", {"u1": "é" * 20}], 1, id="no-ascii"),
        pytest.param(3, 0, id="no-object"),
    ],
)  # fmt: skip
def test_a_long_line_says_what_json_says(line: Any, left_out: int) -> None:
    for ascii_only in (True, False):
        raw = json.dumps(line, separators=(",", ":"), ensure_ascii=ascii_only).encode()
        found = parsing.parsed(raw)
        assert as_text(found) == json.loads(raw) == line
        assert views(found) == (left_out if b"\\u00e9" not in raw else 0)
        assert as_text(parsing.parsed(raw[:-1], raw[-1:])) == line


def test_a_short_line_and_short_numbers_are_read_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.dumps({"a": NUMBERS}, separators=(",", ":")).encode()
    monkeypatch.setattr(parsing, "_LONG_LINE", len(raw) + 1)
    assert views(parsing.parsed(raw)) == 0


def test_no_changed_byte_makes_a_long_line_say_what_is_not_there() -> None:
    generator = random.Random(0)
    line = {"kind": "window", "tensors": {"a": NUMBERS, "b": {"most": 1, "at": packed(np.arange(5), "i4")}}, "c": "x:y"}
    raw = json.dumps(line, separators=(",", ":")).encode()
    read = 0
    for _ in range(4_000):
        text = bytearray(raw)
        for _ in range(generator.choice((1, 1, 3))):
            at, begin = generator.randrange(len(text)), generator.randrange(len(text))
            part = bytes(text[begin : begin + generator.choice((1, 9, 40))])
            text[at : at + generator.choice((0, 1, 20))] = generator.choice(
                (part, b'"', b"\\", b'":"', b"}", b"A", b"")
            )
        try:
            wanted = json.loads(bytes(text))
        except ValueError:
            with pytest.raises(ValueError):  # noqa: PT011  # whatever is wrong with it
                parsing.parsed(bytes(text))
        else:
            assert as_text(parsing.parsed(bytes(text))) == wanted
            read += 1
    assert read > 300


def test_numbers_that_stayed_in_their_line_are_unpacked_or_their_damage_is_named() -> None:
    raw = json.dumps({"a": NUMBERS}, separators=(",", ":")).encode()
    np.testing.assert_array_equal(unpacked(parsing.parsed(raw)["a"], "f", 40), np.arange(40.0))
    for wrong in (b"\x00", b"\xff", b"!", b"=", b"\n"):
        damaged = raw[:30] + wrong + raw[31:]
        with pytest.raises(ValueError, match="packed numbers"):
            unpacked(parsing.parsed(damaged)["a"], "f", 40)


def test_a_window_read_so_says_what_one_says_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = laid_over(frame_of(list(synthetic_run(windows=3))[2]), names_of(PACKED_FROM + 3))
    table = table_line(frame.table)
    raw, tables = encode(window_line(frame, table["table"])), {table["table"]: table_of(decode(encode(table)))}

    def read() -> Frame:
        return frame_of_line(decode(raw), tables)

    assert views(decode(raw)) > 10
    found = read()
    monkeypatch.setattr(parsing, "_LONG_LINE", len(raw) + 1)
    wanted = read()
    assert_same_tensors(found, wanted)
