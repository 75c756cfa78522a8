"""The few elements of a tensor that the ledger reads, and how those of many are read by one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from update_watch.measure.device.multi_gather import MultiGather
from update_watch.measure.positions import Positions

ELEMENTS = 16
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
