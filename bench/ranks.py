"""Ranks that join: truth under every way to share a model, and what happens when one of them fails.

    python bench/ranks.py [--runs 50] [--skip-truth]

Truth: the sampled numbers of the joined report against a full FP64 comparison of all elements on all ranks, two and four
gloo processes on this machine. Faults: runs in which a rank raises inside update-watch, at places that change; a run hangs
if it takes more than 10 s. Exit status 1 if a number is off by more than 0.03, or a run hangs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.ranks.cases import launch

BAR = 0.03
TWO = ["ddp", "fsdp2_even", "fsdp2_uneven", "fsdp2_empty", "fsdp1", "tensor_parallel", "zero1", "pipeline"]
FOUR = ["ddp", "fsdp2_even", "fsdp2_uneven", "fsdp2_empty", "tensor_parallel", "hybrid", "two_dimensional", "zero1"]


def truth(size: int, names: list[str]) -> float:
    """The largest difference over all cases, tensors and ranks."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        found = launch(size, names, Path(folder))
    for name in names:
        first = found[0][name]
        same = all(rank[name]["report"] == first["report"] for rank in found)
        off = max(_differences(first))
        sums, exchanges = first["collectives"]
        print(f"{size} ranks  {name:16} {off:10.4f}  {sums} sums, {exchanges} exchange  same on all ranks: {same}")
        worst = max(worst, off if same else 1.0)
    return worst


def _differences(found: dict[str, Any]) -> list[float]:
    differences = [0.0]
    for tensor in found["report"]["tensors"]:
        efficiency, lost = found["truth"][tensor["name"]]
        differences += [abs(tensor["efficiency"] - efficiency), abs(tensor["lost_fraction"] - lost)]
    return differences


def faults(runs: int) -> int:
    """How many of the runs hung."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = launch(2, [f"many_faults:{runs}"], Path(folder), limit=60 + 10 * runs)
    found = [run for rank in ranks for run in rank[f"many_faults:{runs}"]]
    hung = sum(run["seconds"] > 10 or run["steps"] != 24 for run in found)
    slowest = max(run["seconds"] for run in found)
    print(f"{runs} runs with a rank that raises inside our code: {hung} hung, the slowest took {slowest:.1f} s")
    return hung


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--skip-truth", action="store_true")
    arguments = parser.parse_args()
    worst = 0.0
    if not arguments.skip_truth:
        worst = max(truth(2, TWO), truth(4, FOUR))
        print(f"worst {worst:.4f}, bar {BAR}")
    hung = faults(arguments.runs) if arguments.runs else 0
    return int(worst > BAR or hung > 0)


if __name__ == "__main__":
    sys.exit(main())
