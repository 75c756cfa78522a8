"""Small arrays on their way to a device, without waiting: from a ring of pinned buffers.

One of them is written again only when the event behind its last upload has fired; else the ring grows.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


class PinnedRing:
    """Uploads arrays of one size and format."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self._ring: list[_Buffer] = []

    def send(self, values: npt.NDArray[Any], there: Tensor) -> None:
        """Copy to `there`, on the current stream of its device."""
        buffer = next((buffer for buffer in self._ring if buffer.is_free()), None)
        if buffer is None:
            buffer = _Buffer(self._shape, self._dtype, self._device)
            self._ring.append(buffer)
        buffer.values[...] = values
        there.copy_(buffer.pinned, non_blocking=True)
        buffer.mark(self._device)


class _Buffer:
    """Pinned memory, and the event behind its last upload."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.pinned = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.values: Any = self.pinned.numpy()
        self._event: Any = None

    def mark(self, device: torch.device) -> None:
        if device.type == "cuda":
            if self._event is None:
                with torch.cuda.device(device):
                    self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
            self._event.record(torch.cuda.current_stream(device))

    def is_free(self) -> bool:
        return self._event is None or bool(self._event.query())
