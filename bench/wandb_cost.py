"""What logging to W&B costs: handing a report over, the sink's own time, and training beside it.

    python bench/wandb_cost.py [--tensors 300] [--windows 60] [--max-tensors 200]

Uses an offline run in a temporary directory. Training is a loop of small matrix products on one thread; windows
with and without a report alternate, so that the ratio of their step times is taken within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from update_watch.dashboards.wandb.sink import WandbSink
from update_watch.report import HEADROOM_BINS, AccumulatorReport, Health, Report, TensorReport
from update_watch.worker import Sinks, Worker

STEPS_PER_WINDOW = 128


def make_report(step: int, tensors: int) -> Report:
    histogram = (1.0 / HEADROOM_BINS,) * HEADROOM_BINS
    return Report(
        step,
        STEPS_PER_WINDOW,
        Health.healthy,
        "All tensors receive their updates.",
        tuple(
            TensorReport(
                f"blocks.{i // 8}.part{i % 8 // 2}.{'weight' if i % 2 else 'bias'}",
                Health.healthy,
                layer=f"blocks.{i // 8}.part{i % 8 // 2}",
                numel=1024,
                efficiency=0.99,
                displacement_efficiency=0.98,
                lost_fraction=0.01,
                wanted_fraction=1.0,
                update_ratio=0.01,
                applied_ratio=0.01,
                headroom_histogram=histogram,
                lr=1e-3,
                critical_lr=1e-5,
                state_factor=1.0,
                accumulators={"exp_avg_sq": AccumulatorReport("exp_avg_sq", "float32", Health.healthy, efficiency=1.0)},
            )
            for i in range(tensors)
        ),
        time=time.time(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--windows", type=int, default=60, help="windows with a report; as many are without")
    parser.add_argument("--max-tensors", type=int, default=6, help="WandbSink(max_tensors=...)")
    options = parser.parse_args()
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
        run = wandb.init(mode="offline", project="bench", dir=directory, settings=settings)
        print(json.dumps(measure(WandbSink(run, max_tensors=options.max_tensors), options.tensors, options.windows)))
        run.finish()
        wandb.teardown()


def measure(sink: WandbSink, tensors: int, windows: int) -> dict[str, float | int]:
    """Times in ms; `step_ratio` is the median step beside a busy sink over the median step alone."""
    sink_ms: list[float] = []
    sink_cpu_ms: list[float] = []

    def timed_sink(report: Report) -> None:
        start, cpu = time.perf_counter(), time.thread_time()
        sink(report)
        sink_ms.append((time.perf_counter() - start) * 1e3)
        sink_cpu_ms.append((time.thread_time() - cpu) * 1e3)

    worker = Worker("sink", Sinks([timed_sink]))  # as the watch has it
    weight = torch.randn(256, 256, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1e-6)
    step_ms: dict[bool, list[float]] = {False: [], True: []}
    window_ms: dict[bool, list[float]] = {False: [], True: []}
    hand_over_ms: list[float] = []  # with the wait for Python's lock, which the sink's thread may take at once
    hand_over_cpu_ms: list[float] = []
    for window in range(2 * windows + 2):
        is_watched = window % 2 == 1
        if is_watched:
            report = make_report((window + 1) * STEPS_PER_WINDOW, tensors)
            start, cpu = time.perf_counter(), time.thread_time()
            worker.put(report)
            hand_over_ms.append((time.perf_counter() - start) * 1e3)
            hand_over_cpu_ms.append((time.thread_time() - cpu) * 1e3)
        begin = time.perf_counter()
        for _ in range(STEPS_PER_WINDOW):
            start = time.perf_counter()
            optimizer.zero_grad()
            (weight @ weight).square().mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step_ms[is_watched].append((time.perf_counter() - start) * 1e3)
        window_ms[is_watched].append((time.perf_counter() - begin) * 1e3)
    worker.wait()
    worker.stop()
    warm = slice(STEPS_PER_WINDOW, None)  # the first window of either kind warms up
    alone, watched = (statistics.median(step_ms[kind][warm]) for kind in (False, True))
    lost = statistics.median(window_ms[True][1:]) - statistics.median(window_ms[False][1:])
    return {
        "tensors": tensors,
        "hand_over_ms_median": round(statistics.median(hand_over_ms), 4),
        "hand_over_cpu_ms_median": round(statistics.median(hand_over_cpu_ms), 4),
        "hand_over_cpu_ms_max": round(max(hand_over_cpu_ms), 4),
        "sink_ms_median": round(statistics.median(sink_ms[1:]), 2),
        "sink_ms_max": round(max(sink_ms), 2),
        "sink_cpu_ms_median": round(statistics.median(sink_cpu_ms[1:]), 2),
        "step_ms_alone": round(alone, 3),
        "step_ratio": round(watched / alone, 3),
        "training_delayed_per_window_ms": round(lost, 2),
    }


if __name__ == "__main__":
    main()
