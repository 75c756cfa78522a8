"""Models of very many tensors: work grows with what is shown, everything is counted, and what is left out is said."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.dashboards.million import laid_over, measure, names_of, write_checkpoints, write_journal
from tests.support.run_samples import fully_filled_report, synthetic_run
from update_watch.cli import main
from update_watch.dashboards import top
from update_watch.dashboards.frame import ACCUMULATOR_NUMBERS, TENSOR_NUMBERS, Frame, frame_of
from update_watch.dashboards.journal import Journal
from update_watch.dashboards.journal.lines import encode, header_line, window_line
from update_watch.dashboards.journal.table import table_line
from update_watch.dashboards.report import cases, history, tensor_list
from update_watch.dashboards.report.drawing import every_chart
from update_watch.dashboards.report.first_screen import first_screen
from update_watch.dashboards.report.history import read_history
from update_watch.dashboards.report.html import render_html
from update_watch.dashboards.top import Choice, lines_of, read_tail, view
from update_watch.dashboards.verdict import verdict_of
from update_watch.kinds import tree_of
from update_watch.naming import model_words
from update_watch.report import HEADROOM_BINS, AccumulatorReport, Cause, Health, Report, TensorReport


def _frame(step: int) -> Frame:
    """Three tensors: one stalls."""
    numbers: dict[str, Any] = {"update_ratio": 1e-4, "lr": 1e-3, "critical_lr": 2e-3, "numel": 16, "shape": (16,)}
    numbers |= {"dtype": "bfloat16", "headroom_histogram": (1 / HEADROOM_BINS,) * HEADROOM_BINS}
    state = {"exp_avg": AccumulatorReport("exp_avg", "bfloat16", Health.healthy, efficiency=0.9)}
    tensors = (
        TensorReport(
            "a", Health.stalled, Cause.weight_rounding, "lost 0.9 of it; cure", since_step=1, efficiency=0.1, **numbers
        ),
        TensorReport("b", Health.healthy, efficiency=0.9, accumulators=state, **numbers),
        TensorReport("c", Health.healthy, efficiency=0.95, **numbers),
    )
    return frame_of(Report(step, 8, Health.stalled, "", tensors, time=1.0))


def _journal(path: Path, tensors: int, windows: int = 2) -> Path:
    frames = [laid_over(_frame(8 * n), names_of(tensors)) for n in range(1, windows + 1)]
    table = table_line(frames[0].table)
    lines = [header_line({}, 0.0), table, *(window_line(frame, table["table"]) for frame in frames)]
    path.write_bytes(b"".join(map(encode, lines)))
    return path


def _page(path: Path) -> None:
    found = read_history(path)
    screens = [first_screen(found)]
    every_chart([found], screens)
    tensor_list.tensor_list([found])


def _terminal(path: Path) -> None:
    tail = read_tail(path)
    verdict_of(tail.last)
    for by_kind in (True, False):
        lines_of(tail, Choice(by_kind=by_kind), 20)


def _calls(work: Callable[[], object]) -> int:
    """Calls of functions, ours and C's."""
    tree_of.cache_clear()
    model_words.cache_clear()
    found = [0]

    def count(frame: Any, event: str, argument: Any) -> None:
        found[0] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found[0]


@pytest.mark.parametrize("show", [_page, _terminal])
def test_a_tensor_more_costs_a_few_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, show: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(tensor_list, "MOST_ROWS", 50)
    few, many = (_journal(tmp_path / f"{count}.jsonl", count) for count in (1_000, 4_000))
    show(few)  # what is done once
    assert _calls(lambda: show(many)) - _calls(lambda: show(few)) < 12 * 3_000


@pytest.mark.parametrize("at", [[], ["--at", "3e-5"]], ids=["diff", "diff --at"])
def test_a_tensor_more_costs_a_comparison_of_checkpoints_a_few_calls(tmp_path: Path, at: list[str]) -> None:
    def compared(count: int) -> int:
        sides = [tmp_path / f"{side}{count}" for side in ("first", "second")]
        write_checkpoints(*sides, count)
        return _calls(lambda: main(["diff", *map(str, sides), *at]))

    compared(300)  # what is done once
    assert compared(1_300) - compared(301) < 3 * 1_000


def _seldom() -> Report:
    *_, last = synthetic_run(windows=6)
    tensors = [dataclasses.replace(t, wanted_fraction=0.9 if i % 3 else 0.1) for i, t in enumerate(last.tensors)]
    return dataclasses.replace(last, tensors=tuple(tensors))


@pytest.mark.parametrize("last", [_seldom, fully_filled_report])
def test_what_is_not_read_of_the_last_window_is_nowhere_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: Callable[[], Report]
) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal(path)
    for report in (*synthetic_run(windows=6), dataclasses.replace(last(), step=10_000)):
        journal(report)
    journal.close()
    for module, most in ((history, "MOST"), (cases, "MOST"), (top, "_FEW")):
        monkeypatch.setattr(module, most, 0)

    def shown() -> list[str]:
        tail, out = read_tail(path), io.StringIO()
        for by_kind in (True, False):
            Console(width=140, file=out).print(view(tail, Choice(by_kind=by_kind), "run"))
        return [render_html([read_history(path)]), out.getvalue()]

    some = shown()
    for module in (history, top):
        everything = {*ACCUMULATOR_NUMBERS, *TENSOR_NUMBERS}
        assert everything - module._DRAWN
        monkeypatch.setattr(module, "_DRAWN", everything)
    assert some == shown()


def test_what_the_table_leaves_out_is_counted_and_better_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_list, "MOST_ROWS", 70)
    found = tensor_list.tensor_list([read_history(_journal(tmp_path / "a.jsonl", 300))])
    healths = [found["healths"][row[found["fields"].index("health")]] for row in found["rows"]]
    assert healths == ["stalled"] * 70 and found["left_out"] == 230
    assert dict(zip(found["healths"], found["counts"], strict=True)) == {
        **dict.fromkeys(found["healths"], 0),
        "stalled": 100,
        "healthy": 200,
    }


def test_of_many_tensors_a_point_over_the_run_stands_for_more_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "MOST_VALUES", 60 * 10)
    found = read_history(_journal(tmp_path / "a.jsonl", 60, windows=40))
    assert len(found.spans) <= 11 and found.windows == 40 and found.windows_per_span >= 4
    assert (found.health_PH[::3] == found.health_PH[0, 0]).all()


def test_the_last_window_is_whole_where_what_is_beside_its_verdicts_is_damaged_it_is_said(tmp_path: Path) -> None:
    path = _journal(tmp_path / "a.jsonl", 6)
    assert read_history(path).last.tensors.advice[3] == "lost 0.9 of it; cure"
    path.write_bytes(path.read_bytes().replace(b'"headroom":[[', b'"headroom":[["x",'))
    found = read_history(path)
    assert (found.last.step, found.last.headroom, found.damaged) == (16, None, 1)


@pytest.mark.slow
def test_a_tenth_of_a_million_tensors_takes_seconds(tmp_path: Path) -> None:
    journal, page, first, second = (tmp_path / name for name in ("run.jsonl", "report.html", "first", "second"))
    write_journal(journal, 100_000, 1)
    write_checkpoints(first, second, 100_000)
    for name, arguments, output in (
        ("report", ["report", str(journal), "--output", str(page)], page),
        ("top", ["top", str(journal), "--once"], None),
        ("diff", ["diff", str(first), str(second)], None),
        ("diff --at", ["diff", str(first), str(second), "--at", "3e-5"], None),
    ):
        found = measure(name, arguments, output)
        assert found["cpu_s"] < 8 and found["output_mb"] < 10, found
