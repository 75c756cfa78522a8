"""What a rule may do to the process (random numbers drawn, hooks called, code compiled) is kept from happening, or undone."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import optimizer as _torch_optimizer


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


@contextmanager
def without_effects(device: torch.device) -> Iterator[RandomStates]:
    """What a rule that is not torch's own may do to the process is kept from happening, or undone."""
    hooks = _torch_optimizer._global_optimizer_pre_hooks, _torch_optimizer._global_optimizer_post_hooks
    states = RandomStates(device)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        if any(hooks):  # `super().step()` calls the hooks that are registered for all optimizers
            _set_global_hooks(OrderedDict(), OrderedDict())
        try:
            yield states
        finally:
            _set_global_hooks(*hooks)
            states.restore()


def _set_global_hooks(before: Any, after: Any) -> None:
    _torch_optimizer._global_optimizer_pre_hooks = before
    _torch_optimizer._global_optimizer_post_hooks = after
