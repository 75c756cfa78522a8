"""Rules bound to BF16 are replayed on scaled weights, against the same update in FP64; see bench/bf16/remainders.py for whole runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.bf16 import remainders as runs
from bench.planted.remainders import (
    KEEPING,
    LOSING,
    Dice,
    FusedSplit,
    Kahan,
    LowAdamW,
    Masters,
    OwnDice,
    Remainders,
    Split,
)
from update_watch.replay.absent import ReplayError
from update_watch.replay.rounding_scheme import Join, Scheme
from update_watch.replay.rule import Kind
from update_watch.replay.rule_kind import find_rule
from update_watch.replay.scaled_weights import ScaledWeights, exponent_of
from update_watch.replay.twin import Run, Twin

BF16 = torch.bfloat16
SCHEMES = {
    Split: Scheme("carried:mantissa", "mantissa", Join.low_bits),
    FusedSplit: Scheme("carried:mantissa", "mantissa", Join.low_bits),
    Remainders: Scheme("carried:master_param", "master_param", Join.signed_bits),
    Masters: Scheme("carried:master_param", "master_param", Join.master),
    Kahan: Scheme("carried:compensation", "compensation", Join.sum),
    Dice: Scheme("stochastic"),
    OwnDice: Scheme("stochastic"),
}


def params(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter((torch.randn(shape, generator=rng) * 0.5).to(BF16)) for shape in shapes]


@pytest.mark.parametrize("cls", KEEPING, ids=lambda cls: cls.__name__)
def test_what_completes_the_weight_is_found(cls: type[LowAdamW]) -> None:
    state = torch.get_rng_state()
    rule = find_rule(cls(params((64, 64))), 0, 2, shape=(64, 64), dtype=BF16)
    assert torch.equal(torch.get_rng_state(), state)
    assert rule.kind is Kind.elementwise, rule.reason
    assert rule.scaled is not None and rule.scaled.scheme == SCHEMES[cls]
    assert rule.element_states == {"exp_avg", "exp_avg_sq"} == rule.exact_states
    assert rule.may_draw == (cls in (Dice, OwnDice))


@pytest.mark.parametrize("cls", LOSING, ids=lambda cls: cls.__name__)
def test_what_is_made_for_the_remainder_and_not_used_completes_nothing(cls: type[LowAdamW]) -> None:
    rule = find_rule(cls(params((64, 64))), 0, 2, shape=(64, 64), dtype=BF16)
    assert rule.scaled is not None, rule.reason
    assert rule.scaled.scheme == Scheme("plain")


@pytest.mark.parametrize(
    ("lr", "weight_decay"),
    [(1e-3, 0.1), (1e-6, 0.0), *(pytest.param(*other, marks=pytest.mark.slow) for other in [(1e-3, 0.0), (1e-6, 0.1)])],
)
@pytest.mark.parametrize("cls", KEEPING, ids=lambda cls: cls.__name__)
def test_a_replay_is_the_update_in_fp64(cls: type[LowAdamW], lr: float, weight_decay: float) -> None:
    (p,) = params((4096,))
    optimizer = cls([p], lr=lr, weight_decay=weight_decay)
    rule = find_rule(optimizer, 0, 1, shape=(4096,), dtype=BF16)
    rng = torch.Generator().manual_seed(1)
    for _ in range(5):
        p.grad = torch.randn(4096, generator=rng).to(BF16)
        optimizer.step()
    grad = torch.randn(4096, generator=rng).to(BF16)
    state, scaled = dict(optimizer.state[p]), rule.scaled
    assert scaled is not None
    whole = optimizer.whole(p.detach(), state)
    true = runs.adamw(whole.double(), grad.double(), state, optimizer.param_groups[0])
    state.pop(scaled.scheme.carrier, None)
    given = {k: v.float() if isinstance(v, Tensor) else v for k, v in state.items()}
    before = p.detach().clone()
    result = Twin(optimizer).replay([Run(0, whole.clone(), grad.float(), given, scaled, rule.may_draw)])[0]
    assert torch.equal(p, before)
    moved = result.param.double() - whole.double()
    assert float((moved * true).sum() / true.square().sum()) == pytest.approx(1, abs=2e-3)
    # FP32 has 24 bits for weight and update together: what it cannot hold of the small one is no bias
    assert float((moved - true).norm() / true.norm()) < (0.01 if lr > 1e-4 else 0.05)


class Ratio(LowAdamW):
    """A trust ratio: the weight acts in another way than through decay."""

    def write(self, p: Tensor, state: dict[str, Any], w: Tensor, update: Tensor) -> None:
        p.copy_(w + update * (w.norm() / update.norm()))


class Clipped(LowAdamW):
    """Weights kept in a range."""

    def write(self, p: Tensor, state: dict[str, Any], w: Tensor, update: Tensor) -> None:
        p.copy_((w + update).clamp(-0.1, 0.1))


class Hidden(LowAdamW):
    """FP32 weights kept nowhere that a replay can see."""

    kept: dict[int, Tensor] = {}

    def write(self, p: Tensor, state: dict[str, Any], w: Tensor, update: Tensor) -> None:
        master = self.kept.setdefault(id(p), p.detach().float().clone())
        p.copy_(master.add_(update))


@pytest.mark.parametrize("cls", [Ratio, Clipped])
def test_rules_in_which_the_weight_acts_in_another_way_are_unknown(cls: type[LowAdamW]) -> None:
    rule = find_rule(cls(params((64, 64))), 0, 2, shape=(64, 64), dtype=BF16)
    assert rule.kind is Kind.unknown
    assert "is for BF16 weights" in rule.reason and "; and in its own format " in rule.reason


class SignOf(torch.optim.Optimizer):
    """Steps by the gradient's sign, written in BF16; decay has a name of its own, or is a number in the code."""

    def __init__(self, params: Any, is_named: bool, **settings: float) -> None:
        super().__init__(params, {"lr": 1e-3, **settings})
        self.is_named = is_named

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            decay = group["shrink"] if self.is_named else 0.5
            for p in group["params"]:
                p.copy_((p.float() * (1 - group["lr"] * decay) - group["lr"] * p.grad.float().sign()).to(BF16))


def test_decay_is_scaled_whatever_the_setting_is_called() -> None:
    rule = find_rule(SignOf(params((64, 64)), True, eps=1e-8, shrink=0.5), 0, 2, shape=(64, 64), dtype=BF16)
    assert rule.scaled is not None and rule.scaled.decays == ("shrink",), rule.reason
    rule = find_rule(SignOf(params((64, 64)), True, eps=1e-8, shrink=0.0), 0, 2, shape=(64, 64), dtype=BF16)
    assert rule.scaled is not None and rule.scaled.decays == (), rule.reason


def test_decay_that_is_no_setting_makes_a_rule_unknown() -> None:
    rule = find_rule(SignOf(params((64, 64)), False, eps=1e-8), 0, 2, shape=(64, 64), dtype=BF16)
    assert rule.kind is Kind.unknown and "SignOf decays weights by what is no setting of their group" in rule.reason


def test_a_remainder_kept_out_of_sight_is_not_called_plain() -> None:
    rule = find_rule(Hidden(params((64, 64))), 0, 2, shape=(64, 64), dtype=BF16)
    assert rule.scaled is None or rule.scaled.scheme == Scheme("carried")


def test_fp16_has_no_room() -> None:
    assert exponent_of(BF16) == 47
    with pytest.raises(ReplayError, match="no room to scale"):
        exponent_of(torch.float16)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)
def test_parted_weights_join_to_what_they_were(scheme: Scheme) -> None:
    whole = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    kinds = {Join.low_bits: torch.uint16, Join.signed_bits: torch.int16, Join.master: torch.float32, Join.sum: BF16}
    scaled = ScaledWeights(BF16, 47, scheme, state_dtypes={scheme.carrier: kinds[scheme.join]}, keeps_others=False)
    weight, _, state = scaled.stored(whole, None, {})
    exact = {Join.sum: 2.0**-16}.get(scheme.join, 0.0) if scheme.carrier else 2.0**-8
    back = scaled.whole(weight, state) * 2.0**47
    assert bool(((back - whole).abs() <= exact * whole.abs()).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*runs.KEPT, *runs.LOST])
def test_whole_runs_are_measured_as_in_fp64_and_judged_by_what_is_kept(name: str) -> None:
    make, whole = (runs.KEPT | runs.LOST)[name]
    lr = runs.RARE if "ice" in name or "stoch" in name else 1e-5
    reports, truth = runs.train(make, whole, lr, 0, 1, 3 * runs.WINDOW)
    for t in reports[-1].tensors:
        # steps of a loop's masters arrive; what the loop makes of them is told by the verdict
        expected = 1.0 if name == "LostOutsideMasters" else truth[t.name]
        assert t.efficiency == pytest.approx(expected, abs=runs.BAR), t.name
    found = {str(t.health) for r in reports for t in r.tensors if name in runs.KEPT or t.name.endswith("norm.weight")}
    assert found == {"healthy" if name in runs.KEPT else "stalled"}


@pytest.mark.slow
def test_rounded_moments_beside_split_weights_are_judged_as_those_of_others() -> None:
    def make(given: Any, lr: float) -> Any:
        return FusedSplit(given, lr=lr, betas=(0.9, 0.999))

    _, whole = runs.KEPT["FusedSplit"]
    reports, _ = runs.train(make, whole, 1e-4, 0, 1, 3 * runs.WINDOW)
    for t in reports[-1].tensors:
        assert t.state_factor is not None and 0.5 < t.state_factor < 2, t.name
        assert t.accumulators["exp_avg"].efficiency == pytest.approx(1, abs=0.1)
        # 1 - beta2 is below half a gap of BF16: it can only grow
        assert str(t.accumulators["exp_avg_sq"].health) in ("stalled", "stalling"), t.name
