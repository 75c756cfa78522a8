"""Steps that pass unseen one after the other, between two bursts: nothing is done in them but to count and to look at the rates.

All code is cold in a step, a backward pass has gone through the caches since the last one: each function called costs 3 to 5 us
and not one. What passes unseen goes through as few as can be; whatever is not plain goes the long way (`Watch._wants`, `_passed`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer

from update_watch.measure.hooks.step_frames import hide_from_dynamo
from update_watch.measure.hooks.tap import StepTap
from update_watch.measure.learning_rates import LearningRates, as_number
from update_watch.measure.watched_model import WatchedModel
from update_watch.measure.watched_optimizer import Watched
from update_watch.watching.attention import Attention


class Rests:
    """Lets such steps of a watch's only optimizer pass. `heard`: told that a step was seen."""

    def __init__(self, tap: StepTap, model: WatchedModel, attention: Attention, heard: Callable[[], None]) -> None:
        self._model, self._attention, self._heard = model, attention, heard
        self._resting: Watched | None = None  # in the step that is running
        tap.rests, tap.rested = self._begins, self._ends
        hide_from_dynamo(Rests._begins, Rests._ends, Attention.rests, Attention.spend)
        hide_from_dynamo(WatchedModel.only, Watched.may_rest, Watched.rest, LearningRates.note, as_number)

    def _begins(self, optimizer: Optimizer) -> bool:
        """Whether the step that begins passes so."""
        if not self._attention.rests():
            return False
        only = self._model.only()
        self._resting = only if only is not None and only.may_rest(optimizer) else None
        return self._resting is not None

    def _ends(self, optimizer: Optimizer) -> None:
        watched, self._resting = self._resting, None
        if watched is not None:
            self._heard()
            if watched.rest():
                self._attention.wake()
