"""Which steps are looked at, so that the watch takes no larger share of the time between steps than it may.

At first every step is: for `FIRST_STEPS` steps, as what goes wrong soon is to be told soon (a layer that is replaced, masters
that are copied no more), and on until every tensor has a verdict, for `FIRST_WINDOWS` windows at most. From then on time is an
account. Every second that passes pays in `budget` seconds; what the watch takes is
drawn from it: on the training thread, and the processor time of its own threads (judging, sinks), which slow training down
as much. Steps are looked at in bursts of a few in a row, since what is written between steps shows only between neighbours;
a burst begins when the account is not overdrawn. A window then ends when enough steps were seen in it.

For a window all steps are looked at again when a verdict has changed, a learning rate has jumped or a group was added. That
is drawn from the account, too, so that it cannot happen all the time.

Without a budget every step is looked at. All tensors are for as many windows at first; of a large model on a CPU then one part
after the other (`measure.device.panels`), and all again in the window after a learning rate has jumped or a group was added.
That depends on steps alone, so that it is the same each time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from update_watch.judge.columns.codes import UNKNOWN
from update_watch.judge.columns.judged import judged_of
from update_watch.report import Report

FIRST_WINDOWS = 4
FIRST_STEPS = 256  # README and docs/cost.md name it
BURST = 8  # steps
_ENOUGH = 4  # a window ends when this part of its steps was looked at: every fourth
_STAYS = 0.5  # of what was applied
_SAVINGS = 2.0  # bursts that may be saved up, while training pauses or steps are slow
_DEBT = 1.0  # bursts that may be unpaid when all steps of a window are looked at: the last one
# such a window is looked at to its end while no more is unpaid than this part of all that the run has earned: its share stays
# within a fifth of the budget. At least so many steps are
_OVERDRAWN, _WOKEN_AT_LEAST = 0.15, 16

_FOR_UNSEEN = 0.5  # of what is earned goes to steps that pass unseen, at most

always = False  # tests: every step, whatever the budget is


class Attention:
    """Asked at every step. `budget`: share of the time between steps; None: every step is looked at.

    `is_exact`: whether windows must end at their step, as where several processes join theirs.
    """

    def __init__(
        self,
        budget: float | None,
        window: int,
        is_exact: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._budget = None if always else budget
        self._window, self._is_exact, self._clock = window, is_exact, clock
        self._round: set[int] = set()  # optimizers that have stepped since the round began
        self._looks, self._may_rest = True, False
        self._account = self._earned = 0.0  # s, now and in the whole run
        self._spent_unseen = 0.0  # s, in steps since the round began
        self._at: float | None = None  # when the round began
        self._burst = 0  # steps left of it
        self._burst_cost = 0.0  # s, of the last whole one
        self._burst_spent = 0.0
        # windows left that are looked at in full
        self._full = max(FIRST_WINDOWS, -(-FIRST_STEPS // window))
        self._is_woken = False  # something has changed in the open window
        self._is_cut = False  # which was looked at in full until no more could be paid for,
        self._is_last = False  # and this is the step it ends with
        self._seen = 0  # steps, while nothing is drawn yet
        self._since_woken = 0  # steps looked at
        self._is_first = True  # nothing is drawn yet
        self.observed = 0  # steps of the open window
        self._is_counted = False  # the step of this round
        self._window_spent, self._window_began = 0.0, clock()
        self._lock = threading.Lock()
        self._beside = 0.0  # s, of other threads, still to be drawn
        self._window_beside = 0.0
        self._is_known = False  # every tensor has a verdict
        self._has_changed = False
        self._verdicts: tuple[list[str], Any] = [], np.zeros((0, 3))  # names; health, cause, suspicion of each

    # --- in the step -----------------------------------------------------------------------------

    def looks(self, key: int, window_steps: int) -> bool:
        """Whether the step that optimizer `key` is about to take is looked at. Optimizers that step in turn agree.

        `window_steps`: those it has taken in the open window.
        """
        if key in self._round or not self._round:
            self._round.clear()
            self._begin_round()
        self._round.add(key)
        is_exact = self._is_exact()
        self._may_rest = not is_exact and not self._is_cut
        self._is_last = self._is_cut and window_steps + 1 >= self._window
        return self._looks or self._is_last or (is_exact and window_steps + 1 >= self._window)

    def rests(self) -> bool:
        """Whether the step that begins passes unseen as the one before it did, and there is nothing else to ask; of an optimizer that
        steps alone. Less than `looks`, which is asked where this is False."""
        self._is_last = False
        if self._looks or self._full or self._beside or self._has_changed or not self._may_rest:
            return False
        assert self._at is not None and self._budget is not None  # else all is looked at
        earned = self._budget * (self._clock() - self._at)
        left = earned - min(self._spent_unseen, _FOR_UNSEEN * earned)
        return self._account + left < 0.0

    def _begin_round(self) -> None:
        self._is_counted = False
        if self._budget is None:
            return
        now = self._clock()
        passed, self._at = now - (now if self._at is None else self._at), now
        self._draw_what_was_spent_beside()
        if not self._is_first:
            earned, unseen = self._budget * passed, self._spent_unseen
            # where steps are short those that pass unseen would take all, and nothing be seen any more
            self._account += earned - min(unseen, _FOR_UNSEEN * earned)
            self._earned += earned
            self._spent_unseen = 0.0
            # a long pause (a validation) does not pay for many looks after it
            self._account = min(self._account, _SAVINGS * self._burst_cost)
        if self._full and self._is_overdrawn():
            self._full, self._is_cut = 0, True
        if self._full:
            self._looks = True
        elif self._burst:
            self._burst -= 1
        else:
            if self._looks:
                self._burst_cost = self._burst_spent
            self._looks, self._burst_spent = self._account >= 0, 0.0  # what steps took that passed unseen is no burst's
            self._burst = BURST - 1 if self._looks else 0

    def _is_overdrawn(self) -> bool:
        """Whether what was woken for costs more than the run can have paid back soon."""
        has_looked = not self._is_first and self._since_woken >= _WOKEN_AT_LEAST
        return has_looked and self._account < -_OVERDRAWN * self._earned

    def saw(self, has_changed: bool = False) -> None:
        """An optimizer's step was looked at to its end; one that raises is none. `has_changed`: and it was a reason to `wake`."""
        self._is_woken |= has_changed
        self.observed += not self._is_counted  # those that step in turn are one
        self._seen += not self._is_counted
        self._since_woken += not self._is_counted
        self._is_counted = True

    def spend(self, seconds: float) -> None:
        """The watch took `seconds` on the training thread."""
        self._window_spent += seconds
        self._burst_spent += seconds
        if self._looks or self._full or self._is_last:
            self._account -= 0.0 if self._is_first else seconds
        else:
            self._spent_unseen += seconds

    def beside(self, function: Callable[[Any], None]) -> Callable[[Any], None]:
        """The same function; the processor time of the thread that runs it is counted."""

        def counted(item: Any) -> None:
            began = time.thread_time()
            try:
                function(item)
            finally:
                with self._lock:
                    taken = time.thread_time() - began
                    self._beside += taken
                    self._window_beside += taken

        return counted

    def _draw_what_was_spent_beside(self) -> None:
        if self._beside:
            with self._lock:
                seconds, self._beside = self._beside, 0.0
            if not self._is_first:
                self._account -= seconds
        if self._has_changed and self.wake():  # else once it is paid for, unless the next report says otherwise
            self._has_changed = False
        if self._is_known and self._is_first and self._seen >= FIRST_STEPS:
            self._full = 0
            self._is_first = False
            self._burst_spent = 0.0  # what went before was no burst

    @property
    def is_full(self) -> bool:
        """Whether every step is looked at just now."""
        return self._budget is None or self._full > 0

    def wake(self) -> bool:
        """Look at all steps for a window, unless that is not paid for yet from the last time: False. Without a budget: at all
        tensors in the next one."""
        self._is_woken = True
        if self._budget is None or self._full:
            return True
        may = self._account >= -_DEBT * self._burst_cost
        self._full, self._since_woken = int(may), 0
        return may

    # --- windows -----------------------------------------------------------------------------------

    def may_close(self, steps: int) -> bool:
        """Whether a window of so many steps may end: never one of which nothing was seen, by budget one that is seen enough of."""
        if steps < self._window:
            return False
        return self._budget is None or self._is_exact() or self._is_cut or self.observed * _ENOUGH >= self._window

    def close_window(self) -> tuple[float, int, float | None, bool]:
        """Of the window that ends: seconds on the training thread, steps looked at, share of its time the watch took; and
        whether all tensors are looked at in the next one, as they are by budget: it bounds what that costs."""
        observed, self.observed = self.observed, 0
        now = self._clock()
        began, self._window_began = self._window_began, now
        with self._lock:
            beside, self._window_beside = self._window_beside, 0.0
        spent, self._window_spent = self._window_spent, 0.0
        # a window that was open for long when it was woken ends with the next step: it is not the one to be seen in full
        if self._full and (self._is_first or 2 * self._since_woken >= self._window):
            self._full -= 1
            self._is_first = self._is_first and self._full > 0
        if self._is_woken and self._budget is None:
            self._full = max(self._full, 1)
        self._is_woken = self._is_cut = False
        is_whole = self._full > 0 or self._budget is not None or self._is_exact()
        share = (spent + beside) / (now - began) if now > began else None
        return spent, observed, share, is_whole

    def judged(self, report: Report) -> None:
        """Learn from a report; called on the judging thread."""
        judged = judged_of(report)
        # healthy, though what its steps applied did not stay in this window: once that may be a checkpoint
        is_suspect = judged.column("net_efficiency") < _STAYS
        verdicts = np.stack([judged.health, judged.cause, is_suspect], 1)
        (names, before), self._verdicts = self._verdicts, (judged.names, verdicts)
        if names != judged.names:  # of those that were there
            place_of = {name: place for place, name in enumerate(names)}
            places = np.array([place_of.get(name, -1) for name in judged.names], dtype=np.intp)
            before = np.where((places < 0)[:, None], verdicts, before[places] if len(names) else verdicts)
        self._has_changed = bool((before != verdicts).any())
        self._is_known = self._is_known or (len(judged) > 0 and not (judged.health == UNKNOWN).any())
