"""A soak in small: `bench/soak.py`, whose full run stands in docs/faults.md."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest

SOAK = Path(__file__).resolve().parents[1] / "bench" / "soak.py"


@pytest.mark.slow
def test_many_windows_leave_memory_flat_and_the_disk_within_its_limit(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    assert spec is not None and spec.loader is not None
    bench: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    logger = logging.getLogger("update_watch")
    level = logger.level
    try:
        found = bench.soak(2_500, tmp_path)
    finally:
        logger.setLevel(level)
    assert found["windows"] == 2_500 and found["dropped"] == 0
    assert found["rss_end_mib"] - found["rss_tenth_mib"] < 8
    assert (
        found["journal_max_bytes"] <= bench.JOURNAL_BYTES + 10_000
    )  # a window more than the limit, then it is thinned
    assert found["journal_steps"] == 2_500 * bench.STEPS and found["journal_lines"] < 2_500  # joined, not thrown away
    assert found["stalled_windows"] > 1_000  # the run is not one in which nothing happens
    assert 0 < found["alerts"] == found["alerts_kept"]
    assert found["remembered_bytes"] < 20_000
