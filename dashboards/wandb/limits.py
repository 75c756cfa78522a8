"""How much may be logged: W&B's documented limits, and the pace that keeps a run of any length within them.

The limits are recommendations of W&B's documentation ("Experiments limits and performance"). The sink does not
know how long a run will be, so rows are spaced in proportion to the steps done: a row is due when it lies at
least `step / points` behind the one before. That gives every window at first, and `points * (1 + ln(step / points))`
rows at most after `step` steps, whatever the window, also for a run that was resumed. A second bound holds per
minute; a burst is allowed so that short runs log everything.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """What W&B's documentation asks to stay below."""

    keys_per_run: int = 5_000  # beyond it the workspace has to be set to manual
    rows_per_run: int = 500_000
    calls_per_minute: int = 1_000
    values_per_minute: int = 100_000
    points_per_scalar: int = 100_000
    points_per_histogram: int = 10_000
    files_per_run: int = 1_000
    rows_per_table: int = 10_000
    bytes_per_value: int = 1_000_000
    bytes_per_call: int = 25_000_000


DOCUMENTED = Limits()


class Pace:
    """Decides whether the next row of a kind is due.

    Args:
        points: rows at full rate; later rows are `step / points` steps apart.
        per_minute: sustained rate, in the unit of `amount` (rows, values, ...).
        burst: how many may go out at once before that rate binds.
    """

    def __init__(self, points: int, per_minute: float, burst: float) -> None:
        self.points = points
        self.per_minute = per_minute
        self.burst = burst
        self._last_step: int | None = None
        self._tokens = burst
        self._time: float | None = None  # seconds

    def take(self, step: int, time: float, amount: float = 1.0, *, urgent: bool = False) -> bool:
        """True when a row of `amount` at `step` and `time` (seconds) may be logged; it is then counted.

        An `urgent` row does not wait for the spacing in steps, only for the rate.
        """
        if self._time is not None:
            elapsed = max(0.0, time - self._time)  # a clock that was set back is no time at all
            self._tokens = min(self.burst, self._tokens + elapsed * self.per_minute / 60.0)
        self._time = time if self._time is None else max(time, self._time)
        # A row wider than the whole burst must still go out once in a while.
        needed = min(amount, self.burst)
        if self._tokens < needed or not (urgent or self._is_spaced(step)):
            return False
        self._tokens -= amount
        self._last_step = step
        return True

    def _is_spaced(self, step: int) -> bool:
        # A step before the last one means that training began anew: log it.
        last = self._last_step
        return last is None or step < last or step - last >= max(1.0, step / self.points)


def row_pace() -> Pace:
    """Rows of run-level values."""
    return Pace(points=10_000, per_minute=200, burst=300)


def series_pace() -> Pace:
    """Values of the per-tensor series, and the headroom histogram with them; `amount` is the number of values."""
    return Pace(points=1_000, per_minute=20_000, burst=40_000)


def picture_pace() -> Pace:
    """Rows with tables (two or three files each)."""
    return Pace(points=16, per_minute=1, burst=8)


def alert_table_pace() -> Pace:
    """Rows with the table of tensors out of turn, because there was an alert."""
    return Pace(points=1, per_minute=0.01, burst=10)
