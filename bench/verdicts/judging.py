"""What reading and judging one window of many tensors costs: processor time on the background thread, which shares the interpreter.

    python bench/verdicts/judging.py [--tensors 3000] [--without-budget] [--json FILE]

Really trained: BF16 tensors under AdamW whose updates arrive, arrive in part, or do not; then healthy ones again, with a schedule
whose end is known (a forecast) and with an average of all of them. Ten windows are measured, the last one is judged again and
again as it would be in a run that goes on so: the best of ten, the same of one of the first eight, what of all ten is collecting
garbage, and what it takes to read all of a report's tensors. All tensors are looked at in each window (a budget of all the
time); `--without-budget` of many tensors a part in each after the first eight. Exit status 1 above 50 ms for the first three
kinds of 3,000 tensors.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import update_watch as uw

WINDOW, FIRST, WINDOWS, ROUNDS = 32, 8, 10, 10  # in the first windows all tensors are looked at, then a part of many
MOST = 50.0  # ms, for 3,000 tensors
KINDS = {
    "healthy": 0.05,
    "stalling": 1e-3,
    "stalled": 1e-5,
    "with a forecast": 0.05,
    "with an average": 0.05,
}  # learning rates
ORDINARY = ("healthy", "stalling", "stalled")


def watched(kind: str, tensors: int, budget: float | None) -> tuple[uw.Watch, list[Any]]:
    """A watch and its closed windows, not judged yet."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn((64, 32) if i % 2 else (32,)).bfloat16()) for i in range(tensors)]
    model, lr = nn.ParameterList(params), KINDS[kind]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), fused=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99)) if kind == "with an average" else None
    watch = uw.watch(
        *(model, optimizer),
        budget=budget,
        window=WINDOW,
        schedule=uw.Schedule(lambda step: lr * (1 - step / 10_000), 10_000) if kind == "with a forecast" else None,
        averages={"ema": average} if average is not None else None,
    )
    windows: list[Any] = []
    watch._judge._handle = windows.append
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(WINDOW * WINDOWS):
        optimizer.step()
        if average is not None:
            average.update_parameters(model)
    watch._judge.wait()
    watch.detach()
    return watch, windows


@contextmanager
def collecting(spent: list[float]) -> Iterator[None]:
    """Note the seconds that collections of garbage take."""
    began = 0.0

    def note(phase: str, _: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.process_time()
        else:
            spent.append(time.process_time() - began)

    gc.callbacks.append(note)
    try:
        yield
    finally:
        gc.callbacks.remove(note)


def judge(watch: uw.Watch, window: Any) -> float:
    """Seconds of processor time."""
    began = time.process_time()
    watch._judge_window(window)
    spent = time.process_time() - began
    if watch._has_failed:
        raise RuntimeError("the watch met an error of its own: what it takes is not told by this window")
    return spent


def measure(kind: str, tensors: int, budget: float | None) -> dict[str, float]:
    """Milliseconds."""
    watch, windows = watched(kind, tensors, budget)
    first, spent = [], []
    collected: list[float] = []
    for window in windows[:FIRST] + windows[FIRST - 1 : FIRST] * 3:
        first.append(judge(watch, window))
    for window in windows[FIRST:]:
        judge(watch, window)
    with collecting(collected):
        for _ in range(ROUNDS):
            spent.append(judge(watch, windows[-1]))
    assert watch.last is not None
    began = time.process_time()
    for tensor in watch.last.tensors:
        assert tensor.advice is not None
    reading = time.process_time() - began
    watch.close()
    of_first = 1e3 * min(first[FIRST:])
    return {
        "best": 1e3 * min(spent),
        "one of the first windows": of_first,
        "garbage": 1e3 * sum(collected) / ROUNDS,
        "all of a report": 1e3 * reading,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tensors", type=int, default=3000)
    parser.add_argument("--without-budget", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    found = {}
    for kind in KINDS:
        found[kind] = measure(kind, arguments.tensors, None if arguments.without_budget else 1.0)
        print(f"{kind}: " + ", ".join(f"{name} {value:.1f} ms" for name, value in found[kind].items()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found))
    slow = [kind for kind in ORDINARY if found[kind]["best"] > MOST * max(arguments.tensors / 3000, 1)]
    return int(bool(slow))


if __name__ == "__main__":
    raise SystemExit(main())
