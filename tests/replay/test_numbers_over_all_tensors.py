"""Rules with a number over all tensors: kept in the group from the first step on, or found anew in each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import update_watch as uw
from tests.support.replay.sketched_rules import Sketch, Update, descend, probed
from update_watch.measure import parameters, step_replay
from update_watch.replay.rounding_scheme import Scheme
from update_watch.replay.rule import Kind
from update_watch.replay.rule_kind import find_rule
from update_watch.replay.twin import Twin
from update_watch.report import Health

SHAPES = ((24, 16), (40,))


def over_all(optimizer: Sketch, of: Callable[[torch.nn.Parameter], Tensor]) -> float:
    return math.sqrt(sum(float(of(p).double().square().sum()) for g in optimizer.param_groups for p in g["params"]))


def clip(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
    """By the norm of all gradients, those of the other groups too, and the limit of the first group."""
    norm = over_all(optimizer, lambda p: p.grad)
    for p in params:
        descend(group, p, p.grad.float() * min(1.0, optimizer.param_groups[0]["limit"] / (norm + 1e-12)))


def first_norm(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
    """Momentum in units of the first step's norm over all tensors."""
    if "scale" not in group:
        group["scale"] = 1 / (over_all(optimizer, lambda p: p.grad) + 1e-12)
    for p in params:
        sum_ = optimizer.state[p].setdefault("sum", torch.zeros_like(p, dtype=torch.float32))
        descend(group, p, sum_.mul_(0.9).add_(p.grad.float(), alpha=group["scale"]))


def trained(
    update: Update, steps: int = 12, watched: bool = True, lr: float = 0.05, dtype: torch.dtype = torch.float32
) -> Any:
    """Parameters in two groups behind one without any; the report, the true efficiencies, the parameters."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    groups = [{"params": [], "limit": 0.1}, {"params": params[:1]}, {"params": params[1:], "lr": lr / 4}]
    optimizer = Sketch(groups, update, lr=lr, limit=9.9)
    watch = (
        uw.watch([(str(i), p) for i, p in enumerate(params)], optimizer, window=10**9, budget=None) if watched else None
    )
    sums = [[0.0, 0.0] for _ in params]
    for _ in range(steps):
        for i, p in enumerate(params):
            p.grad = (torch.randn(p.shape) * 2.0**i).to(dtype)
        rates = [lr, lr / 4]
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))
        wanted = [-rate * p.grad.double() * min(1.0, 0.1 / norm) for p, rate in zip(params, rates, strict=True)]
        before = [p.detach().double() for p in params]
        optimizer.step()
        for sum_, p, old, want in zip(sums, params, before, wanted, strict=True):
            sum_[0] += float(((p.detach().double() - old) * want).sum())
            sum_[1] += float(want.square().sum())
    report = None
    if watch is not None:
        with watch:
            report = watch.flush()
    return report, [dot / want for dot, want in sums], params


def test_what_a_rule_makes_of_all_tensors_is_measured_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "find_scheme", lambda *_: Scheme("plain"))  # as it is; it takes most of the time
    report, truth, params = trained(clip, dtype=torch.bfloat16)
    for tensor, true in zip(report.tensors, truth, strict=True):
        assert tensor.efficiency == pytest.approx(true, abs=1e-3), (tensor.name, tensor.advice)
    assert min(truth) < 0.5  # something was lost, or anything would agree
    _, _, alone = trained(clip, watched=False, dtype=torch.bfloat16)
    assert all(map(torch.equal, params, alone))


def all_unknown_because() -> str:
    """The reason why nothing is known of a training that needs all tensors together."""
    report, _, _ = trained(clip, steps=4)
    assert {t.health for t in report.tensors} == {Health.unknown}
    return report.tensors[0].advice


def test_tensors_too_many_to_be_replayed_together_are_unknown_with_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parameters, "WHOLE_LIMIT", 400)
    reason = "needs all tensors of its optimizer together, and 424 elements are over the limit of 400"
    assert reason in all_unknown_because()


def test_weights_in_two_parts_are_not_replayed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "find_scheme", lambda *_: Scheme("carried:rest", "rest"))
    reason = "needs all tensors of its optimizer together, and a part of each weight is in 'rest'"
    assert reason in all_unknown_because()


def test_what_is_too_much_for_each_step_is_replayed_in_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    every, seldom = [], []
    for per_step, steps in ((2**22, every), (142, seldom)):  # of 424 elements
        calls: list[int] = []
        real = step_replay._replay_together

        def counted(*args: Any, calls: list[int] = calls, real: Any = real, **options: Any) -> Any:
            calls.append(1)
            return real(*args, **options)

        monkeypatch.setattr(step_replay, "_WHOLE_PER_STEP", per_step)
        monkeypatch.setattr(step_replay, "_replay_together", counted)
        report, _, _ = trained(clip, steps=12)
        monkeypatch.undo()
        steps += calls
        assert all(t.efficiency is not None for t in report.tensors)
    assert (len(every), len(seldom)) == (12, 4)


def test_a_number_that_the_first_step_leaves_in_the_group_is_taken_from_there() -> None:
    rule = probed(first_norm)
    assert rule.kind is Kind.elementwise and rule.skips_first, rule.reason
    report, _, _ = trained(first_norm, lr=1e-4, dtype=torch.bfloat16)
    assert all(t.efficiency is not None and t.efficiency < 0.9 for t in report.tensors)

    def without_state(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        group.setdefault("scale", 1 / (over_all(optimizer, lambda p: p.grad) + 1e-12))
        for p in params:
            descend(group, p, p.grad * group["scale"])

    assert probed(without_state).kind is Kind.together  # nothing tells its first step from the others


def test_numbers_that_parameters_begin_with_are_each_its_own() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for p in params:
            square = optimizer.state[p].setdefault("square", torch.zeros(()))
            square.lerp_(p.grad.square().mean(), 0.1)
            descend(group, p, p.grad / (square.sqrt() + 1e-8))

    optimizer = Sketch([torch.nn.Parameter(torch.randn(9)) for _ in range(2)], update)
    for _ in range(2):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn(9)
        optimizer.step()
    assert find_rule(optimizer, 0, 1, shape=(9,)).kind is Kind.whole


def test_dice_of_a_generator_of_its_own_are_known_of_all_tensors_and_named_where_they_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def noisy(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for p in params:
            descend(group, p, p.grad + torch.randn(p.shape, generator=optimizer.dice) * 0.1)  # type: ignore[attr-defined]

    optimizer = Sketch([torch.nn.Parameter(torch.zeros(9)) for _ in range(2)], noisy)
    optimizer.dice = torch.Generator().manual_seed(3)  # type: ignore[attr-defined]
    state = optimizer.dice.get_state()  # type: ignore[attr-defined]
    assert find_rule(optimizer, 0, 1, shape=(9,)).kind is Kind.together
    assert torch.equal(optimizer.dice.get_state(), state)  # type: ignore[attr-defined]
    monkeypatch.setattr(Twin, "replay_together", lambda *_, **__: 1 / 0)
    reason = find_rule(optimizer, 0, 1, shape=(9,)).reason
    assert reason.startswith(
        "Sketch draws random numbers from a generator of its own, and a replay of less than all tensors"
    )


def test_numbers_in_the_weights_format_are_widened_with_it() -> None:
    def fading(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for p in params:
            rate = optimizer.state[p].setdefault("rate", torch.ones((), dtype=p.dtype))
            rate.lerp_(torch.full((), 0.25, dtype=p.dtype), 0.5)
            descend(group, p, p.grad * rate)

    params = [torch.nn.Parameter(torch.randn(16).bfloat16()) for _ in range(2)]
    optimizer = Sketch(params, fading, lr=0.5)
    with uw.watch([("a", params[0]), ("b", params[1])], optimizer, window=10**9, budget=None) as watch:
        for _ in range(6):
            for p in params:
                p.grad = torch.randn(16).bfloat16()
            optimizer.step()
        report = watch.flush()
    assert report is not None
    for t in report.tensors:
        assert t.efficiency == pytest.approx(1, abs=0.05), t.advice
