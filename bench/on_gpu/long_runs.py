"""Numbers against the full comparison, and thousands of steps."""

from __future__ import annotations

import time
from typing import Any

import torch

from bench.on_gpu.given import error_of, given, is_cuda, median, quiet_watch, resident_bytes, sync
from bench.on_gpu.models import Bare, backward, net


def truth() -> dict[str, Any]:
    """Efficiency and lost fraction against all elements of all steps in FP64; AdamW by its formula."""
    uw = quiet_watch()
    found = {}
    for label, blocks, lr in (
        ("16 tensors", 4, 3e-4),
        ("32 tensors in turns", 8, 3e-4),
        ("16 tensors, lr 1e-5", 4, 1e-5),
    ):
        model = net(torch.bfloat16, 256, blocks)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
        names = [n for n, _ in model.named_parameters()]
        params = [p for _, p in model.named_parameters()]
        for _ in range(10):
            backward(model, 256)
            optimizer.step()
        sums = {n: torch.zeros(4, device=given.device, dtype=torch.float64) for n in names}  # dot, want, wanted, lost
        steps = 32 if given.quick else 128
        with uw.watch(model, optimizer, window=10_000, budget=None) as watch:
            for _ in range(steps):
                backward(model, 256)
                group = optimizer.param_groups[0]
                b1, b2 = group["betas"]
                before, intended = [], []
                for p in params:
                    state = optimizer.state[p]
                    w, g = p.detach().double(), p.grad.double()
                    t = float(state["step"]) + 1
                    m = state["exp_avg"].double() * b1 + (1 - b1) * g
                    v = state["exp_avg_sq"].double() * b2 + (1 - b2) * g * g
                    move = lr / (1 - b1**t) * m / ((v / (1 - b2**t)).sqrt() + group["eps"])
                    before.append(w)
                    intended.append(-lr * group["weight_decay"] * w - move)
                optimizer.step()
                for n, p, w, d in zip(names, params, before, intended, strict=True):
                    a = p.detach().double() - w
                    wanted = d != 0
                    sums[n] += torch.stack([(a * d).sum(), (d * d).sum(), wanted.sum(), (wanted & (a == 0)).sum()])
            report = watch.flush(20.0)
            error = error_of(watch)
        if report is None:
            found[label] = {"error": error or "no report"}
            continue
        gaps, lost_gaps, unknown = [], [], 0
        for t in report.tensors:
            dot, want, wanted, lost = sums[t.name].tolist()
            if t.efficiency is None:
                unknown += 1
                continue
            gaps.append((abs(t.efficiency - dot / want), t.name))
            if t.lost_fraction is not None and wanted:
                lost_gaps.append(abs(t.lost_fraction - lost / wanted))
        found[label] = {
            "largest": max(gaps, default=(None, ""))[0],
            "where": max(gaps, default=(None, ""))[1],
            "median": median([g for g, _ in gaps]) if gaps else None,
            "largest_lost": max(lost_gaps, default=None),
            "unknown": unknown,
            "error": error,
        }
    return found


def soak() -> dict[str, Any]:
    """Thousands of steps: does it stop, does a step become slower, does memory grow?"""
    uw = quiet_watch()
    bare = Bare([(32, 32)] * 20)
    steps = 600 if given.quick else 5000
    with uw.watch(bare.named, bare.optimizer, budget=None) as watch:
        times, failed = [], 0
        for _ in range(256):
            bare.step()
        sync()
        held = torch.cuda.memory_allocated() if is_cuda() else 0
        host = resident_bytes()
        for i in range(256, steps):
            t = time.perf_counter()
            bare.step()
            times.append(1e3 * (time.perf_counter() - t))
            if watch._tap.error is not None:
                failed = i + 1
                break
            if i % 256 == 0:
                sync()
                if given.left() < 10:
                    break
        error = error_of(watch)
    q = max(len(times) // 8, 1)
    return {
        "steps": 256 + len(times),
        "failed_at": failed,
        "error": error,
        "first_ms": median(times[:q]),
        "last_ms": median(times[-q:]),
        "device_bytes_grown": (torch.cuda.memory_allocated() - held) if is_cuda() else None,
        "host_mb_grown": round((resident_bytes() - host) / 2**20, 1),
    }
