"""What may bring a process down runs in one of its own: captured and compiled steps."""

from __future__ import annotations

import collections
import contextlib
import gc
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.on_gpu.given import error_of, first_watched, given, is_cuda, quiet_watch, sync
from bench.on_gpu.models import Bare

SCRIPT = Path(__file__).parents[1] / "gpu.py"


def say(found: dict[str, Any]) -> None:
    """The result so far, for the parent: the last one counts."""
    print("CHILD " + json.dumps(found, default=str), flush=True)


def child_graph() -> dict[str, Any]:
    """The optimizer's step captured in a CUDA graph, as torch's documentation shows it, with a watch attached."""
    uw = quiet_watch()
    found: dict[str, Any] = {}

    def run(watched: bool, dtype: torch.dtype) -> list[Tensor]:
        bare = Bare([(64, 512)] * 12, dtype, foreach=True, capturable=True)
        watch = uw.watch(bare.named, bare.optimizer) if watched else None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                bare.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            bare.step()
        for _ in range(20):
            with watch.replayed() if watch is not None else contextlib.nullcontext():
                graph.replay()
        torch.cuda.synchronize()
        ends = [p.detach().float().cpu().clone() for p in bare.params]
        if watch is not None:
            kind = str(dtype).removeprefix("torch.")
            found[kind] = {"watch_error": error_of(watch), "captured": watch._tap.captured}
            watched_one = first_watched(watch)
            found[kind]["steps_seen"] = watched_one.window_steps if watched_one is not None else None
            with contextlib.suppress(Exception):
                report = watch.flush(10.0)
                found[kind]["headline"] = None if report is None else str(report.headline)[:200]
                found[kind]["healths"] = dict(
                    collections.Counter(str(getattr(t.health, "value", t.health)) for t in report.tensors)
                )
            watch.close(5.0)
            del watch, watched_one
            gc.collect()
            # what replays still write to where the watch was, they write into these
            sentinels = [
                torch.ones(n, device=given.device)
                for n in [128] * 200 + [512] * 200 + [3072] * 200 + [12288] * 50 + [36864] * 20 + [98304] * 8
            ]
            torch.cuda.synchronize()
            for _ in range(5):
                graph.replay()
            torch.cuda.synchronize()
            found[kind]["foreign_tensors_overwritten"] = sum(int((s != 1).any()) for s in sentinels)
        return ends

    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        plain = run(False, dtype)
        seen = run(True, dtype)
        found[kind]["identical"] = all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    return found


def child_compile() -> dict[str, Any]:
    """A compiled optimizer step; resumed, too (states made by an eager step: counters move to the device)."""
    uw = quiet_watch()
    found: dict[str, Any] = {}
    for label, mode, is_resumed in (
        ("default", None, False),
        ("resumed", None, True),
        ("reduce-overhead", "reduce-overhead", False),
    ):
        ends = []
        for watched in (False, True):
            torch._dynamo.reset()
            bare = Bare([(64, 512)] * 12, torch.bfloat16, foreach=True)
            if is_resumed:
                bare.step()
            watch = uw.watch(bare.named, bare.optimizer, window=16, budget=None) if watched else None
            step = torch.compile(bare.optimizer.step, **({"mode": mode} if mode else {}))
            for _ in range(6):
                step()
            waits = 0
            for _ in range(20):
                if is_cuda():
                    torch.cuda.set_sync_debug_mode("warn")
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    step()
                if is_cuda():
                    torch.cuda.set_sync_debug_mode("default")
                waits += sum("synchroniz" in str(w.message) for w in caught)
            sync()
            ends.append([p.detach().float().cpu().clone() for p in bare.params])
            if watch is not None:
                one = first_watched(watch)
                result = {
                    "watch_error": error_of(watch),
                    "missed": watch._tap.missed,
                    "steps_seen": getattr(one, "steps", None),
                }
                report = watch.flush(10.0)
                result["known"] = None if report is None else sum(t.efficiency is not None for t in report.tensors)
                result["waits_in_20_steps"] = waits
                found[label] = result
                watch.close(5.0)
            else:
                found.setdefault("alone", {})[label] = {"waits_in_20_steps": waits}
        found[label]["identical"] = all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
        say(found)
    return found


def in_child(name: str, seconds: float) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), "--device", given.device, "--child", name] + (
        ["--quick"] if given.quick else []
    )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=min(seconds, max(given.left() - 5, 5)))
        out, err, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        out, err, code = _text(error.stdout), _text(error.stderr), 124
    last = next((line for line in reversed(out.splitlines()) if line.startswith("CHILD ")), None)
    found = {} if last is None else json.loads(last[6:])
    if code != 0:
        found["exit"] = code
        found["stderr"] = [line for line in err.splitlines() if line.strip()][-4:]
    return found


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def graphs() -> dict[str, Any]:
    return in_child("graph", 60) if is_cuda() else {"skipped": "CUDA only"}


def compiled() -> dict[str, Any]:
    return in_child("compile", 100) if is_cuda() else {"skipped": "CUDA only"}


CHILDREN = {"graph": child_graph, "compile": child_compile}
