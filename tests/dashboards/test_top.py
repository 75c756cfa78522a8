"""`top`: a row per kind, the trend, the keys, and that it follows a journal."""

from __future__ import annotations

import dataclasses
import io
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.run_samples import synthetic_run
from update_watch.dashboards.frame import report_of
from update_watch.dashboards.journal import EmptyJournalError, Journal
from update_watch.dashboards.keyboard import Keyboard
from update_watch.dashboards.top import Choice, lines_of, read_tail, sparkline, top, view
from update_watch.report import Alert, Cause, Health, Level, Report, TensorReport

rich_console = pytest.importorskip("rich.console")


def shown(renderable: Any, width: int = 100, **options: Any) -> str:
    file = io.StringIO()
    rich_console.Console(file=file, width=width, legacy_windows=False, **options).print(renderable)
    return file.getvalue()


def small(*tensors: TensorReport, **fields: Any) -> Report:
    return Report(100, 10, Health.stalled, "1 of 2 tensors is stalled.", tensors, **fields)


STALLED = TensorReport(
    "h.0.norm.weight",
    Health.stalled,
    Cause.weight_rounding,
    "BF16 weights round the updates away (efficiency 0.03, 97% lost); keep FP32 master weights.",
    shape=(10,),
    efficiency=0.0312,
    numel=10,
)
HEALTHY = TensorReport("h.0.attn.weight", Health.healthy, efficiency=0.998, shape=(9, 10), numel=90)


def journal(path: Path, windows: int = 3) -> list[Report]:
    reports = list(synthetic_run(windows=windows))
    sink = Journal(path, run={"name": "gpt"})
    for report in reports:
        sink(report)
    return reports


def test_top_once_shows_the_last_window_and_the_last_alerts(tmp_path):
    reports = journal(tmp_path / "j.jsonl", windows=20)
    file = io.StringIO()
    top(tmp_path / "j.jsonl", once=True, console=rich_console.Console(file=file, width=120))
    text = file.getvalue()
    assert f"gpt · step {reports[-1].step:,} ·" in text
    assert "keep FP32 master weights (+" in text
    assert "All 11 norms" in text
    alerts = [a for r in reports for a in r.alerts]
    newest = [f"alert at step {a.step:,}: {a.title}" for a in alerts[:-3:-1]]
    assert [line.strip() for line in text.splitlines() if line.startswith("alert")] == newest


def test_the_last_window_read_alone_is_the_last_of_all(tmp_path):
    from update_watch.dashboards.journal import read_journal

    journal(tmp_path / "j.jsonl", windows=12)
    assert report_of(read_tail(tmp_path / "j.jsonl").last) == list(read_journal(tmp_path / "j.jsonl"))[-1]


def test_a_damaged_last_line_leaves_the_one_before(tmp_path):
    path = tmp_path / "j.jsonl"
    sink = Journal(path)
    for step in (10, 20, 30):
        sink(dataclasses.replace(small(STALLED, HEALTHY), step=step))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1].replace(b'"efficiency":', b'"efficiency":"x"'))
    last = report_of(read_tail(path).last)
    assert (last.step, last.tensors[0].advice) == (20, STALLED.advice)


def test_top_without_a_window_says_so(tmp_path):
    path = tmp_path / "j.jsonl"
    journal(path)
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(EmptyJournalError, match="holds no window yet"):
        top(path, once=True)


@pytest.mark.parametrize("is_terminal", [False, True], ids=["piped", "terminal"])
def test_top_waits_for_the_journal_and_follows_it(tmp_path, monkeypatch, is_terminal):
    monkeypatch.setattr("update_watch.dashboards.top._POLL_SECONDS", 0.02)
    path = tmp_path / "j.jsonl"
    file = io.StringIO()
    console = rich_console.Console(file=file, width=120, height=40, force_terminal=is_terminal)
    is_going = True
    follower = threading.Thread(target=top, args=(path, False, console, lambda: is_going))
    follower.start()
    try:
        sink = Journal(path)
        for report in synthetic_run(windows=2):
            sink(report)
            deadline = time.monotonic() + 20
            while f"step {report.step:,} ·" not in file.getvalue() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert f"step {report.step:,} ·" in file.getvalue()
    finally:
        is_going = False
        follower.join(20)
    assert not follower.is_alive()


def test_a_live_table_fits_the_height_of_the_terminal(tmp_path, monkeypatch):
    journal(tmp_path / "j.jsonl")
    tail = read_tail(tmp_path / "j.jsonl")
    for height in (24, 50):
        for choice in (Choice(), Choice(by_kind=False)):
            text = shown(view(tail, choice, "gpt", is_live=True), width=120, height=height, force_terminal=True)
            assert len(text.splitlines()) <= height


def tail_of(tmp_path: Path, *reports: Report) -> Any:
    path = tmp_path / "t.jsonl"
    sink = Journal(path)
    for report in reports:
        sink(report)
    sink.close()
    return read_tail(path)


def test_a_kind_has_one_row_with_its_worst_tensor_and_its_trend(tmp_path):
    def window(step: int, low: float) -> Report:
        tensors = [
            dataclasses.replace(STALLED, name=f"h.{i}.norm.weight", efficiency=low if i else 0.5) for i in range(3)
        ]
        return dataclasses.replace(small(*tensors, HEALTHY), step=step)

    tail = tail_of(tmp_path, *(window(10 * n, 1 - 0.1 * n) for n in range(1, 10)))
    (norm, attn), count = lines_of(tail, Choice())
    assert count == 2
    assert (norm.name, norm.tensors, norm.unwell, norm.health) == ("norm", 3, 3, Health.stalled)
    assert norm.arrived == pytest.approx(0.1)
    assert norm.trend == pytest.approx((0.5, 0.5, 0.5, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1))
    assert (attn.name, attn.unwell) == ("attn", 0)


def test_keys_change_what_is_shown(tmp_path):
    tail = tail_of(tmp_path, small(HEALTHY, STALLED))
    choice = Choice()
    assert [line.name for line in lines_of(tail, choice)[0]] == ["norm", "attn"]
    assert choice.press("s")
    assert [line.name for line in lines_of(tail, choice)[0]] == ["attn", "norm"]  # the order of the model
    assert choice.press("f")
    assert [line.name for line in lines_of(tail, choice)[0]] == ["norm"]
    assert choice.press("k")
    assert [line.name for line in lines_of(tail, choice)[0]] == ["norm.weight"]  # without what all share
    assert not choice.press("x")


def test_a_trend_is_a_character_a_window():
    nan = float("nan")
    assert sparkline([0.0, 0.5, 1.0, nan, 2.0, -1.0]) == "▁▅█ █▁"
    assert sparkline([0.0, 1.0], is_ascii=True) == "_#"


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_no_line_is_longer_than_the_terminal_and_ascii_is_enough(tmp_path, width):
    name = "x" * 80 + ".größe"
    tail = tail_of(tmp_path, small(STALLED, HEALTHY, TensorReport(name, Health.stalled, advice="a; b" * 90)))
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    rich_console.Console(file=file, width=width).print(view(tail, Choice(), "run"))
    file.flush()
    lines = file.buffer.getvalue().decode("ascii").splitlines()
    assert max(map(len, lines)) <= width


def test_nothing_from_a_run_is_obeyed(tmp_path):
    name = "a\x1b[2Jb[red]x"
    tensor = TensorReport(name, Health.stalled, Cause.weight_rounding, name, efficiency=0.5, layer=name)
    alerts = (Alert(1, Level.warn, name, name),)
    text = shown(
        view(tail_of(tmp_path, small(tensor, alerts=alerts)), Choice(), name),
        width=160,
        force_terminal=True,
        color_system=None,
    )
    assert "\x1b" not in text
    assert "[red]" in text


def test_steps_of_an_earlier_attempt_are_no_part_of_the_run(tmp_path):
    reports = [dataclasses.replace(small(STALLED), step=step) for step in (10, 20, 30, 20)]
    assert [frame.step for frame in tail_of(tmp_path, *reports).frames] == [10, 20]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_a_key_is_taken_without_enter_and_the_terminal_is_as_before(monkeypatch):
    import pty
    import termios

    main, terminal = pty.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        before = termios.tcgetattr(terminal)
        with Keyboard() as keyboard:
            assert keyboard.take() == ""
            os.write(main, b"k")
            keyboard.wait(5.0)
            assert keyboard.take() == "k"
        assert termios.tcgetattr(terminal) == before
    os.close(main)


def test_without_a_terminal_there_are_no_keys(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("q"))
    with Keyboard() as keyboard:
        keyboard.wait(0.0)
        assert keyboard.take() == ""
