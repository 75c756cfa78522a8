"""A page that several tests read."""

from __future__ import annotations

import pytest

from tests.support.report_pages import MIXED
from tests.support.run_samples import synthetic_run
from update_watch.dashboards.report.history import history_of
from update_watch.dashboards.report.html import render_html


@pytest.fixture(scope="module")
def mixed() -> str:
    return render_html([history_of(list(synthetic_run(MIXED, windows=20)), "gpt-mixed")])
