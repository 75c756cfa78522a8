"""What the diagnosis remembers of a tensor between windows, and its way into plain data and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from update_watch.report import Cause, Health

# looking a member up on its enum costs more than what is done with it, thousands of times per window
HEALTHY, STALLING, STALLED, UNKNOWN = Health.healthy, Health.stalling, Health.stalled, Health.unknown
GRADES = (HEALTHY, STALLING, STALLED)
MOST_WAITED = 64  # windows
_ONCE = -1  # in a checkpoint: an average that was updated in one window
_NEVER_UPDATED = 3  # windows in which an average that never was updated is waited for
_NEVER_STEPS = 64  # and steps: libraries update after every tenth step, or every fiftieth
_STOPPED = 8  # windows, and times as many steps as ever before, in which one that was updated has not been


class PooledWindow(NamedTuple):
    """What one window has shown of a tensor's efficiency."""

    steps: int  # measured
    efficiency: float
    error: float | None  # standard error; None: one step alone has shown it
    lost: float
    expected: float  # changes under stochastic rounding
    in_common: float  # of the error, what all windows may have in common
    movement: float  # what it weighs beside others: |intended|^2 of a step, at a learning rate of 1; 0: not known


class AccumulatorHistory:
    """One accumulator of a tensor."""

    __slots__ = (
        *("bad_steps", "bad_windows", "grade", "longest_quiet", "quiet_steps", "quiet_windows", "value"),
        *("bad_cause", "bad_efficiency", "bad_lost", "is_well", "unseen", "was_updated"),
    )

    def __init__(self) -> None:
        self.grade = HEALTHY
        self.bad_steps = 0  # measured steps in the unbroken run of windows that spoke against it
        self.bad_windows = 0  # in that run
        self.value: float | None = None  # of a counter, in the window before
        self.quiet_windows = self.quiet_steps = 0  # of an average: in a row, in which it was not written
        self.was_updated = False  # an average: in any window
        self.longest_quiet: int | None = (
            None  # and the most steps from one such window to the next; None: there was one at most
        )
        # of an average: why its last verdict was bad (None: it was not), at which efficiency and lost fraction, and how many
        # windows in a row have not measured it since
        self.bad_cause: Cause | None = None
        self.bad_efficiency: float | None = None
        self.bad_lost: float | None = None
        self.unseen = 0
        self.is_well = False  # of an average: whether its last verdict was good

    def acquit(self) -> None:
        """A window spoke for it."""
        self.bad_steps = self.bad_windows = 0
        self.bad_cause = None

    def update(self) -> None:
        """An average was written."""
        if self.was_updated:
            self.longest_quiet = max(self.longest_quiet or 0, self.quiet_steps)
        self.was_updated = True
        self.quiet_windows = self.quiet_steps = 0

    @property
    def is_overdue(self) -> bool:
        """An average: no update has come for longer than one waits for it."""
        if not self.was_updated:
            return self.quiet_windows >= _NEVER_UPDATED and self.quiet_steps >= _NEVER_STEPS
        if self.longest_quiet is None:  # how often it is updated is not known yet
            return False
        return self.quiet_windows >= _STOPPED and self.quiet_steps >= _STOPPED * self.longest_quiet

    def to_plain(self) -> list[Any]:
        longest = _ONCE if self.was_updated and self.longest_quiet is None else self.longest_quiet
        quiet = [self.quiet_windows, self.quiet_steps, longest]
        bad = [
            None if self.bad_cause is None else self.bad_cause.value,
            self.bad_efficiency,
            self.bad_lost,
            self.unseen,
            self.is_well,
        ]
        return [self.grade.value, self.bad_steps, self.bad_windows, self.value, *quiet, *bad]

    @classmethod
    def from_plain(cls, data: Any) -> AccumulatorHistory:
        grade, bad_steps, bad_windows, value, quiet_windows, quiet_steps, longest, *bad = _items(data, 12)
        history = cls()
        history.grade, history.value = _grade(grade), _optional(value)
        history.bad_steps, history.bad_windows = _count(bad_steps), _count(bad_windows)
        history.quiet_windows, history.quiet_steps = _count(quiet_windows), _count(quiet_steps)
        history.was_updated = longest is not None and longest is not False  # once that was all that was kept
        if history.was_updated and longest is not True and longest != _ONCE:
            history.longest_quiet = _count(longest)
        history.bad_cause = None if bad[0] is None else Cause(bad[0])
        history.bad_efficiency, history.bad_lost, history.unseen = _optional(bad[1]), _optional(bad[2]), _count(bad[3])
        history.is_well = bool(bad[4])
        return history


class TensorHistory:
    """One tensor."""

    __slots__ = (
        "accumulators",
        "age",
        "bad_state_windows",
        "drift",
        "grade",
        "graded",
        "graded_since",
        "health",
        "lossy_windows",
        "lr",
        "net_grade",
        "peak_lr",
        "pool",
        "proven",
        "since",
        "skipped_windows",
        "stalled_lr",
        "still_steps",
        "was_uncopied",
        "written_gap",
        "written_step",
        "zero_looks",
    )

    def __init__(self) -> None:
        self.health: Health | None = None  # of the last report
        self.since = 0  # first step of the window in which `health` began
        self.grade = HEALTHY  # last of healthy, stalling, stalled: what hysteresis starts from
        self.graded: Health | None = None  # last reported of healthy, stalling, stalled, and since when;
        self.graded_since = 0  # None after a time without signal
        self.pool: list[PooledWindow] = []  # latest windows, oldest first
        self.age = 0  # windows since it was last measured
        self.drift: list[float] = []  # displacement efficiencies of the latest windows with evidence
        self.proven = False  # a displacement has shown that its updates arrive
        self.bad_state_windows = 0  # in a row with a state factor outside the band
        self.net_grade = (
            HEALTHY  # of what is left of the applied updates at a window's end; unknown where it may be no loss
        )
        # in a row in which they were undone; below 0 so many windows are waited for the next copy of masters
        self.lossy_windows = 0
        self.written_step: int | None = None  # the last at which that was seen
        self.written_gap = 0  # steps from one such write to the next, where it was undone
        self.was_uncopied = False  # `net_grade` is that of masters that are not copied back, not of what is undone
        self.still_steps = 0  # in a row, in which it had gradients and not one bit of it moved
        self.skipped_windows = 0  # in a row with nearly all steps skipped
        self.zero_looks = 0  # steps in a row of windows in which its gradient was looked at and was 0
        self.lr: float | None = None  # in the window before
        self.peak_lr = 0.0
        self.stalled_lr = 0.0  # the highest at which rounding has stalled it, since it was last anything else
        self.accumulators: dict[str, AccumulatorHistory] = {}

    def accumulator(self, name: str) -> AccumulatorHistory:
        """The history of one accumulator, new at first."""
        found = self.accumulators.get(name)
        if found is None:
            found = self.accumulators[name] = AccumulatorHistory()
        return found

    def forget_evidence(self) -> None:
        """Start the evidence anew, after a time without signal."""
        self.pool, self.drift, self.age = [], [], 0

    def to_plain(self) -> dict[str, Any]:
        return {
            "health": None if self.health is None else self.health.value,
            "since": self.since,
            "grade": self.grade.value,
            "graded": None if self.graded is None else self.graded.value,
            "graded_since": self.graded_since,
            "pool": [list(entry) for entry in self.pool],
            "age": self.age,
            "drift": list(self.drift),
            "proven": self.proven,
            "bad_state_windows": self.bad_state_windows,
            "net_grade": self.net_grade.value,
            "lossy_windows": self.lossy_windows,
            "written_step": self.written_step,
            "written_gap": self.written_gap,
            "was_uncopied": self.was_uncopied,
            "skipped_windows": self.skipped_windows,
            "still_steps": self.still_steps,
            "zero_looks": self.zero_looks,
            "lr": self.lr,
            "peak_lr": self.peak_lr,
            "stalled_lr": self.stalled_lr,
            "accumulators": {name: a.to_plain() for name, a in self.accumulators.items()},
        }

    @classmethod
    def from_plain(cls, data: Any) -> TensorHistory:
        """Raises ValueError, TypeError or KeyError on anything `to_plain` would not write."""
        if not isinstance(data, Mapping):
            raise TypeError(f"{data!r} is not a mapping")
        history = cls()
        history.health = None if data["health"] is None else Health(data["health"])
        history.since = _count(data["since"])
        history.grade = _grade(data["grade"])
        history.graded = None if data["graded"] is None else _grade(data["graded"])
        history.graded_since = _count(data["graded_since"])
        for entry in _items(data["pool"]):
            steps, efficiency, error, *rest = _items(entry, 7)
            history.pool.append(
                PooledWindow(_count(steps, 1), _number(efficiency), _optional(error), *map(_number, rest))
            )
        history.age = _count(data["age"])
        history.drift = [_number(value) for value in _items(data["drift"])]
        history.proven = bool(data["proven"])
        history.bad_state_windows = _count(data["bad_state_windows"])
        history.net_grade = _grade(data["net_grade"], (*GRADES, UNKNOWN))
        history.lossy_windows = _count(data["lossy_windows"], -MOST_WAITED)
        history.written_step = None if data["written_step"] is None else _count(data["written_step"])
        history.written_gap = _count(data.get("written_gap", 0))
        history.was_uncopied = bool(data.get("was_uncopied", False))
        history.zero_looks = _count(data["zero_looks"])
        history.skipped_windows = _count(data["skipped_windows"])
        history.still_steps = _count(data["still_steps"])
        history.lr = _optional(data["lr"])
        history.peak_lr = _number(data["peak_lr"])
        history.stalled_lr = _number(data["stalled_lr"])
        history.accumulators = {
            str(name): AccumulatorHistory.from_plain(a) for name, a in dict(data["accumulators"]).items()
        }
        return history


def check_state(owner: str, state: Any, version: int, parts: Mapping[str, type]) -> None:
    """Raise unless `state` is what `owner.state_dict()` of this version returns, as far as its outside shows."""
    remedy = "pass what state_dict() gave, or leave the state out to start anew."
    if not isinstance(state, Mapping):
        raise TypeError(f"{owner}.load_state_dict({type(state).__name__}) needs a dict: {remedy}")
    if state.get("version") != version:
        raise ValueError(f"{owner}.load_state_dict: version={state.get('version')!r}, {version} expected: {remedy}")
    for name, kind in parts.items():
        if not isinstance(state.get(name), kind):
            raise TypeError(f"{owner}.load_state_dict: {name}={state.get(name)!r} is not a {kind.__name__}: {remedy}")


def _items(data: Any, length: int | None = None) -> list[Any]:
    if not isinstance(data, (list, tuple)) or (length is not None and len(data) != length):
        raise ValueError(f"{data!r} is not a list{'' if length is None else f' of {length}'}")
    return list(data)


def _count(value: Any, low: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{value!r} is not a whole number of at least {low}")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _optional(value: Any) -> float | None:
    return None if value is None else _number(value)


def _grade(value: Any, grades: tuple[Health, ...] = GRADES) -> Health:
    grade = Health(value)
    if grade not in grades:
        raise ValueError(f"{value!r} is not a grade")
    return grade
