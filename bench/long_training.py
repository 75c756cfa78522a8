"""A long training, with a watch and without: the same bits at the end, flat memory, flat descriptors?

    python bench/long_training.py [--steps 50000]

A small model in BF16 with fused AdamW and a schedule with restarts is trained in two processes of its own, one unwatched.
The watched one has all that a long run meets: an average in BF16, a journal limited to 2 MiB, validation in inference
mode, and every 4,000 steps the watch's state is saved, the watch closed, another made and the state loaded.

Prints one JSON line: the hash of weights, states, average and random states of both; resident memory (MiB) and open
descriptors at 12,000 steps and their largest value after that; memory in use, which is without what the C library keeps
for later; windows reported; errors of the watch.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

import update_watch as uw
from update_watch.dashboards.journal import Journal, read_journal

LOOK_EVERY = 500  # steps
ANEW_EVERY = 4_000
SETTLED = 12_000


def resident() -> float:
    """Memory of this process now (MiB)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


class _MallocInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used free keep".split()]


def in_use() -> float | None:
    """Of that, what is allocated (MiB); the rest glibc keeps for later. None with another C library."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    ask.restype = _MallocInfo
    info = ask()
    return float(info.used + info.mapped) / 2**20


def digest(values: Any) -> str:
    """Of all bits of tensors in plain containers."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(
                value.detach().contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else str(value).encode()
            )
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                found.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    add(values)
    return found.hexdigest()[:16]


def train(steps: int, folder: Path | None) -> dict[str, Any]:
    """One training; watched where there is a folder for the journal."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    model = nn.Sequential(
        nn.Embedding(64, 32),
        nn.Linear(32, 64),
        nn.RMSNorm(64),
        nn.GELU(),
        nn.Linear(64, 32),
        nn.LayerNorm(32),
        nn.Linear(32, 64),
    ).bfloat16()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 1_000)
    problems: list[str] = []
    reported = [0]

    def count(report: Any) -> None:
        reported[0] += 1

    def attach(state: dict[str, Any] | None) -> uw.Watch | None:
        if folder is None:
            return None
        sinks = [Journal(folder / "run.jsonl", max_bytes=2 * 2**20), count]
        watch = uw.watch(model, optimizer, window=64, averages={"ema": average}, sinks=sinks)
        if state is not None:
            watch.load_state_dict(state)
        return watch

    watch = attach(None)
    memory: list[float] = []
    allocated: list[float | None] = []
    descriptors: list[int] = []
    for step in range(1, steps + 1):
        tokens = torch.randint(0, 64, (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).float(), tokens.roll(1)).backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if step % LOOK_EVERY == 0:
            with torch.inference_mode():
                model(tokens)
            if step >= SETTLED:
                memory.append(resident())
                allocated.append(in_use())
                descriptors.append(len(os.listdir("/proc/self/fd")))
        if watch is not None and step % ANEW_EVERY == 0:
            state = watch.state_dict()
            watch.close()
            if watch._tap.error is not None:
                problems.append(repr(watch._tap.error))
            watch = attach(state)
    if watch is not None:
        watch.close()
        if watch._tap.error is not None:
            problems.append(repr(watch._tap.error))
    ends = model.state_dict(), optimizer.state_dict(), average.state_dict(), torch.get_rng_state()
    return {
        "hash": digest(ends),
        "rss_settled_mib": round(memory[0], 1) if memory else None,
        "rss_largest_mib": round(max(memory), 1) if memory else None,
        "rss_end_mib": round(memory[-1], 1) if memory else None,
        "in_use_settled_mib": allocated[0] and round(allocated[0], 1) if allocated else None,
        "in_use_end_mib": allocated[-1] and round(allocated[-1], 1) if allocated else None,
        "descriptors_settled": descriptors[0] if descriptors else None,
        "descriptors_largest": max(descriptors, default=None),
        "windows": reported[0],
        "journal_windows": sum(1 for _ in read_journal(folder / "run.jsonl")) if folder else 0,
        "problems": problems,
    }


def run(steps: int) -> dict[str, Any]:
    """Both trainings, each in a process of its own, one after the other."""
    found = {}
    for name in ("unwatched", "watched"):
        command = [sys.executable, __file__, "--steps", str(steps), "--only", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return {"steps": steps, "same": found["unwatched"]["hash"] == found["watched"]["hash"], **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--only", choices=("unwatched", "watched"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is None:
        print(json.dumps(run(options.steps)))
        return
    import logging

    logging.getLogger("update_watch").setLevel(logging.CRITICAL)  # alerts are many, and not what is asked here
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(train(options.steps, Path(folder) if options.only == "watched" else None)))


if __name__ == "__main__":
    main()
