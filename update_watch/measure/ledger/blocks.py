"""The few elements of a tensor that the ledger reads, and how those of many are read by one launch, or by their addresses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from update_watch.measure.device import host_memory
from update_watch.measure.device.multi_gather import MultiGather
from update_watch.measure.positions import Positions, distance

ELEMENTS = 16
_NEIGHBOURS = 4
_MOST_RUNS = (
    4  # of tensors that are alike; of more, elements are read one by one, which takes 10 us more for 68 tensors
)
_TALL = 4  # rows per column, from which on a matrix is taken for an embedding


def block_of(shard: Tensor, place: float) -> list[Tensor]:
    """A view [runs, neighbours] of E elements, in memory order; of a smaller tensor views of all of it, again and again."""
    at = _positions(shard)
    begin = shard.storage_offset() + int(place * at.room)
    if at.numel >= ELEMENTS:
        return [shard.as_strided((at.blocks, at.block), (at.step * at.block, 1), begin)]
    lengths = [min(at.block, ELEMENTS - b * at.block) for b in range(at.blocks)]
    return [shard.as_strided((1, length), (at.block, 1), begin) for length in lengths]


def _positions(shard: Tensor) -> Positions:
    """Where the elements lie, from the first one on; its place is one of `room`."""
    numel = shard.numel()
    if numel < ELEMENTS:
        return Positions(numel, numel, -(-ELEMENTS // numel), 0, 1)
    # an embedding: of neighbours a batch uses all or none
    is_tall = shard.dim() == 2 and shard.shape[0] >= ELEMENTS and shard.shape[0] > _TALL * shard.shape[1]
    block = 1 if is_tall else _NEIGHBOURS
    blocks = ELEMENTS // block
    step = distance(numel // block, max(shard.stride()), blocks, block)
    return Positions(numel, block, blocks, step, numel - ((blocks - 1) * step + 1) * block + 1)


class ViewReads:
    """The blocks of some tensors by torch's operators, one for those that follow each other and are alike."""

    def __init__(self, blocks: Sequence[Sequence[Tensor]]) -> None:
        views = [view for block in blocks for view in block]
        runs = [list(run) for _, run in itertools.groupby(views, lambda view: view.shape[1])]
        if len(runs) > _MOST_RUNS:
            runs = [[row for view in views for row in view.unbind()]]
        self._runs = [(run, sum(view.numel() for view in run), run[0].shape[1:]) for run in runs]

    def __call__(self, out: Tensor) -> None:
        """Read all of them into `out` [n E]."""
        start = 0
        for run, size, width in self._runs:
            torch.cat(run, out=out[start : start + size].view(-1, *width))
            start += size


class BlockGather:
    """The blocks of some tensors by one launch."""

    def __init__(self, shards: Sequence[Tensor], device: torch.device) -> None:
        positions = [_positions(shard)._replace(room=1) for shard in shards]  # the views begin where they are read
        # of fewer than E elements the kernel itself would read the first one more often than the others
        numels = [max(at.numel, ELEMENTS + 1) for at in positions]
        strides = [(1,)] * len(shards)
        self._multi = MultiGather(numels, positions, strides, ELEMENTS, device, lambda _, block: block)
        self._firsts: list[Tensor] = []

    def go_to(self, blocks: list[list[Tensor]]) -> None:
        """Read these from now on."""
        self._firsts = [block[0][0] for block in blocks]

    def __call__(self, out_nE: Tensor) -> None:
        self._multi(self._firsts, (0, 0), out=out_nE)


class HostBlockReads:
    """The blocks of some tensors of the host, all of one format, by their addresses, into places that stay."""

    def __init__(self, blocks: Sequence[Sequence[Tensor]], places: Sequence[Tensor]) -> None:
        """`blocks`: of each tensor its views; somebody keeps them, and with them what is read. `places`: [n E] each."""
        size = blocks[0][0].element_size()
        into = [place.view(-1, ELEMENTS).view(torch.uint8).numpy() for place in places]
        self._addresses: list[npt.NDArray[np.int64]] = []
        self._places: list[list[npt.NDArray[Any]]] = [[] for _ in places]
        # of fewer than E elements each is read by itself
        widths = [views[0].shape[1] if len(views) == 1 else 1 for views in blocks]
        runs = [(width, len(list(run))) for width, run in itertools.groupby(widths)]
        if len(runs) > _MOST_RUNS:
            runs = [(1, len(blocks))]
        start = 0
        for width, length in runs:
            stop = start + length
            begins = [[at for view in views for at in _begins(view, width)] for views in blocks[start:stop]]
            self._addresses.append(host_memory.at(np.array(begins, np.int64)))
            for place, rows in zip(self._places, into, strict=True):
                place.append(rows[start:stop].view(f"V{width * size}"))
            start = stop

    @staticmethod
    def can_read(blocks: Sequence[Sequence[Tensor]]) -> bool:
        """Whether what their addresses hold is what they hold."""
        return host_memory.is_available() and all(host_memory.can_read(view) for views in blocks for view in views)

    def __call__(self, place: int) -> None:
        """Read all of them into one of the places."""
        for addresses, rows in zip(self._addresses, self._places[place], strict=True):
            host_memory.read_into(addresses, rows)


def _begins(view: Tensor, width: int) -> list[int]:
    """Where each `width` neighbours of a view [runs, neighbours] begin."""
    first, step, size = view.data_ptr(), view.stride(0), view.element_size()
    return [first + (run * step + k) * size for run in range(len(view)) for k in range(0, view.shape[1], width)]
