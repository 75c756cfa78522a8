"""Journals and pages of the HTML report."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.run_samples import gpt
from update_watch.dashboards.journal.journal import Journal
from update_watch.report import Alert, Cause, Health, Level, Report, TensorReport

HOSTILE = "</script><img src=x onerror=\"document.title='executed'\"><script>document.title='executed'</script>"
MIXED = tuple(
    dataclasses.replace(spec, kind={0: "frozen", 3: "idle", 4: "unknown", 5: "broken"}.get(i, "bf16"))
    for i, spec in enumerate(gpt(2))
)


def write_journal(path: Path, reports: Iterator[Report] | list[Report], **run: Any) -> Path:
    sink = Journal(path, run=run)
    for report in reports:
        sink(report)
    sink.close()
    return path


def page_data(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def visible(text: str) -> str:
    """The words of the page, without scripts and style."""
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def hostile_run() -> list[Report]:
    tensor = TensorReport(
        f"h.0.{HOSTILE}",
        Health.stalled,
        Cause.weight_rounding,
        HOSTILE,
        names=(HOSTILE, "other"),
        layer=HOSTILE,
        optimizer_group=HOSTILE,
        dtype=HOSTILE,
        efficiency=0.01,
        update_ratio=1e-4,
        applied_ratio=0.0,
        numel=10,
        lr=1e-3,
        critical_lr=1e-2,
        headroom_histogram=(1 / 32,) * 32,
        accumulators={HOSTILE: dataclasses.replace(_accumulator(), name=HOSTILE)},
    )
    other = dataclasses.replace(tensor, name=f"h.1.{HOSTILE}")
    alert = Alert(10, Level.error, HOSTILE, HOSTILE, (HOSTILE,))
    return [Report(10, 10, Health.stalled, HOSTILE, (tensor, other), alerts=(alert,))]


def _accumulator() -> Any:
    from update_watch.report import AccumulatorReport

    return AccumulatorReport("x", HOSTILE, Health.stalled, Cause.state_rounding, HOSTILE, efficiency=0.1)


def until(is_true: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_true():
            return True
        time.sleep(0.05)
    return False
