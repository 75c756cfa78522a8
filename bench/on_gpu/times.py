"""Time per step, with and without the watch, and memory."""

from __future__ import annotations

import contextlib
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.on_gpu.given import (
    error_of,
    first_watched,
    fold,
    free,
    given,
    is_cuda,
    kind_of_step,
    median,
    quiet_watch,
    sync,
)
from bench.on_gpu.models import CONFIGS, GPT, Bare, Shapes


def environment() -> dict[str, Any]:
    import update_watch as uw

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "update_watch": str(Path(uw.__file__).resolve().parent),
        "device": given.device,
        "threads": torch.get_num_threads(),
    }
    with contextlib.suppress(Exception):
        import triton

        found["triton"] = triton.__version__
    if is_cuda():
        p = torch.cuda.get_device_properties(0)
        found |= {"gpu": p.name, "gpus": torch.cuda.device_count(), "memory_gib": round(p.total_memory / 2**30, 1)}
    a, b = torch.zeros(9, 256, device=given.device), torch.ones(9, 256, device=given.device)
    for _ in range(200):
        a.add_(b)
    sync()
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(400):
            a.add_(b)
        best = min(best, (time.perf_counter() - started) / 400)
        sync()
    found["host_us_per_small_operator"] = round(1e6 * best, 2)
    views = [torch.zeros(512, 512, device=given.device).as_strided((16, 16), (8000, 1), 5) for _ in range(64)]
    torch.stack(views)
    sync()
    started = time.perf_counter()
    for _ in range(100):
        torch.stack(views)
    found["host_us_stack_of_64_views"] = round(1e4 * (time.perf_counter() - started), 1)
    sync()
    return found


def step_time() -> dict[str, Any]:
    """Optimizer steps in turns, with and without the watch: host time, and device time behind a queue that hides launches."""
    found: dict[str, Any] = {}
    window = 16 if given.quick else 128
    for label, shapes in CONFIGS.items():
        if given.left() < 30:
            found[label] = {"skipped": "no time"}
            continue
        found[label] = _step_time(shapes(), window)
        free()
    return found


def _step_time(shapes: Shapes, window: int) -> dict[str, Any]:
    """Of one model."""
    uw = quiet_watch()
    alone, seen = Bare(shapes), Bare(shapes)
    for _ in range(3):
        alone.step()
        seen.step()
    sync()
    started = time.perf_counter()
    watch = uw.watch(seen.named, seen.optimizer, window=window, budget=None)
    attach_ms = 1e3 * (time.perf_counter() - started)
    watched = first_watched(watch)
    started = time.perf_counter()
    for _ in range(window):
        seen.step()
    sync()
    per_step = (time.perf_counter() - started) / window
    cycles = int(min(max(3 * per_step, 2e-3), 60e-3) * 1.7e9)
    steps = window if per_step > 8e-3 else 2 * window

    def timed(bare: Bare) -> tuple[float, float]:
        sync()
        if not is_cuda():
            t = time.perf_counter()
            bare.step()
            t = 1e3 * (time.perf_counter() - t)
            return t, t
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(cycles)
        first.record()
        t = time.perf_counter()
        bare.step()
        host = 1e3 * (time.perf_counter() - t)
        last.record()
        torch.cuda.synchronize()
        return host, first.elapsed_time(last)

    kinds: dict[str, list[tuple[float, float]]] = {"ordinary": [], "adding": [], "close": []}
    plain: list[tuple[float, float]] = []
    for i in range(steps):
        turns = (alone, seen) if i % 2 else (seen, alone)
        times = {id(one): timed(one) for one in turns}
        kind = kind_of_step(watched)
        a, s = times[id(alone)], times[id(seen)]
        plain.append(a)
        kinds[kind].append((s[0] - a[0], s[1] - a[1]))
        if given.left() < 15:
            break
    every = [pair for pairs in kinds.values() for pair in pairs]
    base = tuple(median([p[k] for p in plain]) for k in (0, 1))
    return {
        "tensors": len(seen.params),
        "parameters": sum(p.numel() for p in seen.params),
        "attach_ms": attach_ms,
        "alone_host_ms": base[0],
        "alone_device_ms": base[1],
        **{
            f"{kind}_{where}_ms": median([pair[k] for pair in pairs])
            for kind, pairs in kinds.items()
            for k, where in enumerate(("host", "device"))
        },
        "mean_host_ms": fold([p[0] for p in every], 0.02 if given.quick else 0.0),
        "mean_device_ms": fold([p[1] for p in every], 0.0),
        "closes_host_ms": [round(p[0], 2) for p in kinds["close"]],
        "error": error_of(watch),
    }
    watch.close(10.0)


def training_time() -> dict[str, Any]:
    """Whole training steps of a GPT with 124M parameters, blocks of steps in turns: every step looked at, and by budget."""
    per_block, blocks = (4, 4) if given.quick else (8, 16)
    models = [_gpt() for _ in range(2)]
    high = models[0][0].tokens.num_embeddings
    shape = (2, 64) if given.quick else (8, 1024)
    batches = [torch.randint(0, high, shape, device=given.device) for _ in range(per_block)]
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in models[0][0].parameters()),
        "tensors": len(list(models[0][0].parameters())),
        "steps_per_block": per_block,
    }
    for label, budget in (("every step", None), ("budget", 0.01)):
        if given.left() > 20:
            found[label] = _training_time(models, batches, budget, blocks if budget is None else 2 * blocks)
    return found


def _gpt() -> tuple[GPT, torch.optim.Optimizer]:
    sizes = {"width": 64, "layers": 2, "heads": 2, "vocabulary": 128, "length": 64} if given.quick else {}
    torch.manual_seed(0)
    model = GPT(**sizes).to(given.device, torch.bfloat16)
    return model, torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)


def _training_time(
    models: list[tuple[GPT, torch.optim.Optimizer]], batches: list[torch.Tensor], budget: float | None, blocks: int
) -> dict[str, Any]:
    """`models`: one to train alone, one to train with a watch."""
    uw = quiet_watch()

    def block(which: int) -> float:
        model, optimizer = models[which]
        sync()
        t = time.perf_counter()
        for ids in batches:
            optimizer.zero_grad(set_to_none=True)
            model(ids).backward()
            optimizer.step()
        sync()
        return 1e3 * (time.perf_counter() - t) / len(batches)

    window = 32 if budget is not None else 128
    with uw.watch(*models[1], window=window, budget=budget) as watch:
        block(0)
        for _ in range(2 if given.quick else 4):
            block(1)
        # the first windows are looked at in full, until every tensor has a verdict
        for _ in range(8):
            if budget is None or not watch._attention.is_full:
                break
            block(1)
        alone, pairs = [], []
        for i in range(blocks):
            order = (0, 1) if i % 2 else (1, 0)
            t = {which: block(which) for which in order}
            alone.append(t[0])
            pairs.append(t[1] - t[0])
            if given.left() < 15:
                break
        is_full, error = watch._attention.is_full, error_of(watch)
        report = watch.flush(10.0)
    base, added = median(alone), fold(pairs, 0.05 if budget is None else 0.0)
    # the account is paid by all time that passes, that of the other training between its steps as well
    passes = base if budget is None else 2 * base + added
    return {
        "step_ms": base,
        "added_ms_median": median(pairs),
        "added_ms_mean": added,
        "added_share_mean": added / passes,
        "spread_alone_ms": statistics.pstdev(alone) if len(alone) > 1 else 0.0,
        "blocks": len(pairs),
        "looks_at_every_step": is_full,
        "own_share": None if report is None else report.cost_share,
        "own_ms": None if report is None else report.cost_ms,
        "observed_steps": None if report is None else report.observed_steps,
        "window": None if report is None else report.window,
        "error": error,
        "headline": None if report is None else str(report.headline)[:160],
    }


def memory() -> dict[str, Any]:
    """Bytes on the device that a watch holds, and most above that within a step."""
    if not is_cuda():
        return {"skipped": "CUDA only"}
    found = {}
    for label, shapes in CONFIGS.items():
        found[label] = _memory(shapes())
        free()
    return found


def _memory(shapes: Shapes) -> dict[str, Any]:
    """Of one model."""
    uw = quiet_watch()
    bare = Bare(shapes)
    for _ in range(2):
        bare.step()

    def peak() -> int:
        sync()
        torch.cuda.reset_peak_memory_stats()
        level = torch.cuda.memory_allocated()
        bare.step()
        sync()
        return torch.cuda.max_memory_allocated() - level

    alone = max(peak() for _ in range(3))
    level = torch.cuda.memory_allocated()
    with uw.watch(bare.named, bare.optimizer, window=64, budget=None) as watch:
        for _ in range(67):
            bare.step()
        held = torch.cuda.memory_allocated() - level
        most = max(peak() for _ in range(64))
        error = error_of(watch)
    model = sum(p.numel() * p.element_size() for p in bare.params)
    return {
        "held_mb": held / 1e6,
        "peak_in_step_mb": (most - alone) / 1e6,
        "held_share_of_weights": held / model,
        "error": error,
    }
