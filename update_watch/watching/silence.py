"""Gradients arrive, and no optimizer steps: that is said, not waited out.

A rule may run under another name than `step` (`step_param` in gradient hooks, `first_step`, a hand-written update), or an
optimizer may step other tensors than the model's. Windows of steps never close then. After as many backward passes as a
window has steps, one warning says so, and a report tells of every tensor whether it moves. Where the gradients hold NaN or
infinity each time, a gradient scaler or a check of one's own skips the steps (`overflows`).
"""

from __future__ import annotations

import dataclasses
import logging
import random
import sys
from collections.abc import Callable

from update_watch.measure.device.streams import is_capturing
from update_watch.measure.hooks.backward_passes import BackwardPasses
from update_watch.measure.hooks.step_frames import is_in_step
from update_watch.measure.ledger.ledger import Ledger
from update_watch.measure.ledger.sheet import can_be_read
from update_watch.measure.plain_torch import PlainTorch
from update_watch.measure.transfer import Batch
from update_watch.measure.watched_model import WatchedModel
from update_watch.measure.window_evidence import Window
from update_watch.watching.discovery import Discovery
from update_watch.watching.overflows import Overflows
from update_watch.worker import warn

logger = logging.getLogger("update_watch")


class Silence:
    """Listens for the backward passes of a model. `put` takes a window, `close_window` ends that of the steps; `discovery` knows what else steps."""

    def __init__(
        self,
        model: WatchedModel,
        window: int,
        put: Callable[[Window], object],
        close_window: Callable[[], None],
        discovery: Discovery,
        is_enabled: Callable[[], bool] = lambda: True,
    ) -> None:
        self._model, self._window, self._put, self._strangers = model, window, put, discovery.strangers
        self._close_window = close_window
        self._is_enabled = is_enabled
        self._passes = BackwardPasses(self._passed, discovery.strange_steps)
        self.end = self._passes.reset  # a step was seen
        self._ledger: Ledger | None = None
        self._overflows = Overflows(window)
        self._count = self._told = 0  # passes of the silence, and of what was reported
        self._is_said, self._is_stopped = False, True

    def start(self) -> None:
        """Begin, or begin again."""
        self._is_stopped = False
        self.listen()

    def listen(self) -> None:
        """Go on with the tensors the model has now; does nothing once it was stopped, maybe by another thread."""
        if self._is_stopped or self._passes.goes_on(self._model.tensors):
            return
        self._passes.listen(self._model.tensors, can_be_read)

    def stop(self) -> None:
        """Listen no more."""
        self._is_stopped = True
        self._passes.stop()
        self._ledger = None

    def _passed(self, count: int) -> None:
        if self._is_stopped or is_capturing():
            return
        # steps that pass unseen on purpose; a step whose closure computes gradients again and again (LBFGS)
        if not self._is_enabled() or is_in_step(sys._getframe()):
            self._passes.reset()
            return
        try:
            plain = PlainTorch()
            with plain, plain:
                self._look(count)
        except Exception as error:
            self.stop()
            logger.warning("update-watch: backward passes are no longer counted: %r", error, exc_info=error)

    def _look(self, count: int) -> None:
        if self._ledger is None or count <= self._count:  # a new silence
            self._ledger, self._told, self._overflows = Ledger(random.Random(0)), 0, Overflows(self._window)
            self._ledger.plan([(line, frozenset(), False, None) for line in self._model.lines()])
        self._count = count
        self._ledger.after(self._ledger.before(None, (), count, leads=True))
        self._overflows.passes(count, self._model.tensors)
        if count % self._window == 0:
            self._close()
            if not self._is_said:
                self._is_said = True
                message = f"update-watch: {self._finding()}. Whether the weights move is in the report"
                logger.warning(message)
                warn(message)

    @property
    def lasts(self) -> bool:
        """Whether there is one; where steps were seen before, only one as long as a window: steps that a gradient scaler skips
        are none."""
        least = self._window if self._model.step else 2
        return self._ledger is not None and self._count >= least and self._passes.is_silent

    def flush(self) -> None:
        """Report the silence that lasts, if one does."""
        if self.lasts and self._count != self._told:
            plain = PlainTorch()
            with plain, plain:
                self._close()

    def _finding(self) -> str:
        return (
            f"a step of an optimizer of this model was never seen in {self._count} backward passes, though gradients arrive"
            f"{self._strangers()} (does its rule run under another name than `step`, or does a gradient scaler skip every step?)"
        )

    def _close(self) -> None:
        assert self._ledger is not None
        if not self._told and self._model.window_steps:  # of the steps before
            self._close_window()
        passes, self._told = self._count - self._told, self._count
        batch = Batch()
        sheets, skipped = self._ledger.close_window(batch), self._overflows.close_window(batch, passes)
        batch.send()
        self._put(dataclasses.replace(self._model.silent_window(self._finding(), sheets), skipped=skipped))
