"""Samples of a few parameters at positions that stay: by one launch or by addresses where the device can, else by torch's views.

Legend: A arrays, n rows (parameters), K samples per row, h: 1, or 2 of the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from update_watch.measure.device import kernel_gathers
from update_watch.measure.device.host_memory import HostBlocks
from update_watch.measure.device.multi_gather import MultiGather
from update_watch.measure.parameters import Row
from update_watch.measure.sampling import Sampler, local, pack_views

_T = TypeVar("_T")


class FixedSamples:
    """Reads them in a step; a tensor is made of what was read later, when its code is in the caches."""

    def __init__(self, rows: Sequence[Row], samplers: Sequence[Sampler], is_split: bool, device: torch.device) -> None:
        """`is_split`: of the two of the same those of all rows come first, then the others; else both of a row."""
        self._samplers, self._is_split, self._device = samplers, is_split, device
        shards = [local(row.param) for row in rows]
        self._multi: MultiGather | None = None
        self._blocks: HostBlocks | None = None
        if kernel_gathers.reads(device, set()) and all(type(sampler) is Sampler for sampler in samplers):
            self._multi = self._one_launch(shards)
        elif (blocks := HostBlocks.of(samplers, shards)) is not None and len(blocks.rows) == len(rows):
            self._blocks = blocks

    @property
    def are_once(self) -> bool:
        """h is 1."""
        return self._multi is None

    def read(self, tensors: Sequence[Tensor]) -> Any:
        """Of each array a tensor of every row, local ones; see `tensor`."""
        if self._blocks is not None and (blocks := self._blocks.read(tensors, self._blocks.placed)) is not None:
            return blocks
        n = len(self._samplers)
        views = [self._samplers[i % n].view(tensor) for i, tensor in enumerate(tensors)]
        if self._multi is None:
            return pack_views(views, self._samplers)
        each = [view for first in range(0, len(views), n) for view in self._twice(views[first : first + n])]
        return self._multi(each, (0, 0), fresh=len(each))

    def tensor(self, read: Any) -> Tensor:
        """[A, n, h, K]"""
        n, samples = len(self._samplers), self._samplers[0].samples
        if self._blocks is not None and not isinstance(read, Tensor):
            read = self._blocks.tensor(read)
        values: Tensor = read
        if self._multi is None:
            return values.view(-1, n, 1, samples)
        return values.view(-1, 2, n, samples).transpose(1, 2) if self._is_split else values.view(-1, n, 2, samples)

    def _one_launch(self, shards: Sequence[Tensor]) -> MultiGather:
        """Reads views as they are, positions from the first element on."""
        samplers, samples = self._twice(self._samplers), self._samplers[0].samples
        numels = [s.size if s.is_whole else samples + 1 for s in samplers]
        positions = [None if s.positions is None else s.positions._replace(room=1) for s in samplers]
        views = self._twice([s.view(shard) for s, shard in zip(self._samplers, shards, strict=True)])

        def read(i: int, view: Tensor) -> Tensor:
            return pack_views([view], samplers[i : i + 1])[0]

        return MultiGather(numels, positions, [view.stride() for view in views], samples, self._device, read)

    def _twice(self, items: Sequence[_T]) -> list[_T]:
        return [*items, *items] if self._is_split else [item for item in items for _ in (0, 1)]
