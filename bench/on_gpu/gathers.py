"""One gather of a step: by one launch (Triton), and by strided views and `torch.stack`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.on_gpu.given import given, is_cuda, median, sync
from bench.on_gpu.profiles import activities
from update_watch.measure.device import multi_gather
from update_watch.measure.positions import Positions, plan

K = 256
SHARES = [(5, 4_000_000_000), (1_234_567_890, 2_345_678_901), (2**31 - 1, 2**31)]


def by_views(tensors: list[Tensor], at: list[Positions], shares: tuple[int, int]) -> Tensor:
    """As `update_watch.measure.sampling` does it: one view per tensor, one stack per format."""
    views = []
    for i, tensor in enumerate(tensors):
        p = at[i % len(at)]
        low, high = p.block * p.offset(shares[0]), p.block * p.offset(shares[1])
        strides = (high - low, p.step * p.block, 1)
        views.append(tensor.as_strided((2, p.blocks, p.block), strides, tensor.storage_offset() + low))
    return torch.stack(views).view(len(tensors), K).float()


def gather() -> dict[str, Any]:
    """Equal to the bit, launches, host and device time."""
    if not is_cuda() and not os.environ.get("TRITON_INTERPRET"):
        return {"skipped": "CUDA only (or TRITON_INTERPRET=1)"}
    device = torch.device(given.device)
    multi_gather._interpreted = not is_cuda()
    if not multi_gather.is_available(device):
        return {"skipped": "no Triton here"}
    return {f"{rows} tensors": _gather(rows, device) for rows in ((9,) if given.quick else (9, 68, 148, 512))}


def _gather(rows: int, device: torch.device) -> dict[str, Any]:
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    found: dict[str, Any] = {"same": True}
    for dtype in dtypes:
        params = [torch.randn(256, 128 + i % 3 * 8, device=device).to(dtype) for i in range(rows)]
        slots = [params] + [[torch.randn_like(p) for p in params] for _ in range(3)]
        tensors = [t for slot in slots for t in slot]
        at = [plan(p.numel(), p.shape[1], K // 2) for p in params]
        strides = [p.stride() for p in params]
        started = time.perf_counter()
        one = multi_gather.MultiGather([p.numel() for p in params], at, strides, K, device, lambda _, tensor: tensor)
        same = all(multi_gather.equals(one(tensors, s), by_views(tensors, at, s)) for s in SHARES)
        found["same"] = found["same"] and same
        found.setdefault("first_calls_ms", round(1e3 * (time.perf_counter() - started), 1))
    others = tensors[: 3 * rows] + [torch.randn_like(p) for p in params]  # gradients somewhere else
    ways: dict[str, tuple[int, Callable[[], Any]]] = {
        "views and stack": (1, lambda: by_views(tensors, at, SHARES[0])),
        "one launch": (1, lambda: one(tensors, SHARES[0])),
        "one launch, new addresses": (2, lambda: (one(tensors, SHARES[0]), one(others, SHARES[1]))),
    }
    for name, (calls, way) in ways.items():
        times = []
        for _ in range(6 if given.quick else 60):
            sync()
            begun = time.perf_counter()
            way()
            times.append(1e6 * (time.perf_counter() - begun) / calls)
        _, count, ms = activities(way) if is_cuda() else ({}, 0, 0.0)
        found[name] = {
            "host_us": round(median(times), 1),
            "launches": count / calls,
            "device_us": round(1e3 * ms / calls, 1),
        }
    return found
