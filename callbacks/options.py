"""The options of a callback, checked before training begins."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from update_watch.callbacks.on_stall import OnStall
from update_watch.foresight.schedules import Schedule
from update_watch.thresholds import Thresholds
from update_watch.worker import Sink

AUTO = "auto"  # a journal beside the trainer's logs, where it keeps any; the schedule that the trainer has
OnAudit = Literal["warn", "raise"] | Callable[[Any], object]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a callback; each is documented there."""

    window: int
    samples: int
    sinks: Sequence[Sink]
    thresholds: Thresholds | None
    averages: Mapping[str, Any] | None
    seed: int
    on_stall: OnStall
    progress_bar: bool
    print_audit: bool | Literal["full"]
    check_replicas: bool
    budget: float | None = 0.01
    journal: str | os.PathLike[str] | None = AUTO
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    on_audit: OnAudit = "warn"
    schedule: Schedule | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        if self.on_stall not in ("warn", "stop", "raise") and not callable(self.on_stall):
            raise ValueError(
                f"UpdateWatch(on_stall={self.on_stall!r}) must be 'warn', 'stop', 'raise' or a function of a Report"
            )
        if self.on_audit not in ("warn", "raise") and not callable(self.on_audit):
            raise ValueError(
                f"UpdateWatch(on_audit={self.on_audit!r}) must be 'warn', 'raise' or a function of an Audit"
            )
        if self.averages is not None and not isinstance(self.averages, Mapping):
            raise TypeError(f"UpdateWatch(averages={self.averages!r}) must map names to models, as in {{'ema': model}}")
        # what `watch` would refuse once training begins, where it could only be logged
        for name, least in (("window", 1), ("samples", 4)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"UpdateWatch({name}={value!r}) must be a whole number of at least {least}")
        is_number = isinstance(self.budget, (int, float)) and not isinstance(self.budget, bool)
        if self.budget is not None and not (is_number and 0 < self.budget <= 1):
            raise ValueError(f"UpdateWatch(budget={self.budget!r}) must be a share above 0 and at most 1, or None")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"UpdateWatch(seed={self.seed!r}) must be a whole number")
        for name in ("progress_bar", "print_audit", "check_replicas"):
            if not isinstance(getattr(self, name), bool) and (name, getattr(self, name)) != ("print_audit", "full"):
                raise TypeError(f"UpdateWatch({name}={getattr(self, name)!r}) must be True or False")
        if self.journal is not None and not (isinstance(self.journal, (str, os.PathLike)) and os.fspath(self.journal)):
            raise TypeError(f"UpdateWatch(journal={self.journal!r}) must be the file to write, 'auto' or None")
        if self.thresholds is not None and not isinstance(self.thresholds, Thresholds):
            raise TypeError(f"UpdateWatch(thresholds={self.thresholds!r}) must be update_watch.Thresholds or None")
        if not (self.schedule is None or self.schedule == AUTO or isinstance(self.schedule, Schedule)):
            raise TypeError(
                f"UpdateWatch(schedule={self.schedule!r}) must be update_watch.Schedule(rate, steps), 'auto' (the trainer's) or None"
            )
        for name in ("include", "exclude"):
            given = getattr(self, name)
            patterns = [given] if isinstance(given, str) or given is None else given
            if not isinstance(patterns, Sequence) or not all(one is None or isinstance(one, str) for one in patterns):
                raise TypeError(f"UpdateWatch({name}={given!r}) must be a name with wildcards, or a list of them")
        if isinstance(self.sinks, str) or not isinstance(self.sinks, Iterable):
            raise TypeError(f"UpdateWatch(sinks={self.sinks!r}) must be a list of sinks")
        object.__setattr__(self, "sinks", tuple(self.sinks))
        for sink in self.sinks:
            if not callable(sink):
                raise TypeError(f"UpdateWatch(sinks=[{sink!r}]): a sink is a callable that takes a Report")

    def schedule_or(self, of_trainer: Callable[[], Schedule | None]) -> Schedule | None:
        """The schedule to forecast along: the trainer's where none is given."""
        return self.schedule if isinstance(self.schedule, Schedule) else None if self.schedule is None else of_trainer()

    def for_watch(self) -> dict[str, Any]:
        """Keyword arguments of `update_watch.watch`."""
        names = ("window", "samples", "budget", "sinks", "thresholds", "seed", "check_replicas", "include", "exclude")
        return {name: getattr(self, name) for name in names}
