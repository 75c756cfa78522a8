"""Journals that nobody of ours has written so: damage is named, numbers out of range are no numbers, nothing hangs."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from update_watch.cli import main
from update_watch.dashboards.journal import Journal, JournalError, read_journal
from update_watch.dashboards.report.history import SERIES, read_history
from update_watch.dashboards.report.html import render_html
from update_watch.report import Health, Report, TensorReport


def _journal(path: Path, windows: int = 3) -> Path:
    sink = Journal(path)
    for n in range(1, windows + 1):
        sink(
            Report(
                8 * n, 8, Health.healthy, "All is well.", (TensorReport("w", Health.healthy, efficiency=1.0),), time=1.0
            )
        )
    sink.close()
    return path


def _changed(path: Path, **changes: Any) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "window":
            for key, value in changes.items():
                if key in line:
                    line[key] = value
                else:
                    line["tensors"][key] = value
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


@pytest.mark.parametrize("windows", [0, -3])
def test_a_line_of_no_window_is_damage(tmp_path: Path, windows: int) -> None:
    path = _journal(tmp_path / "run.jsonl")
    _changed(path, windows=windows)
    with pytest.raises(JournalError, match="of no window"):
        read_history(path)


def test_where_all_windows_are_damaged_the_damage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _journal(tmp_path / "run.jsonl")
    _changed(path, step="eight")
    with pytest.raises(
        JournalError, match=r"no window of it can be read: 3 lines are damaged \(line 3, 4, 5; the first: "
    ):
        read_history(path)
    assert main(["top", str(path), "--once"]) == 2
    error = capsys.readouterr().err
    assert "no window of it can be read" in error or "needs rich" in error


@pytest.mark.parametrize("value", [1e308, -1e308, 1e61], ids=str)
def test_a_number_out_of_range_is_not_known(tmp_path: Path, value: float) -> None:
    path = _journal(tmp_path / "run.jsonl")
    _changed(path, efficiency=value)
    assert [report.tensors[0].efficiency for report in read_journal(path)] == [None] * 3
    assert read_history(path).damaged == 0


@pytest.mark.parametrize("steps", [0, -3, 2**61])
def test_a_window_of_odd_length_is_drawn(tmp_path: Path, steps: int) -> None:
    path = _journal(tmp_path / "run.jsonl")
    _changed(path, window=steps)
    assert "<!doctype html>" in render_html([read_history(path)]).lower()


@pytest.mark.parametrize("field", SERIES)
def test_a_number_that_four_bytes_do_not_hold_is_drawn_nowhere_and_warns_of_nothing(tmp_path: Path, field: str) -> None:
    path = _journal(tmp_path / "run.jsonl")
    _changed(path, **{"lr" if field == "margin" else field: 1e59})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "<!doctype html>" in render_html([read_history(path)]).lower()


@pytest.mark.parametrize("field", ["time", "cost_ms"])
def test_a_clock_or_a_cost_out_of_range_is_damage(tmp_path: Path, field: str) -> None:
    path = _journal(tmp_path / "run.jsonl")
    _changed(path, **{field: 1e300})
    with pytest.raises(JournalError, match="no window of it can be read"):
        read_history(path)


@pytest.mark.slow
def test_a_headline_of_50_megabytes_is_damage_and_read_over_in_seconds(tmp_path: Path) -> None:
    path = _journal(tmp_path / "run.jsonl")
    _changed(path, headline="x" * 50_000_000)
    started = time.monotonic()
    with pytest.raises(JournalError, match="a text of 50000000 characters"):
        read_history(path)
    assert time.monotonic() - started < 30


def test_two_journals_on_one_path_are_told_apart_once_and_both_written(tmp_path: Path) -> None:
    report = Report(8, 8, Health.healthy, "All is well.", (TensorReport("w", Health.healthy),), time=1.0)
    first, second = Journal(tmp_path / "run.jsonl"), Journal(tmp_path / "run.jsonl")
    first(report)
    with pytest.warns(UserWarning, match="another watch or process writes to this file too"):
        second(report)
    second(report)  # said once: a second warning would be an error here
    first.close()
    second.close()
    third = Journal(tmp_path / "run.jsonl")  # a run that goes on is alone
    third(report)
    third.close()
    assert len(list(read_journal(tmp_path / "run.jsonl"))) == 4
