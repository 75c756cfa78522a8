"""The ledger's elements by one launch are those that torch's views read, and reading them costs nothing per tensor."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

from update_watch.measure.ledger.blocks import ELEMENTS, BlockGather, ViewReads, block_of

SHAPES = [(1,), (3,), (15,), (16,), (17,), (5, 7), (16, 1), (64, 2), (300, 3), (24, 24), (4, 3, 3, 3)]  # two embeddings


def stored(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def flat(tensor: torch.Tensor, place: float) -> torch.Tensor:
    return torch.cat([view.flatten() for view in block_of(tensor, place)])


@pytest.mark.parametrize("place", [0.0, 0.37, 0.9999])
def test_a_block_is_elements_of_its_tensor_each_as_often_as_the_others(place: float) -> None:
    for tensor in stored(torch.float32):
        block = flat(tensor, place)
        values, times = block.unique(return_counts=True)
        assert len(block) == ELEMENTS
        assert set(values.tolist()) <= set(tensor.flatten().tolist())
        assert len(values) == min(ELEMENTS, tensor.numel()) and times.max() - times.min() <= 1


def test_the_elements_of_an_embedding_lie_all_over_it() -> None:
    tensor = torch.arange(900.0).view(300, 3)
    for place in (0.0, 0.5, 0.9999):
        rows = flat(tensor, place).div(3, rounding_mode="floor").sort().values
        assert rows.diff().min() >= 15


@pytest.mark.parametrize("shape", [(64, 48), (128, 4, 3, 3), (48, 48), (1000, 10), (256, 1024)])
@pytest.mark.parametrize("place", [0.0, 0.37, 0.9999])
def test_half_of_a_tensor_is_neither_all_nor_nothing_of_what_is_read(shape: tuple[int, ...], place: float) -> None:
    tensor = torch.arange(math.prod(shape)).view(shape).float()
    at = torch.stack(torch.unravel_index(flat(tensor, place).long(), shape))
    for dim in (0, 1):
        is_low = at[dim] < shape[dim] / 2
        assert 0.25 <= is_low.float().mean() <= 0.75


@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[3:6], [(1,), (40, 40)] * 4])
def test_torchs_operators_read_what_the_views_hold(shapes: list[tuple[int, ...]]) -> None:
    tensors = [torch.randn(shape).bfloat16() for shape in shapes]
    out_nE = torch.zeros(len(tensors), ELEMENTS, dtype=torch.bfloat16)
    ViewReads([block_of(tensor, 0.7) for tensor in tensors])(out_nE.view(-1))
    assert torch.equal(out_nE, torch.stack([flat(tensor, 0.7) for tensor in tensors]))


def calls_of(function: Callable[[], None]) -> Counter[str]:
    """How often each function ran, those written in C included."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, function: Any) -> None:
        if event in ("call", "c_call"):
            calls[frame.f_code.co_name if event == "call" else function.__name__] += 1

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_launch_reads_what_views_read_and_nothing_is_done_for_each_tensor(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="the gather kernel needs Triton")
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernel is first imported
    tensors = stored(dtype)
    gather = BlockGather(tensors, torch.device("cpu"))
    for place in (0.0, 0.37, 0.9999):
        blocks = [block_of(tensor, place) for tensor in tensors]
        gather.go_to(blocks)
        out_nE = torch.empty(len(tensors), ELEMENTS)
        gather(out_nE)
        assert torch.equal(out_nE, torch.stack([flat(tensor, place).float() for tensor in tensors]))
    # besides the kernel itself nothing is done for each tensor once addresses are known, but to look at its address
    monkeypatch.setattr(gather._multi._kernel, "gather_views", {(len(tensors),): lambda *args, **options: None})
    calls = calls_of(lambda: gather(out_nE))
    assert {name for name, times in calls.items() if times >= len(tensors)} == {"data_ptr"}
    assert not calls["cat"] and not calls["stack"] and not calls["copy_"]
