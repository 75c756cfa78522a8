#!/usr/bin/env python3
"""What the watch does on a GPU: same bits, no waiting, launches, time, truth. At most six minutes on one card.

    python bench/gpu.py [--seconds N] [--only SECTION ...] [--out FOLDER] [--device cpu --quick]

Runs from a plain checkout with the torch that is there (2.6 or later; the kernels need Triton) and without network.
Every section stands alone: one that fails or finds no time leaves the others' results. A table goes to stdout, all figures
to gpu.json in the folder (default: $OUT, else the current one). Exit status 1 if a bar is missed (see `bench/on_gpu/bars.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products

import torch

from bench.on_gpu import bars, children, gathers, kernels, launches, long_runs, sanctity, times
from bench.on_gpu.given import free, given, is_cuda

SECTIONS: dict[str, tuple[Callable[[], dict[str, Any]], float]] = {  # with the seconds it should have
    "environment": (times.environment, 2),
    "gather": (gathers.gather, 20),
    "kernels": (kernels.kernels, 30),
    "identity": (sanctity.identity, 20),
    "syncs": (sanctity.syncs, 10),
    "launches": (launches.launches, 25),
    "step_time": (times.step_time, 30),
    "training_time": (times.training_time, 45),
    "truth": (long_runs.truth, 10),
    "streams": (sanctity.streams, 5),
    "other_device": (sanctity.other_device, 3),
    "memory": (times.memory, 8),
    "soak": (long_runs.soak, 15),
    "graphs": (children.graphs, 30),
    "compiled": (children.compiled, 45),
}


def save(results: dict[str, Any], folder: Path) -> None:
    """All figures so far, so that a run that is cut short leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(results, indent=1, default=str))
    (folder / "gpu.txt").write_text(bars.table(results) + "\n")


def run(name: str, function: Callable[[], dict[str, Any]], needs: float) -> dict[str, Any]:
    """One section; what it raises is its result."""
    begun = time.monotonic()
    if given.left() < needs * (0.2 if given.quick else 1.0):
        result: dict[str, Any] = {"skipped": f"{given.left():.0f} s left"}
    else:
        try:
            result = function()
        except Exception:
            result = {"failed": traceback.format_exc().splitlines()[-6:]}
        with contextlib.suppress(Exception):
            if is_cuda():
                torch.cuda.set_sync_debug_mode("default")
            free()
    state = "failed" if "failed" in result else "skipped" if "skipped" in result else "done"
    at = time.monotonic() - given.started
    print(f"[{at:5.0f} s] {name}: {state} in {time.monotonic() - begun:.1f} s", flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="smaller and shorter, to try the script itself")
    parser.add_argument("--seconds", type=float, default=330.0, help="no section begins that has no time within these")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), help="these sections")
    parser.add_argument("--out", metavar="FOLDER", default=os.environ.get("OUT", "."), help="where figures are written")
    parser.add_argument("--child", choices=list(children.CHILDREN), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    given.device, given.quick, given.seconds = arguments.device, arguments.quick, arguments.seconds
    warnings.simplefilter("ignore")
    if is_cuda() and not torch.cuda.is_available():
        print("no CUDA device; try --device cpu --quick")
        return 2
    if arguments.child:
        children.say(children.CHILDREN[arguments.child]())
        return 0
    results: dict[str, Any] = {}
    for name, (function, needs) in SECTIONS.items():
        if not arguments.only or name in arguments.only:
            results[name] = run(name, function, needs)
            save(results, Path(arguments.out))
    print(bars.table(results), flush=True)
    return 1 if any(is_met is False for _, is_met, _ in bars.bars(results)) else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no thread of the watch shall hold the machine
