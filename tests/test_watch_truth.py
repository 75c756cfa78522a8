"""The watch on real training steps: its numbers against a full comparison, its names for what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import update_watch as uw
from tests.support.watch_nets import RULES, Full, Make, Net, Rule, backward, batches, make_adamw, tensors, train
from update_watch.report import Cause, Health

BF16, FP16 = torch.bfloat16, torch.float16


# --- truth -------------------------------------------------------------------------------------------


# learning rates at which part of the updates is lost, and nearly all
RATES = {"sgd-momentum": {BF16: (3e-3, 1e-4), FP16: (3e-4, 1e-5)}}
USUAL = {BF16: (3e-4, 1e-5), FP16: (3e-5, 1e-6)}


# by default each rule in one format, and one in both
COMMON = {("adamw-loop", FP16), ("adamw-foreach", BF16), ("adamw-fused", BF16), ("adamw-fused", FP16)}
COMMON |= {("sgd-momentum", FP16), ("lion", BF16)}


@pytest.mark.parametrize(
    ("name", "dtype", "which"),
    [
        pytest.param(
            name,
            dtype,
            which,
            id=f"{name}-{dtype}-{('partly', 'nearly-all')[which]}",
            marks=[pytest.mark.slow] * (which == 1 or (name, dtype) not in COMMON),
        )
        for name in RULES
        for dtype in (BF16, FP16)
        for which in (0, 1)
    ],
)
def test_efficiency_and_lost_fraction_are_those_of_all_elements(name: str, dtype: torch.dtype, which: int) -> None:
    make, rule = RULES[name]
    model = Net(dtype)
    optimizer = make(model.parameters(), RATES.get(name, USUAL)[dtype][which])
    train(model, optimizer, 5, seed=1)  # past the first steps, which are all alike
    full = Full(model, optimizer, rule)
    with uw.watch(model, optimizer, window=10_000) as watch:
        for x in batches(96, dtype):
            model.zero_grad()
            backward(model, x)
            full.step()
        found = tensors(watch.flush())
    assert list(found) == [n for n, _ in model.named_parameters()]
    for t in found.values():
        assert t.efficiency == pytest.approx(full.efficiency(t.name), abs=0.03), t.name
        assert t.lost_fraction == pytest.approx(full.lost_fraction(t.name), abs=0.03), t.name
    lost = [full.lost_fraction(n) for n in ("enter.weight", "leave.weight")]
    assert any(0.1 < x < 0.95 for x in lost) if which == 0 else max(lost) > 0.6  # meta: what the names promise


@pytest.mark.parametrize(("make", "rule"), RULES.values(), ids=RULES.keys())
def test_fp32_training_is_healthy_and_its_efficiency_one(make: Make, rule: Rule) -> None:
    model = Net()
    optimizer = make(model.parameters(), 1e-4)
    with uw.watch(model, optimizer, window=10_000) as watch:
        train(model, optimizer, 30)
        report = watch.flush()
    assert report is not None and report.health is Health.healthy
    for t in report.tensors:
        assert t.health is Health.healthy and t.cause is None
        assert t.efficiency == pytest.approx(1, abs=0.005) and (t.lost_fraction or 0) < 0.01


def test_norms_at_one_are_stalled_by_the_rounding_of_the_weight() -> None:
    model = Net(BF16)
    optimizer = make_adamw(model.parameters(), 1e-4)
    with uw.watch(model, optimizer, window=32) as watch:
        train(model, optimizer, 32)
        norm = tensors(watch.flush())["norm.weight"]
    assert norm.health is Health.stalled and norm.cause is Cause.weight_rounding
    assert norm.efficiency == 0 and norm.lost_fraction == 1 and norm.applied_ratio == 0
    assert norm.critical_lr is not None and norm.critical_lr > 1e-3
    assert norm.dtype == "bfloat16" and norm.layer == "norm" and norm.numel == 64


@pytest.mark.parametrize(("layers", "samples"), [(8, 8 * 64), (9, 64)])
def test_a_model_of_few_tensors_is_looked_at_more_closely(layers: int, samples: int) -> None:
    model = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with uw.watch(model, optimizer, samples=64) as watch:
        (watched,) = watch._model.watched.values()
        sizes = {row.sampler.size for row in watched.rows if row.sampler is not None}
    assert sizes == {samples, 64}  # biases have no more than 64 elements


def test_elements_that_are_met_in_every_step_are_not_in_the_sums() -> None:
    """At the window's own positions every update is lost, elsewhere it arrives."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(600_000, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with uw.watch([("w", weight)], optimizer, window=10**6, samples=16) as watch:
        (cohort,) = next(iter(watch._model.watched.values())).cohorts
        for _ in range(16):
            weight.data.fill_(1.0)
            weight.grad = torch.full_like(weight, -(2.0**-6))
            cohort.gathers.settle()
            for sampler in cohort.samplers:
                sampler.view(weight.grad).fill_(-(2.0**-10))
            optimizer.step()
        report = watch.flush()
    assert report is not None
    (tensor,) = report.tensors
    assert tensor.lost_fraction == pytest.approx(0.0, abs=0.03) and tensor.displacement_efficiency == 0.0


@pytest.mark.parametrize("rate", [1e-3, 5e-8, 1e-9])
def test_fp64_weights_are_measured_in_fp64(rate: float) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.rand(40, 40, dtype=torch.float64) + 1)
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
    with uw.watch([("w", weight)], optimizer, window=32) as watch:
        for _ in range(96):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
        report = watch.flush()
    assert report is not None
    (tensor,) = report.tensors
    assert tensor.health is Health.healthy and tensor.efficiency == pytest.approx(1.0, abs=1e-6)


# --- what is wrong, by name --------------------------------------------------------------------------


class Odd(Net):
    """A net with a parameter that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.ones(300))


def _off(model: Odd) -> Any:
    model.extra.requires_grad_(False)
    return make_adamw(model.parameters())


def _off_and_left_out(model: Odd) -> Any:
    model.extra.requires_grad_(False)
    return make_adamw([p for p in model.parameters() if p.requires_grad])


def _left_out(model: Odd) -> Any:
    return make_adamw([p for p in model.parameters() if p is not model.extra])


def _zero_rate(model: Odd) -> Any:
    rest = [p for p in model.parameters() if p is not model.extra]
    return make_adamw([{"params": rest}, {"params": [model.extra], "lr": 0.0}])


WRONG = [
    pytest.param(_off, None, Health.frozen, Cause.requires_grad_off, id="off"),
    pytest.param(_off_and_left_out, None, Health.frozen, Cause.requires_grad_off, id="off-and-left-out"),
    pytest.param(_left_out, 1.0, Health.idle, Cause.not_in_optimizer, id="left-out"),
    pytest.param(lambda m: make_adamw(m.parameters()), None, Health.idle, Cause.no_gradient, id="no-gradient"),
    # its decay moves it: that is said, and it is not called idle
    pytest.param(lambda m: make_adamw(m.parameters()), 0.0, Health.healthy, Cause.zero_gradient, id="zero-gradient"),
    pytest.param(_zero_rate, 1.0, Health.idle, Cause.zero_learning_rate, id="zero-rate"),
    pytest.param(lambda m: make_adamw(m.parameters()), float("nan"), Health.broken, Cause.non_finite, id="nan"),
    pytest.param(lambda m: make_adamw(m.parameters()), float("inf"), Health.broken, Cause.non_finite, id="inf"),
]


@pytest.mark.parametrize(("make", "grad", "health", "cause"), WRONG)
def test_what_is_wrong_with_one_tensor_is_named_and_the_others_stay_healthy(
    make: Any, grad: float | None, health: Health, cause: Cause
) -> None:
    model = Odd()
    optimizer = make(model)
    with uw.watch(model, optimizer, window=16) as watch:
        for x in batches(16):
            model.zero_grad()
            backward(model, x)
            if grad is not None:
                model.extra.grad = torch.full_like(model.extra, grad)
            optimizer.step()
        found = tensors(watch.flush())
    extra = found.pop("extra")
    assert (extra.health, extra.cause) == (health, cause)
    assert extra.advice
    assert {t.health for t in found.values()} == {Health.healthy}


def test_a_rule_that_cannot_be_replayed_is_unknown_with_its_reason() -> None:
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=2)
    with uw.watch(model, optimizer, window=8) as watch:
        for x in batches(8):

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                return backward(model, x)

            optimizer.step(closure)  # type: ignore[arg-type]  # torch wants a float
        found = tensors(watch.flush())
    for t in found.values():
        assert (t.health, t.cause) == (Health.unknown, Cause.not_replayable)
        assert len(t.advice) > 20 and t.efficiency is None
