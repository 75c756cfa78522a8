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
from update_watch.measure.positions import Positions

ELEMENTS = 16
_MOST_RUNS = (
    4  # of neighbours that are alike; of more, elements are read one by one, which takes 10 us more for 68 tensors
)
_TALL = 4  # rows per column, from which on a matrix is taken for an embedding


def block_of(shard: Tensor, place: float) -> list[Tensor]:
    """Views of E elements in memory order, contiguous ones; of a smaller tensor all of it, again and again.

    A gather of contiguous views takes a third of the time of any other.
    """
    at = _positions(shard)
    begin = shard.storage_offset() + int(place * at.room)
    return [
        shard.as_strided((min(at.block, ELEMENTS - b * at.block),), (1,), begin + b * at.block * at.step)
        for b in range(at.blocks)
    ]


def _positions(shard: Tensor) -> Positions:
    """Where the elements lie, from the first one on; its place is one of `room`."""
    numel = shard.numel()
    if shard.dim() == 2 and shard.shape[0] >= ELEMENTS and shard.shape[0] > _TALL * shard.shape[1]:
        # an embedding: of neighbours a batch uses all or none
        step = numel // ELEMENTS
        return Positions(numel, 1, ELEMENTS, step, numel - (ELEMENTS - 1) * step)
    if numel >= ELEMENTS:
        return Positions(numel, ELEMENTS, 1, 0, numel - ELEMENTS + 1)
    return Positions(numel, numel, -(-ELEMENTS // numel), 0, 1)


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
        self._firsts = [block[0] for block in blocks]

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
        runs = [(is_one, len(list(run))) for is_one, run in itertools.groupby([len(views) == 1 for views in blocks])]
        if len(runs) > _MOST_RUNS:
            runs = [(False, len(blocks))]
        start = 0
        for is_one, length in runs:
            stop, width = start + length, ELEMENTS * size if is_one else size
            begins = [
                [view.data_ptr() + k for view in views for k in _bytes(view, width)] for views in blocks[start:stop]
            ]
            self._addresses.append(host_memory.at(np.array(begins, np.int64)))
            for place, rows in zip(self._places, into, strict=True):
                place.append(rows[start:stop].view(f"V{width}"))
            start = stop

    @staticmethod
    def can_read(blocks: Sequence[Sequence[Tensor]]) -> bool:
        """Whether what their addresses hold is what they hold."""
        return host_memory.is_available() and all(host_memory.can_read(view) for views in blocks for view in views)

    def __call__(self, place: int) -> None:
        """Read all of them into one of the places."""
        for addresses, rows in zip(self._addresses, self._places[place], strict=True):
            host_memory.read_into(addresses, rows)


def _bytes(view: Tensor, width: int) -> range:
    """From the beginning of a view to each of its parts of so many bytes."""
    return range(0, view.numel() * view.element_size(), width)
