"""Samples of many tensors by one launch, on CUDA. Needs Triton, which torch's CUDA wheels bring along.

Up to four gathers (rows before a step, the ledger's few elements, gradients of FP32 states) make one launch: `gather_joined`.

One program per view: a view is a row (tensor of the optimizer's) of a slot (weight, a state, gradient). Positions are those of
`positions`, repeated to the bit from two shares of 2^32 that are the kernel's arguments, so nothing about them is uploaded.

`facts` [n, 5] int64, once per plan: block, elements of one set, step, room (cells), elements of the tensor; a tensor of at most
K elements is read whole, its padding repeats the first element. `addresses` and `kinds` [views]: where the view's tensor
begins (0: there is none, zeros are read) and how it is stored; see `KINDS`. `out` [views, K] FP32. A view may be a single
number beside the rows (a step counter): it is read K times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
PACKED = 3  # FP32 samples that torch has read already, one after the other
NUMBER = 4  # a single one in FP32


@triton.jit
def read_view(  # type: ignore[no-untyped-def]
    view,
    addresses,
    kinds,
    facts,
    out,
    first_high,
    first_low,
    second_high,
    second_low,
    n,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Shares come in halves of 16 bits, so that every turn calls the same compiled kernel."""
    view = view.to(tl.int64)
    fact = facts + (view % n) * 5
    block, per_set, step = tl.load(fact), tl.load(fact + 1), tl.load(fact + 2)
    room, numel = tl.load(fact + 3), tl.load(fact + 4)
    k = tl.arange(0, WIDTH).to(tl.int64)
    is_first = k < per_set
    first = (first_high.to(tl.int64) << 16) | first_low.to(tl.int64)
    second = (second_high.to(tl.int64) << 16) | second_low.to(tl.int64)
    share = tl.where(is_first, first, second)
    within = tl.where(is_first, k, k - per_set)
    at = block * (((share * room) >> 32) + (within // block) * step) + within % block
    at = tl.where(numel <= K, tl.where(k < numel, k, 0), at)
    address, kind = tl.load(addresses + view), tl.load(kinds + view)
    at = tl.where(kind == 3, k, tl.where(kind == 4, 0, at))
    # -1: nothing to be read, by this lane or from this view
    kind_k = tl.where(k < K, tl.where(address != 0, kind, -1), -1)
    brain = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + at, mask=kind_k == 0, other=0.0).to(tl.float32)
    half = tl.load(address.to(tl.pointer_type(tl.float16)) + at, mask=kind_k == 1, other=0.0).to(tl.float32)
    single = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=kind_k >= 2, other=0.0)
    x = tl.where(kind_k == 0, brain, tl.where(kind_k == 1, half, single))
    tl.store(out + view * K + k, x, mask=k < K)


@triton.jit(do_not_specialize=["high", "low", "next_high", "next_low", "n"])
def gather_views(  # type: ignore[no-untyped-def]
    addresses, kinds, facts, out, high, low, next_high, next_low, n, K: tl.constexpr, WIDTH: tl.constexpr
):
    """The views of one gather."""
    read_view(tl.program_id(0), addresses, kinds, facts, out, high, low, next_high, next_low, n, K, WIDTH)


_CHANGING = ("high", "low", "next_high", "next_low", "n", "views")


# fmt: off
@triton.jit(do_not_specialize=[f"{name}{part}" for part in range(4) for name in _CHANGING])
def gather_joined(  # type: ignore[no-untyped-def]
    addresses0, kinds0, facts0, out0,
    high0, low0, next_high0, next_low0, n0, views0,
    addresses1, kinds1, facts1, out1,
    high1, low1, next_high1, next_low1, n1, views1,
    addresses2, kinds2, facts2, out2,
    high2, low2, next_high2, next_low2, n2, views2,
    addresses3, kinds3, facts3, out3,
    high3, low3, next_high3, next_low3, n3, views3,
    K0: tl.constexpr, WIDTH0: tl.constexpr, K1: tl.constexpr, WIDTH1: tl.constexpr,
    K2: tl.constexpr, WIDTH2: tl.constexpr, K3: tl.constexpr, WIDTH3: tl.constexpr,
):
    # fmt: on
    """The views of four gathers, one after the other; there may be fewer: the last ones have no views then."""
    at = tl.program_id(0)
    if at < views0:
        read_view(at, addresses0, kinds0, facts0, out0, high0, low0, next_high0, next_low0, n0, K0, WIDTH0)
    elif at < views0 + views1:
        at -= views0
        read_view(at, addresses1, kinds1, facts1, out1, high1, low1, next_high1, next_low1, n1, K1, WIDTH1)
    elif at < views0 + views1 + views2:
        at -= views0 + views1
        read_view(at, addresses2, kinds2, facts2, out2, high2, low2, next_high2, next_low2, n2, K2, WIDTH2)
    else:
        at -= views0 + views1 + views2
        read_view(at, addresses3, kinds3, facts3, out3, high3, low3, next_high3, next_low3, n3, K3, WIDTH3)
