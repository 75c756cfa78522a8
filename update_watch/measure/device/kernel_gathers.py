"""A step's samples by one launch (`multi_gather`), where the device can; on the host by addresses; else by torch's views (`gathers`).

The first time on a device both ways read the weights, and must agree to the bit; else torch's way is used from then on, and
that is said once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.measure.device import falling_back, joint_reads, multi_gather
from update_watch.measure.device.host_gathers import HostGathers
from update_watch.measure.device.host_memory import HostBlocks
from update_watch.measure.gathers import Common, Gathers
from update_watch.measure.parameters import Row
from update_watch.measure.sampling import Sampler, local, pack_views

_verified: set[torch.device] = set()


def gathers_of(optimizer: Optimizer, rows: list[Row], samples: int, rng: random.Random, common: Common) -> Gathers:
    """Gathers of the fastest kind that reads these rows. `common`: see `Gathers`."""
    device = local(rows[0].param).device
    is_plain = all(type(row.sampler) is Sampler and row.param.dtype is not torch.float64 for row in rows)
    if not is_plain or not multi_gather.is_available(device):
        blocks = HostBlocks.of([row.sampler for row in rows if row.sampler], [local(row.param) for row in rows])
        if blocks is not None:
            return HostGathers(blocks, optimizer, rows, samples, rng, common)
        return Gathers(optimizer, rows, samples, rng, common)
    state = rng.getstate()
    try:
        gathers = KernelGathers(optimizer, rows, samples, rng, common)
        if device not in _verified and not gathers.agrees():
            raise RuntimeError("it does not read what torch reads")
        _verified.add(device)
        return gathers
    except Exception as error:
        if multi_gather.give_up(device, repr(error)):
            falling_back.say(f"its gather kernel is not used on {device}, torch's operators are", error)
        rng.setstate(state)
        return Gathers(optimizer, rows, samples, rng, common)


def reads(device: torch.device, dtypes: set[torch.dtype]) -> bool:
    """Whether the kernel was found to read what torch reads on this device, and reads these formats."""
    return device in _verified and multi_gather.is_available(device) and dtypes <= set(multi_gather.formats())


class KernelGathers(Gathers):
    """Reads rows of one optimizer on one device by one launch for all of them, in FP32."""

    _reads_lower_first = False  # but the kept one

    def __init__(self, optimizer: Optimizer, rows: list[Row], samples: int, rng: random.Random, common: Common) -> None:
        self._shares = (0, 0)
        super().__init__(optimizer, rows, samples, rng, common)
        shards = [local(row.param) for row in rows]
        self._multi = multi_gather.MultiGather(
            [shard.numel() for shard in shards],
            [sampler.positions for sampler in self.samplers],
            [shard.stride() for shard in shards],
            samples,
            self.device,
            self._read_one,
        )

    @property
    def reads_any_cell(self) -> bool:
        """Where the samples lie is arithmetic of the kernel's."""
        return False

    def agrees(self) -> bool:
        """Whether both ways read the same weights. Waits for the device: not for a step."""
        turn, agrees = self._turn, True
        for _ in range(2):
            self.move()
            self._shares = min(self._shares), max(self._shares)  # as torch's views are
            views = [self._placed(i).view(local(row.param)) for i, row in enumerate(self.rows)]
            wanted = pack_views(views, self.samplers).to(torch.float32)
            with joint_reads.joined():
                found = [self.after(None) for _ in range(2)]
            agrees &= all(multi_gather.equals(one, wanted) for one in (self.after(None), *found))
        self._turn = turn
        self._place()
        return agrees

    # --- where: the kernel works positions out itself, so nothing is done per row -----------------

    def _go_to(self, kept: int, moving: int) -> None:
        self._shares = kept, moving

    def _place(self) -> bool:
        super()._place()
        return False  # it reads the kept set first, wherever that is

    def _placed(self, i: int) -> Sampler:
        self.samplers[i].place(*self._shares)
        return self.samplers[i]

    # --- what ------------------------------------------------------------------------------------

    def before(
        self, states: list[dict[str, Any]], grads: list[Tensor | None], counters: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """[(A + 1) n, K]: weights, states, gradients; and copies of step counters, by the same launch where that can."""
        tensors = self._shards(self._stored() + self._states(states) + grads)
        can = [c.dtype is torch.float32 and c.device == self.device and c.numel() == 1 for c in counters]
        numbers = [counter for counter, is_read in zip(counters, can, strict=True) if is_read]
        fresh = len(grads) + len(numbers)
        read = self._multi([*tensors, *numbers], self._shares, fresh, numbers=len(numbers))
        rows = iter(read[len(tensors) :, :1])
        copies = [next(rows).view(c.shape) if is_read else c.clone() for c, is_read in zip(counters, can, strict=True)]
        return read[: len(tensors)], copies

    def gradients(self, grads: list[Tensor | None]) -> Tensor:
        """[n, K]: gradients alone."""
        return self._multi(self._shards(grads), self._shares, fresh=len(grads))

    def after(self, states: list[dict[str, Any]] | None) -> Tensor:
        """[A n, K]: weights, and states unless None."""
        stored = self._stored() if states is None else self._stored() + self._states(states)
        return self._multi(self._shards(stored), self._shares)

    def samples_of(self, i: int, tensor: Tensor, moving_first: bool) -> Tensor:
        """[K]: the samples of one row in a tensor laid out like it, as `widened`."""
        return self._read_one(i, tensor).to(self.dtype)

    def _read_one(self, i: int, tensor: Tensor) -> Tensor:
        sampler = self._placed(i)
        values_K = pack_views([sampler.view(tensor)], [sampler])[0]
        kept, moving = self._shares
        is_turned = moving < kept and not sampler.is_whole
        return values_K.view(2, -1).flip(0).view(-1) if is_turned else values_K
