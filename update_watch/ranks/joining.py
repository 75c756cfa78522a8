"""Training on many ranks: each sees its own shards, and once a window they put together what they saw.

All of it runs on the background thread that judges windows; the training thread and the user's process groups are never
involved. The ranks talk over a gloo group of their own, which nobody else knows of: a rank that does not watch cannot be
kept waiting by it, and cannot hang the others for longer than `WAIT` seconds. Whatever goes wrong, a rank goes on
reporting what it sees itself, and says so once.

One window is one `all_reduce` of a vector (see `shared_plan`). When a rank has something to report that the others do not know
yet (the first window, a state that has come into being), it raises a flag in that vector; then all ranks exchange what
they have, and the window is joined again. Nothing is ever unpickled: JSON and numbers cross.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import warnings
from typing import Any

import numpy as np
import torch

from update_watch.evidence import WindowEvidence
from update_watch.ranks.gloo_group import Group, Parted
from update_watch.ranks.shared_plan import Entry, Plan, Vector, catalogue

logger = logging.getLogger("update_watch")

_TRIES = 4  # exchanges for one window, or windows out of step, before the ranks stop joining
_HEAD = (
    "ranks",
    "a",
    "a2",
    "b",
    "b2",
    "unplanned",
    "leaving",
    "leaver",
    "cost",
    "costs",
    "time",
    "skipped",
    "share",
    "shares",
    "observed",
    "observers",
)


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
        evidence = dataclasses.replace(evidence, tensors=tuple(evidence.tensors))  # all of each is sent
        is_partial = _is_partial(evidence) or len(self._plan) > len(evidence.tensors)
        try:
            return self._join(evidence, group)
        except Parted as reason:
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
                raise Parted(_left(sums, group.size))
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
        raise Parted("they do not agree on what is watched")

    def _waits_for_others(self, evidence: WindowEvidence, group: Group) -> bool:
        """Ranks are at different windows: those that are behind report theirs alone, the others try again.

        Windows that end together but began apart are reported alone by all.
        """
        self._out_of_step += 1
        if self._out_of_step >= _TRIES:
            raise Parted("their windows end at different steps; flush and resume the watch on every rank alike")
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
        cost, share, observed = evidence.cost_ms, evidence.cost_share, evidence.observed_steps
        head.update(a=a, a2=a * a, b=b, b2=b * b, time=evidence.time, skipped=float(evidence.skipped_steps))
        head.update(cost=cost or 0.0, costs=float(cost is not None))
        head.update(share=share or 0.0, shares=float(share is not None))
        head.update(observed=float(observed or 0), observers=float(observed is not None))
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
        cost_share=sums["share"] / sums["shares"] if sums["shares"] else None,
        observed_steps=round(sums["observed"] / sums["observers"]) if sums["observers"] else None,
    )


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else repr(error)
