"""bench/bf16/coverage.py tells optimizers that are measured from those that are not, and right numbers from wrong ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import update_watch as uw
from bench.bf16 import coverage as coverage_bf16
from bench.coverage import Case


class Noisy(torch.optim.SGD):
    """A statistic of all tensors together: no replay of one is right."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(torch.randn(p.shape))
        return super().step(closure)


def measured(make: Any) -> coverage_bf16.Result:
    return coverage_bf16.measure(Case("ours", "case", make), 6)


def test_an_optimizer_that_is_measured_rightly() -> None:
    result = measured(lambda params: torch.optim.AdamW(params, lr=1e-3))
    assert (result.known, result.compared, result.reason) == (6, 6, "")
    assert result.difference < coverage_bf16.WRONG


def test_an_optimizer_that_is_not_known() -> None:
    result = measured(lambda params: Noisy(params, lr=1e-3))
    assert result.known == 0
    assert "draws random numbers in its step" in result.reason


def test_an_optimizer_that_does_not_run() -> None:
    def make(_: Any) -> Any:
        raise ValueError("not here")

    assert measured(make).reason == "cannot be run here: ValueError: not here"


def test_meta_a_wrong_efficiency_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    flush = uw.Watch.flush

    def wrong(self: Any, *given: Any, **named: Any) -> Any:
        report = flush(self, *given, **named)
        assert report is not None
        off = [dataclasses.replace(t, efficiency=(t.efficiency or 0.0) + 0.1) for t in report.tensors]
        return dataclasses.replace(report, tensors=tuple(off))

    monkeypatch.setattr(uw.Watch, "flush", wrong)
    assert measured(lambda params: torch.optim.AdamW(params, lr=1e-3)).difference > coverage_bf16.WRONG
