"""A part of a tensor that is put back after each step: what is said is the part, not all or nothing."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import update_watch as uw
from tests.support.watch_nets import Net, backward, batches
from update_watch.report import Cause, Health, Report

WINDOW = 16


def run(part: Callable[[Tensor], Tensor]) -> tuple[list[Report], dict[str, float]]:
    """The reports of a training that puts `part` (a view) of each tensor back; and what is left of the steps, of all elements in FP64."""
    model, reports = Net(), list[Report]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    first = [p.detach().clone() for p in model.parameters()]
    applied = [torch.zeros_like(p, dtype=torch.float64) for p in first]
    with uw.watch(model, optimizer, window=WINDOW, sinks=[reports.append], budget=None):
        for x in batches(2 * WINDOW):
            model.zero_grad()
            backward(model, x)
            before = [p.detach().double() for p in model.parameters()]
            optimizer.step()
            with torch.no_grad():
                for p, was, old, sums in zip(model.parameters(), before, first, applied, strict=True):
                    sums += p.double() - was
                    part(p).copy_(part(old))
    left = {
        name: float(((p.detach().double() - old.double()) * sums).sum() / sums.square().sum())
        for (name, p), old, sums in zip(model.named_parameters(), first, applied, strict=True)
    }
    return reports, left


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(lambda p: p[: len(p) // 2], id="rows"),
        pytest.param(lambda p: p[::2], id="other rows"),
        pytest.param(lambda p: p[..., p.shape[-1] // 2 :], id="columns"),
    ],
)
def test_half_of_each_tensor_that_is_put_back_is_half_of_it(part: Callable[[Tensor], Tensor]) -> None:
    reports, left = run(part)
    assert not [alert for report in reports for alert in report.alerts]
    for t in reports[-1].tensors:
        if t.name in ("enter.weight", "leave.weight"):
            assert t.net_efficiency is not None
            assert abs(left[t.name] - 0.5) < 0.1
            assert 0.1 < t.net_efficiency < 0.95, t  # of 16 elements, in four places
            assert (t.health, t.cause) == (Health.healthy, Cause.overwritten)
            said = re.match(r"(\d+)% of its elements that were read are put back to the bit", t.advice)
            assert said is not None and 20 < float(said[1]) < 80, t.advice


def test_states_of_a_tensor_that_is_put_back_in_part_are_judged() -> None:
    """What is left alone trains, and its BF16 second moment cannot decay."""
    model = Net(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    first = [p.detach().clone() for p in model.parameters()]
    with uw.watch(model, optimizer, window=32, budget=None) as watch:
        for x in batches(96, torch.bfloat16):
            model.zero_grad()
            backward(model, x)
            optimizer.step()
            with torch.no_grad():
                for p, old in zip(model.parameters(), first, strict=True):
                    p[: len(p) // 2].copy_(old[: len(p) // 2])
        report = watch.flush()
    assert report is not None
    matrices = [t for t in report.tensors if t.name in ("enter.weight", "leave.weight")]
    assert {t.cause for t in matrices} == {Cause.overwritten}
    assert {t.accumulators["exp_avg_sq"].health for t in matrices} == {Health.stalled}
