"""Windows of which nothing was looked at, since a budget let all of their steps pass: the verdict of the last that was stands.

What is shown is that window, and since when nobody has looked. It is no news, no point of a line and no cell of a map.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from update_watch.report import Report
from update_watch.wording import last_looked

if TYPE_CHECKING:
    from update_watch.dashboards.frame import Frame


def is_unseen(window: Report | Frame) -> bool:
    """Whether nothing of it was looked at, and nothing is told of it."""
    return window.observed_steps == 0 and window.observed_at is not None and not window.alerts


def stands(before: Frame | None, frame: Frame) -> bool:
    """Whether all that is to be said of `frame` is that the verdict of `before` stands."""
    if before is None or not is_unseen(frame) or frame.table != before.table:
        return False
    verdicts = [(f.tensors.health, f.tensors.cause) for f in (before, frame)]
    return all(map(np.array_equal, *verdicts))


def standing(frames: Iterable[Frame]) -> Iterator[Frame]:
    """The frames; in place of one that says nothing new the one before it again, with `until`."""
    before: Frame | None = None
    for frame in frames:
        if before is not None and stands(before, frame):
            before = dataclasses.replace(before, until=frame.step)
        else:
            before = frame
        yield before


def unseen_words(frame: Frame) -> str:
    """How old its verdict is; empty where the window itself was looked at."""
    seen, until = frame.step if frame.observed_at is None else frame.observed_at, frame.end
    return f"{last_looked(seen, until)}." if until > seen else ""
