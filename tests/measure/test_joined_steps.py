"""Steps that wait and are added together tell what they tell one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import update_watch as uw
from update_watch.measure import device_rows
from update_watch.replay.absent import ReplayError
from update_watch.replay.twin import Run, Twin


def report(momentum: float = 0.9) -> uw.Report:
    """Of small and large tensors, some without gradient now and then, at a learning rate of its own in each step."""
    torch.manual_seed(0)
    shapes = [(40, 40), (9,), (300,), (64, 8)]
    params = [nn.Parameter((torch.randn(shape) * 0.02).bfloat16()) for shape in shapes]
    optimizer = torch.optim.SGD(params, lr=1e-2, momentum=momentum, nesterov=True)  # writes into gradients
    with uw.watch([(f"p{i}", p) for i, p in enumerate(params)], optimizer, window=64, samples=16, budget=None) as watch:
        for step in range(21):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            for i, p in enumerate(params):
                p.grad = None if i == 2 and step % 3 == 0 else torch.randn_like(p) * 1e-2
            optimizer.step()
        found = watch.flush()
        assert watch._tap.error is None
    return found


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict):
        return [d for key in a for d in differences(a[key], b.get(key), f"{path}.{key}")]
    if isinstance(a, list):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}[{i}]")]
    is_same = math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) if isinstance(a, float) and b is not None else a == b
    return [] if is_same else [f"{path}: {a} {b}"]


def tensors(found: uw.Report) -> list[Any]:
    return [t for t in found.to_dict()["tensors"] if t["efficiency"] is not None]


@pytest.mark.parametrize("fails", [False, True])
def test_steps_added_together_say_what_they_say_alone(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as alone:
        alone.setattr(device_rows, "_AT_MOST", 1)
        alone.setattr(device_rows, "_AT_LEAST", 1)
        expected = tensors(report())
    together: list[int] = []
    replay = Twin.replay

    def counted(self: Twin, runs: list[Run], *args: Any, **kwargs: Any) -> list[Run]:
        keys = len({run.group for run in runs})  # steps: each has settings of its own
        together.append(keys)
        if fails and keys > 1:
            for run in runs:
                run.param.zero_()  # half done
            raise ReplayError("not together")
        return replay(self, runs, *args, **kwargs)

    monkeypatch.setattr(Twin, "replay", counted)
    found = tensors(report())
    assert len(found) == 4 and max(together) >= 4
    assert not differences(expected, found)


def test_meta_another_run_says_something_else() -> None:
    assert differences(tensors(report()), tensors(report(momentum=0.5)))
