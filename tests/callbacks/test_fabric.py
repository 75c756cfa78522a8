"""`uw.watch` on what Fabric's setup returns, and on what its strategies wrap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

import update_watch as uw
from tests.support.lightning_models import WIDTH, FullComparison, network, same
from update_watch.report import Report


def train(precision: str, watched: bool, steps: int = 12) -> tuple[list[torch.Tensor], list[Report], FullComparison]:
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)  # type: ignore[arg-type]
    plain = network()
    optimizer: Any = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    model, optimizer = fabric.setup(plain, optimizer)
    reports: list[Report] = []
    full = FullComparison()
    names = {id(p): name for name, p in plain.named_parameters()}
    watch = uw.watch(plain, optimizer, window=steps, sinks=[reports.append]) if watched else None
    data = torch.randn(steps, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    for x in data:
        x = x.to(torch.bfloat16) if precision == "bf16-true" else x
        loss = (model(x).float() - x.float().sum(1, keepdim=True)).pow(2).mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        full.before(optimizer.optimizer)
        optimizer.step()
        full.after(optimizer.optimizer, names)
    if watch is not None:
        watch.close()
        assert not optimizer.optimizer._optimizer_step_pre_hooks
    state = [v for s in optimizer.optimizer.state.values() for v in s.values()]
    return [p.detach().clone() for p in plain.parameters()] + state, reports, full


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_fabrics_optimizer_is_looked_through_and_the_report_equals_the_full_comparison(precision: str) -> None:
    watched, reports, full = train(precision, watched=True)
    unwatched, _, _ = train(precision, watched=False)
    assert same(watched, unwatched)
    assert [report.window for report in reports] == [12]
    for tensor in reports[0].tensors:
        assert tensor.efficiency == pytest.approx(full.efficiency(tensor.name), abs=0.03), tensor.name
        assert tensor.lost_fraction == pytest.approx(full.lost_fraction(tensor.name), abs=0.03), tensor.name
    assert len(reports[0].tensors) == 6
    assert (reports[0].efficiency or 0.0) < 0.9 or precision != "bf16-true"


def test_a_watch_is_a_fabric_callback_by_name() -> None:
    """`fabric.call` runs methods by name: an object that holds the watch closes it in good order."""

    class Watching:
        def on_fit_start(self, model: Any, optimizer: Any) -> None:
            self.watch = uw.watch(model, optimizer, window=2)

        def on_fit_end(self) -> None:
            self.watch.close()

    callback = Watching()
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
    model: Any = network()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = fabric.setup(model, optimizer)
    fabric.call("on_fit_start", model=model.module, optimizer=optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        fabric.backward(model(torch.randn(4, WIDTH)).pow(2).mean())
        optimizer.step()
    fabric.call("on_fit_end")
    assert callback.watch.last is not None and callback.watch.last.step == 4
    assert [t.name for t in callback.watch.last.tensors][:2] == ["0.weight", "0.bias"]
