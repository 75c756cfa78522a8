"""A window's sums on the host, by NumPy: an operator costs half of what torch's does, and wakes no other threads (`one_thread`).

Weighted sums are formed of weighted values here, and not of the sums of cells: counts of equal weights agree with torch's
way exactly, sums in FP64 but for the order of additions.

Legend: as in `device_sums`; H the halves of a row (the kept set, the moving set), C samples of a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from update_watch.formats import BF16, Format
from update_watch.measure.sums.added_steps import AddedSteps, Slot, merged
from update_watch.measure.sums.device_sums import THIN, DeviceSums
from update_watch.measure.sums.layout import (
    BEFORE,
    CHANGED,
    COUNT,
    CROSS,
    DOT,
    GRADIENT,
    LOST,
    MOVED,
    NONZERO,
    SQUARE,
    STATE_DOT,
    STATE_LOST,
    STATE_SUMS,
    STATE_WANT,
    STATE_WANTED,
    WANT,
    WANTED,
    F,
    Layout,
)
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, PLACES

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class HostSums(DeviceSums):
    """Adds without torch, but for logarithms."""

    def layout(self, parts: int) -> Layout:
        """See `DeviceSums.layout`; without a way there is no place for what is made of it."""
        return super().layout(parts)._replace(has_way=self.kept > 0)

    def add(self, added: AddedSteps) -> None:
        """See `DeviceSums.add`."""
        # what is no number is reported as that; not as a decorator, which threads would share
        with np.errstate(all="ignore"):
            self._add(added)

    def _add(self, added: AddedSteps) -> None:
        mask_RK, states_SRK, slots = added.mask_RK, added.states_SRK, added.slots
        before_ark, intended_ark = added.before_ARK.numpy(), added.intended_ARK.numpy()
        after_rk = added.after_RK.numpy()
        values_4rk = np.empty((4, *after_rk.shape))
        np.subtract(intended_ark[0], before_ark[0], out=values_4rk[0])
        np.subtract(after_rk, before_ark[0], out=values_4rk[1])
        values_4rk[2], values_4rk[3] = added.gradient_RK.numpy(), before_ark[0]
        valid_rk = None
        if mask_RK is not None:  # a row that took no part may hold anything
            valid_rk = mask_RK.numpy() > 0
            values_4rk[:, ~valid_rk] = 0.0
        weights = _Weights.made(added.weights_R2J, added.whole_R1, valid_rk, bool(self.kept), *after_rk.shape)
        counted_FR, kept_2R = self._weighed(values_4rk, weights)
        views = {name: view.numpy() for name, view in self.views.items()}
        for slot in merged(slots, lambda slot: slot.part):
            views["parts_PFn"][slot.part][:, slot.rows] += _total(counted_FR, slot)
        if self.kept:
            way_G2nK = self.way_G2nK.numpy()
            for slot in merged(slots, lambda slot: slot.group):
                _add(way_G2nK[slot.group][:, slot.rows], _total(values_4rk[:2, :, : self.kept], slot, 1))
                views["single_G2n"][slot.group][:, slot.rows] += _total(kept_2R, slot)
        largest_R = np.square(values_4rk[2]).max(-1)
        for slot in merged(slots):
            largest_n = views["gradient_max_n"][slot.rows]
            np.maximum(largest_n, _steps(largest_R, slot).max(0), out=largest_n)
        if self.elements_2nK is not None:
            self._add_elements_of(values_4rk, self.elements_2nK.numpy(), views["both_3n"], slots)
        if states_SRK is not None:
            full = slice(states_SRK.shape[1])
            slots = merged([slot for slot in slots if slot.stop <= full.stop])
            for slot in slots:
                views["full_n"][slot.rows] += _total(counted_FR[COUNT], slot)
            found_FSR = self._of_states(
                before_ark[1:, full], intended_ark[1:, full], states_SRK.numpy(), weights.first(full.stop), slots
            )
            for slot in slots:
                views["states_FSn"][..., slot.rows] += _total(found_FSR, slot)
        if added.looks:
            self._count_headroom(added, values_4rk[0], views)

    def _weighed(self, values_4rk: Array, weights: _Weights) -> tuple[Array, Array]:
        """[F, R] sums over what is counted, and [2, R] the first two over what is kept."""
        R, K = values_4rk.shape[1:]
        sums_FRH = np.empty((F, R, 2))
        weighed_4rk = weights.times(values_4rk)
        dot_rk, want_rk = weighed_4rk[0] * values_4rk[1], weighed_4rk[0] * values_4rk[0]
        dot_RHJ, want_RHJ = weights.of_cells(dot_rk), weights.of_cells(want_rk)
        sums_FRH[DOT], sums_FRH[WANT] = dot_RHJ.sum(-1), want_RHJ.sum(-1)
        sums_FRH[CROSS], sums_FRH[SQUARE] = _dot(dot_RHJ, want_RHJ), _dot(want_RHJ, want_RHJ)
        for i, name in ((1, MOVED), (2, GRADIENT), (3, BEFORE)):
            sums_FRH[name] = _dot(_halves(weighed_4rk[i]), _halves(values_4rk[i]))
        are_3rk = values_4rk[:3] != 0
        for i, name in ((0, WANTED), (1, CHANGED), (2, NONZERO)):
            sums_FRH[name] = weights.weight_of(are_3rk[i])
        sums_FRH[LOST] = weights.weight_of(are_3rk[0] > are_3rk[1])
        sums_FRH[COUNT] = weights.weight_of(None)
        return weights.joined(sums_FRH), weights.joined(sums_FRH[:CHANGED][: WANT + 1], kept=True)

    def _add_elements_of(self, values_4rk: Array, elements_2nK: Array, both_3n: Array, slots: Sequence[Slot]) -> None:
        """See `DeviceSums._add_elements`."""
        products_2rk = values_4rk[1::-1] * values_4rk[0]
        dot_rk, want_rk = products_2rk
        squares_3R = np.stack([_dot(dot_rk, dot_rk), _dot(dot_rk, want_rk), _dot(want_rk, want_rk)])
        for slot in merged(slots):
            elements_2nK[:, slot.rows] += _total(products_2rk, slot, 1)
            both_3n[:, slot.rows] += _total(squares_3R, slot)

    def _count_headroom(self, added: AddedSteps, intended_rk: Array, views: dict[str, npt.NDArray[Any]]) -> None:
        """See `DeviceSums._add_headroom`."""
        before_rk, weights_R2J, slots = added.before_ARK[0].numpy(), added.weights_R2J, added.looked
        first = slots[0].start
        rows_in_all = slots[-1].stop - first
        found_3RB = np.zeros((3, rows_in_all, HEADROOM_BINS))
        found_RQ, what_if_2R = np.zeros((rows_in_all, PLACES)), np.zeros((2, rows_in_all))
        for rows, fmt, octaves in added.looks:
            wide_rk, n = intended_rk[rows], rows.stop - rows.start
            w_rk, d_rk = before_rk[rows].astype(np.float32), wide_rk.astype(np.float32)
            headroom_rk = _headroom(w_rk, d_rk, fmt)
            wanted_rk, energy_rk = (wide_rk != 0).astype(np.float64), np.square(wide_rk) * 4.0**-octaves
            if weights_R2J is not None:
                cells_nJ1 = weights_R2J[rows].numpy().reshape(n, -1, 1)
                for counted_rk in (energy_rk, wanted_rk) if added.are_drawn else (energy_rk,):
                    by_cells = counted_rk.reshape(*cells_nJ1.shape[:2], -1)
                    by_cells *= cells_nJ1
            inside = slice(rows.start - first, rows.stop - first)
            wanted_nBQ, energy_nBQ = _histograms(headroom_rk, octaves, wanted_rk, energy_rk)
            found_3RB[1, inside], found_3RB[2, inside] = wanted_nBQ.sum(-1), energy_nBQ.sum(-1)
            found_RQ[inside] = energy_nBQ.sum(1)
            found_3RB[0, inside] = found_3RB[1, inside]
            if octaves:
                found_3RB[0, inside] = _histograms(headroom_rk, 0.0, wanted_rk)[0].sum(-1)
            if fmt.mantissa_bits > BF16.mantissa_bits:
                w, d = torch.from_numpy(w_rk), torch.from_numpy(d_rk)
                lost_rk = BF16.absorbs(BF16.round(w), d).numpy() * wanted_rk
                what_if_2R[:, inside] = lost_rk.sum(-1), wanted_rk.sum(-1)
        histograms_3nB = self._histograms_3nB.numpy()
        for slot in merged([slot._replace(start=slot.start - first) for slot in slots]):
            histograms_3nB[:, slot.rows] += _total(found_3RB, slot, 1)
            views["places_nQ"][slot.rows] += _total(found_RQ, slot, 0)
            views["what_if_2n"][:, slot.rows] += _total(what_if_2R, slot)

    def _of_states(
        self,
        before_srk: npt.NDArray[np.floating],
        intended_srk: npt.NDArray[np.floating],
        after_srk: npt.NDArray[np.floating],
        weights: _Weights,
        slots: Sequence[Slot],
    ) -> Array:
        """[STATE_SUMS, S, R], see `DeviceSums._add_states`."""
        moved_2srk = np.stack([after_srk, intended_srk])
        moved_2srk -= before_srk
        if weights.valid_rk is not None:
            moved_2srk[..., ~weights.valid_rk] = 0.0
        if self.kept:
            way_2SnK = self.state_way_2SnK.numpy()
            for slot in slots:
                _add(way_2SnK[:, :, slot.rows], _total(moved_2srk[..., : self.kept : THIN], slot, 2))
        wide_2srk = moved_2srk.astype(np.float64)
        sums_FSRH = np.empty((STATE_SUMS, *wide_2srk.shape[1:3], 2))
        for s, (moved_rk, wanted_rk) in enumerate(wide_2srk.swapaxes(0, 1)):
            weighed_rk = weights.times(wanted_rk)
            is_wanted_rk, falls_rk = wanted_rk != 0, (wanted_rk * before_srk[s]) < 0
            is_lost_rk = is_wanted_rk > (moved_rk != 0)
            for half, inside_rk in ((0, None), (STATE_SUMS // 2, falls_rk)):
                if inside_rk is not None:  # the same again of what moves towards zero
                    weighed_rk = weighed_rk * inside_rk
                    is_wanted_rk, is_lost_rk = is_wanted_rk & inside_rk, is_lost_rk & inside_rk
                sums_FSRH[half + STATE_DOT, s] = _dot(_halves(weighed_rk), _halves(moved_rk))
                sums_FSRH[half + STATE_WANT, s] = _dot(_halves(weighed_rk), _halves(wanted_rk))
                sums_FSRH[half + STATE_LOST, s] = weights.weight_of(is_lost_rk)
                sums_FSRH[half + STATE_WANTED, s] = weights.weight_of(is_wanted_rk)
        return weights.joined(sums_FSRH)


class _Weights(NamedTuple):
    """What the samples of R rows weigh, and which of them are counted."""

    rk: Array | None  # None: all the same
    cells: int  # of a half
    valid_rk: Mask | None  # None: all
    whole_R: Array | None  # 1 for rows read whole, where only some are
    has_kept: bool
    shape: tuple[int, int]

    @classmethod
    def made(
        cls, weights_R2J: Tensor | None, whole_R1: Tensor | None, valid_rk: Mask | None, has_kept: bool, R: int, K: int
    ) -> _Weights:
        whole_R = None if whole_R1 is None else whole_R1.numpy()[:, 0].astype(np.float64)
        if weights_R2J is None:
            return cls(None, 0, valid_rk, whole_R, has_kept, (R, K))
        cells = weights_R2J.shape[2]
        of_cells = weights_R2J.numpy().reshape(R, 2 * cells).astype(np.float64)
        return cls(np.repeat(of_cells, K // (2 * cells), axis=1), cells, valid_rk, whole_R, has_kept, (R, K))

    def first(self, rows: int) -> _Weights:
        """Those of the first rows."""
        return self._replace(
            rk=None if self.rk is None else self.rk[:rows],
            valid_rk=None if self.valid_rk is None else self.valid_rk[:rows],
            whole_R=None if self.whole_R is None else self.whole_R[:rows],
            shape=(rows, self.shape[1]),
        )

    def times(self, values: Array) -> Array:
        """[..., R, K] weighed."""
        return values if self.rk is None else values * self.rk

    def of_cells(self, values_rk: Array) -> Array:
        """[R, H, J] sums over cells; without weights each sample is one."""
        if self.rk is None:
            return _halves(values_rk)
        sums_RHJ: Array = values_rk.reshape(len(values_rk), 2, self.cells, -1).sum(-1)
        return sums_RHJ

    def weight_of(self, are: Mask | None) -> Array:
        """[R, H] weights of some samples, or of all valid ones."""
        are = self.valid_rk if are is None else are
        if are is None:
            return np.full((self.shape[0], 2), self.shape[1] / 2) if self.rk is None else _halves(self.rk).sum(-1)
        if self.rk is None:
            return _dot(*[_halves(are.astype(np.float64))] * 2)  # ones and zeros: their squares are the same
        return _dot(_halves(self.rk), _halves(are.astype(np.float64)))

    def joined(self, sums_RH: Array, kept: bool = False) -> Array:
        """[..., R] of [..., R, H]: of the moving set, or of what is `kept`; of rows read whole both, and where none is kept."""
        if self.rk is None or not self.has_kept:
            both_R: Array = sums_RH.sum(-1)
            return both_R
        own_R, other_R = sums_RH[..., int(not kept)], sums_RH[..., int(kept)]
        return own_R if self.whole_R is None else own_R + other_R * self.whole_R


def _headroom(w_rk: npt.NDArray[np.float32], d_rk: npt.NDArray[np.float32], fmt: Format) -> npt.NDArray[np.float32]:
    """log2(|d| / half gap), to the bit what `Format.half_gap` and torch make of it."""
    w, d = w_rk.view(np.int32), d_rk.view(np.int32)
    # towards zero the gap is that of the FP32 number before, see `Format.half_gap`
    exponent = ((w & 0x7FFFFFFF) - ((w ^ d) < 0) >> 23) - 127
    half_gap = np.maximum(exponent, fmt.lowest_exponent).astype(np.float32) - np.float32(fmt.precision)
    half_gap[exponent == 128] = np.inf
    # 1e-38: a zero update must not make log2 complain; torch's, since NumPy's differs in the last bit
    found: npt.NDArray[np.float32] = torch.from_numpy(np.abs(d_rk)).clamp_min_(1e-38).log2_().numpy()
    found -= half_gap
    return found


def _histograms(headroom_rk: npt.NDArray[np.float32], octaves: float, *counted: Array) -> list[Array]:
    """[n, HEADROOM_BINS, PLACES] of each of what is counted: by parts of octaves."""
    n, bins = len(headroom_rk), HEADROOM_BINS * PLACES
    part = np.floor((headroom_rk - np.float32(octaves + HEADROOM_LOW)) * np.float32(PLACES))
    # NaN cannot be an index; those rows are reported as broken from their sums
    index = np.clip(np.nan_to_num(part, copy=False), 0, bins - 1).astype(np.int64)
    index += np.arange(n)[:, None] * bins
    found = [np.bincount(index.ravel(), one.ravel(), n * bins) for one in counted]
    return [one.astype(np.float64, copy=False).reshape(n, HEADROOM_BINS, PLACES) for one in found]


def _halves(values_rk: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[R, H, K / 2]"""
    return values_rk.reshape(len(values_rk), 2, -1)


def _dot(a: Array, b: Array) -> Array:
    """Sums of products over the last axis."""
    return np.einsum("...k,...k->...", a, b)  # type: ignore[no-any-return]


def _steps(values: npt.NDArray[Any], slot: Slot, axis: int = -1) -> npt.NDArray[Any]:
    """[..., steps, n, ...]: what is a slot's among the R."""
    axis %= values.ndim
    inside = values[(slice(None),) * axis + (slice(slot.start, slot.stop),)]
    return inside.reshape(*values.shape[:axis], slot.steps, -1, *values.shape[axis + 1 :])


def _total(values: npt.NDArray[Any], slot: Slot, axis: int = -1) -> npt.NDArray[Any]:
    """[..., n, ...]: the same, added up over its steps."""
    total: npt.NDArray[Any] = _steps(values, slot, axis).sum(axis % values.ndim)
    return total


def _add(sums: npt.NDArray[np.float32], values: npt.NDArray[Any]) -> None:
    """Sums in FP32 are rounded once, as by torch."""
    np.add(sums, values, out=sums, casting="same_kind")
