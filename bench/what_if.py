"""What each cure would give, foretold from one window, held against the same window really trained that way.

    python bench/what_if.py [--only WORDS ...] [--before 128] [--window 64] [--seed N]

Small language models in BF16: AdamW (moments in BF16 and in FP32), SGD with momentum, Lion, at the learning rate at which tensors lie
on the edge, and at a third and three times of it. After `--before` steps a window is watched, and `report.what_if()` asked; then
the same window is trained anew from the same weights, states and data in another way: weights in FP32, in FP16, only norms and biases
in FP32, four times the learning rate (at once), states in FP32, and where moments in BF16 can only grow (beta2 of 0.999) a beta2 of 0.996. A
floor is asked of a run whose rate fell to a quarter, and held against one that kept its rate from its begin. The truth is the efficiency of all elements in FP64. (What keeps
the rest of an update, or rounds at random, is said to lose nothing: bench/bf16/remainders.py measures that.) One line for each way:

    tensors       how many were compared, over all runs
    mean, 95%, most   of the difference of efficiencies, above 1 taken as 1
    within        tensors whose difference is at most 0.05
    sure, right   of those that are said without doubt, the ones within 0.05
    doubt, range  of those in doubt (`case.in_doubt`: their range is wider than 0.05 to a side), the ones that lie within their range
    range         tensors whose truth lies within the range that was said; where none is said, within 0.05

A rate that is raised or kept changes what gradients and weights do: that is in the truth. What a what-if knows of it was made with seeds
0 and 1 in view, which are other weights and data, and a rate of 1 and 0.3; seeds 2 and 3 (3 and 0.1 times the rate) are held out.

Exit status 1 if the mean difference of a way is above 0.05, fewer than 95% of what is sure are within 0.05, or fewer than nine of ten lie
within their ranges.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

import update_watch as uw
from bench.shared.full_comparison import FullComparison
from bench.shared.regimes import FullMoments, Training, text_training
from update_watch.foresight.forecasts import Case
from update_watch.report import Report

NEAR, FLOOR, ENOUGH, SURE = 0.05, 4.0, 0.9, 0.95
OFTEN_KEPT = "adamw, beta2 of 0.999"  # its second moments can only grow in BF16
KINDS = ("adamw", "adamw, FP32 moments", "momentum", "lion", OFTEN_KEPT)
BETA2 = 1 - 2**-8
RATES = (1 / 3, 1.0, 3.0)
Recordings = dict[str, tuple[Report, dict[str, float]]]
WAYS = ("masters", "float16", "fp32_norms", "floor", "at once", "fp32_states", "beta2")


@dataclasses.dataclass
class Start:
    """A training at the begin of the window, kept to begin from again."""

    weights: list[Tensor]
    states: list[list[dict[str, Any]]]  # by optimizer and parameter


def _make(kind: str, base: float, seed: int, rate: Callable[[int], float] = lambda t: 1.0) -> Training:
    """A training of which `rate(t)` scales the learning rate."""
    plain = text_training("adamw" if kind == OFTEN_KEPT else kind, blocks=2, base=base, rate=lambda t, steps: rate(t))
    torch.manual_seed(seed)
    training = plain(seed, 0)
    if kind == OFTEN_KEPT:
        _set_beta2(training, 0.999)
    return training


def floors(kind: str, rate: float, before: int, window: int, seed: int) -> tuple[Report, dict[str, float]]:
    """The window of a run whose rate fell to a quarter before it, and its truth where the rate was kept."""

    def falls(t: int) -> float:
        return 1.0 if t >= before else min(FLOOR, FLOOR - (FLOOR - 1) * (2 * t / before - 1))

    runs = []
    for shape in (falls, lambda t: FLOOR):
        training = _make(kind, rate, seed, shape)
        for t in range(before):
            training.gradients(t)
            training.step()
        runs.append(training)
    return _watched(runs[0], before, window), _exact(runs[1], before, window)


def begun(kind: str, rate: float, before: int, seed: int) -> tuple[Callable[[], Training], Start]:
    training = _make(kind, rate, seed)
    for t in range(before):
        training.gradients(t)
        training.step()
    start = Start(
        [p.detach().clone() for p in training.model.parameters()],
        [
            [_cloned(optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]
            for optimizer in training.optimizers
        ],
    )

    def again() -> Training:
        training = _make(kind, rate, seed)
        with torch.no_grad():
            for p, kept in zip(training.model.parameters(), start.weights, strict=True):
                p.copy_(kept)
        for optimizer, states in zip(training.optimizers, start.states, strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for p, state in zip(params, states, strict=True):
                optimizer.state[p] = _cloned(state)
        torch.manual_seed(1)
        return training

    return again, start


def _set_beta2(training: Training, beta2: float) -> None:
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["betas"] = group["betas"][0], beta2


def _cloned(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def _watched(training: Training, begin: int, window: int) -> Report:
    reports: list[Report] = []
    with uw.watch(training.model, training.optimizers, window=window, sinks=[reports.append], budget=None) as watch:
        for t in range(begin, begin + window):
            training.gradients(t)
            training.step()
        watch.flush()
    return reports[0]


def _exact(training: Training, begin: int, window: int) -> dict[str, float]:
    named = list(training.model.named_parameters())
    comparison = FullComparison(named, training.optimizers, training.rules)
    for t in range(begin, begin + window):
        training.gradients(t)
        with comparison.step():
            training.step()
    return {name: exact.efficiency for name, exact in comparison.close_window().items() if exact.efficiency is not None}


def really(again: Callable[[], Training], way: str, window: int) -> dict[str, float]:
    """Efficiency of each tensor over the window, trained that way."""
    training = again()
    _change(training, way)
    return _exact(training, 0, window)


def _change(training: Training, way: str) -> None:
    if way == "beta2":
        _set_beta2(training, BETA2)
        return
    if way == "fp32_states" and training.rules == ["adamw"]:  # torch's own wants states and gradients in one format
        (old,) = training.optimizers
        (group,) = old.param_groups
        new = FullMoments(group["params"], group["lr"], group["betas"])
        new.param_groups[0] |= {name: group[name] for name in ("initial_lr",) if name in group}
        new.state = old.state
        training.optimizers = [new]
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            if way == "at once":  # what the schedule scales
                group["lr"] *= FLOOR
                group["initial_lr"] = group["lr"]
            for p in group["params"]:
                if way in ("masters", "float16") or (way == "fp32_norms" and p.dim() == 1):
                    p.data = p.data.to(torch.float16 if way == "float16" else torch.float32)
                if way != "at once":
                    keep = torch.float32 if way == "fp32_states" else p.dtype
                    _cast(optimizer.state[p], keep)


def _cast(state: dict[str, Any], dtype: torch.dtype) -> None:
    """States that are stored as low as the weight go with it; those in FP32 stay."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.dtype is not torch.float32:
            state[name] = value.to(dtype)


def _cases(report: Report) -> dict[str, Case]:
    lr = next(t.lr for t in report.tensors if t.lr)
    return {case.name: case for case in report.what_if(floor=FLOOR * lr)}


def _recorded(kind: str, rate: float, given: argparse.Namespace) -> Recordings:
    name = f"{kind}-{rate:.2f}-{given.before}-{given.window}-{given.seed}.json".replace(",", "").replace(" ", "-")
    path = given.keep and given.keep / name
    if path and path.exists():
        kept = json.loads(path.read_text())
        return {way: (Report.from_dict(report), truth) for way, (report, truth) in kept.items()}
    found = record(kind, rate, given.before, given.window, given.seed)
    if path:
        given.keep.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({way: (report.to_dict(), truth) for way, (report, truth) in found.items()}))
    return found


def record(kind: str, rate: float, before: int, window: int, seed: int) -> Recordings:
    """What was seen of this training, and what then happened, by way."""
    again, _ = begun(kind, rate, before, seed)
    report = _watched(again(), 0, window)
    possible = {"at once", *_cases(report)}
    found = {}
    for way in WAYS:
        if way == "floor":
            found[way] = floors(kind, rate, before, window, seed)
        # Adam's second moment is 0 in FP16
        elif way in possible and not (way == "float16" and kind in ("adamw", OFTEN_KEPT)):
            found[way] = report, really(again, way, window)
    return found


@dataclasses.dataclass(frozen=True)
class Held:
    """One tensor: what was said, held against what then happened; efficiencies above 1 taken as 1."""

    off: float
    is_sure: bool
    is_between: bool

    @property
    def is_near(self) -> bool:
        return self.off <= NEAR


def hold(case: Case, truth: dict[str, float]) -> list[Held]:
    found, in_doubt = [], set(case.in_doubt)
    for name, said in case.tensors.items():
        if name in truth:
            now = min(truth[name], 1.0)
            off = abs(min(said, 1.0) - now)
            low, high = case.ranges.get(name, (said - NEAR, said + NEAR))
            found.append(Held(off, name not in in_doubt, low <= now <= high))
    return found


def show(way: str, held: list[Held]) -> bool:
    """Print the line of a way; whether it is as it must be."""
    offs, sure = sorted(h.off for h in held), [h for h in held if h.is_sure]
    near, between, in_doubt = sum(h.is_near for h in held), sum(h.is_between for h in held), len(held) - len(sure)
    right, ranged = sum(h.is_near for h in sure), sum(h.is_between for h in held if not h.is_sure)
    mean = statistics.fmean(offs)
    print(
        f"{way:14} {len(held):7} {mean:6.3f} {offs[int(0.95 * (len(offs) - 1))]:6.3f} {offs[-1]:6.3f} {near:7}"
        f" {right:5} of {len(sure):<5} {ranged:5} of {in_doubt:<5} {between:6}"
    )
    return mean <= NEAR and right >= SURE * len(sure) and between >= ENOUGH * len(held)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORDS", help="ways whose name contains one of these")
    parser.add_argument("--before", type=int, default=128)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and rate; see above")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what was trained here, and take it from here")
    given = parser.parse_args()
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    held: dict[str, list[Held]] = {way: [] for way in WAYS if not given.only or any(w in way for w in given.only)}
    if not held:
        parser.error(f"--only {' '.join(given.only)}: no way has this in its name")
    for kind in KINDS:
        for rate in RATES:
            for way, (report, truth) in _recorded(kind, rate, given).items():
                if way in held:
                    held[way] += hold(_cases(report)["floor" if way == "at once" else way], truth)
    print(
        f"{'way':14} {'tensors':>7} {'mean':>6} {'95%':>6} {'most':>6} {'within':>7} {'sure, right':>14} {'doubt, range':>14} {'range':>6}"
    )
    return int(not all([show(way, of_way) for way, of_way in held.items() if of_way]))


if __name__ == "__main__":
    sys.exit(main())
