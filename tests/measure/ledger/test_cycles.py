"""What is left of what the steps applied from one write to the next: by design the same share, by mistake next to nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from tests.measure.ledger import writes_between_steps
from tests.measure.ledger.writes_between_steps import WINDOW, Between, adamw, kept, put, sgd
from tests.support.watch_nets import Net
from update_watch.report import Cause, Health, Report

BAD = (Health.stalled, Health.stalling)


def run(
    make: Callable[[Net], Between],
    windows: int,
    rule: Callable[[Any], Optimizer] = adamw,
    dtype: torch.dtype = torch.float32,
) -> list[Report]:
    return writes_between_steps.run(make, windows * WINDOW, rule, dtype, first=1, budget=None)


def lookahead(every: int, share: float) -> Callable[[nn.Module], Between]:
    """The slow weights take `share` of the way of the fast ones, which go on from there."""

    def make(model: nn.Module) -> Between:
        slow = [value.float() for value in kept(model)]

        def between(i: int, model: nn.Module) -> None:
            if i % every == 0:
                for s, p in zip(slow, model.parameters(), strict=True):
                    s.lerp_(p.float(), share)
                put(model, slow)

        return between

    return make


def average_left(every: int, decay: float) -> Callable[[nn.Module], Between]:
    def make(model: nn.Module) -> Between:
        average = kept(model)

        def between(i: int, model: nn.Module) -> None:
            for a, p in zip(average, model.parameters(), strict=True):
                a.lerp_(p, 1 - decay)
            if i % every == 0:
                put(model, average)

        return between

    return make


def restored(every: int, until: int = 10**9) -> Callable[[nn.Module], Between]:
    def make(model: nn.Module) -> Between:
        first = kept(model)
        return lambda i, model: put(model, first) if i % every == 0 and i <= until else None

    return make


@pytest.mark.parametrize("rule", [adamw, sgd])
@pytest.mark.parametrize(("every", "share"), [(10, 0.2), (10, 0.1), (5, 0.5)])
def test_lookahead_is_no_alarm_and_its_share_is_said(
    every: int, share: float, rule: Callable[[Any], Optimizer]
) -> None:
    reports = run(lookahead(every, share), 7, rule)
    assert not [alert for report in reports for alert in report.alerts]
    for report in reports[2:7]:
        for t in report.tensors:
            assert t.health is Health.healthy
            # FP32 and nothing between: no further from it than replay rounds
            assert t.net_efficiency == pytest.approx(share, rel=0.02)
            said = f"{1 - share:.0%} of what its steps apply is taken back"
            assert (said in t.advice) == (share < 0.25), t.advice


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_lookahead_of_bf16_weights_is_no_accusation(share: float) -> None:
    for report in run(lookahead(10, share), 6, dtype=torch.bfloat16):
        assert not [t for t in report.tensors if t.cause is Cause.overwritten and t.health in BAD]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_that_is_left_in_the_model_is_overwritten(dtype: torch.dtype) -> None:
    report = run(average_left(8, 0.998), 2, dtype=dtype)[-1]
    moving = [t for t in report.tensors if t.cause is not Cause.weight_rounding]
    assert len(moving) >= 3
    assert {(t.health in BAD, t.cause) for t in moving} == {(True, Cause.overwritten)}


def test_an_average_of_which_a_tenth_stays_is_not_taken_for_lookahead() -> None:
    report = run(average_left(20, 0.99), 4)[-1]
    assert {(t.health in BAD, t.cause) for t in report.tensors} == {(True, Cause.overwritten)}


@pytest.mark.parametrize("every", [25, 50, pytest.param(60, marks=pytest.mark.slow)])
def test_what_is_restored_seldom_stays_told(every: int) -> None:
    reports = run(restored(every), 24)
    told = [{t.cause for t in report.tensors} == {Cause.overwritten} for report in reports]
    first = told.index(True)
    assert first * WINDOW <= 2.5 * every
    assert all(told[first:])


def test_what_is_no_longer_restored_is_acquitted() -> None:
    reports = run(restored(4, until=40), 7)
    assert {t.cause for t in reports[1].tensors} == {Cause.overwritten}
    assert {t.health for t in reports[-1].tensors} == {Health.healthy}
