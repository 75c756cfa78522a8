"""Further trainings that must be bit-identical with and without the watch: other optimizers, several of them, dropout,
accumulated gradients, schedules, checkpoints, an engine that fails. The plain cases are in test_identity.py."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import torch
from lion_pytorch import Lion
from torch import Tensor, nn
from torch.optim import Optimizer

import update_watch as uw
from tests.support.replay import known_trials
from update_watch.measure.watched_optimizer import Watched

STEPS = 12


class Net(nn.Module):
    """Two matrices and a norm; dropout, so that a disturbed random state would show in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(40, 48)
        self.norm = nn.RMSNorm(48)
        self.leave = nn.Linear(48, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.leave(nn.functional.dropout(self.norm(self.enter(x)), 0.2))
        return out


Make = Callable[[Net], list[Optimizer]]
Run = Callable[[Net, list[Optimizer]], None]


def _adamw(**options: Any) -> Make:
    return lambda m: [torch.optim.AdamW(m.parameters(), lr=1e-3, **options)]


def _muon(m: Net) -> list[Optimizer]:
    matrices = [m.enter.weight, m.leave.weight]
    rest = [m.enter.bias, m.norm.weight]
    return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-3)]


OPTIMIZERS: dict[str, Make] = {
    "adamw-loop": _adamw(foreach=False),
    "adamw-foreach": _adamw(foreach=True),
    "adamw-fused": _adamw(fused=True),
    "adamw-amsgrad-tensor-lr": lambda m: [torch.optim.AdamW(m.parameters(), lr=torch.tensor(1e-3), amsgrad=True)],
    "sgd": lambda m: [torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)],
    "lion-pytorch": lambda m: [Lion(m.parameters(), lr=1e-4)],
    "lion": lambda m: [pytorch_optimizer.Lion(m.parameters(), lr=1e-4)],
    "muon": _muon,
    "sgd-and-adamw": lambda m: [
        torch.optim.SGD(m.enter.parameters(), lr=1e-2, momentum=0.9),
        torch.optim.AdamW([*m.norm.parameters(), *m.leave.parameters()], lr=1e-3),
    ],
}


def _backward(model: Net, optimizers: list[Optimizer]) -> Tensor:
    x = torch.randn(8, 40).to(model.norm.weight.dtype) * (1 + random.random() + float(np.random.rand()))
    loss = (model(x) - x).pow(2).mean()
    loss.backward()
    return loss


def plain(model: Net, optimizers: list[Optimizer]) -> None:
    for _ in range(STEPS):
        model.zero_grad()
        _backward(model, optimizers)
        for optimizer in optimizers:
            optimizer.step()


def closure(model: Net, optimizers: list[Optimizer]) -> None:
    for _ in range(STEPS):
        for optimizer in optimizers:

            def evaluate() -> Tensor:
                model.zero_grad()
                return _backward(model, optimizers)

            optimizer.step(evaluate)  # type: ignore[arg-type]  # torch wants a float


def accumulated_and_scheduled(model: Net, optimizers: list[Optimizer]) -> None:
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in optimizers]
    for i in range(3 * STEPS):
        _backward(model, optimizers)
        if i % 3 == 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            model.zero_grad(set_to_none=False)


def restored_in_between(model: Net, optimizers: list[Optimizer]) -> None:
    plain(model, optimizers)
    saved = copy.deepcopy(model.state_dict()), [pickle.dumps(o.state_dict()) for o in optimizers]
    plain(model, optimizers)
    model.load_state_dict(saved[0])
    for optimizer, state in zip(optimizers, saved[1], strict=True):
        optimizer.load_state_dict(pickle.loads(state))
    plain(model, optimizers)


def scaled(model: Net, optimizers: list[Optimizer]) -> None:
    """The attributes `torch.amp.GradScaler` sets around a fused step; every fifth step overflows and is skipped."""
    for i in range(STEPS):
        model.zero_grad()
        _backward(model, optimizers)
        for optimizer in optimizers:
            if i % 5 == 1:
                model.norm.weight.grad[3] = float("inf")  # type: ignore[index]  # there is one
            optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]  # as the scaler does
            optimizer.found_inf = torch.tensor(float(i % 5 == 1))  # type: ignore[attr-defined]  # as the scaler does
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf


def _bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        flat = value.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        return str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {k: _bits(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_bits(v) for v in value]
    return repr(value)


def outcome(make: Make, run: Run, dtype: torch.dtype, watched: bool, **options: Any) -> dict[str, Any]:
    """All a training leaves behind, bit by bit."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Net().to(dtype)
    optimizers = make(model)
    keys = [set(vars(o)) for o in optimizers]
    watch = uw.watch(model, optimizers, window=5, **options) if watched else None
    run(model, optimizers)
    if watch is not None:
        report = watch.flush()
        assert options or (report is not None and any(t.efficiency is not None for t in report.tensors))
        watch.close()
    return {
        "weights": _bits(model.state_dict()),
        "gradients": [_bits(p.grad) for p in model.parameters()],
        "versions": [p._version for p in model.parameters()],
        "states": [_bits(o.state_dict()) for o in optimizers],
        # what a run adds to an optimizer's attributes, the watch adds not one more
        "attributes": [sorted(set(vars(o)) - before) for o, before in zip(optimizers, keys, strict=True)],
        "torch": _bits(torch.get_rng_state()),
        "python": repr(random.getstate()),
        "numpy": repr(np.random.get_state()),
        "next": _bits(torch.rand(3)),
    }


def assert_same(make: Make, run: Run, dtype: torch.dtype, **options: Any) -> None:
    expected, found = outcome(make, run, dtype, False), outcome(make, run, dtype, True, **options)
    assert [key for key in expected if expected[key] != found[key]] == []


def _slow(name: str) -> Any:
    """What differs from others of the list in nothing that the claim is about."""
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_any_optimizers_training_is_bit_identical(make: Make) -> None:
    assert_same(make, plain, torch.bfloat16)


@pytest.mark.parametrize("name", ["adamw-fused", _slow("sgd"), _slow("lion"), "muon"])
def test_training_by_closures_is_bit_identical(name: str) -> None:
    assert_same(OPTIMIZERS[name], closure, torch.bfloat16)


@pytest.mark.parametrize("name", ["adamw-foreach", "muon"])
def test_training_in_fp32_is_bit_identical(name: str) -> None:
    assert_same(OPTIMIZERS[name], plain, torch.float32)


@pytest.mark.parametrize("name", [_slow("adamw-foreach"), "adamw-fused", "sgd-and-adamw"])
@pytest.mark.parametrize("run", [accumulated_and_scheduled, restored_in_between], ids=["schedule", "restore"])
def test_schedules_clipping_and_checkpoints_are_bit_identical(run: Run, name: str) -> None:
    assert_same(OPTIMIZERS[name], run, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scalers_steps_are_bit_identical(dtype: torch.dtype) -> None:
    assert_same(OPTIMIZERS["adamw-fused"], scaled, dtype)


def test_seed_and_samples_make_no_difference() -> None:
    assert_same(OPTIMIZERS["adamw-foreach"], plain, torch.bfloat16, seed=7, samples=16)


@functools.cache
def _of_adamw() -> dict[str, Any]:
    """Without a watch."""
    return outcome(OPTIMIZERS["adamw-foreach"], plain, torch.bfloat16, False)


@pytest.mark.parametrize("where", ["before", "after", "close_window"])
def test_an_engine_that_fails_leaves_training_bit_identical(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _of_adamw()
    right, calls = getattr(Watched, where), []

    def failing(self: Watched, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a bug of ours")
        return right(self, *arguments)

    monkeypatch.setattr(Watched, where, failing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = outcome(OPTIMIZERS["adamw-foreach"], plain, torch.bfloat16, True, seed=1)
    assert [key for key in expected if expected[key] != found[key]] == []
    assert len(calls) == 2 and len([w for w in caught if "a bug of ours" in str(w.message)]) == 1


DISTURBANCES: dict[str, Callable[[Watched], Any]] = {
    "torch": lambda watched: torch.rand(1),
    "numpy": lambda watched: np.random.rand(),
    "python": lambda watched: random.random(),
    "weights": lambda watched: watched.rows[0].param.data[0].add_(1e-2),
    "gradients": lambda watched: watched.rows[0].param.grad[0].mul_(1.01),  # type: ignore[union-attr, index]
    "states": lambda watched: [s["exp_avg"].mul_(1.01) for s in watched.optimizer.state.values()],
    "versions": lambda watched: watched.rows[0].param.mul_(1),
    "attributes": lambda watched: setattr(watched.optimizer, "mark", 1),
}


@pytest.mark.parametrize("what", DISTURBANCES)
def test_meta_a_watch_that_disturbed_training_would_be_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _of_adamw()
    right = Watched.before
    known_trials.remember(monkeypatch)  # what a trial leaves behind is not asked here

    def disturbing(self: Watched, *args: Any, **options: Any) -> Any:
        measured = right(self, *args, **options)
        DISTURBANCES[what](self)
        return measured

    monkeypatch.setattr(Watched, "before", disturbing)
    found = outcome(OPTIMIZERS["adamw-foreach"], plain, torch.bfloat16, True)
    assert expected[what] != found[what]
