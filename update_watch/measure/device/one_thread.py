"""What is added up on the host is added up on one thread.

torch gives each of its OpenMP threads a part of an operator on more than 32,768 elements, of a fused rule on any number, and waits
for all of them. Of what is added up here that saves nothing, and where other processes use the cores it takes milliseconds
instead of microseconds. OpenMP keeps the number of threads by the thread that asks, so no other thread sees another one;
`torch.set_num_threads` would change the whole process.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from update_watch.replay.side_effects import Undone

_NAMES = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}


class OnOneThread(Undone):
    """torch's operators run on the thread that asks for them, and no other; what was before comes back. Enter it twice.

    Does nothing on another device than the host, and where torch does not ask OpenMP how many threads there are.
    """

    __slots__ = ("_set", "_threads")

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._set = setter() if device.type == "cpu" else None
        self._threads = torch.get_num_threads()

    def change(self) -> None:
        if self._set is not None and self._threads > 1:
            self._set(1)

    def undo(self) -> None:
        if self._set is not None and self._threads > 1:
            self._set(self._threads)


@functools.cache
def setter() -> Callable[[int], None] | None:
    """Sets the number of this thread's threads; None where torch does not go by it."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / _NAMES.get(sys.platform, "")))
        found: Callable[[int], None] = library.omp_set_num_threads  # of the library that torch itself is linked to
        threads = torch.get_num_threads()
        found(threads + 1)
        does_obey = torch.get_num_threads() == threads + 1
        found(threads)
        return found if does_obey else None
    except (OSError, AttributeError):
        return None
