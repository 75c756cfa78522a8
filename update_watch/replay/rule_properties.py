"""How a rule moves the weight, tried before the first step on synthetic parameters.

A copy of the optimizer trains tiny parameters: is an update about as large as the learning rate, does weight decay get a
rounding of its own, is the rest of a rounded update kept somewhere? Nothing is concluded from the name of a class. The real
optimizer, its parameters and all random states stay as they are.
"""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.replay.synthetic_parameter import (
    LR,
    SECONDS,
    STEPS,
    SyntheticParameter,
    normal,
    small_shape,
    spread,
    undisturbed,
)

_ABOUT = (0.5, 2.0)  # |update| / lr of a rule whose updates are "about the learning rate"


@dataclasses.dataclass(frozen=True)
class RuleProperties:
    """What was found out for parameters of one format and number of dimensions in one parameter group."""

    step_size: float | None = None  # |update| / learning rate where that is about the same for all gradients
    keeps_remainder: bool = False  # what rounding takes from the weight is made good later
    decouples_decay: bool = False  # weight decay acts on the weight, not on the gradient
    merges_decay: bool = False  # decay and gradient reach the weight in one rounding


def find_properties(optimizer: Optimizer, group: int, dtype: torch.dtype, ndim: int) -> RuleProperties:
    """Try the rule of `optimizer.param_groups[group]` on parameters of `dtype` with `ndim` dimensions.

    Raises `ReplayError` when the rule does not run on synthetic parameters; the message says why.
    """
    shape = small_shape(ndim)
    quiet = undisturbed(optimizer, torch.device("cpu"))
    with quiet, quiet:
        step_size = _step_size(optimizer, group, shape)
        keeps = step_size is not None and _keeps_remainder(optimizer, group, dtype, shape, step_size)
        decouples, merges = _decay(optimizer, group, dtype, ndim)
    return RuleProperties(step_size, keeps, decouples, merges)


def find_decay(optimizer: Optimizer, group: int, dtype: torch.dtype, ndim: int) -> RuleProperties:
    """Of `find_properties` only what is said of decay, in a tenth of the steps."""
    quiet = undisturbed(optimizer, torch.device("cpu"))
    with quiet, quiet:
        decouples, merges = _decay(optimizer, group, dtype, ndim)
    return RuleProperties(decouples_decay=decouples, merges_decay=merges)


def _step_size(optimizer: Optimizer, group: int, shape: tuple[int, ...]) -> float | None:
    """|update| / lr, if constant gradients of any size lead to updates about as large as the learning rate."""
    found: list[float] = []
    grad = spread(shape)
    for scale in (1.0, 16.0):
        trial = SyntheticParameter(optimizer, group, 0.05 * normal(shape), torch.float32)
        started = time.thread_time()
        for _ in range(STEPS):
            before = trial.value()
            trial.step(grad * scale)
            if time.thread_time() - started > SECONDS:
                return None
        size = (trial.value() - before).abs() / LR
        if not _ABOUT[0] <= float(size.min()) <= float(size.max()) <= _ABOUT[1]:
            return None
        found.append(float(size.mean()))
    return sum(found) / len(found)


def _keeps_remainder(
    optimizer: Optimizer, group: int, dtype: torch.dtype, shape: tuple[int, ...], step_size: float
) -> bool:
    """Updates of an eighth of half a gap: plain rounding never moves the weight, anything that remembers does."""
    half_gap = torch.finfo(dtype).eps / 4  # the smallest one between 1 and 2
    trial = SyntheticParameter(optimizer, group, 1.0 + spread(shape).abs(), dtype, lr=half_gap / 8 / step_size)
    grad = spread(shape)
    start = trial.value()
    started = time.thread_time()
    for _ in range(STEPS + 16):
        trial.step(grad)
        if time.thread_time() - started > SECONDS:
            return False
    intended = half_gap / 8 * (STEPS + 16)
    return float((trial.value() - start).abs().mean()) > intended / 4


def _decay(optimizer: Optimizer, group: int, dtype: torch.dtype, ndim: int) -> tuple[bool, bool]:
    """Whether decay shrinks the weight itself; whether it shares a rounding with the gradient."""
    shape = {0: (256,), 1: (256,), 2: (16, 16), 3: (8, 8, 4)}.get(ndim, (4, 4, 4, 4) + (1,) * (ndim - 4))
    rate = torch.finfo(dtype).eps / 16  # lr * weight_decay, a quarter of what a rounding of its own never lets pass
    start = (0.02 * normal(shape)).to(dtype).double()

    def train(kind: torch.dtype, weight_decay: float) -> tuple[Tensor, Tensor]:
        """The weight at the end, and its sum over the steps."""
        trial = SyntheticParameter(optimizer, group, start, kind, weight_decay=weight_decay)
        summed = torch.zeros_like(start)
        # several steps: the first update of many rules is one number for all elements, on the format's own grid
        for seed in range(4):
            summed += trial.value()
            trial.step(normal(shape, seed))
        return trial.value(), summed

    end, summed = train(torch.float64, 0.0)
    expected = -rate * summed
    off = train(torch.float64, rate / LR)[0] - end - expected
    if not float(off.norm() / expected.norm()) < 0.1:
        return False, False
    shrunk = train(dtype, rate / LR)[0] - train(dtype, 0.0)[0]
    return True, float((shrunk * expected).sum() / (expected * expected).sum()) > 0.5
