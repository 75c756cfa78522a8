"""How long does it take by budget until a fault that begins late is told? On a clock of its own, so that the machine does not matter.

    python bench/verdicts/detection_delay.py [--step-ms MS ...] [--seeds N] [--steps N] [--fault NAME ...] [--json FILE]

Real training (fused AdamW on the 64 small BF16 tensors, made-up gradients) in which a fault begins at about step 1,500. What
passes on the clock is given: steps of `--step-ms`, and what was measured of a watch on a slow core: 1 ms for a look, 20 us for a step
that passes unseen, 1 ms for a window's end, and 23 ms of the judging and the sink's thread for a report. Prints the steps from a
fault to the first report that names it (health and cause, for half of the tensors that have it), and which share of the time was taken.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import nn

import update_watch as uw
from update_watch.report import Cause, Health, Report

LOOK, UNSEEN, END, BESIDE = 1e-3, 20e-6, 1e-3, 23e-3  # s
TENSORS, FAULTY, SIDE = 64, 6, 16  # eight turns


class Clock:
    """Seconds pass as they are told to, in training and in the watch."""

    def __init__(self, watch: uw.Watch) -> None:
        self.now = self.taken = 0.0
        self._watch, self._attention = watch, watch._attention
        self._attention._clock = lambda: self.now
        self._attention._window_began = self._attention._at = self.now
        watch._tap.spend = self._spend
        self._close, watch._close_window = watch._close_window, self._closes  # type: ignore[method-assign]
        self._is_closed = False

    def _spend(self, _: float) -> None:
        """One of a step's two hooks is over."""
        is_seen = self._attention._looks or self._attention._full
        self._pass((LOOK if is_seen else UNSEEN) / 2)

    def _closes(self) -> None:
        self._close()
        self._pass(END)
        self._is_closed = True

    def _pass(self, seconds: float) -> None:
        self.now += seconds
        self.taken += seconds
        self._attention.spend(seconds)

    def step(self, seconds: float) -> None:
        """The rest of a training step passes; what was closed in it is judged."""
        self.now += seconds
        if self._is_closed:
            self._is_closed = False
            self._watch._judge.wait(60)
            self._watch._post.wait(60)
            self._attention._beside = self._attention._window_beside = BESIDE
            self.now += BESIDE
            self.taken += BESIDE


class Training:
    """Tensors, their optimizer, and a fault from some step on."""

    def __init__(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.params = [
            nn.Parameter((torch.randn(SIDE, SIDE, generator=self.rng) * 0.02).bfloat16()) for _ in range(TENSORS)
        ]
        slope = torch.randn(SIDE, SIDE, generator=self.rng) * 1e-3
        noise = [torch.randn(SIDE, SIDE, generator=self.rng) * 3e-4 for _ in range(16)]
        noise = [one - torch.stack(noise).mean(0) for one in noise]  # there and back, so that weights keep their size
        self._gradients = [[(sign * slope + one).bfloat16() for one in noise] for sign in (1, -1)]
        self.optimizer = torch.optim.AdamW(self.params, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.zeros = torch.zeros(SIDE, SIDE, dtype=torch.bfloat16)
        self.named = [(f"layers.{i // 11}.{i % 11}", p) for i, p in enumerate(self.params)]
        self.faulty = torch.randperm(TENSORS, generator=self.rng)[:FAULTY].tolist()

    def step(self, t: int, onset: int, fault: str) -> None:
        for i, p in enumerate(self.params):
            p.grad = self._gradients[t // 32 % 2][(7 * i + 5 * t) % 16]
        if t >= onset:
            FAULTS[fault][0](self, t - onset)
        self.optimizer.step()
        if t >= onset and fault == "put back":
            with torch.no_grad():
                for i in self.faulty:
                    self.params[i].copy_(self.kept[i])

    kept: dict[int, torch.Tensor]


def _grown(training: Training, since: int) -> None:
    if since == 0:
        with torch.no_grad():
            for i in training.faulty:
                training.params[i].mul_(256.0)


def _no_signal(training: Training, since: int) -> None:
    for i in training.faulty:
        training.params[i].grad = training.zeros


def _nan(training: Training, since: int) -> None:
    if since == 0:
        with torch.no_grad():
            for i in training.faulty:
                training.params[i].fill_(float("nan"))


def _put_back(training: Training, since: int) -> None:
    if since == 0:
        training.kept = {i: training.params[i].detach().clone() for i in training.faulty}


def _slow_schedule(training: Training, since: int) -> None:
    for group in training.optimizer.param_groups:
        group["lr"] = 3e-4 * max(0.998**since, 0.03)


def _none(training: Training, since: int) -> None:
    pass


FAULTS: dict[str, tuple[Callable[[Training, int], None], set[Health], Cause | None]] = {
    "grown weights": (_grown, {Health.stalled, Health.stalling}, Cause.weight_rounding),
    "put back": (_put_back, {Health.stalled, Health.stalling}, Cause.overwritten),
    "zero gradients": (_no_signal, {Health.idle, Health.unknown}, Cause.zero_gradient),
    "NaN": (_nan, {Health.broken}, Cause.non_finite),
    "falling rate": (_slow_schedule, {Health.stalled, Health.stalling}, Cause.weight_rounding),
    "none": (_none, set(), None),
}


def measure(fault: str, seed: int, step: float, steps: int) -> dict[str, Any]:
    """Steps of `step` s. Returns the delay (None: it was not told), and the watch's share from step 1,000 on."""
    torch.manual_seed(seed)
    training, onset = Training(seed), 1500 + 97 * seed
    reports: list[Report] = []
    with uw.watch(training.named, training.optimizer, sinks=[reports.append], seed=seed) as watch:
        clock = Clock(watch)
        for t in range(steps):
            training.step(t, onset, fault)
            clock.step(step)
            if t == 1000:
                before = clock.taken, clock.now
            if len(reports) and reports[-1].step > onset and _is_told(reports[-1], training, fault):
                break
        share = (clock.taken - before[0]) / (clock.now - before[1])
    told = next((r.step for r in reports if r.step > onset and _is_told(r, training, fault)), None)
    wrong = {a.title for r in reports for a in r.alerts if r.step <= onset or fault == "none"}
    return {
        "delay": None if told is None else told - onset,
        "share": share,
        "reports": len(reports),
        "wrong": sorted(wrong),
    }


def _is_told(report: Report, training: Training, fault: str) -> bool:
    _, healths, cause = FAULTS[fault]
    found = [t for t in report.tensors if t.health in healths and t.cause is cause]
    return len(found) >= (TENSORS if fault == "falling rate" else FAULTY) / 2


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--step-ms", type=float, nargs="+", default=[6.0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--fault", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for step_ms in given.step_ms:
        for fault in given.fault:
            runs = [measure(fault, seed, 1e-3 * step_ms, given.steps) for seed in range(given.seeds)]
            found[f"{step_ms} ms, {fault}"] = runs
            delays = ["-" if r["delay"] is None else f"{r['delay']:,}" for r in runs]
            share = statistics.fmean(r["share"] for r in runs)
            wrong = sorted({title for r in runs for title in r["wrong"]})
            print(
                f"steps of {step_ms:g} ms, {fault}: told after {', '.join(delays)} steps; {100 * share:.2f}% of the time;"
                f" {statistics.fmean(r['reports'] for r in runs):.1f} reports; false alarms: {wrong or 'none'}",
                flush=True,
            )
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
