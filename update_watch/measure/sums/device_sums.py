"""Sums over steps and samples, kept on the device; ratios are made of them on the host, once a window (`window_sums`).

Steps are added some at a time: R rows lie side by side, those of one step (a slot) next to each other, so that the number of
operators does not grow with the steps that waited. All that leaves the device lies in one vector from the start (`layout`).

Legend: S optimizer states, n rows (parameters), R rows of the steps that are added, K samples per row, F sums per row,
P parts of a window, G groups of steps. `before`, `intended`, `applied` as defined in docs/definitions.md: what was stored,
what an FP32 accumulator would have added, what the stored value moved by. Samples are the kept set's, then the moving set's,
or those of a tensor read whole.

Sums are FP64, so squares of gradients near 1e-20 beside others near 1 need no scale (FP32 where the device has no FP64).
Of sampled rows the moving set is summed: the kept set's elements are the same in all steps of the window, and would outweigh
all others. What they were meant to move by is added up element by element: that is the way which the displacement is of. Where
there is none both sets move, and both are summed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from update_watch.formats import BF16
from update_watch.measure.sums.added_steps import AddedSteps, Slot, merged
from update_watch.measure.sums.layout import (
    BEFORE,
    CHANGED,
    COUNT,
    CROSS,
    DOT,
    GRADIENT,
    GROUPS,
    LOST,
    NONZERO,
    PARTS,
    SQUARE,
    STATE_LOST,
    STATE_SUMS,
    STATE_WANT,
    STATE_WANTED,
    WANT,
    WANTED,
    F,
    Layout,
    zeros,
)
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, PLACES

THIN = 4  # of the states every so manieth sample is kept on the way, to hold little between steps


class DeviceSums:
    """Sums of all rows of an optimizer on one device over one window. `add` runs on the device, `packing` ends the window.

    `are_whole`: all rows are read whole; `whole_n1` [n, 1]: those that are, where only some are. `has_clusters`: elements of
    rows read whole are added up one by one, since their steps are not independent. `has_way`: what the kept samples moved
    and were meant to move by is added up, for the displacement. `parts`: of the window, an even number.
    """

    def __init__(
        self,
        states: int,
        rows: int,
        samples: int,
        device: torch.device,
        are_whole: bool = True,
        whole_n1: Tensor | None = None,
        has_clusters: bool = False,
        has_way: bool = True,
        parts: int = PARTS,
    ) -> None:
        self.states, self.rows, self.samples, self.device = states, rows, samples, device
        self.are_whole, self.whole_n1, self.has_clusters = are_whole, whole_n1, has_clusters
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        # the way: sums of what was intended and applied, in groups of steps; of single steps the sums of both products
        kept = samples if are_whole or whole_n1 is not None else samples // 2
        self.kept = kept = kept if has_way else 0
        layout = self.layout(parts)
        spans = layout.spans()
        self.vector = zeros(spans["parts_PFn"].stop, dtype=self.dtype, device=device)
        self.views = {name: self.vector[spans[name]].view(shape) for name, shape in layout.shapes().items()}
        self._parts_PFn, self._states_FSn = self.views["parts_PFn"], self.views["states_FSn"]
        self._gradient_max_n = self.views["gradient_max_n"]
        self.decay_5n = self.views["decay_5n"]  # see decay.decay_sums
        both = slice(spans["headroom_2nB"].start, spans["movement_nB"].stop)
        self._histograms_3nB = self.vector[both].view(3, rows, HEADROOM_BINS)
        if layout.has_way:  # not so on the host: `HostSums`
            both = slice(spans["meant_GGn"].start, spans["arrived_GGn"].stop)
            self.products_2GGn = self.vector[both].view(2, GROUPS, GROUPS, rows)
        self.way_G2nK = zeros(GROUPS, 2, rows, kept, dtype=torch.float32, device=device)
        self.state_way_2SnK = zeros(2, states, rows, -(-kept // THIN), dtype=torch.float32, device=device)
        # dot, want of rows read whole
        self.elements_2nK = zeros(2, rows, samples, dtype=self.dtype, device=device) if has_clusters else None

    def layout(self, parts: int) -> Layout:
        """How the vector orders its numbers, of so many parts."""
        return Layout(parts, self.states, self.rows, self.has_clusters)

    def merge_parts(self, rows: slice) -> None:
        """Make two parts of some rows one, all of which are in use; the second half is free then."""
        parts_PFn = self._parts_PFn[: len(self._parts_PFn) // 2 * 2, ..., rows]
        half = len(parts_PFn) // 2
        merged_PFn = torch.unflatten(parts_PFn, 0, (half, 2)).sum(1)
        parts_PFn[:half].copy_(merged_PFn)
        parts_PFn[half:].zero_()

    def add(self, added: AddedSteps) -> None:
        """Add some steps. No host read, no copy between devices."""
        before_ARK, intended_ARK, after_RK, states_SRK, gradient_RK, mask_RK, weights_R2J, slots, *_ = added
        whole_R1 = added.whole_R1
        values_4RK = torch.empty(4, *after_RK.shape, dtype=self.dtype, device=self.device)
        torch.sub(intended_ARK[0], before_ARK[0], out=values_4RK[0])
        torch.sub(after_RK, before_ARK[0], out=values_4RK[1])
        values_4RK[2].copy_(gradient_RK)
        values_4RK[3].copy_(before_ARK[0])
        valid_RK = None
        if mask_RK is not None:
            # where, not multiplication: a row that took no part may hold anything
            valid_RK = mask_RK > 0
            values_4RK = torch.where(valid_RK, values_4RK, 0.0)
        products_FRK = torch.empty(F, *after_RK.shape, dtype=self.dtype, device=self.device)
        torch.mul(values_4RK[0], values_4RK[1], out=products_FRK[DOT])
        torch.mul(values_4RK, values_4RK, out=products_FRK[WANT : BEFORE + 1])
        torch.ne(values_4RK[:3], 0, out=products_FRK[WANTED : NONZERO + 1])
        torch.gt(products_FRK[WANTED], products_FRK[CHANGED], out=products_FRK[LOST])
        if valid_RK is None:
            products_FRK[COUNT].fill_(1.0)
        else:
            products_FRK[COUNT].copy_(valid_RK)
        largest_R = products_FRK[GRADIENT].amax(-1)
        if self.elements_2nK is not None:
            self._add_elements(products_FRK[: WANT + 1], slots)
        counted_FR, kept_FR = self._reduced(products_FRK, weights_R2J, whole_R1)
        for slot in merged(slots, lambda slot: slot.part):
            self._parts_PFn[slot.part][:, slot.rows].add_(_total(counted_FR, slot))
        for slot in merged(slots, lambda slot: slot.group):
            if self.kept:
                self.way_G2nK[slot.group][:, slot.rows].add_(_total(values_4RK[:2, :, : self.kept], slot, 1))
                self.views["single_G2n"][slot.group][:, slot.rows].add_(_total(kept_FR[: WANT + 1], slot))
        for slot in merged(slots):
            largest_n, here_Tn = self._gradient_max_n[slot.rows], _piece(largest_R, slot)
            torch.maximum(largest_n, here_Tn[0] if slot.steps == 1 else here_Tn.amax(0), out=largest_n)
        if states_SRK is not None:
            full = slice(states_SRK.shape[1])
            slots = merged([slot for slot in slots if slot.stop <= full.stop])
            for slot in slots:
                self.views["full_n"][slot.rows].add_(_total(counted_FR[COUNT], slot))
            self._add_states(
                before_ARK[1:, full],
                intended_ARK[1:, full],
                states_SRK,
                None if valid_RK is None else valid_RK[full],
                None if weights_R2J is None else weights_R2J[full],
                None if whole_R1 is None else whole_R1[full],
                slots,
            )
        if added.looks:
            self._add_headroom(added, values_4RK[0])

    def _reduced(
        self, products_FRK: Tensor, weights_R2J: Tensor | None, whole_R1: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """[F, R] sums over what is counted, and over what is kept.

        Of the weight, CROSS and SQUARE are taken here, of cells: their places among the products hold anything.
        """
        has_cells = len(products_FRK) == F
        if weights_R2J is None:
            if has_cells:
                _multiply_cells(products_FRK)
            sums_FR = products_FRK.sum(-1)
            return sums_FR, sums_FR
        cells_FR2J = torch.empty(len(products_FRK), *weights_R2J.shape, dtype=self.dtype, device=self.device)
        of_samples = products_FRK[:CROSS] if has_cells else products_FRK
        split = of_samples.view(len(of_samples), *weights_R2J.shape, -1)
        torch.sum(split, -1, out=cells_FR2J[: len(of_samples)]).mul_(weights_R2J)
        if has_cells:
            _multiply_cells(cells_FR2J)
        if not self.kept:
            sums_FR = cells_FR2J.flatten(2).sum(-1)
            return sums_FR, sums_FR
        kept_FR, moving_FR = cells_FR2J.sum(-1).unbind(-1)
        if whole_R1 is None:
            return moving_FR, kept_FR
        whole_R = whole_R1.squeeze(-1).to(self.dtype)
        return torch.addcmul(moving_FR, kept_FR, whole_R), torch.addcmul(kept_FR, moving_FR, whole_R)

    def _add_elements(self, products_2RK: Tensor, slots: Sequence[Slot]) -> None:
        """What single elements of rows read whole have got, and the squares of single elements and steps."""
        assert self.elements_2nK is not None
        dot_RK, want_RK = products_2RK
        squares_3R = torch.stack([dot_RK * dot_RK, dot_RK * want_RK, want_RK * want_RK]).sum(-1)
        for slot in merged(slots):
            self.elements_2nK[:, slot.rows].add_(_total(products_2RK, slot, 1))
            self.views["both_3n"][:, slot.rows].add_(_total(squares_3R, slot))

    def _add_states(
        self,
        before_SRK: Tensor,
        intended_SRK: Tensor,
        after_SRK: Tensor,
        valid_RK: Tensor | None,
        weights_R2J: Tensor | None,
        whole_R1: Tensor | None,
        slots: Sequence[Slot],
    ) -> None:
        moved_2SRK = torch.stack([after_SRK, intended_SRK]).sub_(before_SRK)
        if valid_RK is not None:
            moved_2SRK = torch.where(valid_RK, moved_2SRK, 0.0)
        for slot in slots if self.kept else ():
            self.state_way_2SnK[:, :, slot.rows].add_(_total(moved_2SRK[..., : self.kept : THIN], slot, 2))
        wide_2SRK = moved_2SRK.to(self.dtype)
        products = torch.empty(STATE_SUMS, *wide_2SRK.shape[1:], dtype=self.dtype, device=self.device)
        half = STATE_SUMS // 2
        torch.mul(wide_2SRK, wide_2SRK[1], out=products[: STATE_WANT + 1])
        torch.ne(wide_2SRK, 0, out=products[STATE_LOST : STATE_WANTED + 1])
        torch.gt(products[STATE_WANTED], products[STATE_LOST], out=products[STATE_LOST])
        # the same again of what moves towards zero
        falling_SRK = (wide_2SRK[1] * before_SRK) < 0
        torch.mul(products[:half], falling_SRK, out=products[half:])
        sums_FR = self._reduced(products.view(-1, *products.shape[2:]), weights_R2J, whole_R1)[0]
        sums_FSR = sums_FR.view(STATE_SUMS, self.states, -1)
        for slot in slots:
            self._states_FSn[..., slot.rows].add_(_total(sums_FSR, slot))

    def _add_headroom(self, added: AddedSteps, intended_RK: Tensor) -> None:
        """Count headroom log2(|intended| / half gap) in one-octave bins; zero updates are not counted. `intended`: the update.

        Counted again at the learning rate of the window's first look; so is intended^2 added up. Of formats finer than BF16
        count too how many updates a BF16 weight would lose."""
        before_RK, weights_R2J, slots = added.before_ARK[0], added.weights_R2J, added.looked
        first, last = slots[0].start, slots[-1].stop
        found_3RB = torch.zeros(3, last - first, HEADROOM_BINS, dtype=self.dtype, device=self.device)
        found_RQ = torch.zeros(last - first, PLACES, dtype=self.dtype, device=self.device)
        what_if_2R: Tensor | None = None
        for rows, fmt, octaves in added.looks:
            wide, w = intended_RK[rows], before_RK[rows].float()
            d = wide.float()
            inside = slice(rows.start - first, rows.stop - first)
            # 1e-38: a zero update (weight 0 below) must not make log2 complain
            headroom = d.abs().clamp_min_(1e-38).log2_().sub_(fmt.half_gap(w, d).log2_())
            part = _part(headroom, octaves)
            index = part // PLACES
            index_2RK = [index if octaves == 0.0 else _part(headroom, 0.0) // PLACES, index]
            wanted = wide.ne(0).to(self.dtype)
            energy = wide.square().mul_(4.0**-octaves)
            if weights_R2J is not None:
                cells = weights_R2J[rows].flatten(1).unsqueeze(-1)
                for counted in (energy, wanted) if added.are_drawn else (energy,):
                    counted.view(*cells.shape[:2], -1).mul_(cells)
            # by the headroom at the first look's rate
            counts = (index_2RK[0], wanted), (index_2RK[1], wanted), (index_2RK[1], energy)
            for k, (index, counted) in enumerate(counts):
                found_3RB[k, inside].scatter_add_(1, index, counted)
            found_RQ[inside].scatter_add_(1, part % PLACES, energy)
            if fmt.mantissa_bits > BF16.mantissa_bits:
                if what_if_2R is None:
                    what_if_2R = torch.zeros(2, last - first, dtype=self.dtype, device=self.device)
                lost = BF16.absorbs(BF16.round(w), d).to(self.dtype).mul_(wanted)
                what_if_2R[:, inside] = torch.stack([lost.sum(-1), wanted.sum(-1)])
        for slot in merged([slot._replace(start=slot.start - first) for slot in slots]):
            self._histograms_3nB[:, slot.rows].add_(_total(found_3RB, slot, 1))
            self.views["places_nQ"][slot.rows].add_(_total(found_RQ, slot, 0))
            if what_if_2R is not None:
                self.views["what_if_2n"][:, slot.rows].add_(_total(what_if_2R, slot))


def _multiply_cells(sums_F: Tensor) -> None:
    torch.mul(sums_F[DOT : WANT + 1], sums_F[WANT], out=sums_F[CROSS : SQUARE + 1])


def _part(headroom: Tensor, octaves: float) -> Tensor:
    """In which part of which octave."""
    part = (headroom - (octaves + HEADROOM_LOW)).mul_(PLACES).floor_()
    # NaN cannot be an index; those rows are reported as broken from their sums
    return part.nan_to_num_(0.0).clamp_(0, HEADROOM_BINS * PLACES - 1).to(torch.int64)


def _piece(values: Tensor, slot: Slot, axis: int = -1) -> Tensor:
    """[..., steps, n, ...]: what is a slot's among the R."""
    return torch.unflatten(values.narrow(axis, slot.start, slot.stop - slot.start), axis, (slot.steps, -1))


def _total(values: Tensor, slot: Slot, axis: int = -1) -> Tensor:
    """[..., n, ...]: the same, added up over its steps."""
    if slot.steps == 1:
        return values.narrow(axis, slot.start, slot.stop - slot.start)
    axis %= values.dim()
    return _piece(values, slot, axis).sum(axis)
