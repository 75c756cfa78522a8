"""The few elements of a tensor that the ledger reads, and how those of many are read by one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from update_watch.measure.device.multi_gather import MultiGather

ELEMENTS = 16
_TALL = 4  # rows per column, from which on a matrix is taken for an embedding


def block_of(shard: Tensor, place: float) -> list[Tensor]:
    """Views of E elements in memory order, contiguous ones; of a smaller tensor all of it, again and again.

    A gather of contiguous views takes a third of the time of any other.
    """
    numel, offset = shard.numel(), shard.storage_offset()
    rows = shard.shape[0]
    if shard.dim() == 2 and rows >= ELEMENTS and rows > _TALL * shard.shape[1]:
        # an embedding: of neighbours a batch uses all or none
        begins = [int((place + k / ELEMENTS) % 1.0 * numel) for k in range(ELEMENTS)]
        return [shard.as_strided((1,), (1,), offset + begin) for begin in begins]
    if numel >= ELEMENTS:
        return [shard.as_strided((ELEMENTS,), (1,), offset + int(place * (numel - ELEMENTS)))]
    whole = shard.as_strided((numel,), (1,), offset)
    times, rest = divmod(ELEMENTS, numel)
    return [whole] * times + ([whole[:rest]] if rest else [])


class BlockGather:
    """The blocks of some tensors by one launch; those that come last and are no neighbours in memory by torch."""

    def __init__(self, n: int, device: torch.device) -> None:
        self._multi = MultiGather([ELEMENTS] * n, [None] * n, [(1,)] * n, ELEMENTS, device, lambda _, block: block)
        self._blocks: list[Tensor | None] = []
        self._apart: list[Tensor] = []

    def go_to(self, blocks: list[list[Tensor]]) -> None:
        """Read these from now on."""
        self._blocks = [block[0] if len(block) == 1 else None for block in blocks]
        self._apart = [view for block in blocks if len(block) > 1 for view in block]

    def __call__(self, out_nE: Tensor) -> None:
        self._multi(self._blocks, (0, 0), out=out_nE)
        if self._apart:  # embeddings, and tensors of a few elements
            apart = self._blocks.count(None)
            torch.cat(self._apart, out=out_nE[-apart:].view(-1))
