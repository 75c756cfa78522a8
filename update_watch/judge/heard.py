"""What is said of the accumulators of many tensors, without a report of each: only of some anybody wants to hear."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from update_watch.judge.accumulators import alert_level
from update_watch.judge.columns.codes import CAUSES, HEALTHS, HEALTHY, NONE, UNKNOWN
from update_watch.judge.columns.reports import Judged
from update_watch.report import Cause, Health, Level, TensorReport


class Heard(NamedTuple):
    """An accumulator that somebody is alerted of."""

    place: int  # of its tensor
    name: str
    health: Health
    cause: Cause | None
    level: Level


def loud(tensors: Sequence[TensorReport]) -> dict[int, list[Heard]]:
    """By the place of their tensor, in order."""
    found: dict[int, list[Heard]] = {}
    for place, name, health, cause in sorted(_loud(tensors), key=lambda one: one[0]):
        level = alert_level(health, cause)
        if level is not None:
            found.setdefault(place, []).append(Heard(place, name, health, cause, level))
    return found


def _loud(tensors: Sequence[TensorReport]) -> Iterator[tuple[int, str, Health, Cause | None]]:
    if not isinstance(tensors, Judged):
        for place, tensor in enumerate(tensors):
            for a in tensor.accumulators.values():
                yield place, a.name, a.health, a.cause
        return
    for part in tensors.parts:
        is_loud = np.flatnonzero(part.is_loud)
        rows = zip(
            part.places[is_loud].tolist(), part.health[is_loud].tolist(), part.cause[is_loud].tolist(), strict=True
        )
        for place, health, cause in rows:
            yield place, part.name, HEALTHS[health], None if cause == NONE else CAUSES[cause]


def well(tensors: Sequence[TensorReport]) -> set[str]:
    """Keys of those that are healthy, as `key` makes them."""
    if not isinstance(tensors, Judged):
        healthy = (
            (tensor.name, a.name)
            for tensor in tensors
            for a in tensor.accumulators.values()
            if a.health is Health.healthy
        )
        return {key(*names) for names in healthy}
    found: set[str] = set()
    for part in tensors.parts:
        places = part.places[(part.health == HEALTHY) & ~part.is_loud]
        found.update([key(tensors[place].name, part.name) for place in places.tolist()])
    return found


def key(tensor: str, accumulator: str) -> str:
    """What an accumulator is called among all of a run."""
    return f"{tensor} [{accumulator}]"


def unknown_averages(tensors: Sequence[TensorReport]) -> Counter[str]:
    """How many of each average are not known."""
    if isinstance(tensors, Judged):
        averages = (part for part in tensors.parts if part.name.startswith("average:"))
        counts = {part.name: int((part.health == UNKNOWN).sum()) for part in averages}
        return Counter({name: count for name, count in counts.items() if count})
    return Counter(
        a.name
        for t in tensors
        for a in t.accumulators.values()
        if a.health is Health.unknown and a.name.startswith("average:")
    )
