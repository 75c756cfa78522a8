"""Finds the optimizers that step a model, at their first step, whatever object hides them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from torch.optim import Optimizer

from update_watch.measure.device.streams import is_capturing
from update_watch.measure.hooks.process_steps import ProcessSteps
from update_watch.measure.hooks.tap import StepTap
from update_watch.measure.plain_torch import PlainTorch
from update_watch.measure.watched_model import WatchedModel
from update_watch.wrappers import unwrap

logger = logging.getLogger("update_watch")

Attach = Callable[[Optimizer, Sequence[Optimizer]], None]  # the optimizer, and those within whose step it steps


class Discovery:
    """Calls `attach` for every optimizer of the process that steps the model, before its first step."""

    def __init__(self, model: WatchedModel, tap: StepTap, attach: Attach) -> None:
        self._model, self._tap, self._attach = model, tap, attach
        self._steps = ProcessSteps(self._meet)
        self._has_told_remade = False
        self._strangers: dict[
            str, int
        ] = {}  # class of an optimizer that does not step the model -> how many tensors it does
        self.start, self.stop, self.forget = self._steps.start, self._steps.stop, self._steps.forget

    def _meet(self, optimizer: Optimizer) -> bool | None:
        if self._tap.is_running or not self._tap.enabled or is_capturing():
            return None
        try:
            plain = PlainTorch(optimizer)
            with self._tap.lock, plain, plain:
                outside = self._tap.outside(optimizer)
                is_ours = self._model.adopts(optimizer, outside)
                if is_ours and not self._model.has(optimizer):
                    self._attach(optimizer, outside)
                    count = sum(len(group["params"]) for group in optimizer.param_groups)
                    text = "update-watch: %s with %d tensors is watched from step %d on"
                    level = logging.DEBUG if self._is_crowded(optimizer) else logging.INFO
                    logger.log(level, text, type(optimizer).__name__, count, self._model.step + 1)
        except Exception as error:  # it costs this optimizer, not the watch
            logger.warning("update-watch: %s cannot be watched: %r", type(optimizer).__name__, error, exc_info=error)
            return False
        if is_ours is False:
            self._strangers[type(optimizer).__name__] = sum(len(group["params"]) for group in optimizer.param_groups)
        return is_ours

    def _is_crowded(self, optimizer: Optimizer) -> bool:
        """Whether optimizers of the same tensors come one after the other; only the latest of them are kept."""
        remade = self._model.release_remade(unwrap(optimizer))  # that of ZeRO holds the one that is watched
        self.let_go(remade)
        if remade and not self._has_told_remade:
            self._has_told_remade = True
            logger.warning(
                "update-watch: a new %s is made for the same tensors again and again: its momentum and moments begin anew"
                " each time; make it once, before the loop",
                type(optimizer).__name__,
            )
        return bool(remade)

    def let_go(self, optimizers: Iterable[Optimizer]) -> None:
        """Take the hooks from those that are no longer watched, and ask about them again when they step."""
        for optimizer in optimizers:
            self._tap.detach(optimizer)
            self.forget(optimizer)

    def strange_steps(self) -> int:
        """Of optimizers that step other tensors than the model's, since it began to look."""
        return self._steps.strange

    def strangers(self) -> str:
        """What is said of the optimizers that were met and step other tensors than the model's."""
        if not self._strangers:
            return ""
        kinds = " and ".join(f"{kind} steps {count} tensors" for kind, count in list(self._strangers.items())[:2])
        return f", and {kinds} that are not the model's: was it made before the model was wrapped or moved?"
