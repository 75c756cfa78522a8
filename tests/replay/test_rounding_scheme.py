"""What becomes of what rounding takes: found out by trial, never from a name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import update_watch as uw
from tests.measure.ledger.test_masters_inside import HoldsMasters
from tests.support.watch_nets import Net, train
from update_watch.replay.rounding_scheme import Join, Scheme, find_scheme


def _params(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(16, 16, dtype=dtype)), torch.nn.Parameter(torch.ones(16, dtype=dtype))]


PLAIN = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p),
    "rmsprop-centered": lambda p: torch.optim.RMSprop(p, lr=1e-4, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_torch_optimizers_round_plainly(make: Any, dtype: torch.dtype) -> None:
    assert find_scheme(make(_params(dtype)), 0, dtype, 2) == Scheme("plain")


def test_fp32_weights_are_plain_without_a_trial() -> None:
    assert find_scheme(torch.optim.SGD(_params(torch.float32), lr=0.1), 0, torch.float32, 1) == Scheme("plain")


@pytest.mark.parametrize("kahan", [True, False])
def test_the_kahan_buffer_is_found_where_it_is_in_use(kahan: bool) -> None:
    optimi = pytest.importorskip("optimi")
    optimizer = optimi.AdamW(_params(torch.bfloat16), lr=1e-3, kahan_sum=kahan)
    expected = Scheme("carried:kahan_comp", "kahan_comp") if kahan else Scheme("plain")
    assert find_scheme(optimizer, 0, torch.bfloat16, 1) == expected


class _Growing(torch.optim.SGD):
    """Its steps grow by a sixth each time; `holds`: what the weight cannot hold is kept in its state."""

    holds = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("size", torch.tensor(group["lr"])).mul_(7 / 6)
                rest = state.setdefault("rest", torch.zeros_like(p))
                exact = p.float() - state["size"] * p.grad.float() + (rest.float() if self.holds else 0.0)
                p.copy_(exact)
                rest.copy_(exact - p.float() if self.holds else rest)


@pytest.mark.parametrize("holds", [True, False])
def test_of_a_rule_whose_steps_grow_the_small_ones_tell(holds: bool) -> None:
    optimizer = _Growing(_params(torch.bfloat16), lr=0.01)
    optimizer.holds = holds
    found = find_scheme(optimizer, 0, torch.bfloat16, 2)
    assert (found == Scheme("plain")) != holds


class _Stochastic(torch.optim.SGD):
    """Rounds at random between the two neighbours in BF16."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                exact = p.float() - group["lr"] * p.grad.float()
                if p.dtype is torch.bfloat16:
                    bits = exact.view(torch.int32) + torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32)
                    exact = (bits & -(1 << 16)).view(torch.float32)
                p.copy_(exact)


class _Masters(torch.optim.SGD):
    """Keeps FP32 masters in its state and stores a rounded copy."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                master = self.state[p].setdefault("master", p.float().clone())
                master.sub_(group["lr"] * p.grad.float())
                p.copy_(master)


class _Hidden(torch.optim.SGD):
    """The same, but the masters are no states of its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.master = getattr(p, "master", p.float().clone())
                p.master.sub_(group["lr"] * p.grad.float())
                p.copy_(p.master)


def test_stochastic_rounding_is_recognised() -> None:
    assert find_scheme(_Stochastic(_params(torch.bfloat16), lr=0.1), 0, torch.bfloat16, 1) == Scheme("stochastic")


def test_masters_in_the_state_are_named() -> None:
    optimizer = _Masters(_params(torch.bfloat16), lr=0.1)
    assert find_scheme(optimizer, 0, torch.bfloat16, 1) == Scheme("carried:master", "master", Join.master)


@pytest.mark.parametrize("every", [1, 2, 6, 7, 8, 12, 50])
def test_masters_that_are_written_only_after_some_steps_are_told_from_others(every: int) -> None:
    found = find_scheme(HoldsMasters(_params(torch.bfloat16), lr=0.1, every=every), 0, torch.bfloat16, 2)
    assert found == Scheme("carried:master", "master", Join.master, is_late=every > 1)


class _ScheduleFree(torch.optim.SGD):
    """Keeps an FP32 iterate and the average of it in its state; the weight lies between the two."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                steps = state["steps"] = state.get("steps", 0) + 1
                z = state.setdefault("z", p.float().clone()).sub_(group["lr"] * p.grad.float())
                x = state.setdefault("x", z.clone()).lerp_(z, 1 / steps)
                p.copy_(group["momentum"] * x + (1 - group["momentum"]) * z)


@pytest.mark.parametrize("momentum", [0.9, 0.98])
def test_a_state_that_the_weight_is_only_made_of_is_no_master_of_it(momentum: float) -> None:
    optimizer = _ScheduleFree(_params(torch.bfloat16), lr=0.1, momentum=momentum)
    assert find_scheme(optimizer, 0, torch.bfloat16, 2).is_part


def test_weights_made_of_two_states_are_not_said_to_lack_a_copy_of_one() -> None:
    model = Net(torch.bfloat16)
    optimizer = _ScheduleFree(model.parameters(), lr=1e-4, momentum=0.98)
    reports: list[uw.Report] = []
    with uw.watch(model, optimizer, window=8, budget=None, sinks=[reports.append]) as watch:
        train(model, optimizer, 120)
        watch.flush()
    assert len(reports) == 15
    assert {t.cause for report in reports for t in report.tensors} == {None}


def test_a_remainder_kept_elsewhere_is_recognised() -> None:
    assert find_scheme(_Hidden(_params(torch.bfloat16), lr=0.1), 0, torch.bfloat16, 1) == Scheme("carried")


def test_the_trial_leaves_optimizer_and_random_state_alone() -> None:
    params = _params(torch.bfloat16)
    optimizer = _Stochastic(params, lr=0.1)
    before = [p.clone() for p in params]
    state = torch.get_rng_state()
    find_scheme(optimizer, 0, torch.bfloat16, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.1
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


RATES = {
    "warm-up": lambda t: min(1.0, t / 100),
    "decay": lambda t: 1 / (1 + t / 50),
    "every other": lambda t: 1.0 if t % 2 else 0.3,
}


class SetsItsRate(torch.optim.SGD):
    """A schedule in its own step; `is_kept`: what BF16 weights cannot hold is kept beside them."""

    def __init__(self, params: Any, lr: float, rate: Any, is_kept: bool) -> None:
        super().__init__(params, lr=lr)
        self.peak, self.rate, self.is_kept, self.steps = lr, rate, is_kept, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            group["lr"] = self.peak * self.rate(self.steps)
            for p in group["params"] if self.is_kept else ():
                kept = self.state[p].setdefault("kept", torch.zeros_like(p))
                update = kept - group["lr"] * p.grad
                before = p.clone()
                p.add_(update)
                kept.copy_(update - (p - before))
        return None if self.is_kept else super().step(closure)


@pytest.mark.parametrize("lr", [0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("rate", RATES.values(), ids=RATES.keys())
def test_a_rule_that_sets_its_own_learning_rate_is_tried_on_weights_of_another_size(rate: Any, lr: float) -> None:
    plain, kept = (SetsItsRate(_params(torch.bfloat16), lr, rate, is_kept) for is_kept in (False, True))
    assert find_scheme(plain, 0, torch.bfloat16, 2) == Scheme("plain")
    assert find_scheme(kept, 0, torch.bfloat16, 2) == Scheme("carried:kept", "kept", Join.sum)
