"""The kernels of the ledger, in Triton's interpreter, against torch's way on the same steps."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels of the ledger need Triton")
os.environ["TRITON_INTERPRET"] = "1"

from update_watch.measure.ledger import kernel_sheet_sums
from update_watch.measure.ledger.blocks import ELEMENTS
from update_watch.measure.ledger.kernel_sheet_sums import KernelSheetSums
from update_watch.measure.ledger.sheet_sums import COLUMNS, SheetSums

CPU = torch.device("cpu")
N = 3
EXACT = {"writes", "span_writes", "own_writes", "still", "last", "copy_steps", "copy_window", "coarse", "largest"}
EXACT |= {"tries", "rewritten", "put_back", "passed"}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy


def steps(count: int, masters: bool, dtype: torch.dtype, seed: int, planted: float | None) -> list[Tensor]:
    """What is read before and after some steps: written between in some, at a bound, unmoved."""
    drawn = torch.Generator().manual_seed(seed)
    held = torch.randn(1 + masters, N, ELEMENTS, generator=drawn)
    if seed == 0:
        held[-1] = held[-1].bfloat16().float()  # values of BF16, two of them the same
        held[-1, :, 3] = held[-1, :, 7]
    read = torch.empty(1 + masters, count, 2, N, ELEMENTS)
    for t in range(count):
        if t % 3 == 1:
            held[:, 0] += 0.1 * torch.randn(ELEMENTS, generator=drawn)  # written between
            held[:, 0, 11:13] = read[:, max(t - 3, 1), 0, 0, 11:13] if t > 3 else 0.3  # where the write before put it
            held[:, 0, 9], held[:, 2, 2] = 0.0, held[:, 2].amax(-1) - 0.5
            held[:, 2].clamp_(max=float(held[0, 2, 2]))
            if seed == 1:
                held[:, 1] = 2.0
        if seed == 1 and t == count - 1:
            held[1:] = held[1:].bfloat16().float()  # masters taken from rounded weights
        read[:, t, 0] = held
        held = held + 0.01 * torch.randn(held.shape, generator=drawn)
        held[:, :, 5] = 0.0
        held[:, 1, :2] = held[:, 1].amax(-1, keepdim=True)
        held[0] = held[0].to(dtype).float()
        read[:, t, 1] = held
    if planted is not None:
        read[0, 1, 1, 2, 4] = planted
    return list(read)


def windows(
    way: type[SheetSums], masters: bool, dtype: torch.dtype, full: slice | None, planted: float | None = None
) -> list[Tensor]:
    """[COLUMNS, n] of two windows, and of one after a new span."""
    sums = way(N, masters, dtype, full, CPU)
    found = []
    for window in range(3):
        if window == 2:
            sums.open_span()
        made = steps(5, masters, dtype, window, planted)
        sums.add([run[:3] for run in made], (1,) if window == 1 else ())
        sums.add([run[3:] for run in made], (0,) if window == 1 else ())
        sums.add_gradients(torch.ones(N, ELEMENTS))
        found.append(sums.packed().view(len(COLUMNS), N))
        sums.open_window()
        sums.forget_gradients()
    return found


@pytest.mark.parametrize(
    ("masters", "dtype", "full", "planted"),
    [
        pytest.param(False, torch.float32, slice(0, N), None, id="fp32"),
        pytest.param(True, torch.bfloat16, slice(N, 2 * N), None, id="masters"),
        pytest.param(
            True, torch.float16, slice(N, 2 * N), float("nan"), id="masters-of-fp16-nan", marks=pytest.mark.slow
        ),
        pytest.param(False, torch.bfloat16, None, float("inf"), id="bf16-inf", marks=pytest.mark.slow),
    ],
)
def test_columns_are_those_of_torchs_way(
    masters: bool, dtype: torch.dtype, full: Any, planted: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_sheet_sums, "_works", {CPU: True})
    found, wanted = (windows(way, masters, dtype, full, planted) for way in (KernelSheetSums, SheetSums))
    assert kernel_sheet_sums._works[CPU]  # else torch's way was compared with itself
    for window, (one, other) in enumerate(zip(found, wanted, strict=True)):
        for name, a, b in zip(COLUMNS, one, other, strict=True):
            where = window, name
            if name in EXACT:
                assert torch.equal(a, b), where
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True), (where, a, b)
    seen = {name for one in wanted for name, values in zip(COLUMNS, one, strict=True) if values.ne(0).any()}
    missing = set(COLUMNS) - seen
    assert missing <= ({"due", "copied", "span_due", "span_copied"} if not masters else set()) | (
        {"copy_steps", "copy_window", "coarse"} if full is None else set()
    )


def test_a_kernel_that_adds_otherwise_is_not_used_and_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_sheet_sums, "_works", {})
    kernel_sheet_sums.check(CPU)
    assert kernel_sheet_sums._works == {CPU: True}
    run = kernel_sheet_sums.launch

    def wrong(name: str, grid: Any, given: Any, compiled_for: Any) -> None:
        run(name, grid, given, compiled_for)
        if name == "end_window":
            given[0].mul_(1.01)

    monkeypatch.setattr(kernel_sheet_sums, "launch", wrong)
    monkeypatch.setattr(kernel_sheet_sums, "_works", {})
    with pytest.warns(UserWarning, match="kernel of the ledger is not used") as said:
        kernel_sheet_sums.check(CPU)
        kernel_sheet_sums.check(CPU)
    # the interpreter divides by 0 with NumPy, which says so
    ours = [one for one in said if one.category is UserWarning]
    assert len(ours) == 1
    assert type(kernel_sheet_sums.sums_of(N, False, torch.float32, None, CPU, True)) is SheetSums


@pytest.mark.parametrize("name", ["add_steps", "end_window"])
def test_where_it_fails_in_a_step_torchs_way_goes_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_sheet_sums, "_works", {CPU: True})
    run = kernel_sheet_sums.launch

    def fails(kernel: str, *given: Any) -> None:
        if kernel == name:
            raise RuntimeError("planted")
        run(kernel, *given)

    monkeypatch.setattr(kernel_sheet_sums, "launch", fails)
    given = False, torch.float32, slice(0, N)
    with pytest.warns(UserWarning, match="kernel of the ledger is not used") as said:
        found = windows(KernelSheetSums, *given)
    assert len(said) == 1
    for one, other in zip(found, windows(SheetSums, *given), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
