"""What a watch costs at scale, worked out from real windows on stand-ins: as many tensors as the model has, small ones.

    python bench/scale.py [--only WORDS] [--tensors N ...] [--json FILE]

What the watch does depends on how many tensors there are and how many elements of each are looked at, not on their size: so
7B parameters on 8 ranks, 70B on 512 and a mixture of experts of 10,000 tensors are each stood for by as many small BF16
tensors as one rank steps. Measured on them (CPU): operators per step that is looked at, host time of it and of a window's
end, processor time of the judging thread, bytes held, bytes that leave the device (and are summed over ranks) per window,
lines of a journal, and what a W&B run is given. The share of steps that is looked at follows from the step time and the budget of
1%; what is written in a day is the most: every step looked at, in windows of 128. Without a budget more than 320 tensors are looked at
a part a window once the first windows are over: for that operators, processor time of the training thread and a window's end
are measured again. `--tensors`: of so many small tensors instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

import update_watch as uw
from bench.overhead import Operators
from update_watch.dashboards import Journal
from update_watch.measure import transfer
from update_watch.measure.hooks.tap import StepTap
from update_watch.watching import attention

WINDOW, USUAL_WINDOW, DAY, BUDGET = 32, 128, 86_400.0, 0.01


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model and where it trains. `tensors`: that one rank steps; `step_s`: a usual time of a step."""

    name: str
    tensors: int
    parameters: float
    ranks: int
    step_s: float


SETUPS = [
    Setup("GPT-2, 124M, 1 rank", 148, 124e6, 1, 0.2),
    Setup("Llama, 7B, 8 ranks", 291, 6.7e9, 8, 2.0),
    Setup("Llama, 70B, 512 ranks", 723, 69e9, 512, 5.0),
    Setup("experts, 10,000 tensors, 64 ranks", 10_000, 40e9, 64, 3.0),
]


def stand_ins(setup: Setup) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """As many tensors as a rank has, small ones, and what steps them."""
    torch.manual_seed(0)
    params = [nn.Parameter((torch.randn(32, 32) * 0.02).bfloat16()) for _ in range(setup.tensors)]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    optimizer = torch.optim.AdamW(params, lr=3e-4, weight_decay=0.1, fused=True)
    optimizer.step()
    return params, optimizer


def measure(setup: Setup) -> dict[str, Any]:
    params, optimizer = stand_ins(setup)
    gc.collect()
    before = _storages()
    sent: list[int] = []
    send, add_later = transfer.Batch.send, transfer.Batch.add_later

    def counted(batch: transfer.Batch) -> None:
        sent.append(sum(v.numel() * v.element_size() for parts in batch._waiting.values() for _, v in parts))
        send(batch)

    def counted_later(batch: transfer.Batch, device: torch.device, make: Callable[[], Tensor]) -> Any:
        def made() -> Tensor:  # by the judging thread, as on the CPU nothing leaves a device
            vector = make()
            sent.append(vector.numel() * vector.element_size())
            return vector

        return add_later(batch, device, made)

    windows = 3 if setup.tensors < 5000 else 2
    attention.always = True  # by budget, and it never ends
    names = [f"layers.{i // 9}.{'qkvoghudn'[i % 9]}.weight" for i in range(setup.tensors)]
    judged: list[float] = []
    logged: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "run.jsonl"
        sinks: list[Any] = [Journal(journal), lambda report: logged.append(len(json.dumps(_numbers(report))))]
        started = time.perf_counter()
        watch = uw.watch(list(zip(names, params, strict=True)), optimizer, window=WINDOW, sinks=sinks)
        attach_s = time.perf_counter() - started
        judge = watch._judge_window

        def timed(window: Any) -> None:
            began = time.thread_time()
            judge(window)
            judged.append(time.thread_time() - began)

        watch._judge._handle = timed
        transfer.Batch.send, transfer.Batch.add_later = counted, counted_later  # type: ignore[method-assign]
        added: list[float] = []
        ends: list[float] = []
        try:
            for i in range(windows * WINDOW):
                watch.enabled = False
                alone = _timed(optimizer.step)
                watch.enabled = True
                took = _timed(optimizer.step) - alone
                if i >= WINDOW:
                    (ends if (i + 1) % WINDOW == 0 else added).append(1e3 * took)
        finally:
            transfer.Batch.send, transfer.Batch.add_later = send, add_later  # type: ignore[method-assign]
        watch._judge.wait()
        window_bytes = sum(sent) / windows
        watch._post.wait()
        gc.collect()
        held = sum(size for key, size in _storages().items() if key not in before)
        counter = Operators()
        with counter:
            for _ in range(8):
                optimizer.step()
        watch.enabled = False
        alone_counter = Operators()
        with alone_counter:
            for _ in range(8):
                optimizer.step()
        lines = journal.stat().st_size / windows
        watch.close()
    later = measure_later(setup)
    look_ms, end_ms = statistics.fmean(added), statistics.median(ends)
    window_ms = WINDOW * look_ms + end_ms + 1e3 * statistics.median(judged)
    # of the steps of a day, those that fit into the budget
    looks = min(BUDGET * DAY * 1e3 / (window_ms / WINDOW), DAY / setup.step_s)
    windows = DAY / setup.step_s / USUAL_WINDOW
    return {
        "tensors": setup.tensors,
        "attach_s": attach_s,
        "operators": (counter.seen.total() - alone_counter.seen.total()) / 8,
        "look_ms": look_ms,
        "window_end_ms": end_ms,
        "judging_ms": 1e3 * statistics.median(judged),
        "held_mb": held / 1e6,
        "held_share": held / (2 * setup.parameters / setup.ranks),
        "window_kb": window_bytes / 1e3,
        "journal_kb": lines / 1e3,
        "logged_kb": statistics.median(logged) / 1e3,
        "looked_at": min(looks * setup.step_s / DAY, 1.0),
        "windows_per_day": windows,
        "journal_mb_per_day": windows * lines / 1e6,
        "logged_mb_per_day": windows * statistics.median(logged) / 1e6,
        **later,
    }


def measure_later(setup: Setup) -> dict[str, Any]:
    """Without a budget: what the watch adds to a step in the first windows, and what once they are over."""
    (params, optimizer), (_, other) = stand_ins(setup), stand_ins(setup)
    names = [f"layers.{i // 9}.{'qkvoghudn'[i % 9]}.weight" for i in range(setup.tensors)]
    sizes: list[int] = []

    def looked_at(report: uw.Report) -> None:
        sizes.append(sum(t.efficiency is not None for t in report.tensors))

    given = list(zip(names, params, strict=True)), optimizer
    with InHooks() as spent, uw.watch(*given, window=USUAL_WINDOW, budget=None, sinks=[looked_at]) as watch:
        first = [_window(optimizer, watch, spent) for _ in range(attention.FIRST_WINDOWS)]
        later = [_window(optimizer, watch, spent) for _ in range(4)]
        counter, alone = Operators(), Operators()
        for _ in range(USUAL_WINDOW):
            watch._judge.wait()
            with counter:
                optimizer.step()
            with alone:
                other.step()
        watch.flush()
    return {
        "first_added_ms": min(statistics.fmean(window) for window in first[1:]),
        "first_window_end_ms": min(window[-1] for window in first[1:-1]),
        "later_added_ms": min(statistics.fmean(window) for window in later[1:]),
        "later_window_end_ms": min(window[-1] for window in later[1:]),
        "later_operators": (counter.seen.total() - alone.seen.total()) / USUAL_WINDOW,
        "later_tensors": sizes[-2],
    }


class InHooks:
    """Processor time of the training thread in the hooks of watches that are made within, since it was last asked for."""

    def __enter__(self) -> InHooks:
        self.seconds = 0.0
        self._hooks = {name: getattr(StepTap, name) for name in ("_run_begin", "_run_after")}
        for name, hook in self._hooks.items():
            setattr(StepTap, name, self._timed(hook))
        return self

    def __exit__(self, *_: Any) -> None:
        for name, hook in self._hooks.items():
            setattr(StepTap, name, hook)

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began = time.thread_time()
            try:
                return hook(*args)
            finally:
                self.seconds += time.thread_time() - began

        return timed


def _window(optimizer: torch.optim.Optimizer, watch: uw.Watch, spent: InHooks) -> list[float]:
    """Of each step of a window what the watch adds to it, ms. Judging is waited for: it shares the interpreter."""
    found = []
    for _ in range(USUAL_WINDOW):
        watch._judge.wait()
        spent.seconds = 0.0
        optimizer.step()
        found.append(1e3 * spent.seconds)
    return found


def _numbers(report: uw.Report) -> dict[str, Any]:
    """About what a logger is given of a report: the run's numbers, and of each tensor a few."""
    from update_watch.dashboards import metrics

    return {**metrics.run_values(report), **{t.name: [t.efficiency, t.update_ratio] for t in report.tensors}}


def _timed(step: Any) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _storages() -> dict[int, int]:
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="WORDS", default="", help="setups with these words in their name")
    parser.add_argument("--tensors", type=int, nargs="+", default=[], help="this many small ones, no setup")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    given = parser.parse_args()
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    found = {}
    small = [Setup(f"{count:,} small tensors", count, 1024.0 * count, 1, 0.05) for count in given.tensors]
    for setup in small or SETUPS:
        if given.only in setup.name:
            found[setup.name] = r = measure(setup)
            print(
                f"{setup.name}: {r['tensors']:,} tensors a rank; attached in {r['attach_s']:.1f} s\n"
                f"  a step looked at: {r['operators']:.0f} operators, {r['look_ms']:.2f} ms; a window's end {r['window_end_ms']:.1f} ms;"
                f" judged in {r['judging_ms']:.0f} ms\n"
                f"  without a budget, in the mean: {r['first_added_ms']:.2f} ms a step in the first windows, {r['first_window_end_ms']:.1f}"
                f" ms at their end; later"
                f" {r['later_operators']:.0f} operators and {r['later_added_ms']:.2f} ms, {r['later_tensors']:,} tensors a window,"
                f" a window's end {r['later_window_end_ms']:.1f} ms\n"
                f"  holds {r['held_mb']:.1f} MB ({100 * r['held_share']:.2f}% of a rank's weights); {r['window_kb']:.0f} kB leave per window\n"
                f"  with steps of {setup.step_s:g} s: {100 * r['looked_at']:.0f}% are looked at, a window is"
                f" {r['journal_kb']:.0f} kB in a journal, {r['logged_kb']:.0f} kB to a logger; at most {r['windows_per_day']:.0f} a day:"
                f" {r['journal_mb_per_day']:.0f} MB, {r['logged_mb_per_day']:.0f} MB",
                flush=True,
            )
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
