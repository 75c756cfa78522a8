"""Gradients arrive and no optimizer steps: said once, and whether the weights move is in the report."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import update_watch as uw
from tests.support.watch_nets import Net, backward, batches
from update_watch.report import Report

WINDOW = 8


def by_hand(model: nn.Module) -> Callable[[], None]:
    def update() -> None:
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p.sub_(p.grad, alpha=1e-3)
                p.grad = None

    return update


class OtherName(torch.optim.SGD):
    @torch.no_grad()
    def first_step(self) -> None:
        torch.optim.SGD.step.__wrapped__(self)  # type: ignore[attr-defined]  # the rule without the hooks
        self.zero_grad()


def in_hooks(model: nn.Module) -> Callable[[], None]:
    """The rule runs in the backward pass and leaves no gradient."""

    def rule(p: torch.Tensor) -> None:
        assert p.grad is not None
        with torch.no_grad():
            p.sub_(p.grad, alpha=1e-3)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(rule)  # type: ignore[no-untyped-call]
    return lambda: None


def other_name(model: nn.Module) -> Callable[[], None]:
    return OtherName(model.parameters(), lr=1e-3).first_step


def stepped(model: nn.Module) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return update


def accumulating(model: nn.Module) -> Callable[[], None]:
    """32 micro-batches to a step."""
    optimizer, count = torch.optim.SGD(model.parameters(), lr=1e-3), [0]

    def update() -> None:
        count[0] += 1
        if count[0] % 32 == 0:
            optimizer.step()
            optimizer.zero_grad()

    return update


def elsewhere_and_never_zeroed(model: nn.Module) -> Callable[[], None]:
    """The optimizer was made for another model of other values, and sets that one's gradients to zero."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return update


def run(make: Callable[[nn.Module], Callable[[], None]], passes: int = 40) -> tuple[list[str], Report | None, Net]:
    model = Net()
    update = make(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with uw.watch(model, window=WINDOW) as watch:
            for x in batches(passes):
                backward(model, x)
                update()
            report = watch.flush()
    return [str(w.message) for w in caught if "update-watch" in str(w.message)], report, model


@pytest.mark.parametrize("make", [by_hand, in_hooks, other_name])
def test_a_rule_that_hooks_do_not_see_is_said_once_and_that_the_weights_move(
    make: Callable[[nn.Module], Callable[[], None]],
) -> None:
    texts, report, _ = run(make)
    assert len(texts) == 1 and "never seen in 8 backward passes" in texts[0]
    assert report is not None and "never" in report.headline
    assert {t.health for t in report.tensors} == {uw.Health.unknown}
    assert all("moved by" in t.advice for t in report.tensors)


def test_what_steps_did_before_a_silence_is_reported_too_and_before_it() -> None:
    """Gradients that are looked at when training is over, say; each is reported once."""
    model, seen = Net(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps, passes = WINDOW // 2, 2 * WINDOW - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with uw.watch(model, optimizer, window=WINDOW, budget=None, sinks=[seen.append]) as watch:
            for t, x in enumerate(batches(steps + passes)):
                backward(model, x)
                if t < steps:
                    optimizer.step()
                model.zero_grad()
            watch.flush()
            watch.flush()
    (of_steps,) = [report for report in seen if report.window == steps]
    assert all(t.efficiency is not None for t in of_steps.tensors)
    silent = [report for report in seen if "never seen" in report.headline]
    assert len(seen) == 1 + len(silent) == 3 and seen[-1] is silent[-1]


def test_where_no_bit_moves_that_is_said() -> None:
    texts, report, _ = run(lambda model: lambda: model.zero_grad())
    assert len(texts) == 1 and report is not None
    assert all("not one sampled bit" in t.advice for t in report.tensors)


def test_gradients_that_nobody_sets_to_zero_are_no_micro_batches_where_another_optimizer_steps() -> None:
    texts, report, _ = run(elsewhere_and_never_zeroed)
    assert len(texts) == 1 and "AdamW steps 4 tensors that are not the model's" in texts[0]
    assert report is not None and all("not one sampled bit" in t.advice for t in report.tensors)


def skipping_the_last(model: nn.Module) -> Callable[[], None]:
    """As a gradient scaler does where gradients overflow."""
    optimizer, count = torch.optim.SGD(model.parameters(), lr=1e-3), [0]

    def update() -> None:
        count[0] += 1
        if count[0] <= 61:
            optimizer.step()
        optimizer.zero_grad()

    return update


@pytest.mark.parametrize("make", [stepped, accumulating, skipping_the_last])
def test_where_an_optimizer_steps_nothing_is_said(make: Callable[[nn.Module], Callable[[], None]]) -> None:
    texts, report, _ = run(make, 64)
    assert texts == []
    assert report is not None and report.window > 0


def test_an_optimizer_that_steps_something_else_is_named() -> None:
    def make(model: nn.Module) -> Callable[[], None]:
        other = copy.deepcopy(model)
        optimizer: Optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)  # loaded since

        def update() -> None:
            optimizer.step()
            model.zero_grad()

        return update

    texts, _, _ = run(make)
    assert len(texts) == 1 and "AdamW steps 4 tensors that are not the model's" in texts[0]


def test_training_that_is_silent_is_the_same_to_the_bit() -> None:
    model = Net()
    update = by_hand(model)
    for x in batches(40):
        backward(model, x)
        update()
    _, _, watched = run(by_hand)
    for a, b in zip(model.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
