"""A tensor that is read in several rows: against the same one read in one, and against all its elements."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import update_watch as uw
from update_watch.measure.parameters import Row
from update_watch.measure.positions import SHARES
from update_watch.replay.rounding_scheme import Scheme
from update_watch.replay.rule import Kind, Rule
from update_watch.report import Health, TensorReport

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


class OfAllTogether(torch.optim.Optimizer):
    """Steps of one length: a norm over all tensors."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.15})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        length = torch.stack([p.grad.float().square().sum() for p in params if p.grad is not None]).sum().sqrt()
        for p in params:
            assert p.grad is not None
            p.add_((-0.15 * p.grad.float() / length).to(p.dtype))


RULES: dict[str, Make] = {
    "momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "all together": OfAllTogether,
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
        assert a.efficiency is not None and 0.05 < a.efficiency < 0.99
        assert a.scheme != "plain" or a.efficiency_error == 0
        compare(dataclasses.asdict(a), dataclasses.asdict(b), a.name)


@pytest.mark.parametrize(
    ("shape", "most", "rows"), [((60, 100), 7, 5), ((60, 100), 1, 1), ((31, 16, 5), 4, 1), ((4096,), 15, 8)]
)
def test_stretches_that_are_sampled_meet_every_element_equally_often(
    shape: tuple[int, ...], most: int, rows: int
) -> None:
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    stretches = Row(values, ("a",), 0, Rule(Kind.elementwise), Scheme("plain"), 256).stretches(256, most)
    assert [row.is_first for row in stretches] == [True] + [False] * (rows - 1)
    met = torch.zeros(values.numel(), dtype=torch.float64)
    turns = 500
    for row in stretches:
        sampler = row.sampler
        assert sampler is not None and sampler.positions is not None and not sampler.is_whole
        assert sampler.positions.numel == values.numel() // rows
        for turn in range(turns):  # evenly over a sweep
            at = [(k * SHARES) // turns for k in (turn, turns - 1 - turn)]
            sampler.place(*at)
            weights = [1 / m for share in sorted(at) for m in sampler.positions.multiplicities(share)]
            seen_bB = sampler.view(values).reshape(len(weights), -1).long()
            met.index_add_(
                0, seen_bB.flatten(), torch.tensor(weights, dtype=met.dtype).repeat_interleave(seen_bB.shape[1])
            )
    mean = met.mean()
    assert mean > 0 and (met - mean).abs().max() < 0.35 * mean  # whole turns fall into one place or its neighbour
    assert (met.view(rows, -1).mean(1) - mean).abs().max() < 0.02 * mean


class Truth:
    """Plain SGD on a BF16 matrix: <applied, intended> / <intended, intended> of all elements in FP64."""

    def __init__(self) -> None:
        self.dot = self.want = 0.0

    def step(self, p: torch.nn.Parameter, optimizer: torch.optim.Optimizer, lr: float) -> None:
        assert p.grad is not None
        before, intended = p.detach().double(), -lr * p.grad.double()
        optimizer.step()
        self.dot += float(((p.detach().double() - before) * intended).sum())
        self.want += float(intended.square().sum())

    @property
    def efficiency(self) -> float:
        return self.dot / self.want


def test_a_matrix_too_large_to_be_read_whole_is_read_in_as_many_rows_as_a_step_may_have() -> None:
    drawn = torch.Generator().manual_seed(1)
    p = torch.nn.Parameter(torch.randn(400, 96, generator=drawn).bfloat16())
    optimizer, truth, lr = torch.optim.SGD([p], lr=1e-2), Truth(), 1e-2
    # few rows carry the sum, others next to nothing
    size = torch.randn(400, 1, generator=drawn).mul(1.5).exp() * 0.004
    with uw.watch([("a", p)], optimizer, window=32, budget=None, samples=64) as watch:  # eight times as many are taken
        for _ in range(32):
            p.grad = (torch.randn(400, 96, generator=drawn) * size).bfloat16()
            truth.step(p, optimizer, lr)
        (cohort,) = (cohort for one in watch._model.watched.values() for cohort in one.cohorts)
        report = watch.flush()
    assert report is not None
    (a,) = report.tensors
    assert len(cohort.rows) == 32 and cohort.firsts == [0]
    assert a.efficiency is not None and a.efficiency_error is not None and 0.2 < truth.efficiency < 0.8
    assert abs(a.efficiency - truth.efficiency) < 0.02
    assert abs(a.efficiency - truth.efficiency) < 2 * a.efficiency_error < 0.1


def test_one_row_of_a_vocabulary_is_no_idle_matrix() -> None:
    p = torch.nn.Parameter(torch.ones(4000, 64).bfloat16())
    optimizer = torch.optim.SGD([p], lr=1e-2)
    watch = uw.watch([("a", p)], optimizer, window=8, budget=None, samples=64)
    for step in range(24):
        p.grad = torch.zeros_like(p)
        p.grad[(7 * step) % 4000, 0] = 1.0
        optimizer.step()
        if step % 8 == 7:
            report = watch.flush()
            assert report is not None and report.tensors[0].health is not Health.idle
    watch.close()


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
