"""How sums leave the device: one vector per device and window, without any thread calling the device to wait for it.

On CUDA two copies follow each other on the step's stream: the vector, then a mark. Both land in pinned memory, and the
second cannot arrive before the first, so the judging thread knows by looking at its own memory. It calls nothing of CUDA:
a query of an event from a second thread breaks a graph that another stream is capturing (torch pull request 104487).
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_LONGEST = 0.02  # s between two looks at the mark
_PATIENCE = 600.0  # s until a vector counts as lost
_ASYNCHRONOUS = ("cuda",)  # where pinned memory and ordered copies are known to work


class _Landing:
    """Pinned memory for one vector and its mark. Used again and again: to free it would be a call to the device."""

    def __init__(self, numel: int) -> None:
        self.values = torch.empty(numel, dtype=torch.float32, pin_memory=True)
        self.mark = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._seen = self.mark.numpy()

    def receive(self, vector: Tensor, mark: Tensor) -> None:
        """Ask for the copies, on the current stream of the vector's device."""
        self._seen[0] = 0
        self.values[: vector.numel()].copy_(vector, non_blocking=True)
        self.mark.copy_(mark, non_blocking=True)

    def has_arrived(self) -> bool:
        return bool(self._seen[0])


_lock = threading.Lock()
_free: defaultdict[int, list[_Landing]] = defaultdict(list)  # by size, a power of two
_marks: dict[torch.device, Tensor] = {}


def _landing(numel: int) -> _Landing:
    size = 1 << max(numel - 1, 255).bit_length()
    with _lock:
        return _free[size].pop() if _free[size] else _Landing(size)


def _give_back(landing: _Landing) -> None:
    with _lock:
        _free[landing.values.numel()].append(landing)


class Transfer:
    """One FP32 vector on its way to the host. Made on the training thread; `wait` runs on the background thread.

    The copy is asked for on the current stream of the vector's device, which must be the one that wrote the vector.
    On devices without ordered copies to pinned memory (MPS, XPU and others) it is made at once.
    """

    def __init__(self, vector: Tensor) -> None:
        self._landing: _Landing | None = None
        self._values: npt.NDArray[np.float32] | None = None
        self._host: Any = vector
        if vector.device.type == "cpu":
            return
        if vector.device.type not in _ASYNCHRONOUS:
            self._host = torch.empty(vector.shape, dtype=vector.dtype)
            self._host.copy_(vector)
            return
        device = vector.device
        with torch.cuda.device(device):
            if device not in _marks:
                _marks[device] = torch.ones(1, dtype=torch.int32, device=device)
            self._landing = _landing(vector.numel())
            self._landing.receive(vector, _marks[device])
        self._numel = vector.numel()
        self._host = vector  # the copy reads it until the mark is there

    def wait(self) -> npt.NDArray[np.float64]:
        """The values, in FP64; waits for the device (this thread only).

        Raises:
            TimeoutError: nothing arrived in ten minutes; the device hangs or has failed.
        """
        return self.raw().astype(np.float64)

    def raw(self) -> npt.NDArray[np.float32]:
        """The same as they were sent."""
        if self._values is None:
            if self._landing is None:
                self._values = self._host.numpy()
            else:
                self._await(self._landing)
                self._values = self._landing.values[: self._numel].numpy().copy()
                _give_back(self._landing)
            self._landing = self._host = None
        return self._values

    def _await(self, landing: _Landing) -> None:
        pause, waited = 0.0002, 0.0
        while not landing.has_arrived():
            if waited > _PATIENCE:
                raise TimeoutError(f"a window's sums have not left {self._host.device} in {_PATIENCE:.0f} s")
            time.sleep(pause)
            waited += pause
            pause = min(2 * pause, _LONGEST)


class Part:
    """One vector of a `Batch`. `wait` runs on the background thread, after the batch was sent."""

    def __init__(self, is_double: bool = False) -> None:
        self._is_double = is_double
        self.transfer: Transfer | None = None
        self.span = slice(0, 0)

    def wait(self) -> npt.NDArray[np.float64]:
        """The vector's values, in FP64; waits for the device (this thread only)."""
        if self.transfer is None:
            raise RuntimeError("Part.wait: its batch was not sent; call Batch.send first")
        values = self.transfer.raw()[self.span]
        return values.view(np.float64) if self._is_double else values.astype(np.float64)


class Later:
    """A vector on the host that is made when it is asked for, by the thread that asks."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make: Callable[[], Tensor] | None = make
        self._values: npt.NDArray[np.float64] | None = None

    def wait(self) -> npt.NDArray[np.float64]:
        """The vector's values, in FP64."""
        if self._values is None:
            assert self._make is not None
            with torch.no_grad():
                self._values = self._make().numpy().astype(np.float64)
            self._make = None  # lets go of what it was made of
        return self._values


class Batch:
    """Vectors that leave together: one transfer per device, however many there are."""

    def __init__(self) -> None:
        self._waiting: dict[torch.device, list[tuple[Part, Tensor]]] = {}

    def add(self, vector: Tensor) -> Part:
        """Take a vector along, in FP32 or FP64."""
        part = Part(vector.dtype is torch.float64)
        # bit by bit: two FP32 numbers that mean nothing for one in FP64
        self._waiting.setdefault(vector.device, []).append((part, vector.view(torch.float32)))
        return part

    def add_later(self, device: torch.device, make: Callable[[], Tensor]) -> Part | Later:
        """Take along what `make` gives; from the CPU it is not even made before it is asked for."""
        return Later(make) if self.is_later(device) else self.add(make())

    @staticmethod
    def is_later(device: torch.device) -> bool:
        """Whether what is added there for later is not made yet."""
        return device.type == "cpu"

    def send(self) -> None:
        """Send all that was added, without waiting."""
        for members in self._waiting.values():
            transfer = Transfer(torch.cat([vector for _, vector in members]))
            start = 0
            for part, vector in members:
                part.transfer, part.span = transfer, slice(start, start + vector.numel())
                start += vector.numel()
        self._waiting = {}
