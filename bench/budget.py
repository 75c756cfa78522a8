"""Is the budget held? Training with steps of 5, 13 and 50 ms, alone and with `uw.watch(budget=0.01)`.

    python bench/budget.py [--step-ms MS ...] [--steps N] [--budget B] [--json FILE]

A step is work of a fixed length (a loop that holds the interpreter, as a training loop on the host does) and fused AdamW on the
68 small BF16 tensors of a GPT. Share: what a step takes longer with the watch, from step 1,000 on (or a third of N), its threads
included, in the mean; beside it, what the watch itself says. Exit status 1 if a share is more than a fifth above the budget.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

import update_watch as uw


class Training:
    """Steps of a given length."""

    def __init__(self, step_ms: float) -> None:
        torch.manual_seed(0)
        self.params = [nn.Parameter((torch.randn(64, 64) * 0.02).bfloat16()) for _ in range(68)]
        for p in self.params:
            p.grad = torch.randn_like(p) * 1e-3
        self.named = [(f"layers.{i // 11}.{i % 11}", p) for i, p in enumerate(self.params)]
        self.optimizer = torch.optim.AdamW(self.params, lr=3e-4, weight_decay=0.1, fused=True)
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
                pass
            self.optimizer.step()
        return (time.perf_counter() - started) / count


def measure(step_ms: float, steps: int, budget: float) -> dict[str, Any]:
    first = min(steps // 3, 1000)
    training = Training(step_ms)
    training.steps(50)
    before = training.steps(min(first, 500))
    reports: list[uw.Report] = []
    with uw.watch(training.named, training.optimizer, budget=budget, sinks=[reports.append]) as watch:
        training.steps(first)
        watch.flush()
        began = len(reports)
        seconds = training.steps(steps - first)
        watch.flush()
        late = reports[began:]
        said = [(r.cost_share, r.window) for r in late if r.cost_share is not None]
        looked, of = sum(r.observed_steps or 0 for r in late), sum(r.window or 0 for r in late)
    after = training.steps(min(first, 500))
    alone = (before + after) / 2
    return {
        "step_ms": 1e3 * alone,
        "share": (seconds - alone) / seconds,
        "own_share": sum(share * window for share, window in said) / of if of else None,
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
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    found = {}
    for step_ms in given.step_ms:
        found[step_ms] = r = measure(step_ms, given.steps, given.budget)
        own = "-" if r["own_share"] is None else f"{100 * r['own_share']:.2f}%"
        looked = "-" if r["looked_at"] is None else f"{100 * r['looked_at']:.0f}%"
        print(
            f"steps of {r['step_ms']:6.2f} ms: {100 * r['share']:.2f}% more (own clock {own}; the machine itself drifts by"
            f" {100 * r['noise']:.1f}%), {looked} of the steps looked at; first verdict at step {r['first_verdict_step']}",
            flush=True,
        )
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1))
    return 1 if any((r["own_share"] or 0) > 1.2 * given.budget for r in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
