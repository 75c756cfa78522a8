"""What was said of a tensor stands in windows in which it was not its turn: of a large model on a CPU a part is looked at in each,
and by budget of none, where a window is closed while its steps pass unseen.

What the host knows of all tensors is news all the same: one that no longer requires a gradient, a learning rate of 0, steps that
are skipped. Those are judged as in any other window, and so is one of which nothing was said yet.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from update_watch.columns.evidence_columns import Columns
from update_watch.judge.columns.codes import CAUSE_CODES, HEALTHY, NONE, UNSAID, Codes, Mask, Rows, known
from update_watch.judge.columns.histories import Histories
from update_watch.judge.columns.judged import Judged
from update_watch.judge.columns.rests import Sorted, is_state_off
from update_watch.judge.no_signal import NEARLY_ALL
from update_watch.report import Cause
from update_watch.thresholds import Thresholds
from update_watch.worker import unhurried

# what the host says of a tensor, whether it is looked at or not; of skipped steps nothing is known while all pass unseen
_BY_HOST = [
    CAUSE_CODES[cause]
    for cause in (Cause.skipped_steps, Cause.requires_grad_off, Cause.not_in_optimizer, Cause.zero_learning_rate)
]


class Resting:
    """Remembers the sentences of the tensors whose turn it is not, by name."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._last: Judged | None = None  # of the window before,
        self.count = 0  # and how many it was of

    def take(
        self,
        columns: Columns,
        sorts: Sorted,
        histories: Histories,
        rows: Rows,
        limits: Thresholds,
        is_seen: bool = True,
    ) -> Mask:
        """[n] those whose verdict stands; from here on neither at rest nor scored. `is_seen`: whether anything of the window was."""
        column = columns.column
        is_resting = column("is_resting") != 0 if is_seen else np.ones(len(rows), bool)
        found: Mask = is_resting & (histories.cause[rows] != UNSAID)
        if not found.any():
            return found
        steps = column("steps")
        found &= (column("trainable") != 0) & (steps > 0) & (known(column("lr_max")) != 0)
        found &= ~(column("skipped_steps") >= NEARLY_ALL * np.maximum(steps, 1)) & (column("replicas_differ") == 0)
        found &= ~np.isin(histories.cause[rows], _BY_HOST if is_seen else _BY_HOST[1:]) & ~is_state_off(
            columns, histories, rows, limits
        )
        sorts.rests[found] = sorts.scored[found] = False
        return found

    def texts(self, columns: Columns, stands: Mask, health: Codes, cause: Codes) -> Mapping[int, str]:
        """The sentences of those, by place."""
        places = np.flatnonzero(stands & ((health != HEALTHY) | (cause != NONE))).tolist()
        if not places:
            return {}
        names = columns.raw("name")
        lacking = {names[place] for place in places if names[place] not in self._texts}
        if lacking and self._last is not None:
            told = [(place, name) for place, name in enumerate(self._last.names) if name in lacking]
            self._texts |= {name: self._last.advice(place) for place, name in unhurried(told)}
        return {place: self._texts.get(names[place], "") for place in places}

    def keep(self, stands: Mask, judged: Judged) -> None:
        """Remember what was said of a window."""
        self._last, self.count = judged, int(stands.sum())
        if self._texts:
            names = judged.names
            for place in np.flatnonzero(~stands).tolist():
                self._texts.pop(names[place], None)
