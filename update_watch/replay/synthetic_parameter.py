"""One synthetic parameter and the copy of the optimizer that trains it, with gradients of the caller's choice."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.replay.absent import ReplayError
from update_watch.replay.attribute_copy import Copier
from update_watch.replay.kept_states import states_of
from update_watch.replay.optimizer_copy import copy_of, rule_of, settings_of
from update_watch.replay.premade_state import made_before, state_for
from update_watch.replay.side_effects import WithoutEffects

LR = 2.0**-10  # far above the resolution of FP32 weights of the size used
STEPS = 48
SECONDS = 1.0  # for one trial of a slow rule
_LIMIT = 2**20  # elements of tensors the optimizer keeps outside its state


class SyntheticParameter:
    """One synthetic parameter and the twin that trains it."""

    def __init__(
        self,
        optimizer: Optimizer,
        group: int,
        start: Tensor,
        dtype: torch.dtype,
        device: torch.device | None = None,
        *,
        lr: float | None = LR,
        weight_decay: float = 0.0,
    ) -> None:
        self._name = type(optimizer).__name__
        self._rule = rule_of(optimizer)
        self.param = torch.nn.Parameter(start.to(device=device, dtype=dtype, copy=True))
        self._of = optimizer, group
        copier = self._copier = Copier(_LIMIT, optimizer=optimizer)
        settings = settings_of(optimizer.param_groups[group], [self.param], copier)
        if lr is not None and "lr" in settings:
            old = settings["lr"]
            settings["lr"] = torch.full_like(old, lr) if isinstance(old, Tensor) else lr
        if "weight_decay" in settings and isinstance(settings["weight_decay"], (int, float)):
            settings["weight_decay"] = weight_decay
        self._twin = copy_of(optimizer, [settings], None, copier, are_synthetic=True)
        train = getattr(type(optimizer), "train", None)
        if callable(train):  # schedule-free rules refuse to step before it
            train(self._twin)

    def step(self, grad: Tensor) -> None:
        """One step of the rule with this gradient."""
        self.param.grad = grad.to(device=self.param.device, dtype=self.param.dtype, copy=True)
        try:
            with torch.no_grad():
                try:
                    self._rule(self._twin)
                except KeyError:
                    if self.state or not (made := made_before(*self._of)):
                        raise
                    self._twin.state[self.param] = state_for(self.param, made, self._copier)
                    self._rule(self._twin)
        except Exception as error:
            raise ReplayError(f"{self._name} fails on a synthetic parameter: {error!r}") from error

    @property
    def state(self) -> dict[str, Any]:
        return states_of(self._twin).get(self.param) or {}

    @property
    def lr(self) -> float | None:
        """The learning rate it has now."""
        lr = self._twin.param_groups[0].get("lr")
        return None if lr is None else float(lr)

    def value(self) -> Tensor:
        """The parameter in FP64 on the CPU."""
        return self.param.detach().to("cpu", torch.float64, copy=True)


def undisturbed(optimizer: Optimizer, device: torch.device) -> AbstractContextManager[Any]:
    """To be entered twice, as `Undone`: the process as it was, whatever the rule of `optimizer` does to it."""
    # torch's own rules draw no random numbers, call no hook and compile nothing; keeping compilation from happening
    # would import the compiler: seconds
    is_native = type(optimizer).__module__.startswith("torch.optim")
    return nullcontext() if is_native else WithoutEffects(device)


def small_shape(ndim: int) -> tuple[int, ...]:
    return {0: (), 1: (48,), 2: (6, 8), 3: (4, 3, 6)}.get(ndim, (2,) * (ndim - 3) + (3, 4, 5))


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def spread(shape: tuple[int, ...]) -> Tensor:
    """Values from 0.01 to 1 of both signs: gradients of one size would hide a rule that divides by their norm."""
    count = math.prod(shape)
    values = torch.logspace(-2, 0, count, dtype=torch.float32, device="cpu")
    values[::2] *= -1
    return values[torch.arange(count) * 7 % count if count % 7 else torch.arange(count)].reshape(shape)
