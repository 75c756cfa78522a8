"""Which tensors of a checkpoint would stall at a learning rate: what of one step would arrive in them, as they are stored.

With an optimizer state (Adam's moments, a momentum buffer) the step is the one it would make if gradients went on as they were;
without one every update is as large as the rate, as Adam's and Lion's are at most. Elements are sampled; each is really rounded.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from update_watch import formats
from update_watch.checkpoints.files import CheckpointError, read_optimizer, read_tensors
from update_watch.wording import fixed, listed, number, plural

_SAMPLES = 2**14
_LIMIT = 0.8  # efficiency under which a tensor stalls
_OCTAVES = 40  # the rates that are tried lie within so many of the one that is asked for
_FROM_STATE, _AS_LARGE = "optimizer state", "update = rate"


@dataclasses.dataclass(frozen=True)
class AtRate:
    """One low-precision tensor, at one learning rate."""

    name: str
    dtype: str
    efficiency: float  # share of a step's update that would be stored
    least_lr: float | None  # from about which on 0.8 of it is; None: at no rate
    basis: str  # "optimizer state": of its moments; "update = rate"


def at_rate(weights: Mapping[str, Tensor], lr: float, optimizer: Mapping[str, Any] | None = None) -> tuple[AtRate, ...]:
    """The low-precision tensors among these, worst first. `optimizer`: the `state_dict()` of one that has them in this order.

    Raises:
        ValueError: `lr` is no number above 0.
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"--at {lr!r} must be a learning rate above 0")
    low = {name: w for name, w in weights.items() if w.layout is torch.strided and w.numel() and _is_low(w)}
    directions = _directions(weights, optimizer or {})
    found = []
    for name, w in low.items():
        stride = -(-w.numel() // _SAMPLES)
        sample = w.reshape(-1)[::stride]
        given = directions.get(name)
        direction = torch.ones(len(sample), dtype=torch.float64) if given is None else given.reshape(-1)[::stride]
        if float(direction.abs().sum()) > 0:
            kind, basis = str(w.dtype).removeprefix("torch."), _AS_LARGE if given is None else _FROM_STATE
            arrives, least = _efficiency(sample, direction, lr), _least(sample, direction, lr)
            found.append(AtRate(name, kind, arrives, least, basis))
    return tuple(sorted(found, key=lambda t: t.efficiency))


def of_files(
    path: str | os.PathLike[str], lr: float, optimizer: str | os.PathLike[str] | None = None
) -> tuple[AtRate, ...]:
    """The same of files; the optimizer's state is looked for beside the weights where no file of it is given.

    Raises:
        FileNotFoundError, CheckpointError: as `read_tensors`; also where a given file holds no optimizer's state.
        ValueError: `lr` is no number above 0.
    """
    state = read_optimizer(path if optimizer is None else optimizer)
    if state is None and optimizer is not None:
        raise CheckpointError(f"{optimizer}: there is no state of an optimizer in it (the `state_dict()` of one)")
    return at_rate(read_tensors(path), lr, state)


def text(found: Sequence[AtRate], lr: float, limit: int | None = None) -> str:
    """A table, worst first, and one sentence."""
    if not found:
        return f"At a learning rate of {number(lr)}: no low-precision weights, so none is lost to their format."
    width = max(len(t.name) for t in found[:limit])
    lines = [f"{'tensor':{width}}  {'format':8}  arrives  least rate for {_LIMIT}  from"]
    lines += [
        f"{t.name:{width}}  {t.dtype:8}  {fixed(t.efficiency):>7}  {'-' if t.least_lr is None else number(t.least_lr):>18}  {t.basis}"
        for t in found[:limit]
    ]
    stalled = [t.name for t in found if t.efficiency < _LIMIT]
    known = [t.least_lr for t in found if t.least_lr is not None]
    said = f"At a learning rate of {number(lr)} {plural(len(stalled), 'tensor')} of {len(found)} would lose updates"
    lines.append(
        f"{said}: {listed(stalled)}." if stalled else f"{said}; the first does under {number(max(known, default=0.0))}."
    )
    if any(t.basis == _AS_LARGE for t in found):
        lines.append(
            "Where the optimizer's state is not known, updates are taken to be as large as the rate, which is the most they are."
        )
    return "\n".join(lines)


def _is_low(w: Tensor) -> bool:
    return w.dtype in formats.HALVES and formats.of(w.dtype) is not None


def _efficiency(w: Tensor, direction: Tensor, lr: float) -> float:
    wide, update = w.double(), -lr * direction
    applied = (wide + update).to(w.dtype).double() - wide
    return float((applied * update).sum() / (update * update).sum())


def _least(w: Tensor, direction: Tensor, lr: float) -> float | None:
    """To a sixteenth of an octave; where efficiency does not rise with the rate throughout, one of the rates it passes at."""
    low, high = -float(_OCTAVES), float(_OCTAVES)
    if not _efficiency(w, direction, lr * 2**high) >= _LIMIT:
        return None
    while high - low > 1 / 16:
        middle = (low + high) / 2
        low, high = (low, middle) if _efficiency(w, direction, lr * 2**middle) >= _LIMIT else (middle, high)
    return float(lr * 2.0**high)


def _directions(weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> dict[str, Tensor]:
    """Steps over the rate by name. States have numbers, not names: they are taken if they fit the weights one after the other."""
    states, groups = optimizer.get("state"), optimizer.get("param_groups")
    if not isinstance(states, Mapping) or not isinstance(groups, (list, tuple)):
        return {}
    group_of = {index: group for group in groups for index in group.get("params", ())}
    names, found = iter(weights), {}
    for index in sorted(key for key in states if isinstance(key, int) and key in group_of):
        direction = _direction(states[index], group_of[index])
        if direction is None:
            continue
        name = next((name for name in names if weights[name].shape == direction.shape), None)
        if name is None:
            return {}  # of another model, or in another order
        found[name] = direction
    return found


def _direction(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
    """The update over the rate that this state makes; None of a rule that is not known."""
    if "exp_avg" in state and "exp_avg_sq" in state and "betas" in group:
        (b1, b2), step = group["betas"], float(state.get("step", 0)) or math.inf
        mean, square = (state[name].double() for name in ("exp_avg", "exp_avg_sq"))
        found: Tensor = mean / (1 - b1**step) / ((square / (1 - b2**step)).sqrt() + group.get("eps", 1e-8))
        return found
    if isinstance(state.get("momentum_buffer"), Tensor):
        buffer: Tensor = state["momentum_buffer"].double()
        return buffer
    return None
