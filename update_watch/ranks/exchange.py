"""Training on many ranks: each sees its own shards, and once a window they put together what they saw.

All of it runs on the background thread that judges windows; the training thread and the user's process groups are never
involved. The ranks talk over a gloo group of their own, which nobody else knows of: a rank that does not watch cannot be
kept waiting by it, and cannot hang the others for longer than `WAIT` seconds. Whatever goes wrong, a rank goes on
reporting what it sees itself, and says so once.

One window is one `all_reduce` of a vector (see `joint`). When a rank has something to report that the others do not know
yet (the first window, a state that has come into being), it raises a flag in that vector; then all ranks exchange what
they have, and the window is joined again. Nothing is ever unpickled: JSON and numbers cross.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import time
import warnings
import weakref
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor

from update_watch.evidence import WindowEvidence
from update_watch.ranks.joint_evidence import Entry, Plan, Vector, catalogue

logger = logging.getLogger("update_watch")

WAIT = 60.0  # seconds the ranks wait for each other, in the background
MEET = 20.0  # seconds for a rank's first window to come; by then the others have made their watches
_POLL = 0.02  # s
_LOOK = 1.0  # s between two looks whether another rank has given up
_TRIES = 4  # exchanges for one window, or windows out of step, before the ranks stop joining
_HEAD = ("ranks", "a", "a2", "b", "b2", "unplanned", "leaving", "leaver", "cost", "costs", "time", "skipped")
_COUNT = itertools.count()  # watches of this process: the n-th of one rank joins the n-th of the others


class _Parted(Exception):
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
        self._store = c10d.PrefixStore(f"update_watch/{members}/{next(_COUNT)}", store)
        self._backend: Any = None
        self.sums = 0  # collectives that added a window up
        self.exchanges = 0
        self._pending: Any = None  # a collective that waits for other ranks
        self.deadline = math.inf  # s, of `time.monotonic`: this rank's process or watch ends then
        self._store.add("here", 1)
        _OPEN.add(self)

    def connect(self) -> None:
        """Wait for the other ranks. Raises _Parted when one is missing after `MEET` seconds."""
        import torch.distributed as dist

        deadline = time.monotonic() + MEET
        while (here := self._store.add("here", 0)) < self.size:
            if time.monotonic() > deadline:
                self._store.add("here", -2 * self.size)  # who comes later finds out at once
            self._check_deadline()
            if time.monotonic() > deadline or here < 0:
                raise _Parted(
                    f"not all of the {self.size} ranks are watching. Call update_watch.watch on every rank, "
                    "or say join=False"
                )
            time.sleep(_POLL)
        self._backend = dist.ProcessGroupGloo(self._store, self.rank, self.size, timedelta(seconds=WAIT))

    @property
    def is_connected(self) -> bool:
        return self._backend is not None

    def sum(self, vector: Vector) -> Vector:
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
            raise _Parted("this one ends, and the others are not there")

    def _check_others(self) -> None:
        """Raise _Parted if one has given up. Its connections may still be open."""
        try:
            is_over = self._store.check(["over"])
        except RuntimeError:  # the process that holds the store has ended
            return
        if is_over:
            raise _Parted("another one has ended or given up waiting")

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


class Ranks:
    """Joins windows with those of the other ranks, as long as all take part."""

    def __init__(self, join: Any = True) -> None:
        """`join`: True for all ranks where torch.distributed runs, a process group for its ranks, False for none."""
        self.joined = 0  # windows
        self._of = None if isinstance(join, bool) else join
        self._group: Group | None = None
        self._is_over = join is False
        self._is_ending = False
        self._out_of_step = 0
        self._plan, self._own = Plan(), _Own([])
        self._find()

    @property
    def rank(self) -> int:
        """This rank among those that join; 0 where there is one only."""
        return self._group.rank if self._group is not None else 0

    @property
    def is_joining(self) -> bool:
        """Whether there are other ranks, and nothing went wrong with them so far."""
        return self._group is not None and not self._is_over

    @property
    def collectives(self) -> tuple[int, int]:
        """Collectives so far: sums of windows, exchanges of what there is."""
        return (self._group.sums, self._group.exchanges) if self._group is not None else (0, 0)

    def _find(self) -> None:
        """Look for the other ranks; torch.distributed may begin after the watch."""
        if self._is_over or self._group is not None or not _is_distributed():
            return
        try:
            if torch.distributed.get_rank(self._of) < 0 or torch.distributed.get_world_size(self._of) == 1:
                self._is_over = True
                return
            group = Group(self._of)
        except Exception as error:
            self._part(f"torch.distributed is not usable for it ({error!r})", True)
            return
        self._group = group

    # --- on the background thread ------------------------------------------------------------------

    def join(self, evidence: WindowEvidence) -> WindowEvidence:
        """The window as all ranks saw it; this rank's own if they do not join. Never raises, waits at most for `WAIT`s."""
        if self._group is None:
            self._find()
        group = self._group
        if self._is_over or group is None:
            return evidence
        is_partial = _is_partial(evidence) or len(self._plan) > len(evidence.tensors)
        try:
            return self._join(evidence, group)
        except _Parted as reason:
            self._part(str(reason), is_partial)
        except Exception as error:
            self._part(f"a rank could not be reached, or its watch was closed ({_line(error)})", is_partial)
        return evidence

    def _join(self, evidence: WindowEvidence, group: Group) -> WindowEvidence:
        if not group.is_connected:
            group.connect()
        entries = catalogue(evidence)
        for _ in range(_TRIES):
            covered = self._own.covers(entries)
            head = _head(evidence, unplanned=not covered)
            total = group.sum(np.concatenate([_values(head), self._plan.encode(evidence)]))
            sums = dict(zip(_HEAD, total.tolist(), strict=False))
            if sums["leaving"]:
                raise _Parted(_left(sums, group.size))
            if not _is_same_window(sums):
                if not self._waits_for_others(evidence, group):
                    return evidence
                continue
            if sums["unplanned"]:
                texts = group.exchange(json.dumps(entries))
                self._plan, self._own = Plan((json.loads(text) for text in texts), group.rank), _Own(entries)
                continue
            self.joined += 1
            self._out_of_step = 0
            joint = self._plan.decode(total[len(_HEAD) :], evidence)
            return _with_head(joint, sums)
        raise _Parted("they do not agree on what is watched")

    def _waits_for_others(self, evidence: WindowEvidence, group: Group) -> bool:
        """Ranks are at different windows: those that are behind report theirs alone, the others try again.

        Windows that end together but began apart are reported alone by all.
        """
        self._out_of_step += 1
        if self._out_of_step >= _TRIES:
            raise _Parted("their windows end at different steps; flush and resume the watch on every rank alike")
        steps = group.gather(torch.tensor([evidence.step]))
        return bool((steps != evidence.step).any()) and evidence.step == int(steps.max())

    def hurry(self, seconds: float) -> None:
        """This rank ends: wait for others no longer than this."""
        self._is_ending = True
        if self._group is not None:
            self._group.deadline = time.monotonic() + seconds

    def leave(self) -> None:
        """This rank cannot watch any more: tell the others in the window they wait with."""
        group, was_over = self._group, self._is_over
        self._is_over = True
        if group is None or was_over:
            return
        try:
            if not group.is_connected:
                group.connect()
            head = _head(None, leaver=group.rank)
            group.sum(np.concatenate([_values(head), np.zeros(self._plan.length)]))
        except Exception as error:
            logger.debug("update-watch: the other ranks could not be told: %r", error)
        group.close()

    def close(self) -> None:
        """Let go of the group."""
        self._is_over = True
        if self._group is not None:
            self._group.close()

    def _part(self, reason: str, is_partial: bool) -> None:
        """Stop joining; say so on one rank."""
        self._is_over = True
        group = self._group
        if group is not None:
            group.close()
        message = f"update-watch: ranks are not joined any more, each reports what it sees itself: {reason}"
        # where every rank holds everything, nothing is missed by looking at one
        rank = torch.distributed.get_rank() if group is None else group.rank
        if rank in _speakers(reason):
            if is_partial and not self._is_ending:
                logger.warning(message)
                try:
                    warnings.warn(message, stacklevel=2)
                except Warning:
                    pass
                return
        logger.info(message)


def _speakers(reason: str) -> tuple[int, ...]:
    """The ranks that warn: the first that is certainly there."""
    if "stopped watching" not in reason:
        return (0, 1)  # the first may be the one that is gone
    return (1,) if reason.startswith("rank 0 ") else (0,)


class _Own:
    """What this rank has said of its tensors."""

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = {(e["name"], e["dtype"], tuple(e["shape"])): e for e in entries}

    def covers(self, entries: list[Entry]) -> bool:
        """Whether the others know all there is to say now."""
        for entry in entries:
            said = self._entries.get((entry["name"], entry["dtype"], tuple(entry["shape"])))
            if said is None or any(said[k] != v for k, v in entry.items() if k != "accumulators"):
                return False
            if any(said["accumulators"].get(name) != a for name, a in entry["accumulators"].items()):
                return False
        return True


def _is_partial(evidence: WindowEvidence) -> bool:
    return any(t.held is not None and t.held < t.numel for t in evidence.tensors)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _head(evidence: WindowEvidence | None, unplanned: bool = False, leaver: int | None = None) -> dict[str, float]:
    """The first numbers of the vector. Windows are told apart by two remainders: their squares must be exact in FP64."""
    head = {"ranks": 1.0, "unplanned": float(unplanned)}
    if leaver is not None:
        head.update(leaving=1.0, leaver=float(leaver))
    if evidence is not None:
        window = evidence.step * 131 + evidence.window
        a, b = float(window % 4093), float(window % 4091)
        cost = evidence.cost_ms
        head.update(a=a, a2=a * a, b=b, b2=b * b, time=evidence.time, skipped=float(evidence.skipped_steps))
        head.update(cost=cost or 0.0, costs=float(cost is not None))
    return head


def _values(head: dict[str, float]) -> Vector:
    return np.array([head.get(name, 0.0) for name in _HEAD])


def _is_same_window(sums: dict[str, float]) -> bool:
    """All ranks sent the same window: the variance is 0."""
    n = sums["ranks"]
    return n * sums["a2"] == sums["a"] ** 2 and n * sums["b2"] == sums["b"] ** 2


def _left(sums: dict[str, float], size: int) -> str:
    count = int(sums["leaving"])
    who = f"rank {int(sums['leaver'])} of {size}" if count == 1 else f"{count} of {size} ranks"
    return f"{who} stopped watching after an error of ours"


def _with_head(joint: WindowEvidence, sums: dict[str, float]) -> WindowEvidence:
    n = sums["ranks"]
    return dataclasses.replace(
        joint,
        time=sums["time"] / n,
        cost_ms=sums["cost"] / sums["costs"] if sums["costs"] else None,
        skipped_steps=round(sums["skipped"] / n),
    )


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else repr(error)
