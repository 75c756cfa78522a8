"""What a sheet of the ledger adds up: sums of the open window, and of a span of some windows with the same elements.

What becomes of what steps applied is told from one write to another: a *cycle* is what lies between two. Those of a window end in
it; those of a span begin with its first write. Whatever a tensor did before it was ever written is no part of them, nor is what
the next write may still take back.

Elements that are only ever written to a bound (0, or the smallest from below, the largest from above) are summed apart:
clipping and pruning do that, whether after each step or after some.

Legend: n tensors, N of them and their masters, E elements of each, T steps that wait to be added up, 2: of the open window,
of the span.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from update_watch.measure.ledger.blocks import ELEMENTS

_SUMS = ("dot", "square", "spread", "free_dot", "free_square", "zero_square", "across_dot", "across_square")
_OF_BOTH = (*_SUMS, "moved", "writes", "due", "copied")
# what leaves the device per tensor, sums over its elements: D what it moved by, A the sum of what steps applied
COLUMNS = (
    # of all cycles: <D, A>, <A, A>, spread of <D, A>; of elements at no bound; <A, A> of those at 0; of the part of A across the
    # weights: all of the master where there is one. Then <D, D>; steps it was written before; <R, R>, <D, R> with R what the
    # master moved by, rounded
    *_OF_BOTH,
    *(f"span_{name}" for name in _OF_BOTH),
    *("span_step_square", "step_square"),  # sums over the span's and the window's steps of <A, A> of each
    # of the master where there is one: over the span as above, <D, D> of its cycles; travelled: across the weights
    *("own_writes", "own_moved", "own_travelled", "own_step_square"),
    "written",  # sum of squares of what was written between steps
    *("stored", "still"),  # sum of squares at the window's begin; elements that are at its end what they were
    "last",  # the last look of the span before which it, or its master, was written, from 1; 0: none
    "signature",  # of the set of steps before which that was
    "gradient",  # sum of squares of its gradients
    "largest",  # of them
    # FP32 weights, or FP32 masters: values in BF16 that a step changes, summed over steps; that the window changes; and at its
    # begin values that differ from each other if all of them are values of BF16
    *("copy_steps", "copy_window", "coarse"),
    # of the span's cycles: elements that steps moved; 1 where all that was written filled all elements with one value, and took all
    # of it back in one direction
    *("touched", "one_sided"),
    # over the span's cycles, elements that steps moved in them and no write put to a bound; of those, what the write at their end
    # changed, what it put to the bit where the cycle began, and what it moved further than the steps had
    *("tries", "rewritten", "put_back", "passed"),
)
# where writes put an element, the largest of all of them; 0: nobody wrote. FILLED: where all others are put
AT_ZERO, FILLED, AT_BOUND, FREE = 1.0, 2.0, 3.0, 4.0
NOISE = 1e-5  # of what was applied since the latest write: what is left of it in a difference
TURN = 12.9898  # sines of multiples of it are as good as different for each step


class SheetSums:
    """Sums over n tensors, or over n and their n masters behind them. `dtype`: of the tensors.

    `full`: those of the N rows that are FP32 weights, or else FP32 masters; None where neither are.
    """

    def __init__(
        self, rows: int, has_masters: bool, dtype: torch.dtype, full: slice | None, device: torch.device
    ) -> None:
        self.rows, self.has_masters, self.dtype, self.full, self.device = rows, has_masters, dtype, full, device
        n, members = rows, rows * (1 + has_masters)
        shapes = {
            # what the sums begin with: what is written before the window's first step is part of the window
            "begin_2NE": (2, members, ELEMENTS),
            "held_NE": (members if has_masters else 0, ELEMENTS),  # before the latest step that was added up
            "now_NE": (members, ELEMENTS),  # after it
            "first_NE": (members if has_masters else 0, ELEMENTS),  # before the window's first step
            "from_2NE": (2, members, ELEMENTS),  # after the write with which the first of the cycles begins
            "put_NE": (members, ELEMENTS),  # after the latest write
            "applied_2NE": (2, members, ELEMENTS),  # by all steps since the former
            "writes_2N": (2, members),
            # sums of squares: of what steps applied, over the span; of what was written, in the window
            "squares_2N": (2, members),
            "earlier_N": (members,),  # of the span, before the window
            "signature_N": (members,),
            "last_write_N": (members,),
            "gradients_2n": (2, n),
            "copy_steps_n": (n,),
            "tries_4N": (4, members),
        }
        sizes = [math.prod(shape) for shape in shapes.values()]
        self._all = torch.zeros(sum(sizes), device=device)
        parts = zip(shapes.items(), torch.split(self._all, sizes), strict=True)
        self.views = {name: part.view(shape) for (name, shape), part in parts}
        # where writes put elements: AT_ZERO and so on
        self.views["written_2NE"] = torch.zeros(2, members, ELEMENTS, dtype=torch.int8, device=device)
        self.steps = 0  # of the span
        self._is_written = False  # any of the tensors, in the span
        self._is_new_window = True

    def open_span(self) -> None:
        """Start all sums anew, of other elements."""
        self._all.zero_()
        self.views["written_2NE"].zero_()
        self._is_written = False
        self.steps, self._is_new_window = 0, True

    def open_window(self) -> None:
        """Start those of the window anew."""
        v = self.views
        self._is_new_window = True
        v["earlier_N"].copy_(v["squares_2N"][0])
        v["begin_2NE"][0].copy_(v["now_NE"])
        v["from_2NE"][0].copy_(v["put_NE"])
        v["applied_2NE"][0].copy_(self._since_written())
        for sums in (v["written_2NE"][0], v["writes_2N"][0], v["squares_2N"][1]):
            sums.zero_()
        if self.full is not None:
            v["copy_steps_n"].zero_()

    def copy(self) -> SheetSums:
        """A copy of the sums as they are, which another thread may pack: by torch's operators, that is on the CPU."""
        copy = SheetSums(self.rows, self.has_masters, self.dtype, self.full, self.device)
        copy._all.copy_(self._all)
        copy.views["written_2NE"].copy_(self.views["written_2NE"])
        return copy

    def add_gradients(self, grad_nE: Tensor) -> None:
        """Look at gradients."""
        squares_n, largest_n = self.views["gradients_2n"]
        squares_n.add_(grad_nE.square().sum(-1))
        torch.maximum(largest_n, grad_nE.abs().amax(-1), out=largest_n)

    def forget_gradients(self) -> None:
        """At the end of a window."""
        self.views["gradients_2n"].zero_()

    def add(self, read: Sequence[Tensor], gaps: Sequence[int]) -> None:
        """Add up some steps. `read` [T, 2, n, E]: before and after each, of the tensors, and of their masters.

        `gaps`: those of the steps before which others passed unseen.
        """
        held = [values.to(torch.float32) for values in read]
        held_T2NE = held[0] if len(held) == 1 else torch.cat(held, 2)
        T, v = len(held_T2NE), self.views
        before_TNE, after_TNE = held_T2NE[:, 0], held_T2NE[:, 1]
        last_NE = v["now_NE"]
        if not self.steps:  # what was before the first look is not known
            v["begin_2NE"].copy_(before_TNE[0])
            last_NE = before_TNE[0]
        if self._is_new_window:
            self._is_new_window = False
            if self.has_masters:
                v["first_NE"].copy_(before_TNE[0])
        moved_2TNE = torch.empty(2, *before_TNE.shape, device=self.device)
        applied_TNE, between_TNE = moved_2TNE
        torch.sub(after_TNE, before_TNE, out=applied_TNE)
        torch.sub(before_TNE[0], last_NE, out=between_TNE[0])
        torch.sub(before_TNE[1:], after_TNE[:-1], out=between_TNE[1:])
        if self.full is not None:
            copies_T2nE = held_T2NE[:, :, self.full].to(torch.bfloat16)
            v["copy_steps_n"].add_(torch.ne(*copies_T2nE.unbind(1)).sum((0, 2)))
        passed = [(t, between_TNE[t].clone()) for t in gaps]
        for t in gaps:
            between_TNE[t].zero_()
        v["squares_2N"].add_(moved_2TNE.square().sum((1, 3)))
        for t, missed_NE in passed:
            applied_TNE[t].add_(missed_NE)
        wrote_TN = between_TNE.ne(0).any(-1)
        if self.device.type != "cpu" or bool(wrote_TN.any()):
            self._is_written = True
            ended_TNE = torch.cat([last_NE.unsqueeze(0), after_TNE[:-1]])
            place_TNE = _place(before_TNE, between_TNE)
            self._add_tries(before_TNE, ended_TNE, place_TNE, wrote_TN)
            self._add_written(before_TNE, applied_TNE, place_TNE, wrote_TN)
        elif self._is_written:
            has_begun_N1 = v["writes_2N"][1].gt(0).unsqueeze(-1)
            v["applied_2NE"].add_(torch.where(has_begun_N1, applied_TNE.sum(0), 0.0))
        if self.has_masters:
            v["held_NE"].copy_(before_TNE[-1])
        v["now_NE"].copy_(after_TNE[-1])
        self.steps += T

    def _add_written(self, before_TNE: Tensor, applied_TNE: Tensor, place_TNE: Tensor, wrote_TN: Tensor) -> None:
        """Add up what is told from one write to another."""
        v, T = self.views, len(wrote_TN)
        has_begun_N = v["writes_2N"][1].gt(0)
        so_far_TN = wrote_TN.cumsum(0)
        since_TN1 = so_far_TN.gt(0).logical_or_(has_begun_N).unsqueeze(-1)
        v["applied_2NE"].add_(torch.where(since_TN1, applied_TNE, 0.0).sum(0))
        is_first_TN1 = (wrote_TN & so_far_TN.eq(1) & ~has_begun_N).unsqueeze(-1)
        v["from_2NE"].add_(torch.where(is_first_TN1, before_TNE, 0.0).sum(0))
        is_last_TN1 = (wrote_TN & so_far_TN.eq(so_far_TN[-1])).unsqueeze(-1)
        put_NE = torch.where(is_last_TN1, before_TNE, 0.0).sum(0)
        v["put_NE"].copy_(torch.where(wrote_TN.any(0).unsqueeze(-1), put_NE, v["put_NE"]))
        torch.maximum(v["written_2NE"], place_TNE.amax(0).to(torch.int8), out=v["written_2NE"])
        v["writes_2N"].add_(wrote_TN.sum(0))
        # made on the device: nothing is copied to it
        first = self.steps + 1
        step_T1 = torch.arange(first, first + T, device=self.device, dtype=torch.float32).unsqueeze(1)
        last_write_N = v["last_write_N"]
        torch.maximum(last_write_N, (wrote_TN * step_T1).amax(0), out=last_write_N)
        v["signature_N"].add_((wrote_TN * step_T1.mul_(TURN).sin_()).sum(0))

    def _add_tries(self, before_TNE: Tensor, ended_TNE: Tensor, place_TNE: Tensor, wrote_TN: Tensor) -> None:
        """Compare each write with the one before it. `ended`: what is stored where somebody writes next."""
        v, (T, N) = self.views, wrote_TN.shape
        # which of the puts is the latest before each step: 0 for one that was added up before
        at_TN = (wrote_TN * torch.arange(1, T + 1, device=self.device).unsqueeze(1)).cummax(0).values
        at_TN = torch.cat([at_TN.new_zeros(1, N), at_TN[:-1]])
        puts_TNE = torch.cat([v["put_NE"].unsqueeze(0), before_TNE])
        begun_TNE = puts_TNE.gather(0, at_TN.unsqueeze(-1).expand_as(before_TNE))
        ends_cycle_TN = wrote_TN & (at_TN.gt(0) | v["writes_2N"][1].gt(0))
        is_free_TNE = place_TNE.ne(AT_ZERO) & place_TNE.ne(AT_BOUND)
        tries_TNE = ended_TNE.ne(begun_TNE) & ends_cycle_TN.unsqueeze(-1) & is_free_TNE
        is_passed_TNE = (before_TNE - ended_TNE).abs().gt((ended_TNE - begun_TNE).abs())
        found = [tries_TNE & which for which in (place_TNE.ne(0), before_TNE.eq(begun_TNE), is_passed_TNE)]
        v["tries_4N"].add_(torch.stack([tries_TNE, *found]).sum((1, 3)))

    def _since_written(self) -> Tensor:
        """[N, E] what steps applied since the latest write; of tensors that were not written 0."""
        v = self.views
        return torch.where(v["writes_2N"][1].gt(0).unsqueeze(-1), v["now_NE"] - v["put_NE"], 0.0)

    def _cycles(self) -> tuple[Tensor, Tensor]:
        """[2, N, E] what the steps of the complete cycles applied, and what the elements moved by in them."""
        v = self.views
        in_window_N, in_span_N = v["writes_2N"]
        # of a window before which it was written, the first write ends a cycle
        count_2N = torch.stack([in_window_N - in_window_N.eq(in_span_N).float(), in_span_N - 1])
        is_any_2N1 = count_2N.gt(0).unsqueeze(-1)
        applied_2NE = torch.where(is_any_2N1, v["applied_2NE"] - self._since_written(), 0.0)
        return applied_2NE, torch.where(is_any_2N1, v["put_NE"] - v["from_2NE"], 0.0)

    def packed(self) -> Tensor:
        """[COLUMNS, n] of the window, which ends."""
        v, n = self.views, self.rows
        begin_2NE, now_NE, put_NE = v["begin_2NE"], v["now_NE"], v["put_NE"]
        applied_2NE, cycles_2NE = self._cycles()
        free_2NE = v["written_2NE"].ne(AT_ZERO) & v["written_2NE"].ne(AT_BOUND)
        length_N1 = put_NE.square().sum(-1, keepdim=True)
        products_22NE = torch.stack([cycles_2NE * applied_2NE, applied_2NE.square()], 1)  # <D, A>, <A, A>
        sums_22N, free_22N = products_22NE.sum(-1), (products_22NE * free_2NE.unsqueeze(1)).sum(-1)
        zero_2N = (products_22NE[:, 1] * v["written_2NE"].eq(AT_ZERO)).sum(-1)
        share_2N = torch.where(sums_22N[:, 1] > 0, sums_22N[:, 0] / sums_22N[:, 1], 0.0)
        spread_2N = (products_22NE[:, 0] - share_2N.unsqueeze(-1) * products_22NE[:, 1]).square().sum(-1)
        across_2NE = _across(applied_2NE, put_NE, length_N1)
        across_22N = torch.stack([cycles_2NE * across_2NE, across_2NE.square()], 1).sum(-1)
        moved_2N = (now_NE - begin_2NE).square().sum(-1)
        way_N = _across(cycles_2NE[1], put_NE, length_N1).square().sum(-1)
        copies = [self._compare_copies(begin_NE) for begin_NE in (v["first_NE"], begin_2NE[1])]
        rows: list[Tensor] = []
        for i in (0, 1):
            rows += [row[-n:] for row in (*sums_22N[i], spread_2N[i], *free_22N[i], zero_2N[i], *across_22N[i])]
            rows += [moved_2N[i], v["writes_2N"][i], *copies[i]]
        squares_N, written_N = v["squares_2N"]
        own = [row[-n:] for row in (v["writes_2N"][1], cycles_2NE[1].square().sum(-1), way_N, squares_N)]
        rows += [squares_N, squares_N - v["earlier_N"], *own, written_N, begin_2NE[0].square().sum(-1)]
        still_N, latest = (now_NE - begin_2NE[0]).eq(0).sum(-1).float(), (v["last_write_N"], v["signature_N"])
        rows += [still_N, *(row[-n:] for row in latest), *v["gradients_2n"]]
        rows += self._compare_with_bf16()
        place_NE, wrote_NE = v["written_2NE"][1], cycles_2NE[1] - applied_2NE[1]
        is_touched_NE = applied_2NE[1].abs().gt(NOISE * self._since_written().abs())
        is_put_NE = place_NE.eq(FILLED) | place_NE.eq(AT_BOUND)
        up_NE, down_NE = ((is_touched_NE & (sign * wrote_NE).gt(0)) for sign in (1, -1))
        is_one_sided_N = (is_put_NE | ~is_touched_NE).all(-1) & ~(up_NE.any(-1) & down_NE.any(-1))
        rows += [row[-n:].float() for row in (is_touched_NE.sum(-1), is_one_sided_N)]
        rows += [row[-n:] for row in v["tries_4N"]]
        return torch.cat([row[:n] for row in rows])

    def _compare_copies(self, begin_NE: Tensor) -> list[Tensor]:
        """Have the model's tensors moved as their masters have? Both before the first and before the last step."""
        n = self.rows
        if not self.has_masters:
            return [self._nothing_n] * 2
        end_NE = self.views["held_NE"]
        due_nE = end_NE[n:].to(self.dtype).float() - begin_NE[n:].to(self.dtype).float()
        moved_nE = end_NE[:n] - begin_NE[:n]
        return [due_nE.square().sum(-1), (due_nE * moved_nE).sum(-1)]

    def _compare_with_bf16(self) -> list[Tensor]:
        """What a copy in BF16 would show of FP32 weights or masters; zeros of others."""
        rows, v = self.full, self.views
        if rows is None:
            return [self._nothing_n] * 3
        begin_nE, end_nE = v["begin_2NE"][0, rows], v["now_NE"][rows]
        begun_nE = begin_nE.to(torch.bfloat16)
        is_coarse = begun_nE.float().eq(begin_nE).all(-1)
        different = begin_nE.sort(-1).values.diff(dim=-1).ne(0).sum(-1) + 1
        return [
            v["copy_steps_n"],
            begun_nE.ne(end_nE.to(torch.bfloat16)).sum(-1).float(),
            (different * is_coarse).float(),
        ]

    @property
    def _nothing_n(self) -> Tensor:
        """Zeros: no steps of copies are counted where they are asked for."""
        return self.views["copy_steps_n"] if self.full is None else torch.zeros(self.rows, device=self.device)


def _across(what_NE: Tensor, along_NE: Tensor, length_N1: Tensor) -> Tensor:
    """The part of it that does not lie along the weights, of so many squares."""
    share_N1 = (what_NE * along_NE).sum(-1, keepdim=True) / length_N1
    return what_NE - torch.where(length_N1 > 0, share_N1, 0.0) * along_NE


def _place(before_TNE: Tensor, between_TNE: Tensor) -> Tensor:
    """[T, N, E] where what was written put each element. At a bound is what only ever comes to it from beyond."""
    low_TN1, high_TN1 = torch.aminmax(before_TNE, dim=-1, keepdim=True)
    low_TNE = before_TNE.eq(low_TN1) & between_TNE.gt(0)
    high_TNE = before_TNE.eq(high_TN1) & between_TNE.lt(0)
    bound_TN1 = torch.where(low_TN1.eq(high_TN1), FILLED, AT_BOUND)
    place_TNE = torch.where(low_TNE | high_TNE, bound_TN1, FREE)
    return torch.where(before_TNE.eq(0), AT_ZERO, place_TNE) * between_TNE.ne(0)
