"""How sums leave the device: one vector per device and window, without the training thread waiting for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Transfer:
    """One FP32 vector on its way to the host. Made on the training thread; `wait` runs on the background thread."""

    def __init__(self, vector: Tensor) -> None:
        self._event: Any = None
        self._values: npt.NDArray[np.float64] | None = None
        if vector.device.type == "cpu":
            self._host = vector
            return
        backend = getattr(torch, vector.device.type, None)
        pinned = vector.device.type == "cuda"
        self._host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=pinned)
        self._host.copy_(vector, non_blocking=True)
        self._device_side = vector  # the copy reads it until the event has fired
        if backend is not None and hasattr(backend, "Event"):
            self._event = backend.Event()
            self._event.record()

    def wait(self) -> npt.NDArray[np.float64]:
        """The values, in FP64; waits for the device (this thread only)."""
        if self._values is None:
            if self._event is not None:
                self._event.synchronize()
            self._values = self._host.numpy().astype(np.float64)
        return self._values


class Part:
    """One vector of a `Batch`. `wait` runs on the background thread, after the batch was sent."""

    def __init__(self) -> None:
        self.transfer: Transfer | None = None
        self.span = slice(0, 0)

    def wait(self) -> npt.NDArray[np.float64]:
        """The vector's values, in FP64; waits for the device (this thread only)."""
        if self.transfer is None:
            raise RuntimeError("Part.wait: its batch was not sent; call Batch.send first")
        return self.transfer.wait()[self.span]


class Batch:
    """Vectors that leave together: one transfer per device, however many there are."""

    def __init__(self) -> None:
        self._waiting: dict[torch.device, list[tuple[Part, Tensor]]] = {}

    def add(self, vector: Tensor) -> Part:
        """Take an FP32 vector along."""
        part = Part()
        self._waiting.setdefault(vector.device, []).append((part, vector))
        return part

    def send(self) -> None:
        """Send all that was added, without waiting."""
        for members in self._waiting.values():
            transfer = Transfer(torch.cat([vector for _, vector in members]))
            start = 0
            for part, vector in members:
                part.transfer, part.span = transfer, slice(start, start + vector.numel())
                start += vector.numel()
        self._waiting = {}
