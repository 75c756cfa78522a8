"""Sample positions: inside the tensor, spread over rows and columns, the same logical elements whatever the layout."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from update_watch.measure.positions import SHARES
from update_watch.measure.sampling import Sampler, gather, is_dense, local, mask, unsamplable

K = 256
SHAPES = [(257,), (1000,), (64, 64), (768, 768), (48, 3, 5, 7), (2, 1, 400), (3, 10_007), (513, 1), (1 << 16, 16)]


def indices(*shape: int) -> Tensor:
    """Each element holds its own flat index; exact in FP64."""
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("samples", [16, 100, 256])
@pytest.mark.parametrize("sets", [1, 2])
def test_positions_are_inside_and_a_set_never_repeats(shape: tuple[int, ...], samples: int, sets: int) -> None:
    values, rng = indices(*shape), random.Random(0)
    sampler = Sampler(values, samples, sets)
    for _ in range(50):
        sampler.redraw(rng)
        seen = sampler.view(values).reshape(-1)
        assert len(seen) == samples == sampler.size
        assert seen.min() >= 0 and seen.max() < values.numel()
        assert torch.equal(values.flatten()[seen.long()], seen)
        assert all(len(one.unique()) == samples // sets for one in seen.view(sets, -1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_views_read_the_elements_that_positions_name(shape: tuple[int, ...]) -> None:
    values, rng = indices(*shape), random.Random(0)
    sampler = Sampler(values, K, 2)
    p = sampler.positions
    assert p is not None
    for _ in range(20):
        shares = rng.randrange(SHARES), rng.randrange(SHARES)
        sampler.place(*shares)
        expected = [[start + k for start in p.starts(at) for k in range(p.block)] for at in sorted(shares)]
        assert sampler.view(values).reshape(2, -1).long().tolist() == expected


def test_sets_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"samples=7, sets=2.*one size"):
        Sampler(indices(100), 7, 2)


def test_positions_reach_both_ends() -> None:
    values, rng = indices(100, 100), random.Random(0)
    sampler = Sampler(values, K)
    seen: set[int] = set()
    for _ in range(300):
        sampler.redraw(rng)
        seen.update(sampler.view(values).reshape(-1).long().tolist())
    assert min(seen) == 0 and max(seen) == 9_999
    assert len(seen) > 0.95 * 10_000  # in the long run every element is looked at


def test_every_redraw_looks_elsewhere_and_no_redraw_looks_at_the_same() -> None:
    values, rng = indices(300, 300), random.Random(0)
    sampler = Sampler(values, K)
    first = sampler.view(values).clone()
    assert torch.equal(sampler.view(values), first)
    draws = set()
    for _ in range(20):
        sampler.redraw(rng)
        draws.add(tuple(sampler.view(values).flatten().tolist()))
    assert len(draws) == 20


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "transposed", "permuted"])
def test_the_same_logical_elements_are_read_of_a_tensor_laid_out_otherwise(layout: str) -> None:
    def laid_out(values: Tensor, how: str) -> Tensor:
        if how == "channels-last":
            return values.to(memory_format=torch.channels_last)
        if how == "transposed":
            return values.transpose(2, 3).contiguous().transpose(2, 3)
        if how == "permuted":
            return values.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
        return values.contiguous()

    values, rng = indices(8, 6, 10, 12), random.Random(0)
    param = laid_out(values, layout)
    assert is_dense(param) and unsamplable(param) == ""
    sampler = Sampler(param, K, 2)
    for _ in range(5):
        sampler.redraw(rng)
        read = sampler.view(param)
        assert read.shape == sampler.view_shape
        assert read.data_ptr() >= param.data_ptr()  # nothing was copied
        assert read.untyped_storage().data_ptr() == param.untyped_storage().data_ptr()
        for other in ("contiguous", "channels-last", "transposed", "permuted"):
            grad = laid_out(values * 3 + 1, other)
            assert torch.equal(sampler.view(grad), read * 3 + 1)


def test_a_gradient_that_is_a_window_of_something_larger_is_read_right() -> None:
    values = indices(40, 30)
    sampler = Sampler(values.clone(), K)
    sampler.redraw(random.Random(0))
    hollow = torch.full((80, 65), -1.0, dtype=torch.float64)
    hollow[3:43, 5:65:2] = values
    assert torch.equal(sampler.view(hollow[3:43, 5:65:2]), sampler.view(values))
    expanded = torch.ones(1, dtype=torch.float64).expand(40, 30)  # the gradient of a sum
    assert torch.equal(sampler.view(expanded).flatten(), torch.ones(K, dtype=torch.float64))


def test_a_storage_offset_is_respected() -> None:
    store = indices(3000)
    part = store[1000:2600].view(40, 40)
    seen = Sampler(part, K).view(part)
    assert seen.min() >= 1000 and seen.max() < 2600


def test_sizes_of_one_do_not_make_another_layout() -> None:
    values = indices(40, 1, 30)
    odd = values.as_strided((40, 1, 30), (30, 7, 1))
    sampler = Sampler(values, K)
    assert sampler.shares_layout(odd)
    assert torch.equal(sampler.view(odd), sampler.view(values))


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (16, 16), (0,)], ids=str)
def test_a_small_tensor_is_read_whole_and_its_padding_masked(shape: tuple[int, ...]) -> None:
    values = indices(*shape)
    sampler = Sampler(values, K)
    sampler.redraw(random.Random(0))
    assert sampler.is_whole and sampler.size == values.numel() and sampler.positions is None
    assert torch.equal(sampler.view(values), values.flatten())
    valid = mask([sampler], torch.device("cpu"))
    if values.numel() == K:
        assert valid is None
    else:
        assert valid is not None and valid.sum() == values.numel() and valid[0, : values.numel()].all()


def test_a_small_tensors_gradient_in_another_layout_is_read_in_the_tensors_order() -> None:
    values = indices(6, 9)
    grad = values.t().contiguous().t()
    assert torch.equal(Sampler(values, K).view(grad), values.flatten())
    assert torch.equal(Sampler(grad, K).view(values), values.t().flatten())


def test_gather_puts_every_row_in_its_place_whatever_its_size_and_dtype() -> None:
    torch.manual_seed(0)
    tensors = [
        torch.randn(30, 30),
        torch.randn(31, 31),  # in other blocks
        torch.randn(40, 20).bfloat16(),
        torch.randn(50, 20).bfloat16(),
        torch.randn(5).bfloat16(),
        torch.randn(()).bfloat16(),
        torch.randn(256),
        torch.randn(300).half(),
    ]
    samplers = [Sampler(t, K) for t in tensors]
    out_nK = gather([s.view(t) for s, t in zip(samplers, tensors, strict=True)], samplers)
    assert out_nK.shape == (len(tensors), K) and out_nK.dtype is torch.float32
    for row, sampler, tensor in zip(out_nK, samplers, tensors, strict=True):
        assert torch.equal(row[: sampler.size], sampler.view(tensor).flatten().float())
        assert (row[sampler.size :] == row[0]).all()  # padding holds no value of its own


def test_gathering_does_not_write_into_the_tensors() -> None:
    for tensors in ([torch.randn(30, 30), torch.randn(5)], [torch.randn(30, 30)], [torch.randn(K)]):
        copies = [t.clone() for t in tensors]
        samplers = [Sampler(t, K) for t in tensors]
        gather([s.view(t) for s, t in zip(samplers, tensors, strict=True)], samplers).zero_()
        assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


class Hidden(Tensor):
    """A wrapper whose values only its own dispatch knows, as quantised tensors are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Hidden:
        made: Hidden = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


class Renamed(Tensor):
    """An ordinary tensor under another name."""


UNSAMPLABLE = [
    pytest.param(lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo has no strided storage", id="sparse"),
    pytest.param(lambda: torch.empty(3, device="meta"), "meta device", id="meta"),
    pytest.param(lambda: Hidden(torch.randn(3)), "Hidden is a tensor subclass that hides its stored values", id="sub"),
    pytest.param(lambda: torch.randn(3).expand(4, 3), "overlaps or has holes", id="overlapping"),
    pytest.param(lambda: torch.randn(10)[::2], "overlaps or has holes", id="holes"),
    pytest.param(lambda: torch.arange(5), "dtype int64 is not floating point", id="integer"),
]


@pytest.mark.parametrize(("make", "reason"), UNSAMPLABLE)
def test_what_cannot_be_sampled_is_told_with_its_reason(make: Any, reason: str) -> None:
    assert reason in unsamplable(make())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3),
        torch.randn(()),
        torch.empty(0, 3),
        torch.nn.Parameter(torch.randn(3)),
        torch.randn(3).as_subclass(Renamed),
        torch.randn(4, 1).expand(4, 1),
        torch.randn(3).to(torch.float8_e4m3fn),
    ],
    ids=["plain", "0-dim", "empty", "parameter", "renamed", "size-1", "fp8"],
)
def test_what_can_be_sampled_has_no_reason(tensor: Tensor) -> None:
    assert unsamplable(tensor) == ""
    assert local(tensor) is tensor
