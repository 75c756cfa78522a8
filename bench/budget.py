"""Is the budget held? Training with steps of 5, 13 and 50 ms, alone and with `uw.watch(budget=0.01)`.

    python bench/budget.py [--step-ms MS ...] [--steps N] [--budget B] [--cold] [--json FILE]

A step is work of a fixed length (a loop that holds the interpreter, as a training loop on the host does) and fused AdamW on the
68 small BF16 tensors of a GPT. Share: what a step takes longer with the watch, from step 1,000 on (or a third of N), its threads
included, in the mean; beside it, what the watch itself says, and what a clock outside of it says of its hooks. --cold: the work is
arithmetic on 64 MB, which takes the caches from the hooks as a backward pass on the host does. Exit status 1 if the share that the
watch itself says is more than a fifth above the budget.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import update_watch as uw


class Timed(torch.optim.AdamW):
    """Knows when its rule began."""

    began = 0.0

    def _init_group(self, *given: Any) -> Any:
        self.began = self.began or time.perf_counter()
        return super()._init_group(*given)


class HookClock:
    """Seconds in the hooks around an optimizer's rule: those that are there when it is made come before and after all others."""

    def __init__(self, optimizer: Timed) -> None:
        self._optimizer = optimizer
        self._started = self._ended = 0.0
        self.seconds: list[float] = []  # of each step
        self._handles = [
            register_optimizer_step_pre_hook(self._start),
            optimizer.register_step_post_hook(self._end),
            register_optimizer_step_post_hook(self._note),
        ]

    def _start(self, *_: Any) -> None:
        self._optimizer.began = 0.0
        self._started = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self._ended = time.perf_counter()

    def _note(self, *_: Any) -> None:
        self.seconds.append(self._optimizer.began - self._started + time.perf_counter() - self._ended)

    def remove(self) -> None:
        """Take it off."""
        for handle in self._handles:
            handle.remove()


class Training:
    """Steps of a given length."""

    def __init__(self, step_ms: float, is_cold: bool = False) -> None:
        torch.manual_seed(0)
        self._elsewhere = torch.zeros(2**24) if is_cold else None
        self.params = [nn.Parameter((torch.randn(64, 64) * 0.02).bfloat16()) for _ in range(68)]
        for p in self.params:
            p.grad = torch.randn_like(p) * 1e-3
        self.named = [(f"layers.{i // 11}.{i % 11}", p) for i, p in enumerate(self.params)]
        self.optimizer = Timed(self.params, lr=3e-4, weight_decay=0.1, fused=True)
        for _ in range(20):
            started = time.perf_counter()
            self.optimizer.step()
            taken = time.perf_counter() - started
        self._work = max(1e-3 * step_ms - taken, 0.0)

    def steps(self, count: int) -> float:
        """Seconds per step."""
        started = time.perf_counter()
        for _ in range(count):
            end = time.perf_counter() + self._work
            while time.perf_counter() < end:
                if self._elsewhere is not None:
                    self._elsewhere.add_(1.0)
            self.optimizer.step()
        return (time.perf_counter() - started) / count


def measure(step_ms: float, steps: int, budget: float, is_cold: bool = False) -> dict[str, Any]:
    first = min(steps // 3, 1000)
    training = Training(step_ms, is_cold)
    training.steps(50)
    clock = HookClock(training.optimizer)
    before = training.steps(min(first, 500))
    without = statistics.median(clock.seconds)
    reports: list[uw.Report] = []
    with uw.watch(training.named, training.optimizer, budget=budget, sinks=[reports.append]) as watch:
        training.steps(first)
        watch.flush()
        began = len(reports)
        clock.seconds.clear()
        seconds = training.steps(steps - first)
        hooks = [max(one - without, 0.0) for one in clock.seconds]
        watch.flush()
        late = reports[began:]
        said = [(r.cost_share, r.window) for r in late if r.cost_share is not None]
        looked, of = sum(r.observed_steps or 0 for r in late), sum(r.window or 0 for r in late)
    clock.remove()
    after = training.steps(min(first, 500))
    alone = (before + after) / 2
    return {
        "step_ms": 1e3 * alone,
        "share": (seconds - alone) / seconds,
        "own_share": sum(share * window for share, window in said) / of if of else None,
        "hooks_share": statistics.fmean(hooks) / seconds,
        "unseen_us": 1e6 * statistics.median(hooks) if of and looked < of / 2 else None,
        "looked_at": looked / of if of else None,
        "windows": len(said),
        "first_verdict_step": next((r.step for r in reports if r.health.value != "unknown"), None),
        "noise": abs(before - after) / alone,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--step-ms", type=float, nargs="+", default=[5.0, 13.0, 50.0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--budget", type=float, default=0.01)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    found = {}
    for step_ms in given.step_ms:
        found[step_ms] = r = measure(step_ms, given.steps, given.budget, given.cold)
        own = "-" if r["own_share"] is None else f"{100 * r['own_share']:.2f}%"
        unseen = "-" if r["unseen_us"] is None else f"{r['unseen_us']:.0f} us"
        looked = "-" if r["looked_at"] is None else f"{100 * r['looked_at']:.0f}%"
        print(
            f"steps of {r['step_ms']:6.2f} ms: {100 * r['share']:.2f}% more (own clock {own}; in its hooks, by a clock outside,"
            f" {100 * r['hooks_share']:.2f}%, {unseen} of them in a step that passes unseen; the machine itself drifts by"
            f" {100 * r['noise']:.1f}%), {looked} of the steps looked at; first verdict at step {r['first_verdict_step']}",
            flush=True,
        )
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1))
    return 1 if any((r["own_share"] or 0) > 1.2 * given.budget for r in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
