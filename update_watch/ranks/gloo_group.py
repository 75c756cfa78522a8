"""The gloo group over which the ranks talk: their own store prefix, sums and exchanges with deadlines, a quiet end.

Nobody else knows of it: a rank that does not watch cannot be kept waiting by it, and cannot hang the others for longer
than `WAIT` seconds.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import itertools
import math
import os
import time
import weakref
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WAIT = 60.0  # seconds the ranks wait for each other, in the background
MEET = 20.0  # seconds for a rank's first window to come; by then the others have made their watches
_POLL = 0.02  # s
_LOOK = 1.0  # s between two looks whether another rank has given up
_ATTEMPT = "TORCHELASTIC_RESTART_COUNT"  # processes that torchrun starts anew may find the store of those that failed
_COUNT = itertools.count()  # watches of this process: the n-th of one rank joins the n-th of the others


class Parted(Exception):
    """The ranks stop joining; the text says why."""


class Group:
    """A gloo group of our own, on the store of the group it is made from. Made on the background thread."""

    def __init__(self, group: Any = None) -> None:
        """Announce this rank. `group`: the process group whose ranks join; None for all.

        Raises:
            RuntimeError: torch.distributed cannot do this here.
        """
        import torch.distributed as dist
        from torch.distributed import distributed_c10d as c10d

        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        members = "all" if group is None else "-".join(map(str, dist.get_process_group_ranks(group)))
        members = hashlib.sha256(members.encode()).hexdigest()[:16]
        store = c10d._get_default_store()
        if hasattr(store, "clone"):  # a connection of its own: a client that waits keeps all its users waiting
            store = store.clone()
        attempt = os.environ.get(_ATTEMPT, "0")
        self._store = c10d.PrefixStore(f"update_watch/{members}/{attempt}/{next(_COUNT)}", store)
        self._backend: Any = None
        self.sums = 0  # collectives that added a window up
        self.exchanges = 0
        self._pending: Any = None  # a collective that waits for other ranks
        self.deadline = math.inf  # s, of `time.monotonic`: this rank's process or watch ends then
        self._store.add("here", 1)
        _OPEN.add(self)

    def connect(self) -> None:
        """Wait for the other ranks. Raises Parted when one is missing after `MEET` seconds."""
        import torch.distributed as dist

        deadline = time.monotonic() + MEET
        while (here := self._store.add("here", 0)) < self.size:
            if time.monotonic() > deadline:
                self._store.add("here", -2 * self.size)  # who comes later finds out at once
            self._check_deadline()
            if time.monotonic() > deadline or here < 0:
                raise Parted(
                    f"not all of the {self.size} ranks are watching. Call update_watch.watch on every rank, "
                    "or say join=False"
                )
            time.sleep(_POLL)
        self._backend = dist.ProcessGroupGloo(self._store, self.rank, self.size, timedelta(seconds=WAIT))

    @property
    def is_connected(self) -> bool:
        return self._backend is not None

    def sum(self, vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The sum of all ranks' vectors, the same bits on every rank."""
        self._check_others()
        total = torch.from_numpy(vector.copy())
        self._finish(self._backend.allreduce([total]))
        self.sums += 1
        return total.numpy()

    def gather(self, row: Tensor) -> Tensor:
        """Every rank's `row`: [ranks, ...]."""
        rows = [torch.empty_like(row) for _ in range(self.size)]
        self._finish(self._backend.allgather([rows], [row]))
        return torch.stack(rows)

    def exchange(self, text: str) -> list[str]:
        """Every rank's text, by rank. Equal texts cross once."""
        import torch.distributed as dist

        self.exchanges += 1
        data = text.encode()
        label = hashlib.sha256(data).digest() + len(data).to_bytes(8, "big")
        labels = [bytes(row.tolist()) for row in self.gather(torch.tensor(list(label), dtype=torch.uint8))]
        texts: dict[bytes, str] = {}
        for root, other in enumerate(labels):
            if other in texts:
                continue
            size = int.from_bytes(other[32:], "big")
            buffer = torch.empty(size, dtype=torch.uint8)
            if other == label:
                buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if size else buffer
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = root, 0
            self._finish(self._backend.broadcast([buffer], options))
            texts[other] = bytes(buffer.numpy()).decode()
        return [texts[one] for one in labels]

    def _finish(self, work: Any) -> None:
        # not in C++: a daemon thread that comes back from there while Python shuts down brings the process down
        self._pending, pause = work, 1e-4
        look = time.monotonic() + _LOOK
        while not work.is_completed():
            self._check_deadline()
            if time.monotonic() > look:
                self._check_others()
                look = time.monotonic() + _LOOK
            time.sleep(pause)
            pause = min(2 * pause, _POLL)
        self._pending = None
        work.wait()  # raises if it failed

    def _check_deadline(self) -> None:
        if time.monotonic() > self.deadline:
            raise Parted("this one ends, and the others are not there")

    def _check_others(self) -> None:
        """Raise Parted if one has given up. Its connections may still be open."""
        try:
            is_over = self._store.check(["over"])
        except RuntimeError:  # the process that holds the store has ended
            return
        if is_over:
            raise Parted("another one has ended or given up waiting")

    def close(self) -> None:
        """Let go of the connections; a rank that still waits for this one is told."""
        _OPEN.discard(self)
        backend, self._backend = self._backend, None
        if backend is None:
            return
        if self._pending is not None and not self._pending.is_completed():
            _keep_for_ever(backend)  # its end would wait for the other ranks, and nothing else breaks the connection
            with suppress(RuntimeError):
                self._store.set("over", "1")


_OPEN: weakref.WeakSet[Group] = weakref.WeakSet()


def _keep_for_ever(thing: Any) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


@atexit.register
def _at_exit() -> None:
    for group in list(_OPEN):
        group.close()


def _after_fork() -> None:
    for group in list(_OPEN):  # its threads are in the parent only
        _keep_for_ever(group)
    _OPEN.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
