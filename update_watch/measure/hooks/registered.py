"""What a tap keeps: hooks that are registered at an optimizer, and how to silence one that cannot be removed just now; steps that run."""

from __future__ import annotations

from types import FrameType
from typing import Any

from torch.optim import Optimizer


class Hook:
    """A registered hook, with the way to silence it."""

    __slots__ = ("handle", "hooks")

    def __init__(self, opt: Optimizer, attribute: str, handle: Any) -> None:
        self.handle, self.hooks = handle, getattr(opt, attribute)

    def silence(self) -> None:
        """From now on nothing happens in its place."""
        if self.handle.id in self.hooks:  # giving a present key another value does not disturb a running iteration
            self.hooks[self.handle.id] = nothing


class Hooked:
    """An optimizer with both of its hooks."""

    __slots__ = ("optimizer", "post", "pre")

    def __init__(self, optimizer: Optimizer, pre: Hook, post: Hook) -> None:
        self.optimizer, self.pre, self.post = optimizer, pre, post


class RunningStep:
    """One running step of one optimizer."""

    __slots__ = ("frame", "is_resting", "is_seen", "is_unwanted", "snapshot")

    def __init__(self, frame: FrameType) -> None:
        self.frame = frame  # of torch's wrapper around `step`: a new one for each call
        self.is_seen = self.is_unwanted = self.is_resting = False
        self.snapshot: Any = None


def nothing(*_: Any) -> None:
    """Takes the place of a hook that cannot be removed just now."""
