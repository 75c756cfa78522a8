"""Optimizers that keep what BF16 weights cannot hold in a state made for BF16 alone: split weights, FP32 masters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import update_watch as uw
from tests.support.watch_nets import Net, backward, batches
from update_watch import formats
from update_watch.replay.rounding_scheme import Join, Scheme, find_scheme
from update_watch.report import Report

BF16 = torch.bfloat16


class Remembering(torch.optim.Optimizer):
    """SGD with momentum in FP32 arithmetic; what becomes of the new BF16 weight is up to `store`."""

    def __init__(self, params: Any, lr: float = 0.02, **settings: Any) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.9, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
                momentum = state["momentum"].mul_(group["momentum"]).add_(p.grad.float())
                if p.dtype is BF16:
                    self.store(p, state, self.direction(momentum).mul(-group["lr"]))
                else:
                    p.add_(self.direction(momentum), alpha=-group["lr"])

    def direction(self, momentum: Tensor) -> Tensor:
        return momentum

    def store(self, p: Tensor, state: dict[str, Any], update: Tensor) -> None:
        raise NotImplementedError


def bits(p: Tensor) -> Tensor:
    return p.view(torch.int16).to(torch.int32) << 16


class Split(Remembering):
    """The upper 16 bits in the parameter, the lower ones in the state, as in modded-nanogpt."""

    def store(self, p: Tensor, state: dict[str, Any], update: Tensor) -> None:
        if "mantissa" not in state:
            state["mantissa"] = torch.zeros_like(p, dtype=torch.uint16)
        whole = (bits(p) | state["mantissa"].to(torch.int32)).view(torch.float32) + update
        state["mantissa"].copy_((whole.view(torch.int32) & 0xFFFF).to(torch.uint16))
        p.copy_((whole.view(torch.int32) & ~0xFFFF).view(torch.float32))


class Remainder(Remembering):
    """The weight rounded to nearest, a signed remainder in the state, as in Transformer Engine's FusedAdam."""

    def store(self, p: Tensor, state: dict[str, Any], update: Tensor) -> None:
        if "remainder" not in state:
            state["remainder"] = torch.zeros_like(p, dtype=torch.int16)
        whole = (bits(p) + state["remainder"].to(torch.int32)).view(torch.float32) + update
        rounded = (whole.view(torch.int32) + 0x8000) & ~0xFFFF
        state["remainder"].copy_(whole.view(torch.int32) - rounded)
        p.copy_(rounded.view(torch.float32))


class Master(Remembering):
    """FP32 weights in the state, as in Apex and Transformer Engine."""

    def store(self, p: Tensor, state: dict[str, Any], update: Tensor) -> None:
        if "master_param" not in state:
            state["master_param"] = p.float().clone()
        p.copy_(state["master_param"].add_(update))


class SplitAdam(Split):
    """Both moments in the parameter's dtype; whether a weight is split, its state says, not its dtype."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                    if p.dtype is BF16:
                        state["mantissa"] = torch.zeros_like(p, dtype=torch.uint16)
                state["step"] += 1
                mean = state["exp_avg"].float().lerp_(p.grad.float(), 0.1)
                square = state["exp_avg_sq"].float().lerp_(p.grad.float().square(), 0.001)
                state["exp_avg"].copy_(mean)
                state["exp_avg_sq"].copy_(square)
                size = group["lr"] / (1 - 0.9 ** state["step"]) * (1 - 0.999 ** state["step"]) ** 0.5
                update = mean / (square.sqrt() + 1e-12) * -size
                if "mantissa" in state:
                    self.store(p, state, update)
                else:
                    p.add_(update)


class Normed(Split):
    """Updates of the gradient's size over the whole tensor: no rule for single elements."""

    def direction(self, momentum: Tensor) -> Tensor:
        return momentum / (1e-12 + momentum.norm())


class Always(Split):
    """The state is made for FP32 weights as well, where it stays empty."""

    def direction(self, momentum: Tensor) -> Tensor:
        for state in self.state.values():
            if "mantissa" not in state:
                state["mantissa"] = torch.zeros_like(momentum, dtype=torch.uint16)
        return momentum


class Forgetful(Split):
    """Broken: the lower bits are written and never read."""

    def store(self, p: Tensor, state: dict[str, Any], update: Tensor) -> None:
        state["mantissa"] = torch.zeros_like(p, dtype=torch.uint16)
        super().store(p, state, update)


class AlwaysForgetful(Always, Forgetful):
    """Both."""


class Useless(Split):
    """Broken: the state is there, the weight is rounded all the same."""

    def store(self, p: Tensor, state: dict[str, Any], update: Tensor) -> None:
        state.setdefault("mantissa", torch.zeros_like(p, dtype=torch.uint16))
        p.copy_(p.float() + update)


class Uncopied(Master):
    """Broken: the masters go on, the weights stay."""

    def store(self, p: Tensor, state: dict[str, Any], update: Tensor) -> None:
        if "master_param" not in state:
            state["master_param"] = p.float().clone()
        state["master_param"].add_(update)


def train(cls: type[Remembering], steps: int = 48, change: Any = None, **settings: Any) -> list[Report]:
    """Reports of windows of 16 steps; `change(optimizer)` is called in the middle."""
    model = Net(BF16)
    optimizer = cls(model.parameters(), **settings)
    found: list[Report] = []
    with uw.watch(model, optimizer, window=16, sinks=[found.append]) as watch:
        for t, x in enumerate(batches(steps, BF16)):
            if t == steps // 2 and change is not None:
                change(optimizer)
            model.zero_grad()
            backward(model, x)
            optimizer.step()
        watch.flush()
    return found


def healths(report: Report) -> set[str]:
    return {str(t.health) for t in report.tensors}


def scheme_of(cls: type[Remembering]) -> Scheme:
    return find_scheme(cls(Net(BF16).parameters()), 0, BF16, 2)


KEPT = {
    Split: Scheme("carried:mantissa", "mantissa", Join.low_bits),
    Remainder: Scheme("carried:remainder", "remainder", Join.signed_bits),
    Master: Scheme("carried:master_param", "master_param", Join.master),
    Normed: Scheme("carried:mantissa", "mantissa", Join.low_bits),
    SplitAdam: Scheme("carried:mantissa", "mantissa", Join.low_bits),
    Always: Scheme("carried:mantissa", "mantissa", Join.low_bits),
}


@pytest.mark.parametrize("lr", [0.02, 2e-4])
@pytest.mark.parametrize("cls", KEPT, ids=lambda cls: cls.__name__)
@pytest.mark.slow
def test_weights_that_are_whole_with_their_state_are_healthy_and_take_all_of_every_update(cls: Any, lr: float) -> None:
    assert scheme_of(cls) == KEPT[cls]
    reports = train(cls, lr=lr)
    assert [healths(r) for r in reports] == [{"healthy"}] * 3
    for t in (t for r in reports for t in r.tensors):
        assert (t.efficiency, t.displacement_efficiency) == (pytest.approx(1, abs=1e-4), pytest.approx(1, abs=1e-4))
        assert t.lost_fraction == pytest.approx(0, abs=0.01)
        assert t.scheme == KEPT[cls].name


@pytest.mark.parametrize("lr", [2e-4, 2e-5])
@pytest.mark.parametrize("cls", [Forgetful, Useless, Uncopied, AlwaysForgetful], ids=lambda cls: cls.__name__)
@pytest.mark.slow
def test_a_state_that_is_there_and_not_used_heals_nothing(cls: Any, lr: float) -> None:
    assert not scheme_of(cls).name.startswith("carried")
    norms = [t for t in train(cls, lr=lr)[-1].tensors if t.name == "norm.weight"]
    assert {str(t.health) for t in norms} <= {"unknown", "stalling", "stalled"}


def test_rounded_moments_of_split_weights_are_judged_as_those_of_others() -> None:
    last = train(SplitAdam, lr=2e-4)[-1]
    for t in last.tensors:
        assert t.state_factor == pytest.approx(1, abs=0.02)
        assert {name: str(a.health) for name, a in t.accumulators.items()} == {
            "exp_avg": "healthy",
            "exp_avg_sq": "stalled",  # beta2 = 0.999 in BF16
        }


def test_low_bits_thrown_away_during_training_are_missed() -> None:
    def forget(optimizer: Any) -> None:
        optimizer.__class__ = Forgetful

    reports = train(Split, lr=2e-4, steps=96, change=forget)
    assert [healths(r) for r in reports[:3]] == [{"healthy"}] * 3
    assert healths(reports[-1]) == {"unknown"}
    assert all("of the intended update, which rounding does not explain" in t.advice for t in reports[-1].tensors)


def test_weights_that_are_no_longer_those_of_their_masters_are_stalled() -> None:
    def uncopy(optimizer: Any) -> None:
        optimizer.__class__ = Uncopied

    reports = train(Master, lr=0.02, steps=96, change=uncopy)
    assert [healths(r) for r in reports[:3]] == [{"healthy"}] * 3
    assert healths(reports[-1]) == {"stalled"}


@pytest.mark.parametrize("cls", KEPT, ids=lambda cls: cls.__name__)
def test_training_is_the_same_to_the_bit_where_weights_are_joined(cls: Any) -> None:
    ends = []
    for watched in (False, True):
        model = Net(BF16)
        optimizer = cls(model.parameters())
        watch = uw.watch(model, optimizer, window=4) if watched else None
        state = torch.get_rng_state()
        for x in batches(10, BF16):
            model.zero_grad()
            backward(model, x)
            optimizer.step()
        if watch is not None:
            watch.close()
        assert torch.equal(state, torch.get_rng_state())
        ends.append(
            [
                *model.parameters(),
                *(torch.as_tensor(v) for p in model.parameters() for v in optimizer.state[p].values()),
            ]
        )
    assert all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_joined_weights_are_those_that_were_parted() -> None:
    """Both ways of parting FP32 bits, for weights of either sign, at powers of two and around zero."""
    rng = torch.Generator().manual_seed(0)
    whole = torch.cat(
        [torch.randn(1000, generator=rng), torch.tensor([0.0, -0.0, 1.0, -2.0, 1e-40, 0.99999994, -1.0000001])]
    )
    raw = whole.view(torch.int32)
    cut = (raw & ~0xFFFF).view(torch.float32)
    low = (raw & 0xFFFF).float()
    rounded = (raw + 0x8000) & ~0xFFFF
    rest = (raw - rounded).float()
    for join, weight, state in ((Join.low_bits, cut, low), (Join.signed_bits, rounded.view(torch.float32), rest)):
        assert torch.equal(weight, weight.bfloat16().float())
        assert torch.equal(Scheme("", "", join).joined(weight, state, formats.BF16).view(torch.int32), raw)


def test_a_master_counts_only_where_the_weight_is_its_own() -> None:
    weight = torch.tensor([1.0, 1.0, -3.0, 0.0, 0.0])
    master = torch.tensor([1.003, 1.02, -2.99, 0.0, 0.5])
    joined = Scheme("", "", Join.master).joined(weight, master, formats.BF16)
    assert joined.tolist() == pytest.approx([1.003, 1.0, -2.99, 0.0, 0.0])
    late = Scheme("", "", Join.master, is_late=True).joined(weight, master, formats.BF16)
    assert late.tolist() == pytest.approx([1.003, 1.02, -2.99, 0.0, 0.5])
