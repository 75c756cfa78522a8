"""A sheet of the ledger: a block of elements of each of some tensors, before and after every step they are stepped in.

In the step there is one gather before and one after, from cached views; every few steps the gathered values are added up
on the device. Sums are of the open window, and of a span of some windows with the same elements, for what happens more
seldom than once a window. Elements at a bound (0, or the smallest or largest) are summed apart: clipping and pruning write them.

Legend: n tensors, E elements of each, T steps that wait to be added up, 2: of the open window, of the span.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from update_watch.measure.device import joint_reads, kernel_gathers
from update_watch.measure.ledger.blocks import ELEMENTS, BlockGather, block_of
from update_watch.measure.sampling import local, unsamplable
from update_watch.measure.transfer import Batch, Part

SPAN = 8  # windows in which the same elements are read
_WAITING, _WAITING_ON_GPU = 8, 16  # steps
_GRADIENT_EVERY = 4  # steps between two looks at gradients

_SUMS = ("dot", "square", "spread", "free_dot", "free_square", "across_dot", "across_square")
_OF_BOTH = (*_SUMS, "moved", "writes", "due", "copied")
# what leaves the device per tensor, sums over its elements: D what it moved by, A the sum of what steps applied
COLUMNS = (
    # <D, A>, <A, A>, spread of <D, A>; of elements at no bound; of the part of A across the weights: all of the master where
    # there is one. <D, D>; steps it was written before; <R, R>, <D, R> with R what the master moved by, rounded
    *_OF_BOTH,
    *(f"span_{name}" for name in _OF_BOTH),
    *("span_step_square", "step_square"),  # sums over the span's and the window's steps of <A, A> of each
    *("own_writes", "own_moved", "own_step_square"),  # over the span as above, of the master where there is one
    "written",  # sum of squares of what was written between steps
    *("stored", "still"),  # sum of squares at the window's begin; elements that are at its end what they were
    "last",  # the last look of the span before which it was written, from 1; 0: none
    "signature",  # of the set of steps before which it was written
    "gradient",  # sum of squares of its gradients
    "largest",  # of them
    # FP32 weights, or FP32 masters: values in BF16 that a step changes, summed over steps; that the window changes; and at its
    # begin, values that differ from each other if all of them are values of BF16
    *("copy_steps", "copy_window", "coarse"),
)


class Line(NamedTuple):
    """One tensor of a sheet."""

    tensor: Tensor
    names: tuple[str, ...]
    master: Tensor | None = None  # of the same shape, which an optimizer steps in its place


class SheetWindow(NamedTuple):
    """A closed window of one sheet, on its way to the host."""

    transfer: Part
    names: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]  # elements of the tensors
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
        self._full = (
            slice(kinds.index(torch.float32) * n, (kinds.index(torch.float32) + 1) * n)
            if torch.float32 in kinds
            else None
        )
        self._is_sharded = any(local(tensor) is not tensor for tensor in self._members)
        self._layouts = [_layout(tensor) for tensor in self._members]
        self._names = tuple(line.names for line in lines)
        self._sizes = tuple(local(line.tensor).numel() for line in lines)
        runs = self._runs if can else []
        self._gathers = [BlockGather([local(tensor) for tensor in run], self.device) for run in runs]
        self._most = _WAITING_ON_GPU if can else _WAITING
        self._rings = [
            torch.empty(
                *(self._most, 2, len(run), ELEMENTS), dtype=torch.float32 if can else run[0].dtype, device=self.device
            )
            for run in self._runs
        ]
        self._slots = [[[ring[t, side].view(-1) for ring in self._rings] for side in (0, 1)] for t in range(self._most)]
        self._no_gradient = torch.zeros(ELEMENTS, device=self.device)
        self._nothing_n = torch.zeros(n, device=self.device)
        self._open_span()

    @property
    def has_changed(self) -> bool:
        """A tensor has another shape, format or device than it was planned for."""
        members = [local(tensor) for tensor in self._members] if self._is_sharded else self._members
        # of thousands: each look at an attribute counts. What could be read was not lazy, and does not become so
        return any(
            [
                shard.dtype is not dtype or shard.shape != shape or shard.device != device
                for shard, (shape, dtype, device) in zip(members, self._layouts, strict=True)
            ]
        )

    def _open_span(self) -> None:
        """Choose other elements and start all sums anew."""
        self._place = self._rng.random()
        self._pointers: list[int] = []
        self._views: list[list[Tensor]] = []
        self._waiting = self._span_steps = self._span_windows = 0
        self._steps: list[int] = []  # of the run, that were looked at
        self._gaps: list[int] = []  # those of the waiting steps before which others passed unseen
        self._has_missed = False
        n, device = len(self._members), self.device
        # [2, n, E] what the sums begin with: what is written before the window's first step is part of the window
        self._begin_2nE: Tensor | None = None
        self._last_2nE: Tensor | None = None  # before and after the latest step that was added up
        self._applied_2nE = torch.zeros(2, n, ELEMENTS, device=device)  # of the window, of the span
        self._writes_2n = torch.zeros(2, n, device=device)
        # sums of squares: of what steps applied, over the span; of what was written, in the window
        self._squares_2n = torch.zeros(2, n, device=device)
        self._signature_n, self._last_write_n = torch.zeros(2, n, device=device)
        self._gradients_2n = torch.zeros(2, len(self.lines), device=device)
        self._copy_steps_n = torch.zeros(len(self.lines), device=device)
        self._open_window()

    def _open_window(self) -> None:
        self.steps = 0
        self._first_nE: Tensor | None = None  # before the window's first step
        self._earlier_n = self._squares_2n[0].clone()  # of the span, before the window
        if self._begin_2nE is not None and self._last_2nE is not None:
            self._begin_2nE[0].copy_(self._last_2nE[1])
            for sums in (self._applied_2nE[0], self._writes_2n[0], self._squares_2n[1]):
                sums.zero_()
            if self._needs_gradients:
                self._gradients_2n.zero_()
            if self._full is not None:
                self._copy_steps_n.zero_()
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
        self._span_steps += 1
        if self._waiting == self._most:
            self._add()

    def miss(self) -> None:
        """A step passes unseen: what changes till the next one is not to be told from what it applied."""
        self._has_missed = True

    def _read(self, side: int) -> None:
        members = [local(tensor) for tensor in self._members] if self._is_sharded else self._members
        pointers = [tensor.data_ptr() for tensor in members]
        if pointers != self._pointers:
            # what was put in a tensor's place is compared by its values like anything else
            blocks = [[block_of(local(tensor.detach()), self._place) for tensor in run] for run in self._runs]
            self._views = [[view for block in run for view in block] for run in blocks]
            self._pointers = pointers
            for gather, run in zip(self._gathers, blocks, strict=False):
                gather.go_to(run)
        if self._gathers:
            for gather, slot in zip(self._gathers, self._slots[self._waiting][side], strict=True):
                gather(slot.view(-1, ELEMENTS))
            return
        for views, slot in zip(self._views, self._slots[self._waiting][side], strict=True):
            torch.cat(views, out=slot)

    def _look_at_gradients(self) -> None:
        blocks: list[Tensor] = []
        for i, line in enumerate(self.lines):
            grad = line.tensor.grad
            if grad is None or not can_be_read(grad) or local(grad).shape != local(line.tensor).shape:
                blocks.append(self._no_gradient)
                continue
            self._looks[i] += 1
            blocks += [block.to(torch.float32) for block in block_of(local(grad.detach()), self._place)]
        grad_nE = torch.cat(blocks).view(-1, ELEMENTS)
        self._gradients_2n[0].add_(grad_nE.square().sum(-1))
        torch.maximum(self._gradients_2n[1], grad_nE.abs().amax(-1), out=self._gradients_2n[1])

    # --- every few steps -------------------------------------------------------------------------

    def _add(self) -> None:
        """Add up the steps that wait."""
        T, self._waiting = self._waiting, 0
        if not T:
            return
        joint_reads.launch()
        rings = [ring[:T].to(torch.float32) for ring in self._rings]
        held_T2nE = rings[0] if len(rings) == 1 else torch.cat(rings, 2)
        before_TnE, after_TnE = held_T2nE[:, 0], held_T2nE[:, 1]
        if self._begin_2nE is None or self._last_2nE is None:  # what was before the first look is not known
            self._begin_2nE = before_TnE[:1].repeat(2, 1, 1)
            last_nE = before_TnE[0]
        else:
            last_nE = self._last_2nE[1]
        if self._first_nE is None:
            self._first_nE = before_TnE[0].clone()
        moved_2TnE = torch.empty(2, *before_TnE.shape, device=self.device)
        applied_TnE, between_TnE = moved_2TnE
        torch.sub(after_TnE, before_TnE, out=applied_TnE)
        torch.sub(before_TnE[0], last_nE, out=between_TnE[0])
        torch.sub(before_TnE[1:], after_TnE[:-1], out=between_TnE[1:])
        if (rows := self._full) is not None:
            copies_T2nE = held_T2nE[:, :, rows].to(torch.bfloat16)
            self._copy_steps_n.add_(torch.ne(*copies_T2nE.unbind(1)).sum((0, 2)))
        applied_nE = applied_TnE.sum(0)
        for t in self._gaps:
            applied_nE.add_(between_TnE[t])
            between_TnE[t].zero_()
        self._gaps.clear()
        self._applied_2nE.add_(applied_nE)
        self._squares_2n.add_(moved_2TnE.square().sum((1, 3)))
        wrote_Tn = between_TnE.ne(0).any(-1)
        self._writes_2n.add_(wrote_Tn.sum(0))
        # made on the device: nothing is copied to it
        last = self._span_steps + 1
        step_T1 = torch.arange(last - T, last, device=self.device, dtype=torch.float32).unsqueeze(1)
        torch.maximum(self._last_write_n, (wrote_Tn * step_T1).amax(0), out=self._last_write_n)
        # as good as different for each step
        self._signature_n.add_((wrote_Tn * step_T1.mul_(12.9898).sin_()).sum(0))
        self._last_2nE = held_T2nE[-1].clone()

    # --- at the end of a window ------------------------------------------------------------------

    def close_window(self, batch: Batch) -> SheetWindow | None:
        """Hand the sums to `batch` and start new ones; None where no step was seen."""
        if not self.steps:
            return None
        self._add()
        self._span_windows += 1
        window = SheetWindow(
            batch.add(self._packed()),
            self._names,
            self._sizes,
            len(self._runs) > 1,
            self._full is not None,
            self._is_stepped,
            self.steps,
            self._span_windows,
            tuple(self._steps),
            tuple(self._looks),
        )
        if self._span_windows == SPAN:
            self._open_span()
        else:
            self._open_window()
        return window

    def _packed(self) -> Tensor:
        """[COLUMNS, n]"""
        assert self._last_2nE is not None and self._begin_2nE is not None and self._first_nE is not None
        n, applied_2nE = len(self.lines), self._applied_2nE
        held_nE, now_nE = self._last_2nE  # the former: after whatever is written between steps
        low_n1, high_n1 = held_nE.amin(-1, keepdim=True), held_nE.amax(-1, keepdim=True)
        free_nE = (held_nE.ne(0) & held_nE.ne(low_n1) & held_nE.ne(high_n1)) | low_n1.eq(high_n1)
        length_n1 = held_nE.square().sum(-1, keepdim=True)
        moved_2nE = now_nE - self._begin_2nE
        products_22nE = torch.stack([moved_2nE * applied_2nE, applied_2nE.square()], 1)  # <D, A>, <A, A>
        sums_22n, free_22n = products_22nE.sum(-1), (products_22nE * free_nE).sum(-1)
        share_2n = torch.where(sums_22n[:, 1] > 0, sums_22n[:, 0] / sums_22n[:, 1], 0.0)
        spread_2n = (products_22nE[:, 0] - share_2n.unsqueeze(-1) * products_22nE[:, 1]).square().sum(-1)
        along_2n1 = (applied_2nE * held_nE).sum(-1, keepdim=True) / length_n1
        across_2nE = applied_2nE - torch.where(length_n1 > 0, along_2n1, 0.0) * held_nE
        across_22n = torch.stack([moved_2nE * across_2nE, across_2nE.square()], 1).sum(-1)
        moved_2n = moved_2nE.square().sum(-1)
        copies = [self._compare_copies(begin_nE) for begin_nE in (self._first_nE, self._begin_2nE[1])]
        rows: list[Tensor] = []
        for i in (0, 1):
            rows += [row[-n:] for row in (*sums_22n[i], spread_2n[i], *free_22n[i], *across_22n[i])]
            rows += [moved_2n[i], self._writes_2n[i], *copies[i]]
        squares_n, written_n = self._squares_2n
        own = [row[-n:] for row in (self._writes_2n[1], moved_2n[1], squares_n)]
        rows += [squares_n, squares_n - self._earlier_n, *own, written_n, self._begin_2nE[0].square().sum(-1)]
        rows += [moved_2nE[0].eq(0).sum(-1).float(), self._last_write_n, self._signature_n, *self._gradients_2n]
        return torch.cat([row[:n] for row in (*rows, *self._compare_with_bf16())])

    def _compare_copies(self, begin_nE: Tensor) -> list[Tensor]:
        """Have the model's tensors moved as their masters have? Both before the first and before the last step."""
        n = len(self.lines)
        if len(self._runs) == 1 or self._last_2nE is None:
            return [self._nothing_n] * 2
        dtype, end_nE = self._runs[0][0].dtype, self._last_2nE[0]
        due_nE = end_nE[n:].to(dtype).float() - begin_nE[n:].to(dtype).float()
        moved_nE = end_nE[:n] - begin_nE[:n]
        return [due_nE.square().sum(-1), (due_nE * moved_nE).sum(-1)]

    def _compare_with_bf16(self) -> list[Tensor]:
        """What a copy in BF16 would show of FP32 weights or masters; zeros of others."""
        rows = self._full
        if rows is None or self._begin_2nE is None or self._last_2nE is None:
            return [self._nothing_n] * 3
        begin_nE, end_nE = self._begin_2nE[0, rows], self._last_2nE[1, rows]
        begun_nE = begin_nE.to(torch.bfloat16)
        is_coarse = begun_nE.float().eq(begin_nE).all(-1)
        different = begin_nE.sort(-1).values.diff(dim=-1).ne(0).sum(-1) + 1
        return [
            self._copy_steps_n,
            begun_nE.ne(end_nE.to(torch.bfloat16)).sum(-1).float(),
            (different * is_coarse).float(),
        ]


def can_be_read(tensor: Tensor) -> bool:
    """Whether a block of its elements can be read."""
    if is_lazy(tensor):
        return False
    shard = local(tensor)
    return not unsamplable(shard) and shard.numel() > 0 and shard.dtype.is_floating_point


def _layout(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    shard = local(tensor)
    return shard.shape, shard.dtype, shard.device
