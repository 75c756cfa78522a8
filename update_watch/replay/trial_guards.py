"""What a trial must not do, and what a rule must not ask for: talk to other processes, read marks that samples do not have."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from update_watch.replay.absent import ReplayError
from update_watch.replay.synthetic_training import RuleError, SyntheticTraining, TrainingSettings


def refuse_marks(settings: TrainingSettings) -> None:
    """Raise `ReplayError` when the rule asks its parameters for attributes that samples would not have."""
    looked_up: set[str] = set()

    class Listening(torch.nn.Parameter):
        __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch does itself

        def __getattr__(self, name: str) -> Any:  # only asked for what a parameter does not have
            looked_up.add(name)
            raise AttributeError(name)

    training = SyntheticTraining(settings, Listening)
    with suppress(RuleError):
        for _ in range(2):
            training.set_gradients()
            training.step()
    for param in settings.optimizer.param_groups[settings.group]["params"]:
        if marks := looked_up & set(getattr(param, "__dict__", ())):
            raise ReplayError(f"{training.name} reads {sorted(marks)} from its parameters, which samples do not have")


class _Silence(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Keeps rules from talking to other processes, which would wait for an answer."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise RuntimeError("its step talks to other processes")
        return func(*args, **(kwargs or {}))


def silence() -> AbstractContextManager[Any]:
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return _Silence() if is_distributed else nullcontext()  # type: ignore[no-untyped-call]
