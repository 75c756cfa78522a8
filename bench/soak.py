"""Weeks of watching in minutes: many windows through the real pipeline, with flat memory and a bounded disk?

    python bench/soak.py [--windows 100000] [--wandb] [--quick]

Some windows are taken from a real watched training in BF16, in which a norm stalls and recovers with the learning rate.
They then go round, numbered on and a minute apart, through all that lies behind the training step: read, judge, alerts,
state, journal (limited to 2 MiB), and W&B, where `--wandb` adds an offline run. `--quick`: 2,500 windows.

Prints one JSON line: resident memory (MiB) at a tenth, a half and the end; the largest size of the journal (bytes) and of
the W&B run; alerts told and kept; the size of what the watch remembers (bytes of JSON); windows per second.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

import update_watch as uw
from update_watch.dashboards.journal import Journal, read_journal
from update_watch.measure.window_evidence import Window
from update_watch.report import Health, Report

JOURNAL_BYTES = 2 * 2**20
STEPS = 16  # per window
APART = 60.0  # seconds between two windows: alerts are limited per hour and cool down in minutes
PHASES = 50  # of the run: it stalls in every other one


def captured(watch: uw.Watch, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Window]:
    """Windows of a real training as they leave the training thread: eight that stall, eight that do not."""
    windows: list[Window] = []
    put, watch._judge.put = watch._judge.put, windows.append  # type: ignore[method-assign, assignment]
    rng = torch.Generator().manual_seed(0)
    for n in range(16 * STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 if n < 8 * STEPS else 3e-2
        x = torch.randn(8, 32, generator=rng).to(torch.bfloat16)
        optimizer.zero_grad()
        (model(x) - x.roll(1, -1)).square().mean().backward()
        optimizer.step()
    watch.detach()
    watch._judge.put = put  # type: ignore[method-assign]
    assert len(windows) == 16, len(windows)
    return windows


def resident() -> float:
    """Memory of this process now (MiB)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Heard:
    """A sink that counts."""

    def __init__(self) -> None:
        self.windows = self.alerts = self.stalled = 0

    def __call__(self, report: Report) -> None:
        self.windows += 1
        self.alerts += len(report.alerts)
        self.stalled += any(t.health is Health.stalled for t in report.tensors)


def soak(count: int, folder: Path, with_wandb: bool = False) -> dict[str, Any]:
    """Send `count` windows through; the numbers of the module's first lines."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.RMSNorm(64), nn.Linear(64, 32)).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    heard, path = Heard(), folder / "journal.jsonl"
    sinks: list[Any] = [heard, Journal(path, max_bytes=JOURNAL_BYTES)]
    run = None
    if with_wandb:
        import wandb

        from update_watch.dashboards.wandb.sink import WandbSink

        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
        run = wandb.init(mode="offline", project="soak", dir=str(folder), settings=settings)
        sinks.append(WandbSink(run))
    watch = uw.watch(model, optimizer, window=STEPS, sinks=sinks, budget=None)
    windows = captured(watch, model, optimizer)
    marks = {count // 10: 0.0, count // 2: 0.0, count: 0.0}
    journal_bytes, remembered, started, now = 0, 0, time.perf_counter(), [time.time()]
    watch._alerts._clock = lambda: now[0]
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)  # alerts are counted, not shown
    phase = max(count // PHASES, 8)
    for n in range(1, count + 1):
        window = windows[n // phase % 2 * 8 + n % 8]
        now[0] += APART
        watch._judge.put(dataclasses.replace(window, step=n * STEPS, time=now[0]))
        if n % 16 == 0 or n in marks:
            watch._settle(60.0)
            journal_bytes = max(journal_bytes, path.stat().st_size)
        if n in marks:
            marks[n] = resident()
            remembered = max(remembered, len(json.dumps(watch.state_dict())))
    seconds = time.perf_counter() - started
    watch.close()
    if run is not None:
        run.finish()
    kept = list(read_journal(path))
    first, middle, last = marks.values()
    return {
        "windows": heard.windows,
        "dropped": watch._judge.dropped + watch._post.dropped,
        "rss_tenth_mib": round(first, 1),
        "rss_half_mib": round(middle, 1),
        "rss_end_mib": round(last, 1),
        "journal_max_bytes": journal_bytes,
        "journal_lines": len(kept),
        "journal_steps": sum(report.window for report in kept),
        "wandb_bytes": size_of(folder / "wandb") if run is not None else 0,
        "stalled_windows": heard.stalled,
        "alerts": heard.alerts,
        "alerts_kept": sum(len(report.alerts) for report in kept),
        "remembered_bytes": remembered,
        "windows_per_second": round(count / seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="2,500 windows")
    parser.add_argument("--wandb", action="store_true", help="an offline W&B run as well")
    options = parser.parse_args()
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(soak(2_500 if options.quick else options.windows, Path(directory), options.wandb)))


if __name__ == "__main__":
    main()
