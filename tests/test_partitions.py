"""Optimizers that are stepped in parts and hold flat partitions, as DeepSpeed's and Megatron's wrappers have them."""

from __future__ import annotations

import gc
from typing import Any

import torch

import update_watch as uw
from tests.watch_nets import Net, backward, batches


class Native(torch.optim.SGD):
    """Keeps something outside Python, freed with the optimizer, as DeepSpeedCPUAdam does."""

    ended: list[int] = []

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.number = 7

    def __del__(self) -> None:
        self.ended.append(self.number)


def test_an_optimizer_with_a_finalizer_is_never_copied() -> None:
    """The end of a copy would free what the real one steps with: DeepSpeedCPUAdam would crash."""
    model = Net()
    optimizer = Native(model.parameters(), lr=0.1)
    Native.ended.clear()
    with uw.watch(model, optimizer, window=4) as watch:
        for x in batches(4):
            model.zero_grad()
            backward(model, x)
            optimizer.step()
        report = watch.flush()
    gc.collect()
    assert Native.ended == []
    assert report is not None
    assert {str(t.health) for t in report.tensors} == {"unknown"}
    assert all("finalizer" in t.advice for t in report.tensors)
