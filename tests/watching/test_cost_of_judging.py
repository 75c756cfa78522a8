"""What a window costs the judging thread grows with its tensors by arithmetic on columns alone: no call of Python, no object for each."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import update_watch as uw
from update_watch.measure.window_evidence import Window

FEW, MANY = 80, 160  # both in eight turns
STALLED, HEALTHY = 1e-4, 0.1


def windows_of(tensors: int, lr: float, count: int = 5) -> tuple[uw.Watch, list[Window]]:
    """Closed windows of a run whose tensors all fare alike, not judged yet."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.ones(16, 8).bfloat16()) for _ in range(tensors)]
    optimizer = torch.optim.SGD(params, lr=lr)
    watch = uw.watch(nn.ParameterList(params), optimizer, budget=None, window=32)
    found: list[Window] = []
    watch._judge._handle = found.append
    for _ in range(32 * count):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    watch._judge.wait()
    watch.detach()
    return watch, found


def calls(function: Any, *arguments: Any) -> Counter[str]:
    """Python functions that it calls, and what is written in C that these call."""
    found: Counter[str] = Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        found[event] += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("lr", [STALLED, HEALTHY])
def test_a_window_takes_as_many_calls_for_many_tensors_as_for_few(lr: float) -> None:
    made: dict[int, Counter[str]] = {}
    for tensors in (FEW, MANY):
        watch, windows = windows_of(tensors, lr)
        for window in windows[:-1]:
            watch._judge_window(window)
        made[tensors] = calls(watch._judge_window, windows[-1])
        assert watch.last is not None
        assert watch.last.counts["healthy" if lr == HEALTHY else "stalled"] == tensors
        watch.close()
    assert made[MANY]["call"] <= made[FEW]["call"] + 8
    # what is written in C is asked of each a few times: its state, its place, its name
    assert made[MANY]["c_call"] <= made[FEW]["c_call"] + 10 * (MANY - FEW)


def test_a_window_that_nobody_reads_leaves_no_object_for_a_tensor() -> None:
    left: dict[int, int] = {}
    for tensors in (FEW, MANY):
        watch, windows = windows_of(tensors, STALLED)
        for window in windows[:-1]:
            watch._judge_window(window)
        watch._post.wait()
        watch.last = None  # else the report of before makes room
        gc.collect()
        before = len(gc.get_objects())
        watch._judge_window(windows[-1])
        watch._post.wait()
        gc.collect()
        left[tensors] = len(gc.get_objects()) - before
        watch.close()
    assert left[MANY] <= left[FEW] + 8
