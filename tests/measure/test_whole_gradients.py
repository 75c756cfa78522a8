"""Gradients that come in steps in which their tensor was not measured, against those that never come."""

from __future__ import annotations

import time

import pytest
import torch

import update_watch as uw
from update_watch.measure.sums import whole_gradients
from update_watch.measure.sums.device_sums import DeviceSums
from update_watch.measure.sums.whole_gradients import WholeGradients
from update_watch.report import Cause, Health, Report

WINDOW, WINDOWS, TENSORS = 24, 4, 20


def reports_of(optimizer: type[torch.optim.Optimizer], size: int = 4, **options: float) -> list[Report]:
    """Twenty tensors in turns. 'starved' has a gradient in one step of each window, 'dead' in none; no update is large
    enough to move a bit."""
    names = ["starved", "dead", *(f"other{i}" for i in range(TENSORS - 2))]
    params = {name: torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16)) for name in names}
    drawn = torch.Generator().manual_seed(0)
    reports: list[Report] = []
    made = optimizer(params.values(), lr=1e-6, **options)  # type: ignore[call-arg]
    with uw.watch(params.items(), made, window=WINDOW, budget=None, sinks=[reports.append]) as watch:
        for window in range(WINDOWS):
            comes = int(torch.randint(WINDOW, (), generator=drawn))
            for t in range(WINDOW):
                for name, p in params.items():
                    is_zero = name == "dead" or (name == "starved" and t != comes)
                    p.grad = torch.zeros_like(p)
                    if not is_zero:
                        p.grad[-1] = 1.0
                made.step()
            until_read(reports, window + 1)
        watch.flush()
    return reports


def until_read(reports: list[Report], count: int) -> None:
    until = time.monotonic() + 5.0
    while len(reports) < count and time.monotonic() < until:
        time.sleep(1e-3)


def healths(reports: list[Report], name: str) -> list[Health]:
    return [t.health for report in reports for t in report.tensors if t.name == name]


def test_a_tensor_with_a_gradient_in_one_step_of_a_window_is_never_idle() -> None:
    reports = reports_of(torch.optim.SGD)
    assert Health.idle not in healths(reports, "starved")
    assert healths(reports, "dead")[1:] == [Health.idle] * (WINDOWS - 1)


def test_the_same_where_it_is_sampled() -> None:
    assert Health.idle not in healths(reports_of(torch.optim.SGD, size=600), "starved")


def test_states_that_are_still_zero_prove_in_the_first_window_that_none_has_come() -> None:
    reports = reports_of(torch.optim.SGD, momentum=0.9)
    assert healths(reports, "dead") == [Health.idle] * WINDOWS
    assert {t.cause for report in reports for t in report.tensors if t.name == "dead"} == {Cause.zero_gradient}


def test_of_many_suspects_the_small_ones_are_looked_at_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_gradients, "_LEAST", 20)
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (100, 8, 8, 8)]
    looked = WholeGradients(params, [False] * 4)
    sums = DeviceSums(0, 4, 8, torch.device("cpu"))
    looked.suspect(0, frozenset({0, 1, 3}))
    for t in range(10):
        for p in params:
            p.grad = torch.full_like(p, float("nan") if p is params[3] and t == 4 else 0.0)
        params[1].grad = None
        looked.look(lambda: sums)
    assert looked.looks_n.tolist() == [0, 10, 0, 10]
    assert sums.views["touched_n"].ne(0).tolist() == [False, False, False, True]
    # the large one is not waited for; the one that nobody suspects is known from the three steps it was measured in
    assert looked.blind(slice(0, 4), torch.full((4,), 3.0).numpy()).tolist() == [0, 0, 7, 0]
