"""A step's samples by their addresses (`host_memory`), on the host; else by torch's views (`gathers`)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.measure.device.host_memory import Blocks, HostBlocks, Places
from update_watch.measure.gathers import Common, Gathers
from update_watch.measure.parameters import Row
from update_watch.measure.positions import share
from update_watch.measure.sampling import pack_views


class _Read(NamedTuple):
    """What was read in a step, until it is added up."""

    blocks: Blocks
    others: Tensor | None  # [rows, K] of those that are read by views


class HostGathers(Gathers):
    """Reads rows of one optimizer by addresses wherever they lie as they were planned for."""

    def __init__(
        self,
        blocks: HostBlocks,
        optimizer: Optimizer,
        rows: list[Row],
        samples: int,
        rng: random.Random,
        common: Common,
    ) -> None:
        super().__init__(optimizer, rows, samples, rng, common)
        self._blocks = blocks
        self._others = sorted({*range(len(rows))} - {*blocks.rows})  # those that torch reads
        self._other_samplers = [self.samplers[i] for i in self._others]
        self._shares = (0, 0)
        self._places: Places | None = None  # held within a step
        self._ahead: tuple[tuple[int, int], Places] | None = None  # of the next `move`, until it comes
        self._is_placed = False  # the samplers are where `_shares` says
        self._is_drawn = False  # some are elsewhere

    # --- where: samplers are placed only where their views are read ------------------------------

    def settle(self) -> None:
        """Both sets at the kept positions."""
        super().settle()
        self._put()

    def _go_to(self, kept: int, moving: int) -> None:
        self._shares, self._is_placed, self._is_drawn = (kept, moving), False, False
        ahead, self._ahead = self._ahead, None
        self._places = ahead[1] if ahead is not None and ahead[0] == self._shares else None

    def _look_ahead(self) -> None:
        """Work out where the next `move` goes: while steps are added up it is a third of the work that it is in one."""
        coming = self._turn + 1 if self._keeps else self._turn + 2
        kept = self._kept_turn if self._keeps else coming - 1
        shares = share(self._phase, kept), share(self._phase, coming)
        if self._ahead is None or self._ahead[0] != shares:
            self._ahead = shares, self._blocks.places(*shares)

    def _put(self) -> None:
        if not self._is_placed:
            self._is_placed = True
            for sampler in self._moving:
                sampler.place(*self._shares)

    def draw(
        self, tensors: Iterable[int], grads: Sequence[Tensor | None], states: Sequence[Mapping[str, Any]]
    ) -> dict[int, Tensor]:
        """Read some tensors where gradients and states are large, see `Gathers.draw`."""
        self._put()
        drawn = super().draw(tensors, grads, states)
        self._is_drawn = bool(drawn)
        return drawn

    # --- what ------------------------------------------------------------------------------------

    def after(self, states: list[dict[str, Any]] | None) -> Any:
        """See `Gathers.after`: the last that is read in a step."""
        read = super().after(states)
        self._places = None
        return read

    def _read(self, tensors: list[Tensor | None]) -> Any:
        if self._places is None:
            self._places = self._blocks.places(*self._shares)
        read = None if self._is_drawn else self._read_blocks(self._shards(tensors), self._places)
        if read is None:
            self._put()
            read = super()._read(tensors)
        return read

    def _read_blocks(self, tensors: list[Tensor | None], places: Places) -> _Read | None:
        """None where something has to be read by views."""
        if not self._others:
            blocks = self._blocks.read(tensors, places)
            return None if blocks is None else _Read(blocks, None)
        firsts = range(0, len(tensors), len(self.rows))
        blocks = self._blocks.read([tensors[first + i] for first in firsts for i in self._blocks.rows], places)
        if blocks is None:
            return None
        self._put()
        views = [
            self._zeros[i] if (tensor := tensors[first + i]) is None else self._view[i](tensor)
            for first in firsts
            for i in self._others
        ]
        if any([view.dtype is not self._blocks.dtype for view in views]):
            return None
        return _Read(blocks, pack_views(views, self._other_samplers))

    def unpacked(self, packed: Any) -> Tensor:
        """[rows, K]: what was read in a step; called when it is added up."""
        if isinstance(packed, Tensor):
            return packed
        self._look_ahead()
        blocks_AnK = self._blocks.tensor(packed.blocks)
        if packed.others is None:
            return blocks_AnK.view(-1, self.samples)
        arrays, n = len(blocks_AnK), len(self.rows)
        values_AnK = torch.empty(arrays, n, self.samples, dtype=self._blocks.dtype)
        values_AnK[:, self._blocks.rows] = blocks_AnK.view(arrays, -1, self.samples)
        values_AnK[:, self._others] = packed.others.view(arrays, -1, self.samples)
        return values_AnK.view(-1, self.samples)

    def samples_of(self, i: int, tensor: Tensor, moving_first: bool) -> Tensor:
        """[K]: the samples of one row in a tensor laid out like it, as `widened`."""
        self._put()
        return super().samples_of(i, tensor, moving_first)
