"""Steps that were captured in a CUDA graph.

A captured step runs its hooks once, when it is captured, and never when it is replayed; and nothing of ours may be captured
with it, since a replay would write into memory that somebody else has by then. So replays are looked at from outside:

    with watch.replayed():
        graph.replay()

Weights and states are read before the replay and after it, gradients after it, as the graph may make them. The rule must
leave them as they are: of torch's rules all but `SGD(nesterov=True, foreach=True)` do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from update_watch.measure.hooks.tap import StepTap
from update_watch.measure.watched_model import WatchedModel
from update_watch.worker import warn

logger = logging.getLogger("update_watch")


@contextmanager
def replayed(tap: StepTap, model: WatchedModel, optimizers: Sequence[Any]) -> Iterator[None]:
    """What runs inside is one step of `optimizers`; of all of `model` where none are given."""
    was, model.is_replaying = model.is_replaying, True
    try:
        with ExitStack() as stack:
            for optimizer in optimizers or {id(one): one for one in model.optimizers}.values():
                stack.enter_context(tap.around(optimizer))
            yield
    finally:
        model.is_replaying = was


def say_captured() -> None:
    """Said at the first capture of a step."""
    message = (
        "update-watch: an optimizer step was captured in a CUDA graph. Replays of it run no hooks and are not watched: "
        "put `with watch.replayed():` around `graph.replay()`"
    )
    logger.warning(message)
    warn(message)
