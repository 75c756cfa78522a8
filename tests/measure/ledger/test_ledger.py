"""What is written between steps: told from what the steps applied, and said only where progress is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import update_watch as uw
from tests.measure.ledger.writes_between_steps import WINDOW, Between, adamw, kept, put, run, sgd
from tests.support.watch_nets import Net, backward, batches
from update_watch.report import Cause, Health, Report

# --- faults --------------------------------------------------------------------------------------


def restored(every: int) -> Callable[[Net], Between]:
    """A checkpoint of the beginning is loaded again and again."""

    def make(model: Net) -> Between:
        first = kept(model)
        return lambda i, model: put(model, first) if i % every == every - 1 else None

    return make


def average_left(every: int, decay: float = 0.999) -> Callable[[Net], Between]:
    """Validation copies the average into the model and leaves it there."""

    def make(model: Net) -> Between:
        average = kept(model)

        def between(i: int, model: nn.Module) -> None:
            for a, p in zip(average, model.parameters(), strict=True):
                a.lerp_(p, 1 - decay)
            if i % every == every - 1:
                put(model, average)

        return between

    return make


def on_a_grid(model: Net) -> Between:
    """Weights are rounded after every step: the first time moves them further than steps can, then nothing does."""

    def between(i: int, model: nn.Module) -> None:
        for p in model.parameters():
            p.copy_((p * 32).round() / 32)

    return between


OVERWRITTEN: dict[str, tuple[Callable[[Net], Between], int]] = {
    "each step": (restored(1), 2),
    "every 5": (restored(5), 2),
    "average, 4": (average_left(4), 2),
    "average, 7": (average_left(7), 2),
    "every window": (restored(WINDOW), 7),
    "every 24": (restored(24), 7),
    "average, every window": (average_left(WINDOW), 7),
    "grid": (on_a_grid, 3),
}
# the ledger knows nothing of rules: by default each way of throwing away is met with one of them, the first two with both
SELDOM = (
    "average, 4-sgd",
    "average, 7-adamw",
    "every window-adamw",
    "every 24-sgd",
    "average, every window-sgd",
    "grid-adamw",
)


@pytest.mark.parametrize(
    ("make", "windows", "rule"),
    [
        pytest.param(*given, rule, id=case, marks=[pytest.mark.slow] * (case in SELDOM))
        for name, given in OVERWRITTEN.items()
        for rule in (adamw, sgd)
        for case in [f"{name}-{rule.__name__}"]
    ],
)
def test_progress_that_is_thrown_away_between_steps_is_overwritten(
    make: Callable[[Net], Between], windows: int, rule: Callable[[Any], Optimizer]
) -> None:
    report = run(make, windows * WINDOW, rule)[windows - 1]
    assert {t.name: (t.health in (Health.stalled, Health.stalling), t.cause) for t in report.tensors} == {
        t.name: (True, Cause.overwritten) for t in report.tensors
    }
    assert all("overwritten" in t.advice for t in report.tensors)
    assert report.health is not Health.healthy


def test_what_is_thrown_away_from_some_step_on_is_overwritten_however_far_it_got_before() -> None:
    def make(model: Net) -> Between:
        begin, left = 4 * WINDOW, average_left(2)
        later: list[Between] = []

        def between(i: int, model: nn.Module) -> None:
            if i == begin:
                later.append(left(model))  # type: ignore[arg-type]
            if later:
                later[0](i, model)

        return between

    reports = run(make, 6 * WINDOW, sgd)
    assert {t.cause for t in reports[3].tensors} == {None}
    assert {t.cause for t in reports[5].tensors} == {Cause.overwritten}


# --- healthy twins -------------------------------------------------------------------------------


def nothing(model: Net) -> Between:
    return lambda i, model: None


def swapped(model: Net) -> Between:
    average = kept(model)

    def between(i: int, model: nn.Module) -> None:
        for a, p in zip(average, model.parameters(), strict=True):
            a.lerp_(p, 0.001)
        if i % 4 == 3:
            mine = kept(model)
            put(model, average)
            put(model, mine)

    return between


def loaded_once(model: Net) -> Between:
    first = kept(model)
    return lambda i, model: put(model, first) if i == 20 else None


def clipped(model: Net) -> Between:
    def between(i: int, model: nn.Module) -> None:
        for p in model.parameters():
            p.clamp_(-0.1, 0.1)

    return between


def normalised(model: Net) -> Between:
    norms = [p.norm() for p in model.parameters()]

    def between(i: int, model: nn.Module) -> None:
        for p, norm in zip(model.parameters(), norms, strict=True):
            p.mul_(norm / p.norm())

    return between


def pruned(model: Net) -> Between:
    rng = torch.Generator().manual_seed(0)
    masks = [(torch.rand(p.shape, generator=rng) < 0.2).float() for p in model.parameters()]

    def between(i: int, model: nn.Module) -> None:
        for p, mask in zip(model.parameters(), masks, strict=True):
            p.mul_(mask)

    return between


def looked_ahead(model: Net) -> Between:
    """Every fifth step half of the way back, as Lookahead does."""
    slow = kept(model)

    def between(i: int, model: nn.Module) -> None:
        if i % 5 == 4:
            for s, p in zip(slow, model.parameters(), strict=True):
                s.lerp_(p, 0.5)
            put(model, slow)

    return between


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        pytest.param(make, rule, id=f"{rule.__name__}-{make.__name__}", marks=[pytest.mark.slow] * is_seldom)
        for make in (nothing, swapped, loaded_once, clipped, normalised, pruned, looked_ahead)
        for rule, is_seldom in ((adamw, False), (sgd, make not in (nothing, normalised)))
    ],
)
def test_what_is_written_by_design_is_no_accusation(
    make: Callable[[Net], Between], rule: Callable[[Any], Optimizer]
) -> None:
    reports = run(make, rule=rule)
    told = [t for report in reports for t in report.tensors if t.cause is Cause.overwritten]
    # where all elements that are read are pruned it is said what is seen of them
    assert not [t for t in told if make is not pruned or t.health is not Health.healthy]
    assert not [alert for report in reports for alert in report.alerts]
    written = {t.written_between != 0 for t in reports[1].tensors}
    assert written == {make not in (nothing, swapped)} or make is loaded_once


def outer_rounds(outer_lr: float) -> list[Report]:
    """DiLoCo: eight inner steps, the weights are put back, an outer rule steps on the difference."""
    reports: list[Report] = []
    model = Net()
    inner = adamw(model.parameters())
    outer = torch.optim.SGD(model.parameters(), lr=outer_lr, momentum=0.9, nesterov=True)
    begin = kept(model)
    with uw.watch(model, window=WINDOW, sinks=[reports.append]):
        for i, x in enumerate(batches(6 * WINDOW)):
            model.zero_grad()
            backward(model, x)
            inner.step()
            if i % 8 == 7:
                for p, start in zip(model.parameters(), begin, strict=True):
                    p.grad = start - p.detach()
                put(model, begin)
                outer.step()
                begin = kept(model)
    return reports


def test_what_an_outer_rule_brings_back_is_not_lost() -> None:
    report = outer_rounds(0.7)[-1]
    assert [t.name for t in report.tensors] == ["enter.weight", "enter.bias", "norm.weight", "leave.weight"]
    assert {t.health for t in report.tensors} == {Health.healthy}


def test_where_the_outer_rule_does_nothing_all_is_lost() -> None:
    report = [one for one in outer_rounds(0.0) if one.window == WINDOW][-1]
    assert {t.cause for t in report.tensors} == {Cause.overwritten}


class Adapted(nn.Module):
    """A frozen matrix with a low-rank adapter."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(48, 48, generator=rng) * 0.1, requires_grad=False)
        self.down = nn.Parameter(torch.randn(4, 48, generator=rng) * 0.1)
        self.up = nn.Parameter(torch.zeros(48, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight + self.up @ self.down).T


@pytest.mark.parametrize("is_merged", [True, False], ids=["merged", "only reset"])
def test_adapters_that_are_merged_and_reset_have_lost_nothing_and_reset_ones_have(is_merged: bool) -> None:
    model = nn.ModuleDict({"layer": Adapted()})
    layer: Any = model["layer"]
    start = layer.down.detach().clone()
    optimizer = adamw([layer.down, layer.up])
    with uw.watch(model, optimizer, window=WINDOW) as watch:
        for i, x in enumerate(batches(4 * WINDOW)):
            model.zero_grad()
            (layer(x) - x.roll(1, -1)).pow(2).sum().backward()
            optimizer.step()
            if i % 5 == 4:
                with torch.no_grad():
                    if is_merged:
                        layer.weight.add_(layer.up @ layer.down)
                    layer.up.zero_()
                    layer.down.copy_(start)
        report = watch.flush()
    assert report is not None
    causes = {t.name: t.cause for t in report.tensors if t.name != "layer.weight"}
    assert set(causes.values()) == ({None} if is_merged else {Cause.overwritten})
    frozen = next(t for t in report.tensors if t.name == "layer.weight")
    assert ("moves" in frozen.advice) == is_merged
    assert not is_merged or frozen.written_between


# --- masters -------------------------------------------------------------------------------------


def with_masters(copies: Callable[[int, str], bool], rule: Callable[[Any], Optimizer] = adamw) -> Report:
    """`copies(i, name)`: whether a master is copied back after step i."""
    model = Net(torch.bfloat16)
    masters = copy.deepcopy(model).float()
    optimizer = rule(masters.parameters())
    with uw.watch(model, optimizer, window=WINDOW) as watch:
        for i, x in enumerate(batches(4 * WINDOW, torch.bfloat16)):
            model.zero_grad()
            backward(model, x)
            for master, p in zip(masters.parameters(), model.parameters(), strict=True):
                assert p.grad is not None
                master.grad = p.grad.float()
            optimizer.step()
            with torch.no_grad():
                for master, (name, p) in zip(masters.parameters(), model.named_parameters(), strict=True):
                    if copies(i, name):
                        p.copy_(master)
        report = watch.flush()
    assert report is not None
    return report


@pytest.mark.parametrize("rule", [adamw, pytest.param(sgd, marks=pytest.mark.slow)])
def test_masters_that_are_not_copied_back_are_said(rule: Callable[[Any], Optimizer]) -> None:
    moving = {t.name for t in with_masters(lambda i, name: True, rule).tensors if t.cause is None}
    report = with_masters(lambda i, name: False, rule)
    assert len(moving) == 4
    said = {t.name for t in report.tensors if t.cause is Cause.not_copied_back and t.health is Health.stalled}
    assert said >= {"enter.weight", "leave.weight"}
    assert all(t.cause in (None, Cause.not_copied_back) for t in report.tensors)


def test_a_copy_that_is_missing_is_that_tensors_alone() -> None:
    report = with_masters(lambda i, name: name != "leave.weight")
    assert {t.name for t in report.tensors if t.cause is Cause.not_copied_back} == {"leave.weight"}


def test_masters_that_are_copied_back_now_and_then_are_healthy() -> None:
    report = with_masters(lambda i, name: i % 8 == 7)
    assert {t.health for t in report.tensors} == {Health.healthy}


# --- a rule that cannot be replayed -------------------------------------------------------------


class Noisy(Optimizer):
    """Draws random numbers in its step: no replay can have the same."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad.float() + torch.randn(p.shape)).sign().to(p.dtype))


@pytest.mark.parametrize(("lr", "health"), [(1e-9, Health.stalled), (1e-2, Health.unknown)])
def test_a_rule_that_cannot_be_replayed_is_stalled_where_not_one_bit_moves(lr: float, health: Health) -> None:
    report = run(nothing, rule=lambda params: Noisy(params, lr), dtype=torch.bfloat16)[-1]
    assert {t.health for t in report.tensors if t.name != "enter.bias"} == {health}


# --- the numbers ---------------------------------------------------------------------------------


def test_the_numbers_are_those_of_all_elements_in_fp64_where_all_are_read() -> None:
    """Tensors of at most 16 elements are read whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = adamw(model.parameters())
    first = kept(model)
    applied = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    squares = [0.0 for _ in applied]
    after: list[Tensor] = []
    cycles: list[
        tuple[list[Tensor], list[Tensor]]
    ] = []  # what is stored after each write, and what was applied till then
    with uw.watch(model, optimizer, window=WINDOW) as watch:
        for i in range(WINDOW):
            model.zero_grad()
            model(torch.randn(8, 4)).square().sum().backward()
            before = kept(model)
            for k, old in enumerate(after):
                squares[k] += float((before[k].double() - old.double()).square().sum())
            optimizer.step()
            after = kept(model)
            for k, p in enumerate(model.parameters()):
                applied[k] += p.detach().double() - before[k].double()
            if i % 3 == 2 and i < WINDOW - 1:
                with torch.no_grad():
                    for p, start in zip(model.parameters(), first, strict=True):
                        p.lerp_(start, 0.8)
                cycles.append((kept(model), [sums.clone() for sums in applied]))
        report = watch.flush()
    assert report is not None
    moved, meant = (
        [end.double() - begin.double() for begin, end in zip(*ends, strict=True)]
        for ends in zip(cycles[0], cycles[-1], strict=True)
    )
    for t, d, a, now, start, square in zip(report.tensors, moved, meant, cycles[-1][0], first, squares, strict=True):
        assert t.net_efficiency is not None and t.displacement_efficiency is not None
        true = float((d * a).sum() / (a * a).sum())
        if d.numel() > 3:  # the smallest and largest are left out as if they were at a bound
            free = (now != now.min()) & (now != now.max())
            true = float((d * a)[free].sum() / (a * a)[free].sum())
            assert t.net_efficiency == pytest.approx(true * t.displacement_efficiency, abs=0.03)
        rms = (square / d.numel() / WINDOW) ** 0.5 / float(start.double().square().mean().sqrt())
        if 16 % d.numel() == 0:  # else some elements count twice
            assert t.written_between == pytest.approx(rms, rel=1e-3)


def test_the_last_write_is_told_to_the_step() -> None:
    report = run(lambda model: lambda i, m: put(m, kept(m)) if i != 41 else m.enter.weight.mul_(1.5), 48)[-1]  # type: ignore[union-attr, operator]
    written = {t.name: t.written_between for t in report.tensors}
    assert written.pop("enter.weight") and not any(written.values())
