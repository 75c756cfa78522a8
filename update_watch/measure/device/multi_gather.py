"""All samples of a step by one launch, where Triton is there and the device is CUDA; else by torch's views (`sampling`).

On the device lie, once per plan, the integers of the positions, and a table of the tensors' addresses and formats. The table
is uploaded only when something in it has changed: from a ring of pinned buffers, one of which is written again only when the
event behind its last upload has fired; else the ring grows. Nothing waits.

Tensors in formats or layouts that the kernel does not read are read by torch, and the kernel copies what torch has read.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from update_watch.measure.device import joint_reads
from update_watch.measure.device.pinned_ring import PinnedRing
from update_watch.measure.positions import Positions

_RECHECK = 64  # calls until formats are looked at again where no address has changed

_interpreted = False  # tests run the kernel in Triton's interpreter, on the CPU

Reader = Callable[[int, Tensor], Tensor]
_failed: dict[torch.device, str] = {}  # devices whose kernel does not do as torch does, and why


def is_available(device: torch.device) -> bool:
    """Whether the kernel can be tried on `device`."""
    if device in _failed or importlib.util.find_spec("triton") is None:
        return False
    return _interpreted or (device.type == "cuda" and torch.version.hip is None and _is_recent(device))


def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (7, 0)  # what Triton compiles for


def give_up(device: torch.device, why: str) -> bool:
    """Use torch's way on `device` from now on. True the first time, when it should be said."""
    is_new = device not in _failed
    _failed[device] = why
    return is_new


def formats() -> list[torch.dtype]:
    """What the kernel reads itself."""
    from update_watch.measure.device import gather_kernel

    return list(gather_kernel.KINDS)


class MultiGather:
    """Reads the samples of n rows, any number of slots of them at a time.

    `numels`: elements of the rows (of their local shards). `positions`: of each row; None for one read whole. `contiguous`:
    whether a row's tensor lies in memory as its indices do. `read(i, tensor)` [K]: torch's way for one view of row i.
    """

    def __init__(
        self,
        numels: Sequence[int],
        positions: Sequence[Positions | None],
        strides: Sequence[tuple[int, ...]],
        samples: int,
        device: torch.device,
        read: Reader,
    ) -> None:
        from update_watch.measure.device import gather_kernel

        self._kernel = gather_kernel
        self.n, self.samples, self.device = len(numels), samples, device
        self._strides, self._read = list(strides), read
        facts = [
            (1, samples, 1, 1, numel) if at is None else (at.block, at.blocks * at.block, at.step, at.room, numel)
            for numel, at in zip(numels, positions, strict=True)
        ]
        there = torch.tensor(facts, dtype=torch.int64)
        # pinned: a plan may be made in a step, which must not wait
        self._facts = (there.pin_memory() if device.type == "cuda" else there).to(device, non_blocking=True)
        self._tables: dict[int, _Table] = {}  # by views: another number of slots has a table of its own
        self.uploads = 0

    def __call__(
        self,
        tensors: Sequence[Tensor | None],
        shares: tuple[int, int],
        fresh: int = 0,
        out: Tensor | None = None,
        numbers: int = 0,
    ) -> Tensor:
        """[len(tensors), K] FP32, into `out` if that is given; within `joint_reads.joined` it is filled later.

        `tensors`: local ones, slot by slot and row by row; None reads zeros.

        `shares`: of the two sets of a row, the lower first; see `positions`. `fresh`: so many at the end are made anew in
        every step (gradients), and may have another format at the address of the last ones; any other has its own.
        `numbers`: so many of them, at the very end, are single FP32 numbers; each fills a row.
        """
        views = len(tensors)
        table = self._tables.get(views)
        if table is None:
            table = self._tables[views] = _Table(views, self.device)
        kept = self._fill(table, tensors, views - fresh, views - numbers)
        if table.send():
            self.uploads += 1
        if out is None:
            out = torch.empty(views, self.samples, dtype=torch.float32, device=self.device)
        joint_reads.ask(
            joint_reads.Read(
                (table.addresses, table.kinds, self._facts), out, shares, self.n, self.samples, (tensors, kept)
            )
        )
        return out

    def _fill(self, table: _Table, tensors: Sequence[Tensor | None], settled: int, rows: int) -> list[Tensor]:
        """Note addresses and formats. On the host of a GPU each look at an attribute counts: there are thousands."""
        now = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        fresh = [None if tensor is None else (tensor.dtype, tensor.stride()) for tensor in tensors[settled:]]
        table.calls += 1
        if table.calls % _RECHECK == 0:
            table.known = [-1] * len(now)
        elif now == table.known and fresh == table.known_fresh and not table.packed:
            return []
        changed = {i for i, (a, b) in enumerate(zip(now, table.known, strict=True)) if a != b}
        if fresh != table.known_fresh:
            changed.update(range(settled, len(now)))
        table.known, table.known_fresh = now, fresh
        kept: list[Tensor] = []
        for i in changed | table.packed:
            tensor = tensors[i]
            kind, address = 0, now[i]
            table.packed.discard(i)
            if i >= rows:
                kind = self._kernel.NUMBER
            elif tensor is not None:
                known = self._kernel.KINDS.get(tensor.dtype)
                if known is None or not _is_laid_out(tensor, self._strides[i % self.n]):
                    read = self._read(i % self.n, tensor).to(torch.float32).contiguous()
                    kept.append(read)
                    table.packed.add(i)
                    known, address = self._kernel.PACKED, read.data_ptr()
                kind = known
            table.set(i, address, kind)
        return kept


def _is_laid_out(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    if tensor.stride() == strides:
        return True
    # strides of dimensions of size 1 are arbitrary and do not matter
    return all(a == b for a, b, size in zip(tensor.stride(), strides, tensor.shape, strict=True) if size > 1)


class _Table:
    """Addresses and kinds of so many views, on the device and in a ring of pinned buffers."""

    def __init__(self, views: int, device: torch.device) -> None:
        # both rows begin where Triton takes pointers for aligned: else odd numbers of views had a kernel of their own
        padded = -(-views // 16) * 16
        self._there = torch.zeros(2, padded, dtype=torch.int64, device=device)
        self.addresses, self.kinds = self._there
        self._here = np.zeros((2, padded), dtype=np.int64)
        self.known = [-1] * views  # addresses of the tensors
        self.known_fresh: list[Any] = []
        self.packed: set[int] = set()  # views that torch reads, anew each time
        self.calls = 0
        self._has_changed = True
        self._ring = PinnedRing(self._here.shape, torch.int64, device)

    def set(self, view: int, address: int, kind: int) -> None:
        """What the next `send` uploads."""
        self._here[0, view], self._here[1, view] = address, kind
        self._has_changed = True

    def send(self) -> bool:
        """Upload the table if it has changed."""
        if not self._has_changed:
            return False
        self._has_changed = False
        self._ring.send(self._here, self._there)
        return True


def equals(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN to NaN. Waits for the device: not for a step."""
    return bool(np.array_equal(a.cpu().numpy().view(np.int32), b.cpu().numpy().view(np.int32)))
