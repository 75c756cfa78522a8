"""Which elements of a parameter are looked at, and how they leave it.

K elements of each parameter are read as one or two sets of nb blocks of B neighbours (`positions`): one strided view, no
index tensor, so nothing is copied from the host and a gather of many parameters is one `torch.stack`. Parameters with K elements or fewer are read whole and padded; a mask marks the
padding. Positions are counted in memory order, so any dense layout (channels-last, transposed) will do;
gradients and states laid out otherwise than their parameter are read through computed positions.

Legend: n rows (parameters), K samples per row, nb blocks of B elements in a set.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from update_watch.measure.positions import SHARES, Positions, plan
from update_watch.odd_tensors import unreadable

VARIED = 6  # values that differ, of FP32 values that BF16 holds: constants and zeros are no sign of a rounding
PLAIN = frozenset({Tensor, torch.nn.Parameter})


def local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that lives here; any other tensor as it is."""
    if type(tensor) in PLAIN:
        return tensor
    # there is none before their module is loaded, which takes a second that we do not ask for
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(tensor, module.DTensor):
        shard: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
        return shard
    return tensor


def unsamplable(tensor: Tensor) -> str:
    """Why elements of this (local) tensor cannot be sampled one by one; "" when they can."""
    if type(tensor) not in PLAIN and not is_lazy(tensor) and not _is_plain_subclass(tensor):
        return f"{type(tensor).__name__} is a tensor subclass that hides its stored values"
    if problem := unreadable(tensor):
        return problem
    if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
        return f"dtype {_name(tensor.dtype)} is not floating point"
    if not is_dense(tensor):
        return "its storage overlaps or has holes"
    return ""


def is_dense(tensor: Tensor) -> bool:
    """Every storage element between first and last belongs to exactly one tensor element."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride(), tensor.shape, strict=True) if si > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _is_plain_subclass(tensor: Tensor) -> bool:
    # a subclass without its own dispatch is an ordinary tensor with another name (nn.Buffer, UninitializedParameter's heirs)
    cls = type(tensor)
    if cls.__name__ == "FakeTensor":
        return True
    function = getattr(cls.__torch_function__, "__func__", cls.__torch_function__)  # bound to each class anew
    return cls.__torch_dispatch__ is Tensor.__torch_dispatch__ and function in (
        Tensor.__torch_function__.__func__,  # type: ignore[attr-defined]
        torch._C._disabled_torch_function_impl,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Sampler:
    """The samples of one parameter: views of tensors laid out like it, at its `positions`.

    `size` is the number of samples that are real (K, or the parameter's size if that is smaller); `is_whole`: there are too
    few elements to choose from, all are read. Else there are one or two `sets` of blocks; see `positions`. Of a `stretch` these
    are the elements from one place in memory order to another: `first` elements lie before it. `drawn`: cells of the whole
    parameter that are read until the next `place` instead of all sets, or of those after the first that was placed.
    """

    __slots__ = (
        "_gap",
        "_low",
        "_moves_first",
        "_numel",
        "_shape",
        "_strides",
        "_view_strides",
        "drawn",
        "first",
        "is_whole",
        "positions",
        "samples",
        "sets",
        "size",
        "view_shape",
    )

    def __init__(self, param: Tensor, samples: int, sets: int = 1, stretch: slice | None = None) -> None:
        if samples % sets:
            raise ValueError(f"Sampler(samples={samples}, sets={sets}): the sets must be of one size")
        self.samples, self.sets = samples, sets
        self._numel = param.numel()
        stretch = stretch or slice(0, self._numel)
        length = stretch.stop - stretch.start
        self.size = min(samples, length)
        self._shape = tuple(param.shape)
        self._strides = param.stride()
        self.is_whole = length <= samples
        self.first = self._low = stretch.start  # elements before it, and before the first set
        self._gap = 0  # from there to the second
        self.positions: Positions | None = None
        self.drawn: Tensor | None = None
        self._moves_first = False  # the set that was placed first lies behind the other
        self.view_shape: tuple[int, ...] = (length,)
        self._view_strides: tuple[int, ...] = (1,)
        if not self.is_whole:
            self.positions = plan(length, self._row_length(), samples // sets)
            self.view_shape = (sets, self.positions.blocks, self.positions.block)
            self._view_strides = (0, self.positions.step * self.positions.block, 1)
            self._low += self.positions.block * self.positions.offset(SHARES // 2)

    def _row_length(self) -> int:
        """Elements of the dimension that lies contiguous in memory."""
        if self._shape[-1:] > (1,) and self._strides[-1] == 1:
            return self._shape[-1]
        return next((n for n, stride in zip(self._shape, self._strides, strict=True) if stride == 1 and n > 1), 1)

    @property
    def begins(self) -> list[int]:
        """Elements before the first block of each set, in the order in which `view` reads them."""
        return [self._low + k * self._gap for k in range(self.sets)]

    def redraw(self, rng: random.Random) -> None:
        """Choose new positions."""
        self.place(*(rng.randrange(SHARES) for _ in range(self.sets)))

    def place(self, *shares: int) -> None:
        """Go to the positions of so many sets, the one of the lower share first in what `view` reads."""
        self.drawn = None
        if self.positions is not None:
            # offsets grow with shares
            low, high = self.positions.offset(min(shares)), self.positions.offset(max(shares))
            block = self.positions.block
            self._low, self._gap = self.first + block * low, block * (high - low)
            self._moves_first = shares[-1] < shares[0]
            self._view_strides = (self._gap, *self._view_strides[1:])

    def view(self, tensor: Tensor) -> Tensor:
        """Samples of a tensor with this parameter's shape.

        Shape [sets, nb, B], or [size] for a parameter read whole. A view where the layouts agree, else a gathered copy.
        """
        if tensor.stride() != self._strides and not self.shares_layout(tensor):
            return self._gather_other_layout(tensor)
        if self.drawn is not None:
            return self._drawn_of(tensor)
        return tensor.as_strided(self.view_shape, self._view_strides, tensor.storage_offset() + self._low)

    def cells(self, tensor: Tensor, first: int = 0, step: int = 1) -> Tensor:
        """[count, B]: every so manieth cell of a whole tensor in this parameter's layout."""
        assert self.positions is not None
        block = self.positions.block
        count = len(range(first, self._numel // block, step))
        return tensor.as_strided((count, block), (step * block, 1), tensor.storage_offset() + first * block)

    def _drawn_of(self, tensor: Tensor) -> Tensor:
        assert self.drawn is not None
        moving = self.cells(tensor).index_select(0, self.drawn).view(-1, *self.view_shape[1:])
        if len(moving) == self.sets:
            return moving
        shape = (1, *self.view_shape[1:])
        first = self._low + (self._gap if self._moves_first else 0)
        kept = tensor.as_strided(shape, self._view_strides, tensor.storage_offset() + first)
        return torch.cat([moving, kept] if self._moves_first else [kept, moving])

    def shares_layout(self, tensor: Tensor) -> bool:
        """The tensor's elements lie in memory in the parameter's order."""
        if tensor.stride() == self._strides:
            return True
        # strides of dimensions of size 1 are arbitrary and do not matter
        mine = [s for s, size in zip(self._strides, self._shape, strict=True) if size > 1]
        theirs = [s for s, size in zip(tensor.stride(), self._shape, strict=True) if size > 1]
        return mine == theirs

    def _gather_other_layout(self, tensor: Tensor) -> Tensor:
        # memory position in the parameter -> coordinates -> memory position in `tensor`; arithmetic on the device
        if self.drawn is not None:
            position = self._drawn_of(
                torch.arange(self._numel, device=tensor.device).as_strided(self._shape, self._strides)
            )
        else:
            position = torch.full((), self._low, dtype=torch.int64, device=tensor.device)
            for size, stride in zip(self.view_shape, self._view_strides, strict=True):
                position = position.unsqueeze(-1) + torch.arange(size, device=tensor.device) * stride
        position = position.reshape(-1)
        address = torch.zeros_like(position)
        for size, mine, theirs in zip(self._shape, self._strides, tensor.stride(), strict=True):
            if size > 1:
                address = address + position.div(mine, rounding_mode="floor").remainder(size) * theirs
        span = 1 + sum((size - 1) * s for size, s in zip(self._shape, tensor.stride(), strict=True))
        flat = tensor.as_strided((span,), (1,), tensor.storage_offset())
        return flat.index_select(0, address).view(self.view_shape)


def gather(views: Sequence[Tensor], samplers: Sequence[Sampler]) -> Tensor:
    """[n, K] FP32: the samples `views[i]` in row i; see `pack_views`."""
    return pack_views(views, samplers).to(torch.float32)


def pack_views(views: Sequence[Tensor], samplers: Sequence[Sampler]) -> Tensor:
    """[n, K]: the samples `views[i]` in row i, by a constant number of operators per run of alike rows.

    In the views' dtype if they have one in common, else FP32. There may be several views per sampler: `views[i]` is
    shaped like `samplers[i % len(samplers)]`. Rows of one dtype that lie next to each other are stacked in one operator.
    Padding repeats a row's first element, so a rule run over it meets no value it would not meet anyway.
    """
    n, samples = len(views), samplers[0].samples
    is_one = len({view.dtype for view in views}) == 1
    if is_one and not any([sampler.is_whole for sampler in samplers]) and len({s.view_shape for s in samplers}) == 1:
        return torch.stack(list(views)).view(n, samples)
    out_nK = torch.empty(n, samples, dtype=views[0].dtype if is_one else torch.float32, device=views[0].device)
    matching = list(samplers) * (n // len(samplers))
    start = 0
    while start < n:
        dtype, whole, shape = views[start].dtype, matching[start].is_whole, matching[start].view_shape
        stop = start + 1
        while stop < n and views[stop].dtype is dtype and matching[stop].is_whole == whole:
            if not whole and matching[stop].view_shape != shape:
                break
            stop += 1
        if whole:
            pieces: list[Tensor] = []
            for i in range(start, stop):
                view = views[i]
                pieces.append(view)
                if matching[i].size < samples:
                    pieces.append(view[:1].expand(samples - matching[i].size))
            packed = torch.cat(pieces)
        else:
            packed = torch.stack(list(views[start:stop]))
        if packed.device != out_nK.device:
            raise RuntimeError(f"tensors on {out_nK.device} and {packed.device} cannot be gathered together")
        out_nK[start:stop].copy_(packed.view(stop - start, -1))
        start = stop
    return out_nK


def mask(samplers: Sequence[Sampler], device: torch.device) -> Tensor | None:
    """[n, K] FP32: 1 for samples, 0 for padding; None when no row is padded."""
    if all(s.size == s.samples for s in samplers):
        return None
    valid_nK = torch.ones(len(samplers), samplers[0].samples, device=device)
    start = 0
    for size, alike in itertools.groupby([sampler.size for sampler in samplers]):
        stop = start + len(list(alike))
        valid_nK[start:stop, size:].fill_(0.0)
        start = stop
    return valid_nK
