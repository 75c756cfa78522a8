"""What is seen of the looks that a plan takes."""

from __future__ import annotations

from typing import Any

import pytest

from update_watch.measure.cohort import Cohort
from update_watch.measure.device.panels import Plan
from update_watch.measure.window_evidence import CohortWindow


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many each look reads."""
    found, before = list[int](), Cohort.before

    def counted(cohort: Cohort, *args: Any) -> Any:
        found.append(len(cohort.rows))
        return before(cohort, *args)

    monkeypatch.setattr(Cohort, "before", counted)
    return found


@pytest.fixture
def last_closed(monkeypatch: pytest.MonkeyPatch) -> list[CohortWindow]:
    """The cohorts of the window that was closed last."""
    found, close = list[CohortWindow](), Plan.close_window

    def closed(plan: Plan, *args: Any) -> list[CohortWindow]:
        found[:] = close(plan, *args)
        return found

    monkeypatch.setattr(Plan, "close_window", closed)
    return found
