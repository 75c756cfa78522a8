"""Rules that cast to FP32 by themselves: FP32 weights are looked at in FP64, where that can be done."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import update_watch as uw
from tests.support.watch_nets import Net, backward, batches
from update_watch.replay.rule_kind import find_rule
from update_watch.report import Health


class Momentum(torch.optim.Optimizer):
    """Its gradients become FP32, or what its state is."""

    def __init__(self, params: Any, casts: bool) -> None:
        super().__init__(params, {"lr": 1e-3})
        self.casts = casts

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad.float() if self.casts else p.grad.to(momentum.dtype), 0.1)
                p.sub_(momentum, alpha=group["lr"])


@pytest.mark.parametrize("casts", [True, False])
def test_a_rule_that_casts_gradients_is_replayed_in_fp32_and_others_in_fp64(casts: bool) -> None:
    model = Net()
    optimizer = Momentum(model.parameters(), casts)
    assert find_rule(optimizer, 0, 2, shape=(48, 48)).is_bound_to_fp32 == casts
    with uw.watch(model, optimizer, window=16) as watch:
        for x in batches(32):
            model.zero_grad()
            backward(model, x)
            optimizer.step()
        report = watch.flush()
    assert report is not None
    assert {t.health for t in report.tensors} == {Health.healthy}
    assert all(t.efficiency == pytest.approx(1, abs=1e-3) for t in report.tensors)
