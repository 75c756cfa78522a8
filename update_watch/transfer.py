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
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy().astype(np.float64)
