"""A window that another thread closes ends between two steps."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

import update_watch as uw
from update_watch.report import Report


class Slow(torch.optim.SGD):
    """Its rule takes its time, and tells that it has begun."""

    is_inside = threading.Event()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if "is_trained" in vars(self.param_groups[0]["params"][0]):  # and not a replay of it
            self.is_inside.set()
            time.sleep(0.1)
        return super().step(closure)


def test_a_window_that_is_flushed_elsewhere_ends_with_the_step_that_runs() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    weight.is_trained = True  # type: ignore[attr-defined]
    optimizer, seen = Slow([weight], lr=1e-2), list[Report]()

    def flush_in_each(watch: uw.Watch, steps: int) -> None:
        for _ in range(steps):
            Slow.is_inside.wait(10)
            Slow.is_inside.clear()
            watch.flush()
            is_flushed.set()

    is_flushed = threading.Event()
    with uw.watch([("w", weight)], optimizer, window=100, budget=None, sinks=[seen.append]) as watch:
        flushing = threading.Thread(target=flush_in_each, args=(watch, 8))
        flushing.start()
        for _ in range(8):
            weight.grad = torch.randn(8, 8)
            optimizer.step()
            assert is_flushed.wait(20)
            is_flushed.clear()
        flushing.join(20)
    assert sum(report.window for report in seen) == 8 and len(seen) >= 4
    assert [report.tensors[0].written_between for report in seen if report.tensors[0].written_between] == []
    assert watch._tap.error is None and not watch._has_failed


def test_a_step_that_raised_is_not_waited_for_longer_than_is_asked() -> None:
    weight = torch.nn.Parameter(torch.randn(8))
    optimizer = torch.optim.SGD([weight], lr=1e-2)

    def fail() -> Any:
        raise RuntimeError("no loss")

    with uw.watch([("w", weight)], optimizer, window=100) as watch:
        weight.grad = torch.randn(8)
        optimizer.step()
        try:
            optimizer.step(fail)
        except RuntimeError:
            pass
        started = time.monotonic()
        flushing = threading.Thread(target=watch.flush)
        flushing.start()
        flushing.join(20)
        assert time.monotonic() - started < 5
        assert watch.last is not None and watch.last.window == 1
