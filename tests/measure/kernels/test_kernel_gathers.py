"""A watch whose samples come by one launch, in Triton's interpreter: its reports are those of torch's way to the bit."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="the gather kernel needs Triton")
os.environ["TRITON_INTERPRET"] = "1"

import update_watch as uw
from update_watch.measure import device_rows, transfer
from update_watch.measure.cohort import Cohort
from update_watch.measure.device import kernel_gathers, multi_gather, turns
from update_watch.measure.device.kernel_gathers import KernelGathers
from update_watch.measure.gathers import Common, Gathers
from update_watch.measure.ledger import kernel_sheet_sums
from update_watch.measure.parameters import build_rows
from update_watch.measure.sums import kernel_sums

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads neither stretches of a tensor nor cells drawn by size, which torch's views do on a CPU."""
    monkeypatch.setattr(turns, "_MOST_ROWS", 0)
    monkeypatch.setattr(Cohort, "draw_from", lambda *_: None)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_gather, "_interpreted", True)
    monkeypatch.setattr(multi_gather, "_failed", {})
    monkeypatch.setattr(kernel_gathers, "_verified", set())
    monkeypatch.setattr(kernel_sums, "_works", {})
    monkeypatch.setattr(kernel_sheet_sums, "_works", {})
    monkeypatch.setattr(transfer.Batch, "is_later", lambda *_: False)  # windows end on this thread, as on a GPU


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What nobody has written to yet is NaN: a gather that was used before it ran would show."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(was)


class Net(nn.Module):
    """Formats side by side, small and large tensors, some transposed in memory, one used in some steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(24, 40, dtype=torch.bfloat16)
        self.b = nn.Linear(40, 24)
        self.short = nn.Parameter(torch.randn(30, 11).half())
        self.odd = nn.Parameter(torch.randn(31, 17, dtype=torch.bfloat16).t())
        self.rare = nn.Parameter(torch.randn(700, dtype=torch.bfloat16))


def reports(make: Any, steps: int = 9) -> list[tuple[Any, ...]]:
    # of more than eight steps: some are added within a step
    torch.manual_seed(0)
    model = Net()
    optimizer = make(model.parameters())
    generator = torch.Generator().manual_seed(1)
    seen: list[uw.Report] = []
    with uw.watch(model, optimizer, window=9, samples=16, budget=None, seed=3, sinks=[seen.append]) as watch:
        for step in range(steps):
            for name, p in model.named_parameters():
                is_left_out = name == "rare" and step % 3
                p.grad = None if is_left_out else torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1
            optimizer.step()
        sheets = watch._model._ledger.sheets
        kinds = {type(c.gathers) for w in watch._model.watched.values() for c in w.cohorts}
        watch.flush()
        assert watch._tap.error is None
    assert len(kinds) == 1
    assert sheets and {bool(sheet._gathers) for sheet in sheets} == {kinds == {KernelGathers}}
    numbers = [
        (
            t.name,
            t.health,
            t.efficiency,
            t.lost_fraction,
            t.update_ratio,
            t.displacement_efficiency,
            t.headroom_histogram,
            t.net_efficiency,
            t.written_between,
            t.state_factor,
        )
        for report in seen
        for t in report.tensors
    ]
    return [(kinds.pop() is KernelGathers, len(seen)), *numbers]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1), id="adamw"),
        pytest.param(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), id="sgd", marks=pytest.mark.slow),
        pytest.param(lambda p: torch.optim.Adafactor(p, lr=1e-3), id="whole-tensors", marks=pytest.mark.slow),
    ],
)
def test_reports_are_those_of_torchs_way(
    make: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_rows, "_AT_LEAST", device_rows._AT_MOST)  # as many steps together as by the kernel
    plain = reports(make)
    assert plain[0] == (False, 1)
    request.getfixturevalue("interpreted")
    request.getfixturevalue("poisoned")
    by_kernel = reports(make)
    assert by_kernel[0] == (True, 1)
    assert kernel_sums._works == kernel_sheet_sums._works == {CPU: True}
    for one, other in zip(by_kernel[1:], plain[1:], strict=True):
        assert one[:2] == other[:2]
        for found, wanted in zip(one[2:], other[2:], strict=True):
            # in the order of other additions
            assert found == wanted or found == pytest.approx(wanted, rel=1e-6, abs=1e-12), one[0]


@pytest.mark.slow
def test_states_in_fp32_are_advanced_by_the_same_gradients(request: pytest.FixtureRequest) -> None:
    def factors() -> list[float | None]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(30, 9).bfloat16()), nn.Parameter(torch.randn(20).bfloat16())]
        optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
        seen: list[uw.Report] = []
        with uw.watch([("a", params[0]), ("b", params[1])], optimizer, window=17, samples=8, budget=None, seed=3) as w:
            w._post._handle = seen.append
            for _ in range(17):
                grad = torch.randn(9, 30).bfloat16()
                params[0].grad, params[1].grad = grad.t(), grad[0, :20].clone()  # one is laid out otherwise
                optimizer.step()
            shadow = w._model.watched[id(optimizer), 0].shadow._copy
            w.flush()
            assert shadow is not None and (shadow._reads._multi is not None) == multi_gather._interpreted
        return [t.state_factor for t in seen[0].tensors]

    plain = factors()
    request.getfixturevalue("interpreted")
    assert factors() == plain and all(factor for factor in plain)


@pytest.mark.usefixtures("interpreted")
def test_a_kernel_that_reads_otherwise_is_not_used_and_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = multi_gather.MultiGather.__call__

    def wrong(self: Any, *arguments: Any, **options: Any) -> Any:
        return read(self, *arguments, **options) + 1e-3

    def sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=1e-2)

    monkeypatch.setattr(multi_gather.MultiGather, "__call__", wrong)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert reports(sgd)[0] == (False, 1)
        assert reports(sgd)[0] == (False, 1)
    assert len([w for w in said if "gather kernel is not used" in str(w.message)]) == 1
    monkeypatch.setattr(multi_gather, "_failed", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it must not reach who attaches a watch
        assert reports(sgd)[0] == (False, 1)
    assert not multi_gather.is_available(CPU)


@pytest.mark.usefixtures("interpreted")
def test_where_both_sets_move_every_element_weighs_the_same_and_both_ways_read_the_same() -> None:
    """The values are the places, so what is read tells which elements were met."""
    param = nn.Parameter(torch.arange(350.0).view(50, 7))
    optimizer = torch.optim.SGD([param], lr=0.1)
    weighed = {}
    for way in (Gathers, KernelGathers):
        rows = build_rows(optimizer, {id(param): ("w",)}, 32, "", {})
        gathers = way(optimizer, rows, 32, random.Random(0), Common.of(rows, keeps=False))
        found = torch.zeros(100, 350, dtype=torch.float64)
        for k in range(100):
            turn, moving_first = gathers.move()
            places_K = gathers.widened(gathers.after(None), moving_first)[0, 0].long()
            pair = gathers.weights_of(turn)
            assert pair is not None
            weights_J = torch.cat(pair, -1)[0].double()
            found[k].index_add_(0, places_K, weights_J.repeat_interleave(len(places_K) // len(weights_J)))
        weighed[way] = found
    assert torch.equal(weighed[Gathers], weighed[KernelGathers])
    total = weighed[Gathers].sum(0)
    assert float(total.max() / total.min()) < 1.35
