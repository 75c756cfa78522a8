"""Blocks of elements of many tensors of the host by their addresses, in one call.

A strided view of each tensor takes 3 to 6 us where its caches are cold, and a step reads dozens of them; looking up where the
tensors begin takes 0.7 us each, and one array of addresses is then read by one call of NumPy. It copies bytes: what torch's
views would hold, to the bit.

Reading at an address is safe while somebody holds what lies there. So addresses are asked of the tensors just before each
read, whose tensors are held until it has returned.

Legend: n rows, P blocks of each, B elements of a block, K = P B samples.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from update_watch.measure.sampling import PLAIN, Sampler

_FIRST, _LAST = 1 << 12, 1 << 56  # addresses that a process can have; the first page is nobody's
_MOST_ROOM = 1 << 31  # cells: their product with a share stays within 63 bits
_LEAST_ROWS = 2  # a single view is as fast
_NUMBERS = {2: np.int16, 4: np.int32, 8: np.int64}  # of as many bytes, as which torch takes arrays over

Places = npt.NDArray[np.int64]  # bytes
Blocks = npt.NDArray[np.void]


@functools.cache
def _memory(size: int) -> npt.NDArray[Any]:
    """The `size` bytes from each address on; only where somebody holds them may be looked up."""

    class _Everything:
        __array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "data": (_FIRST, True),
            "shape": (_LAST - _FIRST,),
            "strides": (1,),
        }

    return np.asarray(_Everything())


@functools.cache
def is_available() -> bool:
    """Whether what is read at an address is what lies there."""
    there = np.arange(3, dtype=np.int16)  # an array: under a mode of torch's a tensor may have no memory
    try:
        places = at(np.array([there.ctypes.data + 2], np.int64))
        return np.dtype(np.intp).itemsize == 8 and read(places, 4).tobytes() == there[1:].tobytes()
    except Exception:  # NumPy may come to refuse such an array
        return False


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor to be read into; on the host its memory is NumPy's, which is asked for it."""
    if device.type != "cpu" or dtype.itemsize not in _NUMBERS:
        return torch.empty(*shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(shape, _NUMBERS[dtype.itemsize])).view(dtype)


def can_read(tensor: Tensor) -> bool:
    """Whether the tensor is what lies at its address."""
    is_stored = type(tensor) in PLAIN and tensor.is_cpu and tensor.layout is torch.strided
    return is_stored and not tensor.is_neg() and tensor.data_ptr() != 0


def at(addresses: Places) -> Places:
    """Where to look addresses up."""
    return addresses - _FIRST


def read(places: Places, size: int) -> Blocks:
    """[...] of `size` bytes: what lies at some places, whose tensors the caller holds."""
    return _memory(size)[places]


def read_into(places: Places, out: Blocks) -> None:
    """The same, into an array."""
    out[...] = _memory(out.itemsize)[places]


class HostBlocks:
    """Where the samples of n rows lie, all of them cut into blocks of one shape; see `Sampler`."""

    def __init__(self, rows: Sequence[int], samplers: Sequence[Sampler], tensors: Sequence[Tensor]) -> None:
        """`rows`: which of all rows these are. `tensors`: the (local) tensors of these rows, of one format."""
        self.rows, self.dtype = list(rows), tensors[0].dtype
        self._layouts, self._samplers = [(tensor.stride(), tensor.numel()) for tensor in tensors], samplers
        plans = [sampler.positions for sampler in samplers if sampler.positions is not None]
        self._number = _NUMBERS[self.dtype.itemsize]
        _, blocks, block = samplers[0].view_shape
        self._size = block * self.dtype.itemsize
        # bytes from a set's first block to the next, and from a tensor's beginning to the first cell of the row
        self._steps_n11 = np.array([plan.step for plan in plans], np.int64)[:, None, None] * self._size
        self._blocks = blocks
        self._first_n = np.array([sampler.first for sampler in samplers], np.int64) * self.dtype.itemsize
        self._room_n = np.array([plan.room for plan in plans], np.int64)

    @classmethod
    def of(cls, samplers: Sequence[Sampler], tensors: Sequence[Tensor]) -> HostBlocks | None:
        """Most of the rows that are alike; None where too few are. `tensors`: the rows' own, local ones."""
        if not is_available():
            return None
        alike: dict[Any, list[int]] = {}
        for i, (sampler, tensor) in enumerate(zip(samplers, tensors, strict=True)):
            at = sampler.positions
            if type(sampler) is Sampler and at is not None and at.room < _MOST_ROOM and can_read(tensor):
                alike.setdefault((tensor.dtype, sampler.view_shape), []).append(i)
        rows = max(alike.values(), key=len, default=[])
        if len(rows) < _LEAST_ROWS or tensors[rows[0]].dtype.itemsize not in _NUMBERS:
            return None
        return cls(rows, [samplers[i] for i in rows], [tensors[i] for i in rows])

    def places(self, *shares: int) -> Places:
        """[n, sets, P / sets]: where the blocks of the sets of these shares lie, the lowest first, from a tensor's beginning."""
        begins = [self._first_n + (share * self._room_n >> 32) * self._size for share in sorted(shares)]
        return self._blocks_of(np.stack(begins, 1))

    @functools.cached_property
    def placed(self) -> Places:
        """[n, sets, P / sets]: where those of the samplers lie, of rows whose samplers stay."""
        return self._blocks_of(np.array([sampler.begins for sampler in self._samplers], np.int64) * self.dtype.itemsize)

    def _blocks_of(self, begins_nS: Places) -> Places:
        return at(begins_nS)[..., None] + self._steps_n11 * np.arange(self._blocks)

    def read(self, tensors: Sequence[Tensor | None], places_nSP: Places) -> Blocks | None:
        """[arrays, n, sets, P / sets] blocks; None where they have to be read otherwise. `tensors`: local ones, an array of rows after
        the other."""
        addresses: list[int] = []
        dtype, layouts = self.dtype, itertools.cycle(self._layouts)
        for tensor, (stride, numel) in zip(tensors, layouts, strict=False):
            if tensor is None or tensor.dtype is not dtype or not can_read(tensor):
                return None
            if tensor.stride() != stride or tensor.numel() != numel:  # another one in its place may be shorter
                return None
            addresses.append(tensor.data_ptr())
        return read(np.array(addresses, np.int64).reshape(-1, len(places_nSP), 1, 1) + places_nSP, self._size)

    def tensor(self, blocks: Blocks) -> Tensor:
        """[arrays, n, K] in the rows' dtype: what was read. Not in `read`: torch's code is not in the caches there."""
        return torch.from_numpy(blocks.view(self._number)).view(self.dtype)
