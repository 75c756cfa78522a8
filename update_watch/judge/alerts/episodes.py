"""Episodes: what was told of one cause, when it is told again, and when it is over.

An episode begins with its first tensor, is told again when the share of the parameters it holds passes the next of
`SHARES` (the small ones with twice as many tensors as were told) or when it becomes worse in kind, and ends when its last tensor is well. A tensor of which nothing can be said
for a while stays in it. What was told once is not told again, however often tensors leave and come back.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from update_watch.judge.alerts.findings import Members
from update_watch.judge.alerts.keys import Keys
from update_watch.judge.columns.codes import BROKEN, HEALTHS, STALLED, STALLING, Mask
from update_watch.judge.columns.judged import LEVELS
from update_watch.report import Level

SHARES = (0.01, 0.1, 0.5, 1.0)  # of the parameters that are trained
BEGAN, GREW, WORSE, OVER = "began", "grew", "worse", "over"
_LARGE = 0.5
_RANK = np.zeros(len(HEALTHS), int)
_RANK[[STALLING, STALLED, BROKEN]] = 1, 2, 3


class Episode:
    """One cause in one run."""

    __slots__ = ("members", "over_at", "patience", "told_level", "told_members", "told_rank", "told_share")

    def __init__(self) -> None:
        self.members: Mask = np.zeros(0, bool)  # keys that are in it now
        self.told_level: Level | None = None  # None: not told yet
        self.told_rank = -1  # the worst health told
        self.told_share = 0  # how many of SHARES were told
        self.told_members = 0  # the most it had, when it was told
        self.over_at = -math.inf  # when its end was told (s)
        self.patience = 0  # windows in which it had something to tell and was kept waiting

    @property
    def is_open(self) -> bool:
        return self.told_level is not None

    @property
    def count(self) -> int:
        """Of its members."""
        return int(self.members.sum())

    def take_in(self, bad: Members | None, well: Mask, keys: Keys) -> None:
        """Who is in it after a window: the bad ones, and of those before the ones that are not known to be well."""
        self.members = keys.grown(self.members) & ~well
        if bad is not None:
            self.members[bad.keys] = True

    def news(self, bad: Members | None, share: float) -> str:
        """What there is to tell: BEGAN, WORSE, GREW, OVER or "" for nothing. `share` of the parameters, 0..1."""
        count = self.count
        if not count:
            return OVER if self.is_open else ""
        if bad is None:
            return ""
        if self.told_level is None:
            return BEGAN
        if _rank(bad) > self.told_rank or LEVELS.index(level_of(bad)) > LEVELS.index(self.told_level):
            return WORSE
        has_passed = passed(share) > self.told_share and count > self.told_members
        # one large tensor more among many is no other story until half of the model has it
        is_large = share >= _LARGE or count >= 2 * self.told_members
        return GREW if has_passed and is_large else ""

    def tell(self, event: str, bad: Members | None, share: float, now: float) -> None:
        """Remember that it was told."""
        self.patience = 0
        if event == OVER or bad is None:
            self.told_level, self.told_rank, self.told_share, self.told_members = None, -1, 0, 0
            self.over_at = now
            return
        self.told_level = level_of(bad)
        self.told_rank = max(self.told_rank, _rank(bad))
        self.told_share = max(self.told_share, passed(share))
        self.told_members = max(self.told_members, self.count)

    # --- resume ------------------------------------------------------------------------------------

    def to_plain(self, keys: Keys) -> dict[str, Any]:
        return {
            "members": keys.texts(self.members),
            "told_level": None if self.told_level is None else self.told_level.value,
            "told_rank": self.told_rank,
            "told_share": self.told_share,
            "told_members": self.told_members,
            "over_at": None if math.isinf(self.over_at) else self.over_at,
            "patience": self.patience,
        }

    @classmethod
    def from_plain(cls, data: Any, keys: Keys) -> Episode:
        """Raises ValueError, TypeError or KeyError on anything `to_plain` would not write."""
        if not isinstance(data, Mapping) or not isinstance(data["members"], (list, tuple)):
            raise TypeError(f"{data!r} is not an episode")
        episode = cls()
        episode.members = keys.mask(keys.numbers(map(str, data["members"])))
        episode.told_level = None if data["told_level"] is None else Level(data["told_level"])
        for name in ("told_rank", "told_share", "told_members", "patience"):
            value = data[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < -1:
                raise ValueError(f"{name}={value!r} is not a count")
            setattr(episode, name, value)
        over_at = data["over_at"]
        if over_at is not None:
            if not isinstance(over_at, (int, float)) or isinstance(over_at, bool) or not math.isfinite(over_at):
                raise ValueError(f"over_at={over_at!r} is not a time")
            episode.over_at = float(over_at)
        return episode


def level_of(bad: Members) -> Level:
    """The loudest of them."""
    return LEVELS[int(bad.level.max())] or Level.info


def passed(share: float) -> int:
    """How many of SHARES a share has reached."""
    return bisect.bisect_right(SHARES, share + 1e-12)


def _rank(bad: Members) -> int:
    return int(_RANK[bad.health].max())
