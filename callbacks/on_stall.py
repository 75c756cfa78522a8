"""What a callback does when a tensor stalls, on all ranks alike."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Literal

from update_watch.report import Health, Report

logger = logging.getLogger("update_watch")

OnStall = Literal["warn", "stop", "raise"] | Callable[[Report], Any]


class StalledError(RuntimeError):
    """Raised in the training loop with `on_stall="raise"`.

    `report` is the window that showed the stall; None on ranks that did not see it themselves.
    """

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


class StallResponse:
    """Decides, batch by batch, whether the run is to stop.

    Reports reach a rank at any time, and a rank that stops alone leaves the others waiting for it forever. So the
    ranks put their answers together once per window, after the same step.

    Args:
        on_stall: the option of the callbacks.
        window: optimizer steps per report.
        step: the Trainer's global step now.
        world_size: number of ranks.
        is_leader: whether this is rank 0.
        any_rank: whether a flag is set on any rank; called on all of them.
    """

    def __init__(
        self,
        on_stall: OnStall,
        window: int,
        step: int,
        world_size: int,
        is_leader: bool,
        any_rank: Callable[[bool], bool],
    ) -> None:
        self._on_stall, self._window = on_stall, window
        self._world_size, self._is_leader, self._any_rank = world_size, is_leader, any_rank
        self._windows = step // window
        self._stalled: frozenset[str] = frozenset()
        self._is_pending = False
        self._report: Report | None = None

    def hear(self, report: Report) -> None:
        """Take note of a report: it counts when tensors stand still in it that did not before.

        Raises what the user's function raises.
        """
        stalled = frozenset(t.name for t in report.tensors if t.health is Health.stalled)
        is_news, self._stalled = bool(stalled - self._stalled), stalled
        if is_news and self._on_stall != "warn":  # the alerts are in the log already
            self._report = report
            if not callable(self._on_stall):
                self._is_pending = True
            elif self._is_leader:
                self._is_pending |= self._on_stall(report) is True

    def is_stop(self, step: int) -> bool:
        """Whether the run is to stop now, after this step.

        Raises:
            StalledError: with `on_stall="raise"`.
        """
        if self._on_stall == "warn":
            return False
        is_stop = self._is_pending
        if self._world_size > 1:
            windows = step // self._window
            if windows == self._windows:
                return False
            self._windows = windows
            is_stop = self._any_rank(is_stop)
        self._is_pending = False
        if is_stop and self._on_stall == "raise":
            headline = self._report.headline if self._report is not None else "a tensor stalled; rank 0 tells which"
            raise StalledError(f"update-watch: {headline}", self._report)
        return is_stop


def end_in_good_order(trainer: Any) -> None:
    """End a run of Lightning in good order, with a checkpoint where the Trainer writes any. On all ranks."""
    trainer.should_stop = True
    writer = trainer.checkpoint_callback
    folder = getattr(writer, "dirpath", None)
    if writer is None or folder is None:
        logger.warning(
            "update-watch: training is stopped because tensors stalled; checkpointing is off, none is written"
        )
        return
    path = os.path.join(folder, f"stalled-step={trainer.global_step}.ckpt")
    try:
        trainer.save_checkpoint(path)
    except Exception as error:
        logger.error("update-watch: training is stopped because tensors stalled; no checkpoint: %r", error)
    else:
        logger.warning("update-watch: training is stopped because tensors stalled; checkpoint: %s", path)
