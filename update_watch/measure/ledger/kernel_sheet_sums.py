"""A sheet's sums by one launch every few steps, and one at a window's end, where the ledger is read by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from update_watch.measure.device import falling_back
from update_watch.measure.ledger.blocks import ELEMENTS
from update_watch.measure.ledger.sheet_sums import COLUMNS, NOISE, TURN, SheetSums

_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_works: dict[torch.device, bool] = {}
_READ, _CYCLES = ("begin_2NE", "held_NE", "now_NE", "first_NE"), ("from_2NE", "put_NE", "applied_2NE", "written_2NE")
_SUMMED = (*_READ, *_CYCLES, "writes_2N", "squares_2N")
_STEPS = (*_SUMMED, "signature_N", "last_write_N")
_END = (*_SUMMED, "earlier_N", "signature_N", "last_write_N", "gradients_2n")


def check(device: torch.device) -> None:
    """Find out whether both ways agree on a device, once. Waits for the device: not for a step."""
    if device in _works:
        return
    _works[device] = True
    try:
        if not _agree(device):
            raise RuntimeError("it does not add up what torch adds up")
    except Exception as error:
        _give_up(device, error)


def sums_of(
    rows: int, has_masters: bool, dtype: torch.dtype, full: slice | None, device: torch.device, can: bool
) -> SheetSums:
    """Sums of the fastest kind. `can`: the ledger is read by one launch on `device`."""
    way = KernelSheetSums if can and _works.get(device, False) else SheetSums
    return way(rows, has_masters, dtype, full, device)


def _give_up(device: torch.device, error: Exception) -> None:
    """Use torch's way on `device` from now on."""
    _works[device] = False
    falling_back.say(f"its kernel of the ledger is not used on {device}, torch's operators are", error)


class KernelSheetSums(SheetSums):
    """Adds, and ends a window, by one launch each."""

    _is_ended = False  # by the kernel

    def add(self, read: Sequence[Tensor], gaps: Sequence[int]) -> None:
        """See `SheetSums.add`."""
        if not self._runs(lambda: self._add(read, gaps)):
            super().add(read, gaps)
            return
        self.steps += len(read[0])
        self._is_new_window = False

    def packed(self) -> Tensor:
        """See `SheetSums.packed`; the same launch begins the next window."""
        out = torch.empty(len(COLUMNS) * self.rows, device=self.device)
        self._is_ended = self._runs(lambda: self._end(out))
        return out if self._is_ended else super().packed()

    def open_window(self) -> None:
        """See `SheetSums.open_window`."""
        if self._is_ended:
            self._is_new_window, self._is_ended = True, False
        else:
            super().open_window()

    def _runs(self, make: Callable[[], None]) -> bool:
        if not _works.get(self.device, True):
            return False
        try:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
                make()
        except Exception as error:  # it did not run: nothing was added
            _give_up(self.device, error)
            return False
        return True

    def _add(self, read: Sequence[Tensor], gaps: Sequence[int]) -> None:
        masters = read[1] if self.has_masters else read[0]
        bits = sum(1 << t for t in gaps)
        sizes = self.rows, self._members, self.steps, len(read[0]), bits, int(self._is_new_window), *self._full
        launch(
            "add_steps",
            (self._members,),
            (
                read[0],
                masters,
                *(self.views[name] for name in _STEPS),
                self.views["copy_steps_n"],
                self.views["tries_4N"],
                *sizes,
            ),
            {"E": ELEMENTS, "TURN": TURN},
        )

    def _end(self, out: Tensor) -> None:
        launch(
            "end_window",
            (self.rows,),
            (
                out,
                *(self.views[name] for name in _END),
                self.views["copy_steps_n"],
                self.views["tries_4N"],
                self.rows,
                self._members,
                *self._full,
            ),
            {
                "E": ELEMENTS,
                "KIND": _KINDS[self.dtype] if self.has_masters else 0,
                "HAS_MASTERS": self.has_masters,
                "NOISE": NOISE,
            },
        )

    @property
    def _members(self) -> int:
        return self.rows * (1 + self.has_masters)

    @property
    def _full(self) -> tuple[int, int]:
        return (0, 0) if self.full is None else (self.full.start, self.full.stop)


def launch(name: str, grid: tuple[int, ...], given: Sequence[Any], compiled_for: dict[str, Any]) -> None:
    """Run a kernel."""
    from update_watch.measure.ledger import sheet_kernel

    # one warp: 16 elements are half of one, and what it overwrites it has read itself
    getattr(sheet_kernel, name)[grid](*given, **compiled_for, num_warps=1)


def _agree(device: torch.device) -> bool:
    """Whether both ways make the same of made-up steps. Waits for the device: not for a step."""
    drawn = torch.Generator().manual_seed(0)
    read = [torch.randn(4, 2, 3, ELEMENTS, generator=drawn).to(device) for _ in range(2)]
    read[0][1:3, 1] = read[0][2:4, 0]  # nothing is written between them
    agrees = True
    for masters in (False, True):  # as they are compiled
        found = []
        for way in (SheetSums, KernelSheetSums):
            sums = way(3, masters, torch.bfloat16, slice(3, 6) if masters else None, device)
            runs = read[: 1 + masters]
            sums.add([run[:1] for run in runs], ())
            windows = [sums.packed()]
            sums.open_window()
            sums.add([run[1:] for run in runs], (2,))
            found.append(torch.cat([*windows, sums.packed()]))
        agrees = agrees and are_close(*found)
    return _works[device] and agrees


def are_close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the order of additions in FP32. Waits for the device."""
    return bool(torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(b[b.isfinite()].abs().amax()), equal_nan=True))
