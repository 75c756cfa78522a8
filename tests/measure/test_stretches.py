"""A tensor that is read in several rows against the same one read in one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import update_watch as uw
from update_watch.report import TensorReport

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
RULES: dict[str, Make] = {
    "momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1),
}


def reports_of(make: Make, samples: int) -> tuple[list[TensorReport], int]:
    """A matrix in columns of more elements than are sampled, one that is read whole, and one that has no gradient at first; and
    in how many rows they are read."""
    drawn = torch.Generator().manual_seed(0)
    values = [torch.randn(*shape, generator=drawn).bfloat16() for shape in ((50, 90), (40,), (60, 70))]
    params = [torch.nn.Parameter(values[0].t().contiguous().t()), *map(torch.nn.Parameter, values[1:])]
    optimizer = make(params)
    with uw.watch(list(zip("abc", params, strict=True)), optimizer, window=16, budget=None, samples=samples) as watch:
        for t in range(16):
            for i, p in enumerate(params):
                p.grad = (0.1 * torch.randn(p.shape, generator=drawn)).exp().mul(1e-2).bfloat16()
                if i == 2 and t < 3:
                    p.grad = None
            optimizer.step()
        rows = sum(len(cohort.rows) for one in watch._model.watched.values() for cohort in one.cohorts)
        report = watch.flush()
    assert report is not None
    return list(report.tensors), rows


@pytest.mark.parametrize("make", RULES.values(), ids=RULES.keys())
def test_a_tensor_read_in_several_rows_has_the_numbers_of_one_read_in_one(make: Make) -> None:
    (several, rows), (one, single) = reports_of(make, 256), reports_of(make, 1024)
    assert (rows, single) == (3 + 1 + 3, 3)
    assert [t.name for t in several] == [t.name for t in one] == ["a", "b", "c"]
    for a, b in zip(several, one, strict=True):
        assert a.efficiency_error == 0 and a.efficiency is not None and 0.05 < a.efficiency < 0.99
        compare(dataclasses.asdict(a), dataclasses.asdict(b), a.name)


def compare(a: Any, b: Any, where: str) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            # the FP32 states beside are those of 64 elements drawn anew
            if not str(key).startswith("state_factor"):
                compare(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            compare(*pair, f"{where}[{i}]")
    elif isinstance(a, float) and isinstance(b, float):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-12), where
    else:
        assert a == b, where
