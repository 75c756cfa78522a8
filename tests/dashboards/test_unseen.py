"""Windows of which nothing was looked at: what people look at shows the last that was, and how old it is."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest

from tests.support.run_samples import gpt, synthetic_run
from update_watch.callbacks.session import run_numbers
from update_watch.dashboards import metrics
from update_watch.dashboards.frame import frame_of
from update_watch.dashboards.journal import Journal, read_journal
from update_watch.dashboards.report.history import History, history_of, read_history
from update_watch.dashboards.top import read_tail, top
from update_watch.dashboards.unseen import stands
from update_watch.dashboards.verdict import verdict_of
from update_watch.report import Alert, Health, Level, Report, TensorReport

WINDOW = 128
WORDS = "Not looked at since the report of step 1,024 (700 steps ago)."


def seen(windows: int = 8) -> list[Report]:
    reports = synthetic_run(gpt(1), windows=windows)
    return [dataclasses.replace(r, observed_steps=32, observed_at=r.step) for r in reports]


def blank(tensor: TensorReport) -> TensorReport:
    """Its verdict stands, and of its numbers none is known."""
    kept = {
        "name",
        "health",
        "cause",
        "advice",
        "layer",
        "optimizer_group",
        "dtype",
        "shape",
        "numel",
        "trainable",
        "since_step",
    }
    return TensorReport(**{name: getattr(tensor, name) for name in kept}, names=tensor.names, lr=tensor.lr, scheme=tensor.scheme,
                        low_states=tensor.low_states, options=tensor.options)  # fmt: skip


def after(last: Report, steps: int = 700, **changes: object) -> Report:
    """A window behind `last` of which nothing was looked at."""
    return Report(
        step=last.step + steps,
        window=steps,
        health=last.health,
        headline=f"Not looked at since the report of step {last.observed_at:,} ({steps} steps ago): {last.headline}",
        tensors=tuple(blank(t) for t in last.tensors),
        time=last.time + 10.0,
        cost_ms=0.01,
        observed_steps=0,
        observed_at=last.observed_at,
        **changes,  # type: ignore[arg-type]
    )


@pytest.fixture(params=["journal", "reports"])
def history(request: pytest.FixtureRequest, tmp_path: Path) -> History:
    reports = seen()
    reports.append(after(reports[-1]))
    if request.param == "reports":
        return history_of(reports)
    sink = Journal(tmp_path / "j.jsonl")
    for report in reports:
        sink(report)
    assert [(r.observed_steps, r.observed_at) for r in read_journal(tmp_path / "j.jsonl")][-2:] == [
        (32, 1024),
        (0, 1024),
    ]
    return read_history(tmp_path / "j.jsonl")


def test_the_page_shows_the_last_window_that_was_looked_at_and_its_age(history: History) -> None:
    reports = seen()
    assert (history.last.step, history.last.end, history.last_step) == (1024, 1724, 1724)
    assert history.spans[-1][1] == 1024  # no cell, and no point of a line, behind it
    assert history.last.run.efficiency == pytest.approx(frame_of(reports[-1]).run.efficiency, rel=1e-3)
    known = verdict_of(frame_of(reports[-1]))
    verdict = verdict_of(history.last)
    assert (verdict.sentence, verdict.health) == (known.sentence, known.health)
    assert verdict.reason == f"{WORDS} {known.reason}"
    assert "looked at" not in known.reason


def test_what_is_seen_again_goes_on_behind_a_gap() -> None:
    reports = seen()
    later = dataclasses.replace(reports[-1], step=1724 + WINDOW, observed_at=1724 + WINDOW)
    history = history_of([*reports, after(reports[-1]), later])
    assert history.last.step == later.step and history.last.until is None
    assert history.spans[-1] == (1724, 1852) and history.gaps == [len(history.spans) - 1]
    assert "looked at" not in verdict_of(history.last).reason


def test_top_says_it(tmp_path: Path) -> None:
    console = pytest.importorskip("rich.console")
    reports = seen()
    sink = Journal(tmp_path / "j.jsonl")
    for report in [*reports, after(reports[-1])]:
        sink(report)
    tail = read_tail(tmp_path / "j.jsonl")
    assert [f.step for f in tail.frames] == [r.step for r in reports]  # nothing is added to a trend
    assert not np.isnan(tail.last.tensors.numbers["efficiency"]).all()
    file = io.StringIO()
    top(tmp_path / "j.jsonl", once=True, console=console.Console(file=file, width=120))
    assert WORDS in file.getvalue()


def test_what_is_news_is_shown_as_any_window() -> None:
    reports = seen()
    before, window = frame_of(reports[-1]), after(reports[-1])
    assert stands(before, frame_of(window))
    alert = Alert(1724, Level.warn, "IDLE", "The learning rate is 0.")
    idle = dataclasses.replace(window.tensors[0], health=Health.idle)
    for news in (
        dataclasses.replace(window, alerts=(alert,)),
        dataclasses.replace(window, tensors=(idle, *window.tensors[1:])),
        dataclasses.replace(window, tensors=window.tensors[1:]),
        dataclasses.replace(window, observed_steps=1),
        dataclasses.replace(window, observed_steps=None),
    ):
        assert not stands(before, frame_of(news))
    last = history_of([*reports, dataclasses.replace(window, alerts=(alert,))]).last
    assert last.step == 1724 and verdict_of(last).reason.startswith(WORDS)


def test_numbers_that_are_logged_are_those_of_the_host() -> None:
    reports = seen()
    window = after(reports[-1])
    assert metrics.run_values(window) == {
        "update_watch/skipped_steps": 0.0,
        "update_watch/cost_ms": 0.01,
        "update_watch/unseen_steps": 700.0,
        "update_watch/alert": 0.0,
    }
    assert metrics.run_values(reports[-1])["update_watch/unseen_steps"] == 0.0
    assert run_numbers(window) == {"update_watch/skipped_steps": 0.0, "update_watch/cost_ms": 0.01}
    assert "update_watch/tensors_healthy" in run_numbers(reports[-1])
    assert metrics.summary_values(window)["update_watch/headline"].startswith("Not looked at since")
