"""Every optimizer of the process, met at its first step, whatever object hides it.

torch calls hooks that are registered for all optimizers before those of the optimizer itself, so that an optimizer may be
given hooks of its own in time for the step that is about to run.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from update_watch.measure.device import streams
from update_watch.measure.hooks.step_frames import hide_from_dynamo, is_in_step
from update_watch.measure.hooks.tap import nothing

Meet = Callable[[Optimizer], bool | None]

_places: list[RemovableHandle] = []


def leave_place(handle: RemovableHandle) -> None:
    """The next `ProcessSteps` takes the place of this hook for all optimizers, from which it is called.

    While torch goes through these hooks none may be added, but one may be exchanged.
    """
    _places.append(handle)


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
        self._handle: Any = None
        self._thread = threading.get_ident()  # that steps
        hide_from_dynamo(ProcessSteps._pre)
        self._ask_plainly = torch.compiler.disable(self._ask)  # type: ignore[no-untyped-call]  # torch's

    def start(self) -> None:
        """Begin to look; does nothing where it has begun."""
        if self._handle is not None:
            return
        place = _places.pop() if _places else None
        hooks = None if place is None else place.hooks_dict_ref()
        if place is not None and hooks is not None and place.id in hooks:
            hooks[place.id], self._handle = self._pre, place
        else:
            self._handle = register_optimizer_step_pre_hook(self._pre)

    def stop(self) -> None:
        """Look no more. May be called from a hook, while torch goes through its hooks: one that is removed then would raise."""
        handle, self._handle = self._handle, None
        self._settled.clear()
        hooks = None if handle is None else handle.hooks_dict_ref()
        if hooks is None or handle.id not in hooks:
            return
        hooks[handle.id] = nothing  # giving a present key another value does not disturb a running iteration
        if threading.get_ident() == self._thread and not is_in_step(sys._getframe()):
            handle.remove()

    def forget(self, optimizer: Optimizer) -> None:
        """Ask about it again when it steps."""
        self._settled.pop(id(optimizer), None)

    def _pre(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        settled = self._settled.get(id(optimizer))
        if settled is not None and settled[0]() is optimizer and settled[1] == _size(optimizer):
            self.strange += not settled[2]
            return
        if self._handle is not None and not streams.is_capturing():  # to plan for it there would be captured
            self._ask_plainly(optimizer)

    def _ask(self, optimizer: Optimizer) -> None:
        meet = self._meet()
        self._thread = threading.get_ident()
        answer = None if meet is None else meet(optimizer)
        if answer is not None:
            self._settled[id(optimizer)] = weakref.ref(optimizer), _size(optimizer), answer
            self.strange += not answer


def _size(optimizer: Optimizer) -> int:
    return sum([len(group["params"]) for group in optimizer.param_groups])
