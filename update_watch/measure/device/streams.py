"""The stream of a device that a step ran on, and whether it is being captured in a CUDA graph.

Work of ours must follow the step's on the step's own stream, on the tensor's own device, whatever stream and device are
current when it is asked for. And nothing of ours may run while a graph is captured: it would be replayed, into memory that
is somebody else's by then.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch


def is_capturing() -> bool:
    """Whether the current stream is being captured in a CUDA graph. Never makes a CUDA context."""
    return bool(torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())  # type: ignore[no-untyped-call]  # torch's


def current(device: torch.device) -> Any:
    """The current stream of `device`; None where the device has none (CPU) or torch has no streams for it."""
    if device.type == "cpu":
        return None
    backend = getattr(torch, device.type, None)
    if not hasattr(backend, "current_stream"):
        return None
    return backend.current_stream(device)  # type: ignore[union-attr]


class StepStreams:
    """Remembers the streams that steps ran on; `resumed` makes them current again, for what happens outside a step."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def note(self, devices: Iterable[torch.device]) -> None:
        """A step with tensors on these devices is running now."""
        for device in devices:
            stream = current(device)
            if stream is not None:
                self._streams[device] = stream

    def resumed(self) -> AbstractContextManager[Any]:
        """A context in which each device's current stream is that of its last step."""
        stack = ExitStack()
        for device, stream in self._streams.items():
            stack.enter_context(getattr(torch, device.type).stream(stream))
        return stack

    def settle(self, seconds: float | None) -> bool:
        """Wait until the devices have done what was asked of them, at most `seconds`; False when that ran out.

        Raises: what the device reports of a failed kernel.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        for stream in self._streams.values():
            while not stream.query():
                if deadline is not None and time.monotonic() > deadline:
                    return False
                time.sleep(0.0005)
        return True
