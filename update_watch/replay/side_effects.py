"""What a rule may do to the process (random numbers drawn, hooks called, code compiled) is kept from happening, or undone."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import optimizer as _torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from typing_extensions import Self


HOOKS = (
    threading.RLock()
)  # held while torch's hooks for all optimizers are away, or one is added: else two threads that
# take them away would put back what the other had left in their place
_PATIENCE = 5.0  # s

if hasattr(os, "register_at_fork"):  # another thread may have it, which the child does not
    os.register_at_fork(after_in_child=HOOKS._at_fork_reinit)  # type: ignore[attr-defined]  # as `threading` itself does


class RandomStates:
    """The global generators of torch (CPU and `device`), Python and NumPy, as they are now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        module = sys.modules.get(f"torch.{device.type}") if device.type != "cpu" else None
        self._module: Any = module if hasattr(module, "get_rng_state") else None
        self._torch = self._torch_states()
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def have_moved(self) -> bool:
        """Somebody has drawn random numbers since (NumPy's are not looked at: that would cost more than a rule)."""
        moved = any(not torch.equal(a, b) for a, b in zip(self._torch, self._torch_states(), strict=True))
        return moved or random.getstate() != self._python

    def restore(self) -> None:
        """Put all generators back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        now = self._torch_states()
        if not torch.equal(self._torch[0], now[0]):
            torch.set_rng_state(self._torch[0])
        # only where it has moved: to set it clears the states of cuDNN's dropout, and an LSTM would drop other elements
        if self._module is not None and not torch.equal(self._torch[1], now[1]):
            self._module.set_rng_state(self._torch[1], self._device)

    def _torch_states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return states if self._module is None else [*states, self._module.get_rng_state(self._device)]


class Undone:
    """A change to the process that is undone even where the undoing is interrupted (Ctrl-C). Enter it twice:

        with plain, plain:

    The second entry makes the change, both exits undo it: an interrupt that cuts one of them off leaves the other. A
    generator would not do, as an interrupt in `contextlib` leaves it where it is.
    """

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries = 0

    def __enter__(self) -> Self:
        self._entries += 1
        if self._entries == 2:
            self.change()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.undo()
        if self._entries == 1 and kind is None:
            raise RuntimeError(f"{type(self).__name__} has to be entered twice: with x, x")

    def change(self) -> None:
        """Make the change."""

    def undo(self) -> None:
        """Put back what was when this object was made; may be called again."""


class WithoutEffects(Undone):
    """What a rule that is not torch's own may do to the process is kept from happening, or undone."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._hooks: tuple[Any, Any] | None = None
        self._may_hold = False
        self.random_states = RandomStates(device)
        self._grad, self._stance = torch.is_grad_enabled(), eval_frame()._stance

    def change(self) -> None:
        torch.set_grad_enabled(False)
        torch.compiler.set_stance("force_eager")
        if not _is_held():  # else by one around this
            self._may_hold = True  # before it does: an interrupt may come between the two
            HOOKS.acquire(timeout=_PATIENCE)
        hooks = _torch_optimizer._global_optimizer_pre_hooks, _torch_optimizer._global_optimizer_post_hooks
        if any(hooks):  # `super().step()` calls the hooks that are registered for all optimizers
            self._hooks = hooks
            _set_global_hooks(OrderedDict(), OrderedDict())

    def undo(self) -> None:
        if self._hooks is not None:
            _set_global_hooks(*self._hooks)
        # whatever an interrupt has cut off: a lock that is kept would hold up other threads for ever
        if self._may_hold and _is_held():
            HOOKS.release()
        self.random_states.restore()
        eval_frame()._set_stance(self._stance)
        torch.set_grad_enabled(self._grad)


def _is_held() -> bool:
    """Whether this thread has `HOOKS`."""
    return bool(HOOKS._is_owned())  # type: ignore[attr-defined]  # as `threading.Condition` asks


def eval_frame() -> Any:
    """Where torch keeps what is to be compiled; imported on use, since it takes a while."""
    import torch._dynamo.eval_frame

    return torch._dynamo.eval_frame


def _set_global_hooks(before: Any, after: Any) -> None:
    _torch_optimizer._global_optimizer_pre_hooks = before
    _torch_optimizer._global_optimizer_post_hooks = after


class _Silence(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Keeps rules from talking to other processes, which would wait for an answer."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise RuntimeError("its step talks to other processes")
        return func(*args, **(kwargs or {}))


def silence() -> AbstractContextManager[Any]:
    """Where there are other processes, a rule that talks to them fails."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return _Silence() if is_distributed else nullcontext()  # type: ignore[no-untyped-call]
