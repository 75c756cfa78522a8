"""The gather kernel, in Triton's interpreter, against positions and values picked one by one."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the gather kernel needs Triton")
os.environ["TRITON_INTERPRET"] = "1"

from update_watch.measure.device import gather_kernel, joint_reads, multi_gather
from update_watch.measure.device.multi_gather import MultiGather
from update_watch.measure.positions import SHARES, Positions, plan

K = 64
SHAPES: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((64, 96), torch.bfloat16),
    ((700,), torch.float32),
    ((50, 40), torch.float16),
    ((33, 7), torch.bfloat16),  # uneven: blocks of one element
    ((9,), torch.bfloat16),  # read whole
    ((64,), torch.float32),  # as many as samples
    ((1,), torch.float16),
    ((2, 3, 40, 5), torch.bfloat16),
]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_gather, "_interpreted", True)


def rows(numels: list[int]) -> list[Positions | None]:
    return [None if numel <= K else plan(numel, 1, K // 2) for numel in numels]


def picked(tensor: Tensor | None, at: Positions | None, shares: tuple[int, int]) -> Tensor:
    """The same, one by one."""
    if tensor is None:
        return torch.zeros(K)
    flat = tensor.detach().permute(*_order(tensor)).reshape(-1).float()
    if at is None:
        return torch.cat([flat, flat[:1].expand(K - len(flat))])
    starts = [start for share in shares for start in at.starts(share)]
    return torch.stack([flat[start + j] for start in starts for j in range(at.block)])


def _order(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))


def gather_of(params: list[Tensor], at: list[Positions | None]) -> MultiGather:
    def read(i: int, tensor: Tensor) -> Tensor:
        contiguous = torch.empty_like(params[i], dtype=torch.float64)
        contiguous.copy_(tensor)
        return picked(contiguous, at[i], read.shares)  # type: ignore[attr-defined]

    gather = MultiGather([p.numel() for p in params], at, [p.stride() for p in params], K, params[0].device, read)
    gather.reader = read  # type: ignore[attr-defined]
    return gather


def expected(tensors: list[Tensor | None], at: list[Positions | None], shares: tuple[int, int]) -> Tensor:
    return torch.stack([picked(tensor, at[i % len(at)], shares) for i, tensor in enumerate(tensors)])


def made() -> tuple[list[Tensor], list[Positions | None], list[Tensor | None]]:
    torch.manual_seed(0)
    params = [torch.randn(shape).to(dtype) for shape, dtype in SHAPES]
    states = [torch.randn_like(p, dtype=torch.float32) for p in params]
    grads: list[Tensor | None] = [torch.randn_like(p) for p in params]
    grads[2] = grads[4] = None
    return params, rows([p.numel() for p in params]), [*params, *states, *grads]


@pytest.mark.parametrize("shares", [(0, 0), (1, SHARES - 1), (SHARES // 3, SHARES // 2), (2**31 - 1, 2**31)])
def test_every_sample_is_the_one_torch_would_read(shares: tuple[int, int]) -> None:
    params, at, tensors = made()
    gather = gather_of(params, at)
    found = gather(tensors, shares)
    assert found.dtype == torch.float32 and torch.equal(found, expected(tensors, at, shares))


def test_many_turns_need_one_upload_and_a_new_address_another() -> None:
    params, at, tensors = made()
    gather = gather_of(params, at)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        a, b = sorted(int(x) for x in torch.randint(0, SHARES, (2,), generator=generator))
        assert torch.equal(gather(tensors, (a, b)), expected(tensors, at, (a, b)))
    assert gather.uploads == 1
    tensors[-1] = torch.randn_like(params[-1])
    assert torch.equal(gather(tensors, (5, 9)), expected(tensors, at, (5, 9)))
    tensors[3] = None
    assert torch.equal(gather(tensors, (5, 9)), expected(tensors, at, (5, 9)))
    assert gather.uploads == 3
    assert torch.equal(gather(tensors[: len(params)], (5, 9)), expected(tensors[: len(params)], at, (5, 9)))
    assert gather.uploads == 4  # weights alone have a table of their own
    gather(tensors, (5, 9))
    assert gather.uploads == 4


def test_single_numbers_beside_the_rows_are_read_with_them() -> None:
    params, at, tensors = made()
    counters = [torch.tensor(3.0), torch.tensor([1e-7])]
    found = gather_of(params, at)([*tensors, *counters], (5, 9), fresh=2, numbers=2)
    assert torch.equal(found[: len(tensors)], expected(tensors, at, (5, 9)))
    assert torch.equal(found[len(tensors) :], torch.tensor([[3.0], [1e-7]]).expand(2, K))


def test_other_layouts_and_formats_are_read_by_torch_and_carried_along() -> None:
    params, at, _ = made()
    params[7] = params[7].to(memory_format=torch.channels_last)
    gather = gather_of(params, at)
    shares = (7_000_000, 3_000_000_000)
    gather.reader.shares = shares  # type: ignore[attr-defined]
    transposed = torch.randn(96, 64).bfloat16().t()  # laid out otherwise than its parameter
    double = torch.randn(700, dtype=torch.float64)
    own = torch.randn_like(params[7])
    wanted = [transposed.contiguous(), double, *params[2:7], own]
    for _ in range(3):  # they are read anew each time, at the same addresses
        transposed.mul_(2)
        double.add_(1)
        wanted[0] = transposed.contiguous()
        found = gather([transposed, double, *params[2:7], own], shares)
        assert torch.equal(found, expected(wanted, at, shares))


def test_several_gathers_asked_for_together_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    params, at, tensors = made()
    shares = [(5, 9), (1, SHARES - 1), (SHARES // 3, SHARES // 2), (0, 0), (2**31 - 1, 2**31)]
    others = params[:5]
    all_of, few_of = gather_of(params, at), gather_of(others, at[:5])
    launched: list[int] = []
    run = joint_reads._run_together
    monkeypatch.setattr(joint_reads, "_run_together", lambda reads: (launched.append(len(reads)), run(reads)))
    with joint_reads.joined():
        found = [(few_of if i % 2 else all_of)(others if i % 2 else tensors, s) for i, s in enumerate(shares)]
        for one in found:
            one.fill_(torch.nan)  # nothing has run yet
    assert launched == [4, 1]
    for i, (one, s) in enumerate(zip(found, shares, strict=True)):
        wanted = expected(others, at[:5], s) if i % 2 else expected(tensors, at, s)
        assert torch.equal(one, wanted), i

    def interrupted() -> None:
        with joint_reads.joined():
            all_of(tensors, (5, 9))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert launched == [4, 1]
    assert torch.equal(all_of(tensors, (5, 9)), found[0]) and launched == [4, 1, 1]  # on its own again


def test_where_they_do_not_run_together_each_runs_alone_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params, at, tensors = made()
    gather = gather_of(params, at)
    monkeypatch.setattr(joint_reads, "_failed", False)
    monkeypatch.setattr(gather_kernel, "gather_joined", None)
    with pytest.warns(UserWarning, match="one by one") as said:
        for _ in range(2):
            with joint_reads.joined():
                found = [gather(tensors, (5, 9)), gather(tensors, (7, 11))]
            assert torch.equal(found[0], expected(tensors, at, (5, 9)))
            assert torch.equal(found[1], expected(tensors, at, (7, 11)))
    assert len(said) == 1


def test_values_that_are_no_numbers_arrive_as_they_are() -> None:
    p = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-42, 0.0]).repeat(30)
    gather = gather_of([p], rows([180]))
    assert multi_gather.equals(gather([p], (1, 2)), expected([p], rows([180]), (1, 2)))


def test_gradients_of_another_format_at_the_same_address_are_read_as_they_are() -> None:
    at = rows([700])
    param = torch.randn(700)
    gather = gather_of([param], at)
    memory = torch.randn(700)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
        grad = memory.view(dtype)[:700]
        assert torch.equal(gather([param, grad], (3, 11), fresh=1), expected([param, grad], at * 2, (3, 11)))
    assert gather.uploads == 4


def test_formats_are_looked_at_again_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_gather, "_RECHECK", 3)
    at = rows([700])
    param = torch.randn(700)
    gather = gather_of([param], at)
    memory = torch.randn(700)
    gather([param, memory], (3, 11))
    other = memory.view(torch.bfloat16)[:700]
    for _ in range(2):
        found = gather([param, other], (3, 11))
    assert multi_gather.equals(found, expected([param, other], at * 2, (3, 11)))
