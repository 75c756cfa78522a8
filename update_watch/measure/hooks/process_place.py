"""The one hook of the process for the steps of all optimizers; all watches share it.

While torch goes through these hooks none may be added or removed: it would raise in the training loop, also in that of another
thread. So there is one, and who shares it is kept here.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from update_watch.measure.hooks.registered import nothing
from update_watch.measure.hooks.step_frames import hide_from_dynamo, is_in_step
from update_watch.replay.side_effects import HOOKS

Hook = Callable[[Optimizer, Any, Any], None]


class Place:
    """Calls every hook that was added before each step of each optimizer, and then `last`.

    Hooks may be added and removed at any time, from any thread and within a hook. One that is removed within a step may still
    be called in it.
    """

    def __init__(self) -> None:
        self.last: Hook | None = None
        self._hooks: dict[int, Hook] = {}  # a new one for each change: other threads may be going through it
        self._handle: RemovableHandle | None = None
        self._threads: set[int] = set()  # that step

    def add(self, key: int, hook: Hook) -> None:
        """Call `hook`, which others know by `key`."""
        with HOOKS:
            if not self._hooks:
                self._threads = set()
            self._hooks = {**self._hooks, key: hook}
            if self._handle is None:
                hide_from_dynamo(Place._call)  # here: what does it takes a second to load before there is an optimizer
                self._handle = register_optimizer_step_pre_hook(self._call)

    def remove(self, key: int) -> None:
        """Call it no more."""
        with HOOKS:
            self._hooks = {other: hook for other, hook in self._hooks.items() if other != key}
            is_quiet = self._threads <= {threading.get_ident()} and not is_in_step(sys._getframe())
            if not self._hooks and self.last is None and self._handle is not None and is_quiet:
                self._handle.remove()
                self._handle = None

    def take(self, handle: RemovableHandle) -> None:
        """Take the place of this hook for all optimizers; may be called from it."""
        hooks = handle.hooks_dict_ref()
        if hooks is None:
            return
        hide_from_dynamo(Place._call)
        with HOOKS:  # giving a present key another value does not disturb a running iteration
            hooks[handle.id] = nothing if self._handle is not None else self._call
            self._handle = self._handle or handle

    def _call(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._threads.add(threading.get_ident())
        for hook in self._hooks.values():
            hook(optimizer, args, kwargs)
        if self.last is not None:
            self.last(optimizer, args, kwargs)


PLACE = Place()
