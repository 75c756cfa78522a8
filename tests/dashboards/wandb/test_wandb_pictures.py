"""Tables never hold up the numbers."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from update_watch.dashboards.wandb.pictures import PictureLogger, TableRows


class StuckRun:
    """A run whose `log` waits until it is let go."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.entered = threading.Event()
        self.logged: list[tuple[int, list[list[Any]]]] = []

    def log(self, row: dict[str, Any], commit: bool | None = None) -> None:
        self.entered.set()
        assert self.free.wait(10)
        self.logged.append((row["step"], row["table"].data))


def table(value: int) -> dict[str, TableRows]:
    return {"table": TableRows(("value",), [[value]])}


def wait_for_threads() -> None:
    deadline = time.monotonic() + 10
    while any(t.name == "update-watch-wandb-tables" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stuck_table_holds_the_caller_no_longer_than_its_patience_and_later_ones_not_at_all() -> None:
    run = StuckRun()
    pictures = PictureLogger(run, None, patience=0.2)  # type: ignore[arg-type]
    start = time.perf_counter()
    pictures.log({"step": 1}, table(1))
    first = time.perf_counter() - start
    for step in (2, 3, 4):
        pictures.log({"step": step}, table(step))
    rest = time.perf_counter() - start - first
    assert run.entered.is_set()
    assert 0.15 < first < 2.0
    assert rest < 0.1
    assert run.logged == []
    run.free.set()
    wait_for_threads()
    # what was stuck, and the newest of what came meanwhile
    assert run.logged == [(1, [[1]]), (4, [[4]])]


def test_a_table_is_handed_over_before_log_returns_where_nothing_is_stuck() -> None:
    run = StuckRun()
    run.free.set()
    pictures = PictureLogger(run, None)  # type: ignore[arg-type]
    for step in (1, 2):
        pictures.log({"step": step}, table(step))
        assert run.logged[-1] == (step, [[step]])


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_table_that_cannot_be_logged_raises_nowhere_and_the_next_one_is_logged() -> None:
    run = StuckRun()
    run.free.set()
    pictures = PictureLogger(run, None)  # type: ignore[arg-type]
    pictures.log({"step": 1}, {"table": TableRows(("value",), [[1, 2]])})  # two cells in one column
    pictures.log({"step": 2}, table(2))
    assert run.logged == [(2, [[2]])]
