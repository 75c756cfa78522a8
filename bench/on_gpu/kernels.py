"""Whether the watch's kernels are used on this card, what compiling them takes, and whether reports are those of torch's operators."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bench.on_gpu.given import error_of, given, is_cuda, quiet_watch
from update_watch.measure.device import joint_reads, multi_gather
from update_watch.measure.ledger import kernel_sheet_sums
from update_watch.measure.sums import kernel_sums

_NUMBERS = ("efficiency", "lost_fraction", "update_ratio", "displacement_efficiency", "net_efficiency")


def kernels() -> dict[str, Any]:
    """The same training twice, by the kernels and by torch's operators."""
    device = torch.device(given.device, torch.cuda.current_device()) if is_cuda() else torch.device(given.device)
    if not multi_gather.is_available(device):
        return {"skipped": "no Triton here, or no card that it compiles for"}
    begun = time.perf_counter()
    by_kernels, attach = _reports()
    in_use = {
        "gather": device not in multi_gather._failed,
        "joined gathers": not joint_reads._failed,
        "sums": kernel_sums._works.get(device, False),
        "ledger": kernel_sheet_sums._works.get(device, False),
    }
    seconds = time.perf_counter() - begun
    with _by_torch(device):
        by_torch, _ = _reports()
    differences = [
        abs((a or 0.0) - (b or 0.0)) if (a is None) == (b is None) else float("inf")
        for one, other in zip(by_kernels, by_torch, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return {
        "in_use": in_use,
        "numbers": len(differences),
        "largest_difference": max(differences),
        "attach_seconds": round(attach, 2),
        "seconds": round(seconds, 2),
    }


def _reports() -> tuple[list[list[float | None]], float]:
    uw = quiet_watch()
    torch.manual_seed(0)
    kinds = (torch.bfloat16, torch.float32, torch.float16)
    params = [nn.Parameter((torch.randn(96, 40 + i) * 0.1).to(given.device, kinds[i % 3])) for i in range(9)]
    params += [nn.Parameter(torch.ones(7, device=given.device, dtype=torch.bfloat16))]
    optimizer = torch.optim.AdamW(params, lr=1e-3, eps=1e-4, fused=True)
    found: list[Any] = []
    begun = time.perf_counter()
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    with uw.watch(named, optimizer, window=16, budget=None, seed=0, sinks=[found.append]) as watch:
        attach = time.perf_counter() - begun
        generator = torch.Generator().manual_seed(1)
        for step in range(32):
            for i, p in enumerate(params):
                grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
                p.grad = None if i == 3 and step % 3 else grad
            optimizer.step()
        watch.flush()
        error = error_of(watch)
    if error:
        raise RuntimeError(error)
    return [[getattr(t, name) for name in _NUMBERS] for report in found for t in report.tensors], attach


@contextmanager
def _by_torch(device: torch.device) -> Iterator[None]:
    """The same gathers, so that the same elements are read; sums and ledger by torch's operators."""
    kept = [(works, works.get(device)) for works in (kernel_sums._works, kernel_sheet_sums._works)]
    for works, _ in kept:
        works[device] = False
    try:
        yield
    finally:
        for works, was in kept:
            if was is not None:
                works[device] = was
