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
from update_watch.report import Cause, Health, Report

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
    assert len(seen) == 1 + len(silent) == 3 and seen[0] is of_steps


# --- steps that are skipped, as gradients are not finite -------------------------------------------------------

Skips = Callable[[nn.Module, torch.optim.Optimizer], Callable[[torch.Tensor], None]]
FINITE_UNTIL = 3 * WINDOW  # steps


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[torch.Tensor], None]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def step(loss: torch.Tensor) -> None:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def checked_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[torch.Tensor], None]:
    def step(loss: torch.Tensor) -> None:
        loss.backward()
        if all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None):
            optimizer.step()

    return step


def clipped_with_an_error(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[torch.Tensor], None]:
    def step(loss: torch.Tensor) -> None:
        loss.backward()
        try:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        except RuntimeError:
            return
        optimizer.step()

    return step


def train_with_skips(make: Skips, steps: int, overflows: Callable[[int], bool]) -> list[Report]:
    """The loss of the steps that overflow is infinite."""
    torch.manual_seed(0)
    model, seen = Net(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = make(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with uw.watch(model, optimizer, window=WINDOW, budget=None, sinks=[seen.append]):
            for t, x in enumerate(batches(steps)):
                optimizer.zero_grad()
                loss = model(x).square().mean()
                step(loss * 1e38 * 1e38 if overflows(t) else loss)
    return seen


@pytest.mark.parametrize("make", [scaled, checked_by_hand, clipped_with_an_error])
@pytest.mark.parametrize("begin", [0, FINITE_UNTIL + 2])
def test_steps_that_are_skipped_for_ever_are_told_with_their_cause(make: Skips, begin: int) -> None:
    seen = train_with_skips(make, begin + 6 * WINDOW + 3, lambda t: t >= begin)
    titles = [alert.title for report in seen for alert in report.alerts]
    assert titles == ["NOTHING TRAINS"]
    last = seen[-1]
    assert (last.health, {t.cause for t in last.tensors}) == (Health.idle, {Cause.skipped_steps})
    assert "every step is skipped" in last.headline and "a check of one's own" in last.headline
    assert "look for NaN or overflow in the loss" in last.tensors[0].advice
    assert last.skipped_steps > 0


@pytest.mark.parametrize("make", [scaled, checked_by_hand])
def test_a_few_skips_at_the_start_are_silent(make: Skips) -> None:
    seen = train_with_skips(make, 5 * WINDOW, lambda t: t < 5)
    assert seen and not [alert for report in seen for alert in report.alerts]
    assert all(report.health is Health.healthy and not report.skipped_steps for report in seen)


def test_a_silence_in_which_some_gradients_are_finite_is_none_of_skipped_steps() -> None:
    """Gradients that are looked at when training is over; one of them is infinite."""

    def none(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[torch.Tensor], None]:
        return lambda loss: loss.backward()

    seen = train_with_skips(none, 6 * WINDOW, lambda t: t % 4 != 0)
    assert seen and all(not report.skipped_steps and "never seen" in report.headline for report in seen)


def test_what_goes_wrong_in_looking_at_gradients_ends_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such operator here")

    monkeypatch.setattr(torch, "_foreach_norm", fails)
    seen = train_with_skips(checked_by_hand, 6 * WINDOW, lambda _: True)
    assert seen and not any(report.skipped_steps for report in seen) and seen[-1].health is Health.unknown


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
