"""On a CUDA device: no synchronisation in any step, bit-identical training, numbers of the full comparison.

Run with `pytest -m gpu`. Without a device, `test_device_only.py` proves the first on a fake one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import update_watch as uw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MAKE = {
    "fused": lambda p: torch.optim.AdamW(p, lr=3e-4, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=3e-4, foreach=True),
    "capturable": lambda p: torch.optim.AdamW(p, lr=3e-4, foreach=True, capturable=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=True),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(256, 256), nn.RMSNorm(256)) for _ in range(8)]
    return nn.Sequential(*layers).to("cuda", torch.bfloat16)


def backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    (model(x) - x).float().pow(2).mean().backward()


@contextmanager
def synchronising_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", MAKE)
def test_no_step_waits_for_the_device(name: str) -> None:
    model = net()
    optimizer = MAKE[name](model.parameters())
    inputs = [torch.randn(8, 256, device="cuda", dtype=torch.bfloat16) for _ in range(70)]
    with uw.watch(model, optimizer, window=32) as watch:
        for i, x in enumerate(inputs):
            backward(model, x)
            if i < 5:  # states are made, which torch itself does with copies
                optimizer.step()
                continue
            with synchronising_is_an_error():
                optimizer.step()
        report = watch.flush()
        assert watch._tap.error is None
    assert report is not None and all(t.efficiency is not None for t in report.tensors)


@pytest.mark.parametrize("name", MAKE)
def test_training_is_bit_identical(name: str) -> None:
    def train(watched: bool) -> list[Any]:
        model = net()
        optimizer = MAKE[name](model.parameters())
        watch = uw.watch(model, optimizer, window=8) if watched else None
        for _ in range(40):
            backward(model, torch.randn(8, 256, device="cuda", dtype=torch.bfloat16))
            optimizer.step()
        if watch is not None:
            watch.close()
            assert watch.last is not None
        state = [v for p in model.parameters() for v in optimizer.state[p].values() if isinstance(v, Tensor)]
        return [t.detach().cpu() for t in (*model.parameters(), *state)] + [torch.cuda.get_rng_state()]

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for a, b in zip(train(False), train(True), strict=True):
            assert torch.equal(a, b)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_scaler_may_skip_steps() -> None:
    model = net().float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, growth_interval=5)
    with uw.watch(model, optimizer, window=32) as watch:
        for _ in range(32):
            model.zero_grad()
            x = torch.randn(8, 256, device="cuda")
            with torch.autocast("cuda", torch.float16):
                loss = (model(x) - x).float().pow(2).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        report = watch.flush()
        assert watch._tap.error is None
    assert report is not None and not report.alerts


def test_efficiency_is_that_of_all_elements() -> None:
    model = net()
    optimizer = MAKE["foreach"](model.parameters())
    dot, want = {}, {}
    for name, _ in model.named_parameters():
        dot[name] = want[name] = torch.zeros((), device="cuda", dtype=torch.float64)
    for _ in range(10):
        backward(model, torch.randn(8, 256, device="cuda", dtype=torch.bfloat16))
        optimizer.step()
    with uw.watch(model, optimizer, window=10_000) as watch:
        for _ in range(128):
            backward(model, torch.randn(8, 256, device="cuda", dtype=torch.bfloat16))
            before = {n: p.detach().double() for n, p in model.named_parameters()}
            intended = {}
            for name, p in model.named_parameters():
                state, group = optimizer.state[p], optimizer.param_groups[0]
                b1, b2 = group["betas"]
                g, t = p.grad.double(), float(state["step"]) + 1
                m = state["exp_avg"].double() * b1 + (1 - b1) * g
                v = state["exp_avg_sq"].double() * b2 + (1 - b2) * g * g
                step = group["lr"] / (1 - b1**t) * m / ((v / (1 - b2**t)).sqrt() + group["eps"])
                intended[name] = -group["lr"] * group["weight_decay"] * before[name] - step
            optimizer.step()
            for name, p in model.named_parameters():
                d = intended[name]
                dot[name] = dot[name] + ((p.detach().double() - before[name]) * d).sum()
                want[name] = want[name] + (d * d).sum()
        report = watch.flush()
    assert report is not None
    for t in report.tensors:
        # 32 tensors take turns: each is measured in every fourth step
        assert t.efficiency == pytest.approx(float(dot[t.name] / want[t.name]), abs=0.05), t.name
