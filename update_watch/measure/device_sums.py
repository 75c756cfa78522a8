"""Sums over steps and samples, kept on the device; ratios are made of them on the host, once a window (`window_sums`).

Legend: A accumulators (0 is the weight, then the optimizer states), n rows (parameters), K samples per row,
F sums per row. `before`, `intended`, `applied` as defined in docs/definitions.md: what was stored, what an FP32
accumulator would have added, what the stored value moved by.

Products are taken of values scaled per row (by the largest movement of the first step), so that squares of second
moments near 1e-20 do not underflow in FP32. Sums scale alike, ratios do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from update_watch.formats import BF16, Format
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW

# the F sums; those of SHRINK repeat the first four over changes towards zero only, of the states
DOT, WANT, WANTED, LOST, MOVED, UNCHANGED, SHRINK = 0, 1, 2, 3, 4, 5, 6
F = 10
_THIN = 4
VARIANCE = 3  # sums over steps of dot^2, dot * want, want^2 of the weight: how much a step's efficiency spreads
_STEPS = 8  # steps whose sums are kept apart before they are added up: fewer operators per step


class DeviceSums:
    """Sums of one group of rows over one window. `add` runs on the device, `pack` ends the window.

    A full step counts all accumulators, the gradients and the size of the weights; any other step the weights' changes
    alone, which is half the work. The first step is a full one.
    """

    def __init__(self, accumulators: int, rows: int, samples: int, device: torch.device) -> None:
        self.steps = 0
        self.rows, self.samples, self.accumulators = rows, samples, accumulators
        self.device = device
        self._sums_FAn = torch.zeros(F, accumulators, rows, device=device)
        self._recent_TFAn = torch.zeros(_STEPS, SHRINK, accumulators, rows, device=device)
        self._variance_3n = torch.zeros(VARIANCE, rows, device=device)
        self._gradient_3n = torch.zeros(3, rows, device=device)  # how many are not 0, sum of squares, largest
        self._stored_n = torch.zeros(rows, device=device)  # squared weights
        self._headroom_nB = torch.zeros(rows, HEADROOM_BINS, device=device)
        self._what_if_2n = torch.zeros(2, rows, device=device)
        self.decay_5n = torch.zeros(5, rows, device=device)  # see decay.decay_sums
        # sum applied, sum intended; of the states every fourth sample, to hold little between steps
        self._path_2nK = torch.zeros(2, rows, samples, device=device)
        thin = len(range(0, samples, _THIN))
        self._state_path_2SnJ = torch.zeros(2, accumulators - 1, rows, thin, device=device)
        self._scale_An1: Tensor | None = None

    def add(
        self,
        before_AnK: Tensor,
        intended_AnK: Tensor,
        after_AnK: Tensor,
        grad_nK: Tensor | None,
        mask_nK: Tensor | None,
        path: bool = True,
        counted: Tensor | bool = True,
    ) -> None:
        """Add one step; to the path as well if it is at the positions the path is of.

        `counted`: which rows are added to the sums, all, none, or where a [n, 1] tensor is true.

        `intended_AnK` is the replayed value. It is overwritten with the intended update, `after_AnK` with anything.
        `grad_nK`: gradients, not changed; None for a step that is not full (then A is 1). `mask` is 0 for
        padding and for rows that took no part in this step. No host read, no copy between devices.
        """
        intended_AnK.sub_(before_AnK)
        applied_AnK = after_AnK.sub_(before_AnK)
        if self._scale_An1 is None:
            # before masking: a row that sits out the first step needs its unit too
            largest = torch.maximum(intended_AnK.abs().amax(-1), before_AnK.abs().amax(-1).mul_(2**-10))
            known = (largest > 0) & largest.isfinite()
            self._scale_An1 = torch.where(known, largest.reciprocal(), torch.ones_like(largest)).unsqueeze(-1)
        if mask_nK is not None:
            # where, not multiplication: a row that took no part may hold anything
            valid_nK, zero = mask_nK > 0, intended_AnK.new_zeros(())
            intended_AnK = torch.where(valid_nK, intended_AnK, zero)
            applied_AnK = torch.where(valid_nK, applied_AnK, zero)
            before_AnK = torch.where(valid_nK, before_AnK, zero)
            grad_nK = None if grad_nK is None else torch.where(valid_nK, grad_nK, zero)
        present = len(intended_AnK)  # accumulators
        if path:
            self._path_2nK[0].add_(applied_AnK[0])
            self._path_2nK[1].add_(intended_AnK[0])
            if present > 1:
                self._state_path_2SnJ[0].add_(applied_AnK[1:, :, ::_THIN])
                self._state_path_2SnJ[1].add_(intended_AnK[1:, :, ::_THIN])
        if counted is False:
            return
        if isinstance(counted, Tensor):
            zero = intended_AnK.new_zeros(())
            intended_AnK = torch.where(counted, intended_AnK, zero)
            applied_AnK = torch.where(counted, applied_AnK, zero)
            before_AnK = torch.where(counted, before_AnK, zero)
            grad_nK = None if grad_nK is None else torch.where(counted, grad_nK, zero)
        scale_An1 = self._scale_An1[:present]
        d, a = intended_AnK * scale_An1, applied_AnK.mul_(scale_An1)
        products = torch.empty(SHRINK, *d.shape, device=self.device)
        dot, want, wanted, lost, moved, unchanged = products.unbind(0)
        torch.mul(a, d, out=dot)
        torch.mul(d, d, out=want)
        torch.ne(d, 0, out=wanted)
        torch.mul(a, a, out=moved)
        torch.eq(a, 0, out=unchanged)
        torch.mul(wanted, unchanged, out=lost)
        torch.sum(products, -1, out=self._recent_TFAn[self.steps % _STEPS, :, :present])
        if grad_nK is not None:
            self._gradient_3n[:2].add_(torch.stack((grad_nK.ne(0).sum(-1).float(), grad_nK.square().sum(-1))))
            largest_n = self._gradient_3n[2]
            torch.maximum(largest_n, grad_nK.abs().amax(-1), out=largest_n)
            self._stored_n.add_(before_AnK[0].square().sum(-1))
            if present > 1:
                falling_SnK = d[1:].mul_(before_AnK[1:]) < 0
                self._sums_FAn[SHRINK:, 1:].add_(products[: LOST + 1, 1:].mul_(falling_SnK).sum(-1))
        self.steps += 1
        if self.steps % _STEPS == 0:
            self._add_up()

    def _add_up(self) -> None:
        recent_TFAn = self._recent_TFAn
        self._sums_FAn[:SHRINK].add_(recent_TFAn.sum(0))
        dot_Tn, want_Tn = recent_TFAn[:, DOT, 0], recent_TFAn[:, WANT, 0]
        self._variance_3n.add_(
            torch.stack([(x * y).sum(0) for x, y in ((dot_Tn, dot_Tn), (dot_Tn, want_Tn), (want_Tn, want_Tn))])
        )
        recent_TFAn.zero_()

    def add_headroom(self, before_nK: Tensor, intended_nK: Tensor, rows: slice, fmt: Format) -> None:
        """Count the rows' headroom log2(|intended| / half gap) in one-octave bins; zero updates are not counted.

        For formats finer than BF16, count too how many updates a BF16 weight would lose.
        """
        d, w = intended_nK[rows], before_nK[rows]
        size = d.abs()
        # 1e-38: a zero update (weight 0 below) must not make log2 complain
        octave = (size.clamp_min(1e-38).log2() - fmt.half_gap(w, d).log2()).floor_().sub_(HEADROOM_LOW)
        wanted = d.ne(0).to(torch.float32)
        # NaN cannot be an index; those rows are reported as broken from their sums
        index = octave.nan_to_num_(0.0).clamp_(0, HEADROOM_BINS - 1).to(torch.int64)
        self._headroom_nB[rows].scatter_add_(1, index, wanted)
        if fmt.mantissa_bits > BF16.mantissa_bits:
            lost = BF16.absorbs(BF16.round(w), d).to(torch.float32).mul_(wanted)
            self._what_if_2n[:, rows].add_(torch.stack([lost.sum(-1), wanted.sum(-1)]))

    def pack(self, stored_nK: Tensor | None, formats: list[tuple[slice, Format]]) -> Tensor:
        """All sums in one FP32 vector on the device; `window_sums.WindowSums` reads it on the host.

        `stored_nK`: the weights' last values, to tell which summed updates exceed half a gap.
        """
        self._add_up()
        displacement_3An = torch.cat(
            [_displacement(self._path_2nK.unsqueeze(1)), _displacement(self._state_path_2SnJ)], 1
        )
        evidence_n = torch.zeros(self.rows, device=self.device)
        if stored_nK is not None:
            for rows, fmt in formats:
                total = self._path_2nK[1, rows]
                reached = total.abs() >= fmt.half_gap(stored_nK[rows], total)
                evidence_n[rows] = (reached & total.ne(0)).sum(-1).to(torch.float32)
        scale = self._scale_An1 if self._scale_An1 is not None else torch.ones_like(displacement_3An[0])
        parts = (
            self._sums_FAn,
            self._variance_3n,
            self._gradient_3n,
            self._stored_n,
            self._headroom_nB,
            self._what_if_2n,
            displacement_3An,
            evidence_n,
            scale,
            self.decay_5n,
        )
        return torch.cat([part.reshape(-1) for part in parts])


def _displacement(path_2AnK: Tensor) -> Tensor:
    """<sum applied, sum intended> and |sum intended|^2 per row in a unit of its own, and 1 / unit: [3, A, n]."""
    applied, intended = path_2AnK
    if not intended.numel():
        return path_2AnK.new_zeros(3, *intended.shape[:-1])
    peak = intended.abs().amax(-1, keepdim=True)
    unit = torch.where(peak > 0, peak.reciprocal(), torch.ones_like(peak))
    d, a = intended * unit, applied * unit
    return torch.stack([(a * d).sum(-1), (d * d).sum(-1), unit.squeeze(-1)])
