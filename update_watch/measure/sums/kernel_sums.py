"""A window's sums by one launch for all steps that are added, where Triton is there and the device is CUDA.

The first time on a device both ways add the same made-up steps, and must agree; else torch's way is used from then on, and
that is said once. Counts agree exactly, sums in FP64 to 1e-9: only the order of additions differs. The way in FP32 is rounded
once per step and not once per call: 1e-6.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from update_watch.formats import BF16, FP32
from update_watch.measure.device import falling_back, multi_gather
from update_watch.measure.device.pinned_ring import PinnedRing
from update_watch.measure.sums.added_steps import AddedSteps, Look, Slot
from update_watch.measure.sums.device_sums import THIN, DeviceSums
from update_watch.measure.sums.layout import GROUPS, PARTS
from update_watch.measure.sums.packing import Reach, packed
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, PLACES

_SLOT = 6  # numbers of a step, see `sums_kernel`
_LOOK = 5  # of a row whose headroom is counted
_SMALLEST = 1024  # numbers that are uploaded at once
_works: dict[torch.device, bool] = {}
_rings: dict[tuple[torch.device, int], PinnedRing] = {}


class Kind(NamedTuple):
    """What the kernel is compiled for."""

    states: int
    samples: int
    cells: int  # of one set of samples; 0: all rows are read whole
    dtype: torch.dtype  # of what is added
    has_whole: bool  # some rows are read whole
    has_clusters: bool
    has_way: bool

    def sums(
        self, way: type[DeviceSums], rows: int, whole_n1: Tensor | None, device: torch.device, parts: int = PARTS
    ) -> DeviceSums:
        """New ones, empty."""
        shape = self.states, rows, self.samples, device
        return way(*shape, not self.cells, whole_n1, self.has_clusters, self.has_way, parts)


def is_right(device: torch.device, kind: Kind) -> bool:
    """Whether the kernel can be used on a device; the first one is compared with torch's way, which waits for the device."""
    if not multi_gather.is_available(device) or not _works.get(device, True):
        return False
    try:
        if device in _works:
            _made_up(KernelSums, device, kind, steps=0)  # compiles it, now and not in a step
        else:
            _works[device] = True
            found, wanted = (_made_up(way, device, kind, steps=2) for way in (KernelSums, DeviceSums))
            if not all(are_close(a, b) for a, b in zip(found, wanted, strict=True)):
                raise RuntimeError("it does not add up what torch adds up")
    except Exception as error:
        give_up(device, error)
    return _works[device]


def give_up(device: torch.device, error: Exception) -> None:
    """Use torch's way on `device` from now on."""
    _works[device] = False
    falling_back.say(f"its kernel of sums is not used on {device}, torch's operators are", error)


class KernelSums(DeviceSums):
    """Adds by one launch."""

    def add(self, added: AddedSteps) -> None:
        """See `DeviceSums.add`. On a GPU no samples are drawn."""
        if _works.get(self.device, True):
            try:
                self._add(added)
                return
            except Exception as error:  # it did not run: nothing was added
                give_up(self.device, error)
        super().add(added)

    def _add(self, added: AddedSteps) -> None:
        states_SRK, weights_R2J, slots = added.states_SRK, added.weights_R2J, added.slots
        looks, looked = added.looks, added.looked
        R, K = added.after_RK.shape
        full_rows = 0 if states_SRK is None else states_SRK.shape[1]
        first, last = (looked[0].start, looked[-1].stop) if looks else (0, 0)
        steps = _numbers_of(slots, full_rows)
        numbers = _uploaded(np.concatenate([steps.reshape(-1), _numbers_of_looks(looks, first, last)]), self.device)
        cells = K if weights_R2J is None else 2 * weights_R2J.shape[2]
        cell, views, nothing = K // cells, self.views, self.vector  # the last one for what is not read
        optional = (
            added.before_ARK if states_SRK is None else states_SRK,
            added.gradient_RK,
            self.way_G2nK if added.mask_RK is None else added.mask_RK,  # in FP32 as a mask is
            nothing if weights_R2J is None else weights_R2J,
            nothing if self.whole_n1 is None else self.whole_n1,
        )
        found = (
            *(views["parts_PFn"], views["states_FSn"], views["full_n"], views["gradient_max_n"], self._histograms_3nB),
            *(views["places_nQ"], views["what_if_2n"], views["single_G2n"], views.get("both_3n", nothing)),
            *(nothing if self.elements_2nK is None else self.elements_2nK, self.way_G2nK, self.state_way_2SnK),
        )
        compiled_for = {
            "STATES": max(self.states, 1),
            "CELLS": _power(cells),
            "CELL": _power(cell),
            "HAS_WEIGHTS": weights_R2J is not None,
            "HAS_WHOLE": self.whole_n1 is not None and weights_R2J is not None,
            "HAS_CLUSTERS": self.elements_2nK is not None,
            "HAS_WAY": self.kept > 0,
            **{"THIN": THIN, "BINS": HEADROOM_BINS, "LOW": HEADROOM_LOW, "PLACES": PLACES},
        }
        read = added.before_ARK, added.intended_ARK, added.after_RK, *optional
        sizes = self.rows, R, full_rows, len(slots), K, cells, cell, self.kept, int(added.mask_RK is not None)
        given = *(tensor.contiguous() for tensor in read), numbers, numbers[steps.size :], *found, *sizes, first, last
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            launch("add_steps", (self.rows, 1 + self.states), given, compiled_for)

    def packed(
        self, parts: int, stored_nK: Tensor | None, kept_weights_nJ: Tensor | None, reaches: Sequence[Reach]
    ) -> Tensor:
        """As `packing.packed`."""
        if _works.get(self.device, True):
            try:
                self._pack(stored_nK, kept_weights_nJ, reaches)
                return self.vector[: self.layout(parts).spans()["parts_PFn"].stop]
            except Exception as error:
                give_up(self.device, error)
        return packed(self, parts, stored_nK, kept_weights_nJ, reaches)

    def _pack(self, stored_nK: Tensor | None, kept_weights_nJ: Tensor | None, reaches: Sequence[Reach]) -> None:
        weighted = self.kept if kept_weights_nJ is None else kept_weights_nJ.shape[1]
        cells = weighted * (1 if kept_weights_nJ is None or self.whole_n1 is None else 2)
        cell, views, nothing = max(self.kept, 1) // max(cells, 1), self.views, self.vector
        read = (
            self.way_G2nK,
            self.state_way_2SnK,
            nothing if self.elements_2nK is None else self.elements_2nK,
            self.way_G2nK if stored_nK is None else stored_nK.contiguous(),
            self.way_G2nK if kept_weights_nJ is None else kept_weights_nJ.contiguous(),
            nothing if self.whole_n1 is None else self.whole_n1,
            _uploaded(_numbers_of_reaches(reaches, self.rows), self.device),
        )
        found = (
            *(self.products_2GGn, views["cells_3n"], views["evidence_n"], views["state_way_2Sn"]),
            views.get("elements_3n", nothing),
        )
        compiled_for = {
            **{"GROUPS": GROUPS, "STATES": self.states, "THIN": THIN},
            **{"CELLS": _power(cells), "CELL": _power(cell), "WIDTH": _power(self.samples)},
            "HAS_WEIGHTS": kept_weights_nJ is not None,
            "HAS_WHOLE": self.whole_n1 is not None and kept_weights_nJ is not None,
            "HAS_CLUSTERS": self.elements_2nK is not None,
            "HAS_WAY": self.kept > 0,
        }
        sizes = self.rows, self.samples, self.kept, cells, cell, max(weighted, 1), int(stored_nK is not None)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            launch("pack_window", (self.rows,), (*read, *found, *sizes), compiled_for)


def launch(name: str, grid: tuple[int, ...], given: Sequence[Any], compiled_for: dict[str, Any]) -> None:
    """Run a kernel."""
    from update_watch.measure.sums import packing_kernel, sums_kernel

    kernel = sums_kernel.add_steps if name == "add_steps" else packing_kernel.pack_window
    kernel[grid](*given, **compiled_for)


def _power(count: int) -> int:
    """The power of two at or above it."""
    return 1 << max(count - 1, 0).bit_length()


def _numbers_of(slots: Sequence[Slot], full_rows: int) -> Any:
    found = np.zeros((len(slots), _SLOT))
    for row, slot in zip(found, slots, strict=True):
        if slot.steps != 1:
            raise ValueError(f"slots of one step each are expected, {slot.steps} given")
        row[:] = slot.rows.start, slot.rows.stop, slot.start, slot.part, slot.group, slot.stop <= full_rows
    return found


def _numbers_of_looks(looks: Sequence[Look], first: int, last: int) -> Any:
    found = np.full((_LOOK, last - first), np.nan)
    for rows, fmt, octaves in looks:
        told = octaves, fmt.mantissa_bits, fmt.lowest_exponent, fmt.mantissa_bits > BF16.mantissa_bits, 4.0**-octaves
        found[:, rows.start - first : rows.stop - first] = np.array(told, dtype=float)[:, None]
    return found.reshape(-1)


def _numbers_of_reaches(reaches: Sequence[Reach], rows: int) -> Any:
    found = np.full((3, rows), np.nan)
    for of_rows, fmt, scale in reaches:
        found[:, of_rows] = np.array((fmt.mantissa_bits, fmt.lowest_exponent, scale), dtype=float)[:, None]
    return found.reshape(-1)


def _uploaded(values: Any, device: torch.device) -> Tensor:
    size = max(_power(len(values)), _SMALLEST)
    ring = _rings.setdefault((device, size), PinnedRing((size,), torch.float64, device))
    there = torch.empty(size, dtype=torch.float64, device=device)
    padded = np.zeros(size)
    padded[: len(values)] = values
    ring.send(padded, there)
    return there


# --- made-up steps -------------------------------------------------------------------------------


def _made_up(way: type[DeviceSums], device: torch.device, kind: Kind, steps: int) -> list[Tensor]:
    """The sums of some steps of three rows with all that there may be: masks, states, headroom of two formats."""
    n, K = 3, kind.samples
    R = 2 * n
    drawn = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn).to(device, kind.dtype)

    before_ARK = noise(1 + kind.states, R, K)
    before_ARK[0] = before_ARK[0].bfloat16()
    intended_ARK = before_ARK + 1e-3 * noise(1 + kind.states, R, K)
    after_RK, gradient_RK = intended_ARK[0].bfloat16().to(kind.dtype), noise(R, K)
    states_RK = intended_ARK[1:, :n].bfloat16().to(kind.dtype) if kind.states else None
    mask_RK = torch.ones(R, K, device=device)
    mask_RK[1, 1:] = 0.0
    whole_n1 = torch.ones(n, 1, dtype=torch.bool, device=device) if kind.has_whole else None
    if whole_n1 is not None:
        whole_n1[1:] = False
    cells = 2 * kind.cells
    weights_R2J = torch.rand(R, 2, kind.cells, generator=drawn).to(device) if cells else None
    slots = [Slot(slice(0, n), 0, 0, 0), Slot(slice(0, n), n, PARTS - 1, GROUPS - 1)][:steps]
    looks = [Look(slice(0, 2), BF16, 0.5), Look(slice(2, n), FP32, 0.0)] if steps else []
    sums = kind.sums(way, n, whole_n1, device)
    given = before_ARK, intended_ARK, after_RK, states_RK, gradient_RK, mask_RK, weights_R2J
    sums.add(AddedSteps(*given, slots, looks, slots[:1], None if whole_n1 is None else whole_n1.repeat(2, 1)))
    reaches = [Reach(slice(0, 2), BF16, 1.5), Reach(slice(2, n), FP32, 2.0)][: len(looks)]
    kept_weights_nJ = None if weights_R2J is None else weights_R2J[:n, 0]
    window = PARTS, before_ARK[0, :n, : sums.kept].float(), kept_weights_nJ, reaches
    vector = sums.packed(*window) if isinstance(sums, KernelSums) else packed(sums, *window)
    more = [] if sums.elements_2nK is None else [sums.elements_2nK]
    return [vector, sums.way_G2nK, sums.state_way_2SnK, *more]


def are_close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the order of additions. Waits for the device."""
    if not a.numel():
        return True
    if a.dtype is torch.float64:
        return bool(torch.allclose(a, b, rtol=1e-9, atol=0.0, equal_nan=True))
    return bool(torch.allclose(a, b, rtol=1e-6, atol=1e-7 * float(b[b.isfinite()].abs().amax()), equal_nan=True))
