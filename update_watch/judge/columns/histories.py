"""What the diagnosis remembers of all tensors between windows: the fields of `TensorHistory`, each as one column.

A tensor that is judged alone gets its `TensorHistory` out of the columns and puts it back.

Legend: m tensors that have ever been seen, F fields of a pooled window, W of D windows, the latest last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from update_watch.judge.columns.codes import HEALTH_CODES, HEALTHS, HEALTHY, NONE, UNSAID, Array, Codes, Rows
from update_watch.judge.history import AccumulatorHistory, PooledWindow, TensorHistory
from update_watch.thresholds import Thresholds

_HEALTHS = ("health", "grade", "graded", "net_grade")
_COUNTS = (
    *("since", "graded_since", "age", "bad_state_windows", "lossy_windows"),
    *("still_steps", "skipped_windows", "written_gap", "zero_looks"),
)
_NUMBERS = ("lr", "peak_lr", "stalled_lr", "written_step")
_POOLED = len(PooledWindow._fields)
STEPS, EFFICIENCY, ERROR, LOST, EXPECTED, IN_COMMON, MOVEMENT = range(_POOLED)


class AccumulatorColumns:
    """Of the accumulators of one name: what a verdict by their numbers needs. Averages and counters are kept as objects."""

    def __init__(self, count: int) -> None:
        self.is_there = np.zeros(count, bool)
        self.grade: Codes = np.zeros(count, np.int8)
        self.bad_steps: npt.NDArray[np.int64] = np.zeros(count, np.int64)
        self.bad_windows: npt.NDArray[np.int64] = np.zeros(count, np.int64)

    def grow(self, count: int) -> None:
        for name, values in vars(self).items():
            setattr(self, name, np.concatenate([values, np.zeros(count - len(values), values.dtype)]))

    def get(self, row: int) -> AccumulatorHistory:
        found = AccumulatorHistory()
        found.grade = HEALTHS[self.grade[row]]
        found.bad_steps, found.bad_windows = int(self.bad_steps[row]), int(self.bad_windows[row])
        return found

    def put(self, row: int, history: AccumulatorHistory) -> None:
        self.is_there[row], self.grade[row] = True, HEALTH_CODES[history.grade]
        self.bad_steps[row], self.bad_windows[row] = history.bad_steps, history.bad_windows


def is_plain(history: AccumulatorHistory) -> bool:
    """Whether it holds no more than `AccumulatorColumns` can."""
    few = (history.value, history.longest_quiet, history.bad_cause, history.bad_efficiency, history.bad_lost)
    counts = history.quiet_windows or history.quiet_steps or history.unseen or history.is_well or history.was_updated
    return all(value is None for value in few) and not counts


class Histories:
    """Of all tensors of a run, by name."""

    def __init__(self, limits: Thresholds) -> None:
        self._windows, self._drifts = limits.pool_windows + 1, 2 * limits.drift_windows
        self.rows: dict[str, int] = {}
        self._names: Sequence[str] = ()  # of the window before
        self._rows_n: Rows = np.zeros(0, np.intp)
        self.health: Codes
        self.cause: Codes  # of the last report; UNSAID where there was none in this process
        self.grade: Codes
        self.graded: Codes
        self.net_grade: Codes
        self.lr: Array
        self.peak_lr: Array
        self.stalled_lr: Array
        self.written_step: Array
        self.since: npt.NDArray[np.int64]
        self.graded_since: npt.NDArray[np.int64]
        self.age: npt.NDArray[np.int64]
        self.bad_state_windows: npt.NDArray[np.int64]
        self.lossy_windows: npt.NDArray[np.int64]
        self.still_steps: npt.NDArray[np.int64]
        self.skipped_windows: npt.NDArray[np.int64]
        self.zero_looks: npt.NDArray[np.int64]
        for name, values in self._fresh(0).items():
            setattr(self, name, values)
        self.accumulators: dict[str, AccumulatorColumns] = {}
        self.odd: dict[str, dict[int, AccumulatorHistory]] = {}  # name -> row -> what no column holds

    def _fresh(self, count: int) -> dict[str, Any]:
        """The columns of so many tensors that nothing is known of."""
        found: dict[str, Any] = {name: np.full(count, HEALTHY, np.int8) for name in _HEALTHS}
        found["health"][:] = found["graded"][:] = NONE
        found["cause"] = np.full(count, UNSAID, np.int8)
        found |= {name: np.zeros(count, np.int64) for name in _COUNTS}
        found |= {name: np.zeros(count) for name in _NUMBERS}
        found["lr"][:] = found["written_step"][:] = np.nan
        found["proven"], found["was_uncopied"] = np.zeros(count, bool), np.zeros(count, bool)
        found["pool_FWm"], found["pooled"] = np.zeros((_POOLED, self._windows, count)), np.zeros(count, np.int64)
        found["drift_Dm"], found["drifts"] = np.zeros((self._drifts, count)), np.zeros(count, np.int64)
        return found

    proven: npt.NDArray[np.bool_]
    was_uncopied: npt.NDArray[np.bool_]
    pool_FWm: Array  # `pooled` of the W are in use
    pooled: npt.NDArray[np.int64]
    drift_Dm: Array  # `drifts` of the D are in use
    drifts: npt.NDArray[np.int64]

    def rows_of(self, names: Sequence[str]) -> Rows:
        """[n] where these tensors are in the columns; those that are new get rows."""
        if names == self._names:
            return self._rows_n
        rows = [self.rows.setdefault(name, len(self.rows)) for name in names]
        self._grow()
        self._names, self._rows_n = names, np.array(rows, dtype=np.intp)
        return self._rows_n

    def _grow(self) -> None:
        more = len(self.rows) - len(self.health)
        if more:
            for name, values in self._fresh(more).items():
                setattr(self, name, np.concatenate([getattr(self, name), values], -1))
            for columns in self.accumulators.values():
                columns.grow(len(self.rows))

    def of(self, accumulator: str) -> AccumulatorColumns:
        """The columns of the accumulators of this name."""
        found = self.accumulators.get(accumulator)
        if found is None:
            found = self.accumulators[accumulator] = AccumulatorColumns(len(self.rows))
        return found

    # --- of all at once ----------------------------------------------------------------------------

    def forget_evidence(self, rows: Rows) -> None:
        """Start the evidence of these anew."""
        self.pooled[rows] = self.drifts[rows] = self.age[rows] = 0

    def remember(self, rows: Rows, pooled_Fn: Array) -> None:
        """Add a window to the pools of these."""
        pool_FWm = self.pool_FWm
        for w in range(self._windows - 1):
            pool_FWm[:, w, rows] = pool_FWm[:, w + 1, rows]
        pool_FWm[:, -1, rows] = pooled_Fn
        self.pooled[rows] = np.minimum(self.pooled[rows] + 1, self._windows)

    def add_drift(self, rows: Rows, drift_n: Array) -> None:
        """Add a displacement efficiency to what is known of these."""
        for d in range(self._drifts - 1):
            self.drift_Dm[d, rows] = self.drift_Dm[d + 1, rows]
        self.drift_Dm[-1, rows] = drift_n
        self.drifts[rows] = np.minimum(self.drifts[rows] + 1, self._drifts)

    # --- of one ------------------------------------------------------------------------------------

    def get(self, row: int) -> TensorHistory:
        """The history of one, apart from its accumulators."""
        found = TensorHistory()
        for name in _COUNTS:
            setattr(found, name, int(getattr(self, name)[row]))
        found.health = None if self.health[row] == NONE else HEALTHS[self.health[row]]
        found.grade, found.net_grade = HEALTHS[self.grade[row]], HEALTHS[self.net_grade[row]]
        found.graded = None if self.graded[row] == NONE else HEALTHS[self.graded[row]]
        found.lr = None if np.isnan(self.lr[row]) else float(self.lr[row])
        found.peak_lr, found.stalled_lr = float(self.peak_lr[row]), float(self.stalled_lr[row])
        found.written_step = None if np.isnan(self.written_step[row]) else int(self.written_step[row])
        found.proven, found.was_uncopied = bool(self.proven[row]), bool(self.was_uncopied[row])
        for steps, efficiency, error, *rest in self.pool_FWm[:, self._windows - self.pooled[row] :, row].T.tolist():
            stated = None if error != error else error
            found.pool.append(PooledWindow(int(steps), efficiency, stated, *rest))
        found.drift = self.drift_Dm[self._drifts - self.drifts[row] :, row].tolist()
        return found

    def put(self, row: int, history: TensorHistory) -> None:
        """The other way round."""
        for name in _COUNTS:
            getattr(self, name)[row] = getattr(history, name)
        self.health[row] = NONE if history.health is None else HEALTH_CODES[history.health]
        self.grade[row], self.net_grade[row] = HEALTH_CODES[history.grade], HEALTH_CODES[history.net_grade]
        self.graded[row] = NONE if history.graded is None else HEALTH_CODES[history.graded]
        self.lr[row] = np.nan if history.lr is None else history.lr
        self.peak_lr[row], self.stalled_lr[row] = history.peak_lr, history.stalled_lr
        self.written_step[row] = np.nan if history.written_step is None else history.written_step
        self.proven[row], self.was_uncopied[row] = history.proven, history.was_uncopied
        pool, drift = history.pool[-self._windows :], history.drift[-self._drifts :]
        self.pooled[row], self.drifts[row] = len(pool), len(drift)
        if pool:
            self.pool_FWm[:, -len(pool) :, row] = np.array(pool, dtype=np.float64).T
        if drift:
            self.drift_Dm[-len(drift) :, row] = drift

    def accumulator(self, row: int, name: str) -> AccumulatorHistory:
        """The history of one accumulator, new at first."""
        found = self.odd.get(name, {}).get(row)
        return found if found is not None else self.of(name).get(row)

    def put_accumulator(self, row: int, name: str, history: AccumulatorHistory) -> None:
        if is_plain(history):
            self.odd.get(name, {}).pop(row, None)
            self.of(name).put(row, history)
        else:
            self.odd.setdefault(name, {})[row] = history

    # --- resume ------------------------------------------------------------------------------------

    def to_plain(self) -> dict[str, Any]:
        """By name what `TensorHistory.to_plain` gives."""
        parts: dict[int, dict[str, AccumulatorHistory]] = {}
        for name, columns in self.accumulators.items():
            for row in np.flatnonzero(columns.is_there).tolist():
                parts.setdefault(row, {})[name] = columns.get(row)
        for name, odd in self.odd.items():
            for row, history in odd.items():
                parts.setdefault(row, {})[name] = history
        found = {}
        for tensor, row in self.rows.items():
            of_tensor = self.get(row)
            of_tensor.accumulators = dict(sorted(parts.get(row, {}).items()))
            found[tensor] = of_tensor.to_plain()
        return found

    def take(self, histories: Mapping[str, TensorHistory]) -> None:
        """Put these in the place of what there is of them."""
        rows = self.rows_of(tuple(histories)).tolist()
        for row, history in zip(rows, histories.values(), strict=True):
            self.put(row, history)
            for part, of_part in history.accumulators.items():
                self.put_accumulator(row, part, of_part)
