"""Watching changes nothing: weights, gradients, optimizer state and random states are bit-identical with and without."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import update_watch as uw

OPTIMIZERS = {
    "adamw-loop": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
}


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _train(make: Any, dtype: torch.dtype, watched: bool, mode: str) -> list[bytes]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.RMSNorm(30), torch.nn.Linear(30, 40)).to(dtype)
    optimizer = make(model.parameters())
    watch = uw.watch(model, optimizer, window=8) if watched else None
    for step in range(24):
        x = torch.randn(8, 40).to(dtype)

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - x).pow(2).mean()
            loss.backward()
            return loss

        if mode == "closure":
            optimizer.step(closure)
            continue
        closure()
        if mode == "scaler":  # the attributes torch.amp.GradScaler sets around a fused step
            optimizer.grad_scale = torch.tensor(1.0 if step % 3 else 2.0)
            optimizer.found_inf = torch.tensor(float(step % 5 == 0))
        optimizer.step()
        if mode == "scaler":
            del optimizer.grad_scale, optimizer.found_inf
    if watch is not None:
        report = watch.flush()
        assert report is not None and any(t.efficiency is not None for t in report.tensors)
        watch.close()
    result = [_bits(p) for p in model.parameters()]
    result += [_bits(p.grad) for p in model.parameters() if p.grad is not None]
    for p in model.parameters():
        result += [_bits(v) if isinstance(v, Tensor) else repr(v).encode() for v in optimizer.state[p].values()]
    return [
        *result,
        _bits(torch.get_rng_state()),
        repr(random.getstate()).encode(),
        repr(np.random.get_state()).encode(),
    ]


# each optimizer in BF16, and each other way with one; all combinations with the slow tests
COMMON = {
    *((name, torch.bfloat16, "plain") for name in OPTIMIZERS),
    *(("adamw-foreach", torch.float32, "plain"), ("adafactor", torch.float32, "closure")),
    ("adamw-loop", torch.bfloat16, "closure"),
}


@pytest.mark.parametrize(
    ("make", "dtype", "mode"),
    [
        pytest.param(
            OPTIMIZERS[name],
            dtype,
            mode,
            id=f"{mode}-{dtype}-{name}",
            marks=[pytest.mark.slow] * ((name, dtype, mode) not in COMMON),
        )
        for name in OPTIMIZERS
        for dtype in (torch.float32, torch.bfloat16)
        for mode in ("plain", "closure")
    ],
)
def test_training_is_bit_identical_with_and_without_the_watch(make: Any, dtype: torch.dtype, mode: str) -> None:
    assert _train(make, dtype, False, mode) == _train(make, dtype, True, mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_a_gradient_scaler_skips_are_bit_identical_too(dtype: torch.dtype) -> None:
    make = OPTIMIZERS["adamw-fused"]
    assert _train(make, dtype, False, "scaler") == _train(make, dtype, True, "scaler")
