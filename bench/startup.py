"""What beginning costs: importing `update_watch` beyond torch, its first use, and attaching to a model of many tensors.

    python bench/startup.py [--tensors 3000] [--repeats 5]

Each import is timed in an interpreter of its own, after torch and numpy, from compiled files, as an installed package has them;
`import update_watch` loads little, what `uw.watch` needs is loaded when that name is asked for first. Each attachment is to a
model and an optimizer of their own. Python's collector of garbage is off meanwhile: when it runs is chance, and it walks
through all that torch holds. The least of some repeats, of wall time and of processor time: what else runs on the machine only adds. Bars:
0.05 s for the import, 0.1 s for the first use, 0.2 s for attaching to 3,000 tensors, in processor time. Exit status 1 if one is missed.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

import update_watch as uw

IMPORT_SECONDS, FIRST_USE_SECONDS, ATTACH_SECONDS = 0.05, 0.1, 0.2
_IMPORT = """
import gc, time, torch, numpy, torch.optim
gc.disable()
wall, processor = time.perf_counter(), time.process_time()
import update_watch
print(time.perf_counter() - wall, time.process_time() - processor)
wall, processor = time.perf_counter(), time.process_time()
update_watch.watch
print(time.perf_counter() - wall, time.process_time() - processor)
"""


def timed_imports(repeats: int) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """(wall, processor) seconds each: of the import, and of the first use."""
    times = []
    with tempfile.TemporaryDirectory() as compiled:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for _ in range(repeats + 1):  # the first compiles
            command = [sys.executable, "-c", _IMPORT]
            done = subprocess.run(
                command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=True
            )
            times.append([tuple(map(float, line.split())) for line in done.stdout.splitlines()])
    return [one[0] for one in times[1:]], [one[1] for one in times[1:]]


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
        gc.collect()
        gc.disable()
        try:
            wall, processor = time.perf_counter(), time.process_time()
            watch = uw.watch(named, optimizer)
            times.append((time.perf_counter() - wall, time.process_time() - processor))
        finally:
            gc.enable()
        watch.close()
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    missed = []
    imports, first_uses = timed_imports(given.repeats)
    for name, times, bar in (
        ("import update_watch, after torch", imports, IMPORT_SECONDS),
        ("first use of uw.watch", first_uses, FIRST_USE_SECONDS),
        (f"attach to {given.tensors:,} tensors", timed_attachments(given.tensors, given.repeats), ATTACH_SECONDS),
    ):
        wall, processor = (min(column) for column in zip(*times, strict=True))
        print(f"{name:36} {wall:7.3f} s, {processor:7.3f} s of the processor (bar {bar})")
        if processor > bar:
            missed.append(name)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
