"""Gathers that are asked for around one step, and launched together.

Within `joined` a gather is only noted; all that were noted run by one launch at its end, or when somebody calls `launch`
because he goes on with what was read. Outside of it each runs at once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from update_watch.measure.device import falling_back

AT_ONCE = 4  # by one launch, see `gather_kernel`


class Read(NamedTuple):
    """One gather of `multi_gather`: everything that its kernel is given."""

    table: tuple[Tensor, Tensor, Tensor]  # addresses, kinds, facts
    out: Tensor
    shares: tuple[int, int]
    rows: int
    samples: int
    kept: object  # what is read, or torch has read for it: it may go once the kernel is in the stream

    def arguments(self) -> tuple[object, ...]:
        """Those of the kernel for this gather, but for the sizes it is compiled for."""
        first, second = self.shares
        halves = first >> 16, first & 0xFFFF, second >> 16, second & 0xFFFF
        return (*self.table, self.out, *halves, self.rows, len(self.out))

    @property
    def width(self) -> int:
        """Samples, rounded up to a power of two."""
        return 1 << max(self.samples - 1, 0).bit_length()


class _Noted(threading.local):
    reads: list[Read] | None = None


_noted = _Noted()
_failed = False  # several by one launch


class joined:
    """Gathers asked for in here run at its end, by one launch. Where something was raised they do not run at all."""

    __slots__ = ("_is_outer",)

    def __enter__(self) -> None:
        self._is_outer = _noted.reads is None
        if self._is_outer:
            _noted.reads = []

    def __exit__(self, kind: object, *_: object) -> None:
        if not self._is_outer:
            return
        try:
            if kind is None:
                launch()
        finally:
            _noted.reads = None


def launch() -> None:
    """Run what was noted: it is needed now."""
    reads = _noted.reads
    if reads:
        _noted.reads = []
        for device in dict.fromkeys(read.out.device for read in reads):
            run([read for read in reads if read.out.device == device])


def ask(read: Read) -> None:
    """Note a gather, or run it."""
    if _noted.reads is None:
        run([read])
    else:
        _noted.reads.append(read)


def run(reads: Sequence[Read]) -> None:
    """Run some gathers on one device."""
    device = reads[0].out.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for start in range(0, len(reads), AT_ONCE):
            _run_together(reads[start : start + AT_ONCE])


def _run_together(reads: Sequence[Read]) -> None:
    from update_watch.measure.device import gather_kernel

    global _failed
    if len(reads) > 1 and not _failed:
        parts = [*reads, *[reads[0]._replace(out=reads[0].out[:0])] * (AT_ONCE - len(reads))]
        sizes = {f"K{i}": part.samples for i, part in enumerate(parts)}
        sizes |= {f"WIDTH{i}": part.width for i, part in enumerate(parts)}
        try:
            views = sum(len(read.out) for read in reads)
            gather_kernel.gather_joined[(views,)](*[a for part in parts for a in part.arguments()], **sizes)
            return
        except Exception as error:
            _failed = True
            falling_back.say("its gathers are launched one by one, as they do not run together", error)
    for read in reads:
        given = read.arguments()[:-1]
        gather_kernel.gather_views[(len(read.out),)](*given, K=read.samples, WIDTH=read.width)
