"""Sums over steps and samples, kept on the device; ratios are made of them on the host, once a window (`window_sums`).

Legend: S optimizer states, n rows (parameters), K samples per row, F sums per row, P parts of a window, G groups of steps.
`before`, `intended`, `applied` as defined in docs/definitions.md: what was stored, what an FP32 accumulator would have
added, what the stored value moved by. Samples are the kept set's, then the moving set's, or those of a tensor read whole.

Sums are FP64, so squares of gradients near 1e-20 beside others near 1 need no scale (FP32 where the device has no FP64).
Of sampled rows the moving set is summed: the kept set's elements are the same in all steps of the window, and would outweigh
all others. What they were meant to move by is added up element by element: that is the way which the displacement is of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from update_watch.formats import BF16, Format
from update_watch.measure.sums.layout import (
    BEFORE,
    CHANGED,
    COUNT,
    DOT,
    GRADIENT,
    GROUPS,
    LOST,
    MOVED,
    NONZERO,
    PARTS,
    SQUARE,
    STATE_SUMS,
    WANT,
    WANTED,
    F,
    Layout,
)
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW

_THIN = 4  # of the states every so manieth sample is kept on the way, to hold little between steps


class DeviceSums:
    """Sums of one group of rows over one window. `add` runs on the device, `pack` ends the window.

    `are_whole`: all rows are read whole; `whole_n1` [n, 1]: those that are, where only some are. `has_clusters`: elements of
    rows read whole are added up one by one, since their steps are not independent. `has_way`: what the kept samples moved
    and were meant to move by is added up, for the displacement.
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
    ) -> None:
        self.steps = 0
        self.states, self.rows, self.samples, self.device = states, rows, samples, device
        self.are_whole, self._whole_n1 = are_whole, whole_n1
        self.steps_per_part = 1  # doubles when the parts are full
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        zeros = self._zeros
        self._parts_PFn = zeros(PARTS, F, rows)
        self._states_FSn = zeros(STATE_SUMS, states, rows)
        self._full_n = zeros(rows)  # samples looked at in full steps
        self._gradient_max_n = zeros(rows)  # squared
        self._touched_n = zeros(rows)  # looks at whole gradients that found something other than 0
        self._headroom_2nB = torch.zeros(2, rows, HEADROOM_BINS, device=device)
        self._movement_nB = zeros(rows, HEADROOM_BINS)
        self._what_if_2n = torch.zeros(2, rows, device=device)
        self.decay_5n = torch.zeros(5, rows, device=device)  # see decay.decay_sums
        # the way: sums of what was applied and intended, in groups of steps; of single steps the sums of both products
        kept = samples if are_whole or whole_n1 is not None else samples // 2
        self._kept = kept = kept if has_way else 0
        self._applied_GnK = torch.zeros(GROUPS, rows, kept, device=device)
        self._intended_GnK = torch.zeros(GROUPS, rows, kept, device=device)
        self._single_G2n = zeros(GROUPS, 2, rows)
        self._state_way_2SnK = torch.zeros(2, states, rows, len(range(0, kept, _THIN)), device=device)
        self._elements_2nK = zeros(2, rows, samples) if has_clusters else None  # dot, want
        self._both_3n = zeros(3, rows) if has_clusters else None  # dot^2, dot want, want^2 of single elements and steps

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def next_part(self) -> int:
        """Which part of the window the step that is added next belongs to. Merges parts when they are full."""
        part = self.steps // self.steps_per_part
        if part == PARTS:
            half = PARTS // 2
            self._parts_PFn[:half].copy_(self._parts_PFn.view(half, 2, F, self.rows).sum(1))
            self._parts_PFn[half:].zero_()
            self.steps_per_part *= 2
            part = half
        return part

    def add(
        self,
        before_AnK: Tensor,
        intended_AnK: Tensor,
        after_AnK: Tensor,
        gradient_nK: Tensor,
        mask_nK: Tensor | None,
        weights_n2J: Tensor | None,
        group: int = 0,
    ) -> None:
        """Add one step, of a group of neighbouring steps.

        A is 1, or 1 + S in a full step, in which the states count too. `intended_AnK` is the replayed value; it is
        overwritten with the intended update, `after_AnK` with anything. `gradient_nK`: squared, in `dtype`. `mask` is 0 for
        padding and for rows that took no part in this step. `weights` of samples, see `PositionWeights`; None: 1. No host
        read, no copy between devices.
        """
        part = self.next_part()
        intended_AnK.sub_(before_AnK)
        applied_AnK = after_AnK.sub_(before_AnK)
        if mask_nK is not None:
            # where, not multiplication: a row that took no part may hold anything
            valid_nK, zero = mask_nK > 0, intended_AnK.new_zeros(())
            intended_AnK = torch.where(valid_nK, intended_AnK, zero)
            applied_AnK = torch.where(valid_nK, applied_AnK, zero)
            before_AnK = torch.where(valid_nK, before_AnK, zero)
            gradient_nK = torch.where(valid_nK, gradient_nK, gradient_nK.new_zeros(()))
        if self._kept:
            self._applied_GnK[group].add_(applied_AnK[0, :, : self._kept])
            self._intended_GnK[group].add_(intended_AnK[0, :, : self._kept])
        w, d, a = (x[0].to(self.dtype) for x in (before_AnK, intended_AnK, applied_AnK))
        products = torch.zeros(F, *d.shape, dtype=self.dtype, device=self.device)
        torch.mul(a, d, out=products[DOT])
        torch.mul(d, d, out=products[WANT])
        torch.ne(d, 0, out=products[WANTED])
        torch.mul(a, a, out=products[MOVED])
        torch.ne(a, 0, out=products[CHANGED])
        torch.gt(products[WANTED], products[CHANGED], out=products[LOST])
        torch.mul(w, w, out=products[BEFORE])
        products[GRADIENT].copy_(gradient_nK)
        torch.ne(gradient_nK, 0, out=products[NONZERO])
        if mask_nK is None:
            products[COUNT].fill_(1.0)
        else:
            products[COUNT].copy_(mask_nK)
        torch.maximum(self._gradient_max_n, gradient_nK.amax(-1), out=self._gradient_max_n)
        if self._elements_2nK is not None and self._both_3n is not None:
            dot, want = products[DOT], products[WANT]
            self._elements_2nK.add_(products[: WANT + 1])
            self._both_3n.add_(torch.stack([dot * dot, dot * want, want * want]).sum(-1))
        counted_Fn, single_2n = self._reduced(products, weights_n2J)
        self._parts_PFn[part].add_(counted_Fn)
        if self._kept:
            self._single_G2n[group].add_(single_2n)
        if len(intended_AnK) > 1:
            self._add_states(before_AnK[1:], intended_AnK[1:], applied_AnK[1:], weights_n2J)
            self._full_n.add_(counted_Fn[COUNT])
        self.steps += 1

    def _reduced(self, products_FnK: Tensor, weights_n2J: Tensor | None) -> tuple[Tensor, Tensor]:
        """[F, n] sums over what is counted, [2, n] of the first two over what is kept.

        Of the weight, SQUARE is taken here: its place among the products holds anything.
        """
        has_square = len(products_FnK) == F
        if weights_n2J is None:
            if has_square:
                torch.mul(products_FnK[WANT], products_FnK[WANT], out=products_FnK[SQUARE])
            sums_Fn = products_FnK.sum(-1)
            return sums_Fn, sums_Fn[: WANT + 1]
        cells_Fn2J = products_FnK.view(len(products_FnK), *weights_n2J.shape, -1).sum(-1).mul_(weights_n2J)
        if has_square:
            torch.mul(cells_Fn2J[WANT], cells_Fn2J[WANT], out=cells_Fn2J[SQUARE])
        kept_Fn, moving_Fn = cells_Fn2J.sum(-1).unbind(-1)
        if self._whole_n1 is None:
            return moving_Fn, kept_Fn[: WANT + 1]
        whole_n = self._whole_n1.squeeze(-1).to(self.dtype)
        return moving_Fn + kept_Fn * whole_n, kept_Fn[: WANT + 1] + moving_Fn[: WANT + 1] * whole_n

    def _add_states(
        self, before_SnK: Tensor, intended_SnK: Tensor, applied_SnK: Tensor, weights_n2J: Tensor | None
    ) -> None:
        if self._kept:
            self._state_way_2SnK[0].add_(applied_SnK[..., : self._kept : _THIN])
            self._state_way_2SnK[1].add_(intended_SnK[..., : self._kept : _THIN])
        d, a = intended_SnK.to(self.dtype), applied_SnK.to(self.dtype)
        products = torch.empty(STATE_SUMS, *d.shape, dtype=self.dtype, device=self.device)
        half = STATE_SUMS // 2
        dot, want, wanted, lost = products[:half].unbind(0)
        torch.mul(a, d, out=dot)
        torch.mul(d, d, out=want)
        torch.ne(d, 0, out=wanted)
        torch.gt(wanted, a.ne(0).to(self.dtype), out=lost)
        # the same again of what moves towards zero
        falling = (before_SnK.sign() * d.sign() < 0).to(self.dtype)
        torch.mul(products[:half], falling, out=products[half:])
        sums_Fn = self._reduced(products.view(-1, self.rows, self.samples), weights_n2J)[0]
        self._states_FSn.add_(sums_Fn.view(STATE_SUMS, self.states, self.rows))

    def add_gradient(self, row: int, grad: Tensor) -> None:
        """Look at the whole gradient of a row of which all samples were 0."""
        self._touched_n[row].add_(grad.any())

    def add_headroom(
        self,
        before_nK: Tensor,
        intended_nK: Tensor,
        weights_n2J: Tensor | None,
        rows: slice,
        fmt: Format,
        octaves: float,
    ) -> None:
        """Count the rows' headroom log2(|intended| / half gap) in one-octave bins; zero updates are not counted.

        `before`, `intended`: FP32. Counted again with `octaves` less: by so much the learning rate is above that of the
        window's first look; so is the movement, intended^2, added up. For formats finer than BF16, count too how many updates a BF16 weight would lose.
        """
        d, w = intended_nK[rows], before_nK[rows]
        # 1e-38: a zero update (weight 0 below) must not make log2 complain
        headroom = d.abs().clamp_min(1e-38).log2() - fmt.half_gap(w, d).log2()
        wanted = d.ne(0).to(torch.float32)
        for histogram_nB, shift in zip(self._headroom_2nB, (0.0, octaves), strict=True):
            octave = (headroom - (shift + HEADROOM_LOW)).floor_()
            # NaN cannot be an index; those rows are reported as broken from their sums
            index = octave.nan_to_num_(0.0).clamp_(0, HEADROOM_BINS - 1).to(torch.int64)
            histogram_nB[rows].scatter_add_(1, index, wanted)
        energy = d.to(self.dtype).square().mul_(4.0**-octaves)
        if weights_n2J is not None:
            weights = weights_n2J[rows].flatten(1)
            energy = (energy.view(*weights.shape, -1) * weights.unsqueeze(-1)).flatten(1)
        self._movement_nB[rows].scatter_add_(1, index, energy)  # by the headroom at the first look's rate
        if fmt.mantissa_bits > BF16.mantissa_bits:
            lost = BF16.absorbs(BF16.round(w), d).to(torch.float32).mul_(wanted)
            self._what_if_2n[:, rows].add_(torch.stack([lost.sum(-1), wanted.sum(-1)]))

    # --- at the end of a window --------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """How `pack` orders its numbers."""
        parts = -(-self.steps // self.steps_per_part)
        return Layout(parts, self.states, self.rows, self._both_3n is not None)

    def pack(
        self,
        stored_nK: Tensor | None,
        kept_weights_nJ: Tensor | None,
        formats: list[tuple[slice, Format]],
        scale: float = 1.0,
    ) -> Tensor:
        """All sums in one FP32 vector on the device; `window_sums.WindowSums` reads it on the host.

        `stored_nK`: the kept samples' last values, FP32, to tell which summed updates exceed half a gap; `scale`: the
        window's steps by those that were measured. `kept_weights`: of the kept set; None: 1.
        """
        weights_nK = self._kept_weights(kept_weights_nJ)
        applied_GnK = self._applied_GnK.to(self.dtype)
        intended_GnK = self._intended_GnK.to(self.dtype)
        weighted_GnK = intended_GnK if weights_nK is None else intended_GnK * weights_nK
        total_nK = self._intended_GnK.sum(0)
        evidence_n = self._zeros(self.rows)
        if stored_nK is not None:
            for rows, fmt in formats:
                far_nK = total_nK[rows] * scale
                reached = far_nK.abs() >= fmt.half_gap(stored_nK[rows], far_nK)
                evidence_n[rows] = (reached & far_nK.ne(0)).sum(-1).to(self.dtype)
        # the vector is FP32, the sums are not: squares are sent in units of their own
        parts_PFn = self._parts_PFn[: self.layout.parts].clone()
        energy_n = _unit(torch.maximum(parts_PFn[:, WANT], parts_PFn[:, MOVED]).amax(0))
        before_n, gradient_n = _unit(parts_PFn[:, BEFORE].amax(0)), _unit(self._gradient_max_n)
        for i in (DOT, WANT, MOVED):  # a list as an index would be copied from the host
            parts_PFn[:, i] /= energy_n
        parts_PFn[:, BEFORE] /= before_n
        parts_PFn[:, GRADIENT] /= gradient_n
        parts_PFn[:, SQUARE] /= energy_n.square()
        states_FSn, state_way_2Sn = self._states_FSn.clone(), _state_displacement(self._state_way_2SnK.to(self.dtype))
        state_Sn, way_Sn = _unit(states_FSn[WANT]), _unit(state_way_2Sn.amax(0))
        for i in (DOT, WANT):
            states_FSn[i :: STATE_SUMS // 2] /= state_Sn
        cells_3n = self._cells(weighted_GnK.sum(0), applied_GnK.sum(0), total_nK.to(self.dtype), kept_weights_nJ)
        parts = [
            parts_PFn,
            states_FSn,
            self._full_n,
            self._gradient_max_n / gradient_n,
            self._touched_n,
            self._headroom_2nB,
            self._movement_nB / _unit(self._movement_nB.amax(-1, keepdim=True)),
            self._what_if_2n,
            self.decay_5n,
            torch.stack([(weighted_GnK * other_nK).sum(-1) for other_nK in applied_GnK]) / energy_n,
            torch.stack([(weighted_GnK * other_nK).sum(-1) for other_nK in intended_GnK]) / energy_n,
            self._single_G2n / energy_n,
            cells_3n / energy_n.square(),
            evidence_n,
            state_way_2Sn / way_Sn,
            torch.stack([energy_n, before_n, gradient_n]).sqrt(),
            torch.stack([state_Sn, way_Sn]).sqrt(),
        ]
        if self._elements_2nK is not None and self._both_3n is not None:
            dot, want = self._elements_2nK
            elements_3n = torch.stack([dot * dot, dot * want, want * want]).sum(-1)
            parts += [elements_3n / energy_n.square(), self._both_3n / energy_n.square()]
        return torch.cat([part.reshape(-1).to(torch.float32) for part in parts])

    def _kept_weights(self, weights_nJ: Tensor | None) -> Tensor | None:
        """[n, K] of the kept samples."""
        if weights_nJ is None or not self._kept:
            return None
        both = 1 if self._whole_n1 is None else 2  # of rows read whole both halves are kept
        cells = weights_nJ.repeat(1, both)
        kept = self._kept
        weights_nK = cells.unsqueeze(-1).expand(*cells.shape, kept // cells.shape[1]).reshape(self.rows, kept)
        if self._whole_n1 is not None:
            weights_nK = weights_nK.clone()
            # the moving half of rows that are sampled is at other positions in every step
            weights_nK[:, kept // 2 :].mul_(self._whole_n1.to(weights_nK.dtype))
        return weights_nK

    def _cells(self, weighted_nK: Tensor, applied_nK: Tensor, intended_nK: Tensor, weights_nJ: Tensor | None) -> Tensor:
        """[3, n]: sums over cells of neighbours of x^2, x y, y^2, x their <applied, intended> and y their |intended|^2."""
        if not self._kept:
            return self._zeros(3, self.rows)
        cells = weights_nJ.shape[1] * (1 if self._whole_n1 is None else 2) if weights_nJ is not None else self.samples
        x = (weighted_nK * applied_nK).view(self.rows, cells, -1).sum(-1)
        y = (weighted_nK * intended_nK).view(self.rows, cells, -1).sum(-1)
        return torch.stack([x * x, x * y, y * y]).sum(-1)


def _state_displacement(way_2SnK: Tensor) -> Tensor:
    """[2, S, n]: <sum applied, sum intended> and |sum intended|^2."""
    applied, intended = way_2SnK
    return torch.stack([(applied * intended).sum(-1), (intended * intended).sum(-1)])


def _unit(largest: Tensor) -> Tensor:
    """What to divide by so that the largest is 1; 1 where that cannot be."""
    return torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
