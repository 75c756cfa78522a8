"""A soak in small: `bench/soak.py`, whose full run stands in docs/faults.md."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from bench import soak
from update_watch.dashboards.journal import Journal, read_journal
from update_watch.report import Cause, Health, Report, TensorReport


@pytest.mark.slow
def test_many_windows_leave_memory_flat_and_the_disk_within_its_limit(tmp_path: Path) -> None:
    logger = logging.getLogger("update_watch")
    level = logger.level
    try:
        found = soak.soak(2_500, tmp_path)
    finally:
        logger.setLevel(level)
    assert found["windows"] == 2_500 and found["dropped"] == 0
    assert found["rss_end_mib"] - found["rss_tenth_mib"] < 8
    assert found["journal_max_bytes"] <= soak.JOURNAL_BYTES + 10_000  # a window more than the limit, then it is thinned
    assert found["journal_steps"] == 2_500 * soak.STEPS and found["journal_lines"] < 2_500  # joined, not thrown away
    assert found["stalled_windows"] > 250  # the run is not one in which nothing happens
    assert 0 < found["alerts"] == found["alerts_kept"]
    assert found["remembered_bytes"] < 20_000


@pytest.mark.slow
def test_a_journal_stays_within_its_limit_where_joined_windows_are_longer_than_single_ones(tmp_path: Path) -> None:
    """Every sixteenth window is bad and long; a joined one is as its worst."""
    path, limit, largest = tmp_path / "j.jsonl", 600_000, 0
    journal = Journal(path, max_bytes=limit)
    for n in range(1, 3001):
        bad = n % 16 == 0
        tensors = tuple(
            TensorReport(
                f"w{i}",
                Health.stalled if bad else Health.healthy,
                Cause.weight_rounding if bad else None,
                f"Updates of w{i} are rounded away in window {n}. " * 40 if bad else "",
                efficiency=0.01 if bad else 1.0,
            )
            for i in range(8)
        )
        journal(Report(8 * n, 8, Health.stalled if bad else Health.healthy, "", tensors))
        largest = max(largest, path.stat().st_size)
    journal.close()
    assert limit - 30_000 < largest <= limit + 20_000  # one window more, then it is thinned
    assert sum(report.window for report in read_journal(path)) == 24_000
