"""Frames of steps on the stack, and hooks that tell steps by them."""

from __future__ import annotations

from types import FrameType
from typing import Any

from torch.optim import Optimizer

_STEP_CODE = Optimizer.profile_hook_step(lambda _: None).__code__  # of torch's wrapper around every `step`


def hide_from_dynamo(*hooks: Any) -> None:
    """Let `torch.compile` step over these hooks: it cannot trace `sys._getframe`, and would warn of it.

    `skip` marks the function itself, where `torch.compiler.disable` would put a frame around it.
    """
    from torch._dynamo.decorators import skip  # loaded already: torch needs it to make an optimizer

    for hook in hooks:
        skip(hook)


def is_in_step(frame: FrameType | None) -> bool:
    """Whether a step is running in this frame or outside of it."""
    while frame is not None and frame.f_code is not _STEP_CODE:
        frame = frame.f_back
    return frame is not None
