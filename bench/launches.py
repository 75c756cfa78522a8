"""Launches that a watch adds to a step on CUDA, counted without a GPU.

    python bench/launches.py [--window 32] [--tensors 68 300 3000] [--json FILE]

The step runs on the CPU, planned as on CUDA: all tensors are looked at in every step, by one launch for each gather. The gather
kernel itself is counted and not run (what it reads is replaced by random numbers). Of torch's operators each one that is no view
and makes no empty tensor counts as one launch, `cat` and `stack` as many as CUDA needs for so many tensors (128 of one format in one).
`bench/gpu.py` counts the same on a card, by torch's profiler. Needs Triton, which is not run.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import update_watch as uw
from update_watch.measure import transfer
from update_watch.measure.device import joint_reads, kernel_gathers, multi_gather
from update_watch.measure.ledger import kernel_sheet_sums
from update_watch.measure.sums import kernel_sums

BARS = {"ordinary": 4, "mean": 8}
_AT_ONCE = 128  # contiguous tensors that one launch of torch's `cat` reads
_NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "lift_fresh", "_local_scalar_dense")


class Launches(TorchDispatchMode):
    """Counts what would be launched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        result = func(*args, **(kwargs or {}))
        if not func.is_view and name not in _NOTHING:
            self.count += _of_cat(args[0], result) if name in ("cat", "stack") else 1
        return result


def _of_cat(inputs: Any, result: Tensor) -> int:
    """Where the formats differ each input is copied by a launch of its own."""
    is_one = all(tensor.dtype is result.dtype for tensor in inputs)
    return math.ceil(len(inputs) / _AT_ONCE) if is_one else len(inputs)


def measure(tensors: int, window: int) -> dict[str, float]:
    """Launches added: the median of ordinary steps and of those that add up, the window's end, the mean."""
    torch.manual_seed(0)
    params = [nn.Parameter((torch.randn(24, 24) * 0.02).bfloat16()) for _ in range(tensors)]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    optimizer = torch.optim.AdamW(params, lr=3e-4, weight_decay=0.1, fused=True)
    optimizer.step()
    named = [(f"layers.{i}.weight", p) for i, p in enumerate(params)]
    with uw.watch(named, optimizer, window=window, budget=None) as watch:
        watched = next(iter(watch._model.watched.values()))

        def step() -> tuple[str, int]:
            with Launches() as launches:
                optimizer.step()
            kind = "end" if watched.window_steps == 0 else "ordinary" if watched.is_waiting else "adding"
            return kind, launches.count

        for _ in range(window):
            step()
        watch.enabled = False
        alone = step()[1]
        watch.enabled = True
        steps = [step() for _ in range(window)]
        assert watch._tap.error is None and watched.rows and not any(row.reason for row in watched.rows)
    added = {kind: [n - alone for k, n in steps if k == kind] for kind in ("ordinary", "adding", "end")}
    found = {kind: float(statistics.median(counts)) if counts else math.nan for kind, counts in added.items()}
    return {**found, "mean": statistics.fmean(n - alone for _, n in steps)}


def as_on_cuda() -> None:
    """Plan on the CPU as on CUDA, count the kernel as one launch, and pack at the window's end."""
    cpu = torch.device("cpu")
    multi_gather._interpreted = True
    kernel_gathers._verified.add(cpu)

    def run(reads: Sequence[joint_reads.Read]) -> None:
        for start in range(0, len(reads), joint_reads.AT_ONCE):
            together = reads[start : start + joint_reads.AT_ONCE]
            together[0].out.normal_(std=0.02)  # as one launch
            with _disable_current_modes():
                for read in together[1:]:
                    read.out.normal_(std=0.02)

    def launch(name: str, grid: Any, given: Sequence[Any], compiled_for: Any) -> None:
        given[10].fill_(1.0)  # as one launch; gradients of which all samples are 0 would be looked at as a whole

    def launch_ledger(name: str, grid: Any, given: Sequence[Any], compiled_for: Any) -> None:
        given[0].zero_() if name == "end_window" else given[3].zero_()  # as one launch

    joint_reads.run = run
    kernel_sheet_sums._works[cpu] = True
    kernel_sheet_sums.launch = launch_ledger
    kernel_sums._works[cpu] = True
    kernel_sums.launch = launch
    transfer.Batch.is_later = lambda _, device: False  # type: ignore[method-assign, assignment]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--tensors", type=int, nargs="+", default=[68, 300, 3000], metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    given = parser.parse_args()
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    as_on_cuda()
    found = {tensors: measure(tensors, given.window) for tensors in given.tensors}
    print("launches added   ordinary  adding  window's end   mean")
    for tensors, r in found.items():
        print(f"{tensors:5,} tensors {r['ordinary']:12.0f} {r['adding']:7.0f} {r['end']:13.0f} {r['mean']:6.1f}")
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1))
    missed = [f"{tensors}: {name}" for tensors, r in found.items() for name, bar in BARS.items() if r[name] > bar]
    if missed:
        print("missed:", ", ".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
