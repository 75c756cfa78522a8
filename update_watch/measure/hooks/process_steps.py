"""Every optimizer of the process, met at its first step, whatever object hides it.

torch calls hooks that are registered for all optimizers before those of the optimizer itself, so that an optimizer may be
given hooks of its own in time for the step that is about to run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from update_watch.measure.device import streams
from update_watch.measure.hooks.process_place import PLACE
from update_watch.measure.hooks.step_frames import hide_from_dynamo

Meet = Callable[[Optimizer], bool | None]


class ProcessSteps:
    """Calls `meet(optimizer)` just before the first step of every optimizer of the process.

    What it returns: True or False when the question is settled, None to be asked again at the optimizer's next step. `meet`
    must not raise. One that is settled is asked about again when it has gained or lost parameters, or was `forget`-ed.

    The hook does not keep `meet`'s object alive: who wants to be called must be held by something else.
    """

    def __init__(self, meet: Meet) -> None:
        self._settled: dict[int, tuple[weakref.ref[Optimizer], int, bool]] = {}  # and the answer
        self.strange = 0  # steps of those that were answered with False
        self._meet = weakref.WeakMethod(meet)
        self._is_looking = False
        hide_from_dynamo(ProcessSteps._pre)
        self._ask_plainly = torch.compiler.disable(self._ask)  # type: ignore[no-untyped-call]  # torch's

    def start(self) -> None:
        """Begin to look; does nothing where it has begun."""
        self._is_looking = True
        PLACE.add(id(self), self._pre)

    def stop(self) -> None:
        """Look no more. May be called from a hook and from another thread."""
        self._is_looking = False
        self._settled.clear()
        PLACE.remove(id(self))

    def forget(self, optimizer: Optimizer) -> None:
        """Ask about it again when it steps."""
        self._settled.pop(id(optimizer), None)

    def _pre(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        settled = self._settled.get(id(optimizer))
        size = 0
        for group in optimizer.param_groups:  # in no function of its own: all code is cold in a step
            size += len(group["params"])
        if settled is not None and settled[0]() is optimizer and settled[1] == size:
            self.strange += not settled[2]
            return
        if self._is_looking and not streams.is_capturing():  # to plan for it there would be captured
            self._ask_plainly(optimizer, size)

    def _ask(self, optimizer: Optimizer, size: int) -> None:
        meet = self._meet()
        answer = None if meet is None else meet(optimizer)
        if answer is not None:
            self._settled[id(optimizer)] = weakref.ref(optimizer), size, answer
            self.strange += not answer
