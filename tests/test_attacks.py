"""Trainings meant to break the watch: what is changed under its feet, at the worst moment.

In FP32 a replay that mistakes anything has an efficiency off 1, and a watch that fails gives no later report.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from watch_nets import Net, backward, batches, train

import update_watch as uw
from update_watch.report import Report


def adamw(params: Any, lr: float = 1e-3, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=lr, **options)


def assert_exact(report: Report | None, window: int, *names: str) -> None:
    """All steps of the window were seen, and replayed to the last digit."""
    assert report is not None and report.window == window
    found = {t.name: t for t in report.tensors}
    for name in names or tuple(found):
        assert found[name].efficiency == pytest.approx(1, abs=0.003), (name, found[name].advice)


@contextmanager
def _low_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND = [pytest.param(torch.inference_mode, id="inference"), pytest.param(_low_default, id="low-default-dtype")]


@pytest.mark.parametrize("around", AROUND)
def test_a_window_closed_where_a_trainer_validates_is_not_the_last_one(around: Any) -> None:
    model = Net()
    optimizer, average = adamw(model.parameters()), Net(seed=1)
    with around():
        watch = uw.watch(model, optimizer, window=100, averages={"ema": average})
    with watch:
        train(model, optimizer, 5)
        with around():
            assert_exact(watch.flush(), 5)
        train(model, optimizer, 9)
        assert_exact(watch.flush(), 9)


@pytest.mark.parametrize("around", AROUND)
def test_steps_taken_there_and_outside_are_measured_alike(around: Any) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with uw.watch(model, optimizer, window=6) as watch:
        for i, x in enumerate(batches(17)):
            model.zero_grad()
            backward(model, x)
            if i % 6 in (3, 4, 5):
                with around():
                    optimizer.step()
            else:
                optimizer.step()
        assert_exact(watch.flush(), 5)
