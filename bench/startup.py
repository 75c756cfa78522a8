"""What beginning costs: importing `update_watch` beyond torch, and attaching to a model of many tensors.

    python bench/startup.py [--tensors 3000] [--repeats 5]

Each import is timed in an interpreter of its own, after torch and numpy; each attachment is to a model and an optimizer of their
own. Medians, of wall time and of processor time, which other work on the machine disturbs less. Bars: 0.05 s for the import,
0.2 s for attaching to 3,000 tensors, both in processor time. Exit status 1 if one is missed.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

import update_watch as uw

IMPORT_SECONDS, ATTACH_SECONDS = 0.05, 0.2
_IMPORT = """
import time, torch, numpy, torch.optim
wall, processor = time.perf_counter(), time.process_time()
import update_watch
update_watch.watch  # what it needs is loaded when it is asked for
print(time.perf_counter() - wall, time.process_time() - processor)
"""


def timed_imports(repeats: int) -> list[tuple[float, float]]:
    """(wall, processor) seconds each."""
    times = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", _IMPORT], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
        )
        wall, processor = map(float, done.stdout.split())
        times.append((wall, processor))
    return times


def timed_attachments(
    tensors: int, repeats: int, kind: Callable[[Any], Any] = torch.optim.AdamW
) -> list[tuple[float, float]]:
    """(wall, processor) seconds each, of `uw.watch`. States exist, as after a resume."""
    times = []
    for _ in range(repeats):
        named = [
            (f"layers.{i // 10}.part{i % 10}.weight", nn.Parameter(torch.randn(32, 32).bfloat16()))
            for i in range(tensors)
        ]
        optimizer = kind([p for _, p in named])
        for _, p in named:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        wall, processor = time.perf_counter(), time.process_time()
        watch = uw.watch(named, optimizer)
        times.append((time.perf_counter() - wall, time.process_time() - processor))
        watch.close()
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    missed = []
    for name, times, bar in (
        ("import update_watch, after torch", timed_imports(given.repeats), IMPORT_SECONDS),
        (f"attach to {given.tensors:,} tensors", timed_attachments(given.tensors, given.repeats), ATTACH_SECONDS),
    ):
        wall, processor = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"{name:36} {wall:7.3f} s, {processor:7.3f} s of the processor (bar {bar})")
        if processor > bar:
            missed.append(name)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
