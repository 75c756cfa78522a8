"""A training loop with a W&B run and the sink on the watch's background thread; run as a process of its own by the tests.

    python wandb_training.py '{"url": ..., "windows": 4}'

Every second window hands a report to the sink's thread, the others are training alone: their step times are
compared within the same run. Prints one line of JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
import wandb

from tests.support.wandb.loopback import API_KEY, ENTITY
from tests.support.wandb.samples import large_model, sample_alert, sample_report
from update_watch.dashboards.wandb.sink import WandbSink
from update_watch.worker import Sinks, Worker

WINDOW = 32  # steps


def main(options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = wandb.Settings(
        base_url=options["url"],
        api_key=API_KEY,
        console="off",
        silent=True,
        x_disable_stats=True,
        x_file_stream_transmit_interval=1,
        finish_timeout=options.get("finish_timeout", 0.0),  # 0: wandb's own default, wait for everything
    )
    run = wandb.init(project="p", entity=ENTITY, dir=options["dir"], settings=settings)
    sink = WandbSink(run)
    sink.describe({"window": WINDOW, "audit": {"bytes": 4096}})
    worker = Worker("sink", Sinks([sink]))  # as the watch has it

    weight = torch.randn(256, 256, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    tensors = large_model(options.get("tensors", 20))
    alert_windows = options.get("alert_windows", [])
    seconds: dict[str, list[float]] = {"alone": [], "watched": []}
    handing: list[float] = []
    step = 0
    for window in range(2 * options["windows"]):
        is_watched = window % 2 == 1
        for _ in range(WINDOW):
            start = time.perf_counter()
            optimizer.zero_grad()
            (weight @ weight).square().mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            seconds["watched" if is_watched else "alone"].append(time.perf_counter() - start)
            if window >= 2:  # the first two warm up
                time.sleep(options.get("pause", 0.0) / WINDOW)
            step += 1
        if window < 2:
            seconds = {"alone": [], "watched": []}
        if is_watched:
            alerts = (sample_alert(step, title=f"alert {window // 2}"),) if window // 2 in alert_windows else ()
            report = sample_report(step, tensors, alerts=alerts, time=time.time())
            start = time.thread_time()  # not the wait for Python's lock, which the sink's thread may hold
            worker.put(report)
            handing.append(time.thread_time() - start)

    start = time.perf_counter()
    assert worker.wait(timeout=60)
    drained = time.perf_counter()
    try:
        run.finish()
    except TimeoutError:  # the server is gone and `finish_timeout` is over
        pass
    done = time.perf_counter()
    alone, watched = (statistics.median(seconds[kind]) for kind in ("alone", "watched"))
    result = {
        "steps": [WINDOW * 2 * (i + 1) for i in range(options["windows"])],
        "alone_ms": alone * 1e3,
        "ratio": watched / alone,
        "handing_cpu_ms": statistics.median(handing) * 1e3,
        "drain_s": drained - start,
        "finish_s": done - drained,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
