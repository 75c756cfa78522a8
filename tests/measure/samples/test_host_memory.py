"""What is read at the tensors' addresses is what torch's views hold, to the bit, or it is left to them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import update_watch as uw
from update_watch.measure.device import host_memory
from update_watch.measure.device.host_gathers import HostGathers
from update_watch.measure.device.host_memory import HostBlocks
from update_watch.measure.ledger.blocks import ELEMENTS, HostBlockReads, block_of
from update_watch.measure.positions import SHARES
from update_watch.measure.sampling import Sampler, pack_views

SHAPES = [(4096,), (64, 64), (300, 32), (16, 8, 3, 16), (1 << 20,)]
FORMATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SAMPLES = 256


def tensors_of(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def blocks_of(tensors: list[Tensor], sets: int = 2) -> tuple[list[Sampler], HostBlocks]:
    samplers = [Sampler(tensor, SAMPLES, sets) for tensor in tensors]
    blocks = HostBlocks.of(samplers, tensors)
    assert blocks is not None
    return samplers, blocks


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    "shares", [(0, 0), (7, SHARES - 1), (SHARES - 1, 7), (SHARES // 3, SHARES // 3), (1 << 31, 99)]
)
def test_what_is_read_is_what_views_hold(dtype: torch.dtype, shares: tuple[int, int]) -> None:
    tensors, grads = tensors_of(dtype), tensors_of(dtype, 1)
    samplers, blocks = blocks_of(tensors)
    for sampler in samplers:
        sampler.place(*shares)
    read = blocks.read([*tensors, *grads], blocks.places(*shares))
    assert read is not None
    views = [s.view(t) for s, t in zip(samplers * 2, [*tensors, *grads], strict=True)]
    found = blocks.tensor(read).view(len(views), SAMPLES)
    assert found.dtype is dtype and bits(found) == bits(pack_views(views, samplers))


def test_samplers_that_stay_are_read_where_they_lie() -> None:
    tensors = tensors_of(torch.bfloat16)
    samplers, blocks = blocks_of(tensors, sets=1)
    for i, sampler in enumerate(samplers):
        sampler.place(i * SHARES // 7)
    read = blocks.read(tensors, blocks.placed)
    assert read is not None
    views = [s.view(t) for s, t in zip(samplers, tensors, strict=True)]
    assert bits(blocks.tensor(read).view(-1, SAMPLES)) == bits(pack_views(views, samplers))


def test_a_part_of_a_larger_tensor_is_read_from_its_own_beginning() -> None:
    flat = torch.randn(1 << 16).bfloat16()
    tensors = [flat[3 : 3 + 4096].view(64, 64), flat[8195 : 8195 + 4096]]
    samplers, blocks = blocks_of(tensors)
    read = blocks.read(tensors, blocks.places(5, 1 << 30))
    for sampler in samplers:
        sampler.place(5, 1 << 30)
    assert read is not None
    views = [s.view(t) for s, t in zip(samplers, tensors, strict=True)]
    assert bits(blocks.tensor(read).view(-1, SAMPLES)) == bits(pack_views(views, samplers))


def negative(tensor: Tensor) -> Tensor:
    return torch._neg_view(tensor)


def emptied(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


class Doubled(torch.Tensor):
    """Values that do not lie at its address."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    "other",
    [
        lambda t: None,
        lambda t: t.t().contiguous().t(),
        lambda t: t[:1].expand(t.shape),
        lambda t: t.float(),
        lambda t: t.half(),
        lambda t: t.to("meta"),
        lambda t: t.as_subclass(Doubled),
        lambda t: t.to_sparse(),
        negative,
        emptied,
    ],
    ids=["none", "layout", "expanded", "wider", "format", "meta", "subclass", "sparse", "negative", "emptied"],
)
def test_what_lies_elsewhere_or_otherwise_is_left_to_views(other: Callable[[Tensor], Tensor | None]) -> None:
    tensors = [torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()]
    _, blocks = blocks_of(tensors)
    assert blocks.read([tensors[0], tensors[1].clone()], blocks.places(0, 1)) is not None
    assert blocks.read([tensors[0], other(tensors[1].clone())], blocks.places(0, 1)) is None


def test_tensors_without_memory_are_not_planned_for() -> None:
    with FakeTensorMode():
        tensors = [torch.randn(64, 64), torch.randn(64, 64)]
        assert HostBlocks.of([Sampler(tensor, SAMPLES, 2) for tensor in tensors], tensors) is None
    assert host_memory.is_available()
    # read whole, and of two formats
    small, large, other = torch.randn(16), torch.randn(64, 64), torch.randn(64, 64).half()
    for own, rows in (([small, large], None), ([large, other], None), ([other, large, small, large], [1, 3])):
        found = HostBlocks.of([Sampler(tensor, SAMPLES, 2) for tensor in own], own)
        assert rows == (found and found.rows)


def test_an_array_that_numpy_refuses_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    host_memory.is_available.cache_clear()
    monkeypatch.setattr(host_memory, "read", lambda places, size: np.zeros(size, np.uint8))
    try:
        assert not host_memory.is_available()
        assert (
            HostBlocks.of([Sampler(t, SAMPLES, 2) for t in tensors_of(torch.float32)], tensors_of(torch.float32))
            is None
        )
    finally:
        host_memory.is_available.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 4])
def test_the_ledger_reads_what_its_views_hold(dtype: torch.dtype, count: int) -> None:
    """`count` 1: two runs of alike tensors; 4: so many that elements are read one by one."""
    shapes = ([(3,), (17,), (24, 24)] if count == 1 else [(1,), (16,), (300, 3), (20, 7)]) * count
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    blocks = [block_of(tensor, 0.37) for tensor in tensors]
    places = [torch.zeros(len(tensors) * ELEMENTS, dtype=dtype) for _ in range(3)]
    reads = HostBlockReads(blocks, places)
    reads(1)
    assert bits(places[1]) == bits(torch.cat([view.flatten() for views in blocks for view in views]))
    assert not places[0].any() and not places[2].any()
    tensors[0].add_(1)
    reads(2)
    assert bits(places[2]) == bits(torch.cat([view.flatten() for views in blocks for view in views]))


class Net(nn.Module):
    """Tensors that are sampled and some that are read whole, in memory as they come and otherwise."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=whole) for _ in range(20))
        self.norm = nn.LayerNorm(512)
        self.scale = nn.Parameter(torch.ones(()))


def trained(whole: bool, make: Callable[[Any], torch.optim.Optimizer], missing: bool) -> list[Any]:
    """What reports say of a training in which a gradient comes in another layout, one in another format's place."""
    torch.manual_seed(0)
    model = Net(whole).bfloat16()
    optimizer = make(model.parameters())
    generator = torch.Generator().manual_seed(1)
    found: list[Any] = []
    with uw.watch(model, optimizer, window=16, budget=None, sinks=[found.append]):
        for step in range(64):
            for i, p in enumerate(model.parameters()):
                p.grad = (torch.randn(p.shape, generator=generator) * 1e-3).bfloat16()
                if step and p.dim() == 2 and (i + step) % 5 == 0:  # states made of the first one lie as the weights do
                    p.grad = p.grad.t().contiguous().t()
                if missing and (i + step) % 7 == 0:
                    p.grad = None
            optimizer.step()
            if step == 40:  # replaced in mid-run
                model.layers[0].weight.data = model.layers[0].weight.data.clone()
    return [tuple(str(tensor) for tensor in report.tensors) for report in found]


RULES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_reports_are_the_same_to_the_bit_as_by_views(
    rule: str, whole: bool, missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    reads = 0
    original = HostBlocks.read

    def counted(self: HostBlocks, tensors: Any, places: Any) -> Any:
        nonlocal reads
        found = original(self, tensors, places)
        reads += found is not None
        return found

    monkeypatch.setattr(HostBlocks, "read", counted)
    by_address = trained(whole, RULES[rule], missing)
    assert reads > 20
    # who is measured when stays as it is
    monkeypatch.setattr(HostBlocks, "of", lambda *_: None)
    monkeypatch.setattr(HostBlockReads, "can_read", lambda *_: False)
    reads = 0
    assert trained(whole, RULES[rule], missing) == by_address and reads == 0
    assert len(by_address) == 4


def test_nothing_of_torch_is_called_for_a_step_that_waits() -> None:
    """Once a plan is made, a step's reads are NumPy's alone."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(64, 64).bfloat16()) for _ in range(24)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    with uw.watch([(f"w{i}", p) for i, p in enumerate(parameters)], optimizer, budget=None) as watch:
        (watched,) = watch._model.watched.values()
        assert all(type(cohort.gathers) is HostGathers for cohort in watched.cohorts)
        cohort = watched.cohorts[0]
        before = cohort.before(0)
        cohort.after(before)
        assert all(isinstance(read.blocks, np.ndarray) for read in (before.held, before.after))
        # where the next step is read was worked out while this one was added
        assert isinstance(cohort.gathers, HostGathers)
        cohort.gathers.unpacked(before.held)
        ahead = cohort.gathers._ahead
        cohort.gathers.move()
        assert ahead is not None and cohort.gathers._places is ahead[1] and cohort.gathers._ahead is None
