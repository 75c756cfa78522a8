"""What judging a window of many tensors takes from training: the GPU's work queue must not run dry meanwhile.

    python bench/verdicts/held_lock.py [--tensors 3000] [--json FILE]

A window of so many BF16 tensors under AdamW is measured once, and judged again and again as it would be in a run while a stand-in for a
trainer goes on: its steps are 500 small operators on the host and 40 ms on a device, which works off what is queued, two steps
at most. It prints the processor time of judging, the longest stretch of it without a rest, and how long the device had nothing to do, with
rests and without. Exit status 1 if the device idles for more than 1% of the time.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import nn

import update_watch as uw
from update_watch import worker

OPERATORS, DEVICE, AHEAD = 500, 0.04, 2  # of a step: on the host; s on the device; steps that the host may be ahead
SECONDS = 20.0


class Trainer(threading.Thread):
    """Launches steps until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ends: list[float] = []  # s, when the device is done with each step
        self.idle = 0.0  # s
        self.must_stop = False

    def run(self) -> None:
        x = torch.zeros(8)
        free = time.perf_counter()
        while not self.must_stop:
            for _ in range(OPERATORS):
                x.add_(1)
            now = time.perf_counter()
            self.idle += max(now - free, 0.0) if self.ends else 0.0
            free = max(free, now) + DEVICE
            self.ends.append(free)
            while free - time.perf_counter() > AHEAD * DEVICE:
                time.sleep(0.001)


def watched(tensors: int) -> tuple[Any, Any]:
    """A watch and its one measured window."""
    shapes = [(64, 32), (32,)]
    params = [nn.Parameter(torch.randn(shapes[i % 2]).bfloat16()) for i in range(tensors)]
    model = nn.ParameterList(params)
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
    watch = uw.watch(model, optimizer, window=32)  # by budget: measured in turns, as on a GPU, and not in panels
    windows: list[Any] = []
    judge, watch._judge._handle = watch._judge._handle, windows.append
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(32):
        optimizer.step()
    watch._judge.wait()
    watch.detach()
    watch._judge._handle = judge
    return watch, windows[0]


def measure(watch: Any, window: Any, with_rests: bool) -> dict[str, float]:
    """Judge one window after the other for a while."""
    spent: list[float] = []
    stretches: list[float] = []
    judge, sleep = watch._judge._handle, time.sleep
    since = 0.0

    def timed(item: Any) -> None:
        nonlocal since
        began = since = time.thread_time()
        judge(item)
        spent.append(time.thread_time() - began)
        stretches.append(time.thread_time() - since)

    class Clock:
        perf_counter = staticmethod(time.perf_counter)

        @staticmethod
        def sleep(seconds: float) -> None:
            nonlocal since
            stretches.append(time.thread_time() - since)
            sleep(seconds if with_rests else 0)
            since = time.thread_time()

    watch._judge._handle, worker.time = timed, Clock  # type: ignore[attr-defined]
    trainer = Trainer()
    trainer.start()
    began = time.perf_counter()
    handed = 0
    while time.perf_counter() - began < SECONDS:
        if handed == len(spent):
            handed += watch._judge.put(window)
        sleep(0.01)
    took = time.perf_counter() - began
    trainer.must_stop = True
    trainer.join()
    longest = max(stretches)
    watch._judge.wait()  # without rests, as somebody waits
    watch._judge._handle, worker.time = judge, time  # type: ignore[attr-defined]
    return {"judging_ms": 1e3 * sum(spent) / len(spent), "stretch_ms": 1e3 * longest, "idle": trainer.idle / took}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tensors", type=int, default=3000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    watch, window = watched(arguments.tensors)
    found = {}
    for name, with_rests in (("with rests", True), ("without", False)):
        found[name] = r = measure(watch, window, with_rests)
        longest = f"longest stretch {r['stretch_ms']:.0f} ms, " if with_rests else ""
        print(
            f"{name}: judged in {r['judging_ms']:.0f} ms, {longest}device idle {r['idle']:.1%} of the time", flush=True
        )
    watch.close()
    if arguments.json:
        arguments.json.write_text(json.dumps(found))
    return int(found["with rests"]["idle"] > 0.01)


if __name__ == "__main__":
    raise SystemExit(main())
