"""A sheet of the ledger: a block of elements of each of some tensors, before and after every step they are stepped in.

In the step there is one gather before and one after, from cached views; every few steps the gathered values are added up
on the device (`sheet_sums`). Sums are of the open window, and of a span of some windows with the same elements, for what
happens more seldom than once a window.

Legend: n tensors, E elements of each, T steps that wait to be added up.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from update_watch.measure.device import host_memory, joint_reads, kernel_gathers
from update_watch.measure.ledger.blocks import ELEMENTS, BlockGather, HostBlockReads, ViewReads, block_of
from update_watch.measure.ledger.kernel_sheet_sums import sums_of
from update_watch.measure.positions import GOLDEN_SECTION
from update_watch.measure.sampling import local, unsamplable
from update_watch.measure.transfer import Batch, Later, Part

SPAN = 8  # windows in which the same elements are read
_WAITING, _WAITING_ON_GPU = 8, 16  # steps
_GRADIENT_EVERY = 4  # steps between two looks at gradients


class Line(NamedTuple):
    """One tensor of a sheet."""

    tensor: Tensor
    names: tuple[str, ...]
    master: Tensor | None = None  # of the same shape, which an optimizer steps in its place


class SheetWindow(NamedTuple):
    """A closed window of one sheet, on its way to the host."""

    transfer: Part | Later
    names: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]  # elements of the tensors
    are_thin: tuple[bool, ...]  # whether each row of a matrix, or each column, is one element
    dtype: torch.dtype
    has_masters: bool
    is_full: bool  # FP32, or the masters are
    is_stepped: bool  # else no optimizer holds its tensors
    steps: int
    span_windows: int
    run_steps: tuple[int, ...]  # the steps of the run that were looked at in the span
    looks: tuple[int, ...]  # at gradients


class Sheet:
    """Tensors of one device and dtype that are stepped together, or that nobody steps. All have masters, or none has."""

    def __init__(self, lines: Sequence[Line], rng: random.Random, is_stepped: bool, needs_gradients: bool) -> None:
        self.device = local(lines[0].tensor).device
        # by one launch where the device can, into FP32
        can = kernel_gathers.reads(
            self.device, {t.dtype for line in lines for t in (line.tensor, line.master) if t is not None}
        )
        self.lines, self._rng = list(lines), rng
        self._is_stepped, self._needs_gradients = is_stepped, needs_gradients
        masters = [line.master for line in lines if line.master is not None]
        self._runs = [[line.tensor for line in lines]] + ([masters] if masters else [])
        self._members = [tensor for run in self._runs for tensor in run]
        n, kinds = len(self.lines), [run[0].dtype for run in self._runs]
        # rows of the FP32 weights, or else of the FP32 masters
        full = None
        if torch.float32 in kinds:
            full = slice(kinds.index(torch.float32) * n, (kinds.index(torch.float32) + 1) * n)
        self._sums = sums_of(n, len(self._runs) > 1, kinds[0], full, self.device, can)
        self._is_sharded = any(local(tensor) is not tensor for tensor in self._members)
        self._layouts = [_layout(tensor) for tensor in self._members]
        self._names = tuple(line.names for line in lines)
        self._are_thin = tuple(
            line.tensor.dim() > 1 and max(line.tensor.shape) == line.tensor.numel() for line in lines
        )
        self._sizes = tuple(local(line.tensor).numel() for line in lines)
        runs = self._runs if can else []
        self._gathers = [BlockGather([local(tensor) for tensor in run], self.device) for run in runs]
        self._most = _WAITING_ON_GPU if can else _WAITING
        self._rings = [
            host_memory.empty((self._most, 2, len(run), ELEMENTS), torch.float32 if can else run[0].dtype, self.device)
            for run in self._runs
        ]
        self._slots = [[[ring[t, side].view(-1) for ring in self._rings] for side in (0, 1)] for t in range(self._most)]
        self._no_gradient = torch.zeros(ELEMENTS, device=self.device)
        self._has_moved = True  # since its tensors were looked at
        self.is_open = True  # read in the steps of this window
        self._open_span()

    @property
    def has_changed(self) -> bool:
        """A tensor has another shape, format or device than it was planned for. Looked at where one lies elsewhere since."""
        if not self._has_moved:
            return False
        members = [local(tensor) for tensor in self._members] if self._is_sharded else self._members
        # of thousands: each look at an attribute counts. What could be read was not lazy, and does not become so
        has_changed = any(
            [
                shard.dtype is not dtype or shard.shape != shape or shard.device != device
                for shard, (shape, dtype, device) in zip(members, self._layouts, strict=True)
            ]
        )
        self._has_moved = has_changed
        return has_changed

    def turn(self, is_open: bool) -> None:
        """Be read from now on, or not. What passes unread is no part of a span."""
        if is_open and not self.is_open:
            self._open_span()
        self.is_open = is_open

    def _open_span(self) -> None:
        """Choose other elements and start all sums anew."""
        self._place = self._rng.random()
        self._pointers: list[int] = []
        self._views: list[list[Tensor]] = []
        self._reads: list[HostBlockReads | ViewReads] = []
        self._waiting = self._span_windows = 0
        self._steps: list[int] = []  # of the run, that were looked at
        self._gaps: list[int] = []  # those of the waiting steps before which others passed unseen
        self._has_missed = False
        self._has_moved = True
        self._sums.open_span()
        self._open_window()

    def _open_window(self) -> None:
        self.steps = 0
        if self._needs_gradients:
            self._sums.forget_gradients()
        self._looks = [0] * len(self.lines)

    # --- in the step -----------------------------------------------------------------------------

    def before(self, step: int) -> None:
        """Read what is stored just before a step of the run."""
        self._read(0)
        if self._has_missed:
            self._gaps.append(self._waiting)
            self._has_missed = False
        self._step = step
        if self._needs_gradients and self.steps % _GRADIENT_EVERY == 0:
            self._look_at_gradients()

    def after(self) -> None:
        """Read what is stored just after it."""
        self._read(1)
        self._steps.append(self._step)
        self._waiting += 1
        self.steps += 1
        if self._waiting == self._most:
            self._add()

    def miss(self) -> None:
        """A step passes unseen: what changes till the next one is not to be told from what it applied."""
        self._has_missed = True

    def _read(self, side: int) -> None:
        members = [local(tensor) for tensor in self._members] if self._is_sharded else self._members
        pointers = [tensor.data_ptr() for tensor in members]
        if pointers != self._pointers:
            self._has_moved = True
            # what was put in a tensor's place is compared by its values like anything else
            blocks = [
                [block_of(local(tensor.detach()), self._place_of(i)) for i, tensor in enumerate(run)]
                for run in self._runs
            ]
            self._views = [[view for block in run for view in block] for run in blocks]
            self._reads = [] if self._gathers else [self._way(k, run) for k, run in enumerate(blocks)]
            self._pointers = pointers
            for gather, run in zip(self._gathers, blocks, strict=False):
                gather.go_to(run)
        if self._gathers:
            for gather, slot in zip(self._gathers, self._slots[self._waiting][side], strict=True):
                gather(slot.view(-1, ELEMENTS))
            return
        for reads, slot in zip(self._reads, self._slots[self._waiting][side], strict=True):
            if isinstance(reads, HostBlockReads):
                reads(2 * self._waiting + side)
            else:
                reads(slot)

    def _place_of(self, i: int) -> float:
        """Where the block of a line lies: of no two tensors in one place, lest a part of all of them is nowhere read."""
        return (self._place + i * GOLDEN_SECTION) % 1

    def _way(self, k: int, blocks: list[list[Tensor]]) -> HostBlockReads | ViewReads:
        if not HostBlockReads.can_read(blocks):
            return ViewReads(blocks)
        return HostBlockReads(blocks, [slots[k] for sides in self._slots for slots in sides])

    def _look_at_gradients(self) -> None:
        blocks: list[Tensor] = []
        for i, line in enumerate(self.lines):
            grad = line.tensor.grad
            if grad is None or not can_be_read(grad) or local(grad).shape != local(line.tensor).shape:
                blocks.append(self._no_gradient)
                continue
            self._looks[i] += 1
            block = block_of(local(grad.detach()), self._place_of(i))
            blocks += [view.to(torch.float32).flatten() for view in block]
        self._sums.add_gradients(torch.cat(blocks).view(-1, ELEMENTS))

    # --- every few steps -------------------------------------------------------------------------

    def _add(self) -> None:
        """Add up the steps that wait."""
        T, self._waiting = self._waiting, 0
        if not T:
            return
        joint_reads.launch()
        self._sums.add([ring[:T] for ring in self._rings], self._gaps)
        self._gaps.clear()

    # --- at the end of a window ------------------------------------------------------------------

    def close_window(self, batch: Batch) -> SheetWindow | None:
        """Hand the sums to `batch` and start new ones; None where no step was seen."""
        if not self.steps:
            return None
        self._add()
        self._span_windows += 1
        window = SheetWindow(
            batch.add_later(self.device, (self._sums.copy() if batch.is_later(self.device) else self._sums).packed),
            self._names,
            self._sizes,
            self._are_thin,
            self._runs[0][0].dtype,
            len(self._runs) > 1,
            self._sums.full is not None,
            self._is_stepped,
            self.steps,
            self._span_windows,
            tuple(self._steps),
            tuple(self._looks),
        )
        if self._span_windows == SPAN:
            self._open_span()
        else:
            self._sums.open_window()
            self._open_window()
        return window


def can_be_read(tensor: Tensor) -> bool:
    """Whether a block of its elements can be read."""
    if is_lazy(tensor):
        return False
    shard = local(tensor)
    return not unsamplable(shard) and shard.numel() > 0 and shard.dtype.is_floating_point


def _layout(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    shard = local(tensor)
    return shard.shape, shard.dtype, shard.device
