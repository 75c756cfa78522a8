"""Optimizers that keep what they need of each parameter in attributes of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import update_watch as uw
from tests.support.watch_nets import Net, backward, batches
from update_watch.replay import kept_states
from update_watch.replay.rule import Kind
from update_watch.replay.rule_kind import find_rule
from update_watch.report import Cause, Health, Report

BF16 = torch.bfloat16
LAYOUTS = ("beside", "tuple", "by_group", "by_param", "by_id", "by_place", "flat", "mark")


class Keeping(torch.optim.Optimizer):
    """Momentum on FP32 weights, both in attributes; written to the model after every so many steps."""

    def __init__(self, params: Any, lr: float = 1e-5, layout: str = "beside", every: int = 1) -> None:
        super().__init__(params, {"lr": lr})
        self.layout, self.every, self.steps = layout, every, 0
        self.mine = [p for group in self.param_groups for p in group["params"]]
        self.masters = self._kept(lambda p: p.detach().float().clone())
        self.momenta = self._kept(lambda p: torch.zeros_like(p, dtype=torch.float32))

    def _kept(self, make: Any) -> Any:
        if self.layout == "by_group":
            return [[make(p) for p in group["params"]] for group in self.param_groups]
        if self.layout in ("by_param", "by_id", "by_place"):
            keys = {"by_param": self.mine, "by_place": range(len(self.mine))}.get(self.layout, map(id, self.mine))
            return {key: make(p) for key, p in zip(keys, self.mine, strict=True)}
        if self.layout == "flat":
            return torch.cat([make(p).reshape(-1) for p in self.mine])
        if self.layout == "mark":
            name = f"kept{len(vars(self.mine[0]))}"
            for p in self.mine:
                setattr(p, name, make(p))
            return name
        return (tuple if self.layout == "tuple" else list)(make(p) for p in self.mine)

    def _of(self, kept: Any, g: int, i: int, k: int, p: Tensor) -> Tensor:
        if self.layout == "by_group":
            return kept[g][i]
        if self.layout == "mark":
            return getattr(p, kept)
        return kept[{"by_param": p, "by_id": id(p)}.get(self.layout, k)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        if self.layout == "flat":
            return self._step_flat()
        k = 0
        for g, group in enumerate(self.param_groups):
            for i in range(len(group["params"])):
                p = self.mine[k]
                momentum = self._of(self.momenta, g, i, k, p).mul_(0.9).add_(p.grad.float())
                master = self._of(self.masters, g, i, k, p).sub_(momentum.sign() * group["lr"])
                if self.steps % self.every == 0:
                    p.copy_(master)
                k += 1

    def _step_flat(self) -> None:
        self.momenta.mul_(0.9).add_(torch.cat([p.grad.float().reshape(-1) for p in self.mine]))
        self.masters -= self.momenta.sign() * self.param_groups[0]["lr"]
        parts = self.masters.split([p.numel() for p in self.mine])
        for p, part in zip(self.mine, parts, strict=True):
            if self.steps % self.every == 0:
                p.copy_(part.view(p.shape))


class InGroups(torch.optim.Optimizer):
    """The same with what it keeps as settings of its groups."""

    def __init__(self, params: Any, lr: float = 1e-5, layout: str = "beside", every: int = 1) -> None:
        super().__init__(params, {"lr": lr})
        self.layout, self.every, self.steps = layout, every, 0
        for group in self.param_groups:
            masters = [p.detach().float().clone() for p in group["params"]]
            group["masters"] = torch.cat([m.reshape(-1) for m in masters]) if layout == "flat" else masters
            group["momenta"] = {p: torch.zeros_like(m) for p, m in zip(group["params"], masters, strict=True)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            params, masters = group["params"], group["masters"]
            if self.layout == "flat":
                parts = masters.split([p.numel() for p in params])
                masters = [part.view(p.shape) for part, p in zip(parts, params, strict=True)]
            for p, master in zip(params, masters, strict=True):
                momentum = group["momenta"][p].mul_(0.9).add_(p.grad.float())
                master.sub_(momentum.sign() * group["lr"])
                if self.steps % self.every == 0:
                    p.copy_(master)


class Gathering(torch.optim.Optimizer):
    """SGD on the gradients of four steps, which are gathered in a dict that is filled in the first one."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.sums: dict[int, Tensor] = {}
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                total = self.sums.setdefault(id(p), torch.zeros_like(p, dtype=torch.float32)).add_(p.grad.float())
                if self.steps % 4 == 0:
                    p.copy_(p.float() - group["lr"] * total)
                    total.zero_()


class Lion(torch.optim.Optimizer):
    """Its momenta are like the parameters, in a dict that is filled in the first step or in its state; decay is a number in the code."""

    def __init__(self, params: Any, lr: float, is_kept: bool) -> None:
        super().__init__(params, {"lr": lr})
        self.is_kept = is_kept
        self.momenta: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = group["params"]
            for p in params:
                kept = self.momenta if self.is_kept else self.state[p]
                kept.setdefault(p if self.is_kept else "momentum", torch.zeros_like(p))
            momenta = [self.momenta[p] if self.is_kept else self.state[p]["momentum"] for p in params]
            updates = torch._foreach_mul(momenta, 0.9)
            torch._foreach_add_(updates, [p.grad for p in params], alpha=0.1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(params, 1 - group["lr"] * 0.2)
            torch._foreach_add_(params, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, [p.grad for p in params], 0.01)


def groups(model: Net) -> list[dict[str, Any]]:
    first, *others = model.parameters()
    return [{"params": [first]}, {"params": others}]


def trained(model: Net, optimizer: Any, steps: int = 64, is_watched: bool = True) -> Report | None:
    watch = uw.watch(model, optimizer, window=16, budget=None) if is_watched else None
    for x in batches(steps, BF16 if next(model.parameters()).dtype is BF16 else torch.float32):
        model.zero_grad()
        backward(model, x)
        optimizer.step()
    if watch is None:
        return None
    report = watch.flush()
    watch.close()
    return report


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masters_in_attributes_are_replayed_and_healthy(layout: str) -> None:
    model = Net(BF16)
    report = trained(model, Keeping(groups(model), layout=layout))
    assert report is not None
    assert {(t.health, t.cause) for t in report.tensors} == {(Health.healthy, None)}
    assert all(t.efficiency == pytest.approx(1, abs=0.01) for t in report.tensors)


@pytest.mark.parametrize("layout", ["beside", "flat"])
@pytest.mark.parametrize("every", [1, 10**9])
def test_masters_in_settings_of_groups_are_as_those_in_attributes(layout: str, every: int) -> None:
    model = Net(BF16)
    matrices, vectors = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    report = trained(model, InGroups([{"params": matrices}, {"params": vectors}], layout=layout, every=every))
    assert report is not None
    found = {(t.health, t.cause) for t in report.tensors}
    assert found == {(Health.healthy, None) if every == 1 else (Health.stalled, Cause.not_copied_back)}


@pytest.mark.parametrize("layout", ["beside", "by_id", "flat", "mark"])
def test_masters_in_attributes_that_are_never_written_to_the_model_are_said(layout: str) -> None:
    model = Net(BF16)
    report = trained(model, Keeping(model.parameters(), layout=layout, every=10**9))
    assert report is not None
    assert {(t.health, t.cause) for t in report.tensors} == {(Health.stalled, Cause.not_copied_back)}


@pytest.mark.parametrize(
    ("dtype", "lr", "expected"), [(torch.float32, 1e-3, Health.healthy), (BF16, 1e-7, Health.stalled)]
)
def test_gradients_that_an_optimizer_gathers_by_itself(dtype: torch.dtype, lr: float, expected: Health) -> None:
    model = Net(dtype)
    report = trained(model, Gathering(model.parameters(), lr))
    assert report is not None
    assert {t.health for t in report.tensors} == {expected}
    assert {t.cause for t in report.tensors} == {None if expected is Health.healthy else Cause.weight_rounding}


def test_what_is_made_in_the_format_of_the_weights_is_replayed_as_it_is_in_the_state() -> None:
    reports = [trained(m := Net(BF16), Lion(m.parameters(), 4e-3, is_kept)) for is_kept in (False, True)]
    in_state, kept = ({t.name: t.efficiency for t in report.tensors} for report in reports if report is not None)
    assert in_state["norm.weight"] < 0.95  # of what decay and sign add up to
    assert kept == pytest.approx(in_state, abs=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_with_and_without_a_watch(layout: str) -> None:
    ends: list[list[Tensor]] = []
    for is_watched in (False, True):
        model = Net(BF16)
        optimizer = Keeping(groups(model), lr=1e-3, layout=layout, every=3)
        trained(model, optimizer, 40, is_watched)
        states = kept_states.states_of(optimizer)
        assert optimizer.steps == 40 and bool(states) == is_watched
        assert all(mine is p for mine, p in zip(optimizer.mine, model.parameters(), strict=True))
        kept_states.adopt(optimizer)
        states = kept_states.states_of(optimizer)
        ends.append([t.detach().clone() for p in model.parameters() for t in (p, *states[p].values())])
    assert len(ends[0]) == 3 * len(optimizer.mine)
    assert all(map(torch.equal, *ends))


def test_what_another_hangs_on_parameters_is_no_state() -> None:
    """Not of all of them, not of their shape, or nobody's business."""
    model = Net(BF16)
    optimizer = Keeping(groups(model), layout="mark")
    for p in optimizer.mine:
        p.scale, p._own, p.mean = 1.0, torch.zeros_like(p), torch.zeros(())
    optimizer.mine[0].lone = torch.zeros_like(optimizer.mine[0])
    assert kept_states.adopt(optimizer)
    names = {name for state in kept_states.states_of(optimizer).values() for name in state}
    assert names == {f"param.{optimizer.masters}", f"param.{optimizer.momenta}"}


def test_what_a_rule_can_do_without_stays_an_attribute() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.begin = [weight.detach().clone()]  # type: ignore[attr-defined]
    assert find_rule(optimizer, 0, 2, shape=(8, 8)).kind is Kind.elementwise
    assert dict(kept_states.states_of(optimizer)) == {}


class Swapping(Keeping):
    """What it keeps depends on chance."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for p, master in zip(self.mine, self.masters, strict=True):
            p.copy_(master + 1e-3 * torch.randn_like(master))


def test_where_that_does_not_help_the_first_reason_is_given_and_nothing_is_taken_for_a_state() -> None:
    model = Net()
    optimizer = Swapping(model.parameters())
    rule = find_rule(optimizer, 0, 2, shape=(48, 48))
    assert rule.kind is Kind.unknown and "holds something per parameter outside optimizer.state" in rule.reason
    assert dict(kept_states.states_of(optimizer)) == {}


def test_a_copy_of_an_optimizer_is_another_one() -> None:
    model = Net(BF16)
    optimizer = Keeping(model.parameters())
    assert kept_states.adopt(optimizer) and not kept_states.adopt(optimizer)
    assert {name for state in kept_states.states_of(optimizer).values() for name in state} == {
        "self.masters",
        "self.momenta",
    }
    assert dict(kept_states.states_of(copy.deepcopy(optimizer))) == {}
    kept_states.let_go(optimizer)
    assert dict(kept_states.states_of(optimizer)) == {}
