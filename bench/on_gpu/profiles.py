"""Launches and device time of a step, by torch's profiler."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch

from bench.on_gpu.given import is_cuda, sync


def activities(function: Callable[[], Any]) -> tuple[collections.Counter[str], int, float]:
    """Runtime calls by name, activities on the device, ms of them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda() else [])
    with profile(activities=kinds) as p:
        function()
        sync()
    calls: collections.Counter[str] = collections.Counter()
    count, ns = 0, 0.0
    for event in p.profiler.kineto_results.events():
        name = event.name()
        if event.device_type() == DeviceType.CUDA:
            if "Optimizer." in name or name.startswith(("ProfilerStep", "##")):
                continue  # annotations, drawn on the device's time line
            count += 1
            ns += event.duration_ns() if hasattr(event, "duration_ns") else 1e3 * event.duration_us()
        elif is_cuda():
            if name.startswith(("cuda", "cu")):
                calls[name] += 1
        elif name.startswith("aten::"):
            calls[name] += 1
    return calls, count, ns / 1e6


def marked(step: Callable[[], str], count: int) -> tuple[list[tuple[str, int, float]], collections.Counter[str]] | None:
    """(kind of step, activities on the device, ms of them) of many steps in one profile, told apart by a kernel that marks
    their beginnings; and all runtime calls. None where the marks are not found."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if not is_cuda():
        return None
    kinds = []
    sync()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(count):
            torch.cuda._sleep(1000)
            kinds.append(step())
        torch.cuda._sleep(1000)
        sync()
    calls: collections.Counter[str] = collections.Counter()
    device = []
    for event in p.profiler.kineto_results.events():
        name = event.name()
        if event.device_type() == DeviceType.CUDA:
            if "Optimizer." not in name and not name.startswith(("ProfilerStep", "##")):
                device.append((event.start_ns(), name, event.duration_ns()))
        elif name.startswith("cu"):
            calls[name] += 1
    steps: list[list[float]] = []
    for _, name, ns in sorted(device):
        if "spin_kernel" in name:
            steps.append([0, 0.0])
        elif steps:
            steps[-1][0] += 1
            steps[-1][1] += ns / 1e6
    if len(steps) != count + 1:
        return None
    return [(kind, int(n), ms) for kind, (n, ms) in zip(kinds, steps, strict=False)], calls
