"""Which tensors of a checkpoint would stall at a learning rate: what of one step would arrive in them, as they are stored.

With an optimizer state (Adam's moments, a momentum buffer) the step is the one it would make if gradients went on as they were;
without one every update is as large as the rate, as Adam's and Lion's are at most. Elements are sampled; each is really rounded.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from update_watch import formats
from update_watch.checkpoints.files import CheckpointError, read_optimizer, read_tensors
from update_watch.checkpoints.stored import StoredTensors
from update_watch.wording import end_of, fixed, listed, number, plural, printable

_SAMPLES = 2**14
_TOGETHER = 2**20  # elements that are rounded at once
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
    directions = _directions(weights, optimizer or {})
    groups: dict[tuple[torch.dtype, int], list[str]] = {}
    for name, kind in _low(weights):
        groups.setdefault(kind, []).append(name)
    found: list[AtRate] = []
    for (dtype, numel), names in groups.items():
        most = max(1, _TOGETHER // min(numel, _SAMPLES))
        for begin in range(0, len(names), most):
            found += _of_batch(names[begin : begin + most], dtype, weights, directions, lr)
    places = {name: i for i, name in enumerate(weights)}
    return tuple(sorted(found, key=lambda t: (t.efficiency, places[t.name])))


def _low(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[torch.dtype, int]]]:
    """Names of those in a low format, with format and number of elements."""
    if isinstance(weights, StoredTensors):
        names = list(weights)
        wanted = [(kind.dtype, kind.numel) if kind.numel and _is_low(kind.dtype) else None for kind in weights.kinds]
        for name, code in zip(names, weights.codes(weights.places(names)).tolist(), strict=True):
            if (kind := wanted[code]) is not None:
                yield name, kind
        return
    for name, w in weights.items():
        if w.layout is torch.strided and w.numel() and _is_low(w.dtype):
            yield name, (w.dtype, w.numel())


def _of_batch(
    names: Sequence[str], dtype: torch.dtype, weights: Mapping[str, Tensor], directions: Mapping[str, Tensor], lr: float
) -> Iterator[AtRate]:
    """Tensors of one format and size: n of them, K elements of each."""
    w_nK = _samples(weights, names)
    direction_nK = torch.ones(w_nK.shape, dtype=torch.float64)
    for i, name in enumerate(names):
        if name in directions:
            direction_nK[i] = _sample(directions[name])
    lr_n = torch.full((len(names),), lr, dtype=torch.float64)
    arrives, least = _efficiency(w_nK, direction_nK, lr_n).tolist(), _least(w_nK, direction_nK, lr_n)
    moves, kind = (direction_nK != 0).any(1).tolist(), str(dtype).removeprefix("torch.")
    for i, name in enumerate(names):
        if moves[i]:
            yield AtRate(name, kind, arrives[i], least[i], _FROM_STATE if name in directions else _AS_LARGE)


def _samples(weights: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """[n, K]"""
    if isinstance(weights, StoredTensors) and weights.kind_of(names[0]).numel <= _SAMPLES:
        return weights.rows(weights.places(names))  # of one size, and maybe of several shapes
    return torch.stack([_sample(weights[name]) for name in names])


def _sample(tensor: Tensor) -> Tensor:
    """[K] elements, evenly spaced."""
    return tensor.reshape(-1)[:: -(-tensor.numel() // _SAMPLES)]


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
    names = [end_of(t.name) for t in found[:limit]]
    width = max(map(len, names))
    lines = [f"{'tensor':{width}}  {'format':8}  arrives  least rate for {_LIMIT}  from"]
    lines += [
        f"{name:{width}}  {t.dtype:8}  {fixed(t.efficiency):>7}  {'-' if t.least_lr is None else number(t.least_lr):>18}  {t.basis}"
        for name, t in zip(names, found[:limit], strict=True)
    ]
    stalled = [printable(t.name) for t in found if t.efficiency < _LIMIT]
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


def _is_low(dtype: torch.dtype) -> bool:
    return dtype in formats.HALVES and formats.of(dtype) is not None


def _efficiency(w_nK: Tensor, direction_nK: Tensor, lr_n: Tensor) -> Tensor:
    """[n]"""
    wide_nK, update_nK = w_nK.double(), -lr_n[:, None] * direction_nK
    applied_nK = (wide_nK + update_nK).to(w_nK.dtype).double() - wide_nK
    return (applied_nK * update_nK).sum(1) / (update_nK * update_nK).sum(1)


def _least(w_nK: Tensor, direction_nK: Tensor, lr_n: Tensor) -> list[float | None]:
    """To a sixteenth of an octave; where efficiency does not rise with the rate throughout, one of the rates it passes at."""
    low_n, high_n = torch.full_like(lr_n, -float(_OCTAVES)), torch.full_like(lr_n, float(_OCTAVES))
    arrives_n = _efficiency(w_nK, direction_nK, lr_n * 2**high_n) >= _LIMIT
    while float((high_n - low_n).max()) > 1 / 16:
        middle_n = (low_n + high_n) / 2
        is_enough_n = _efficiency(w_nK, direction_nK, lr_n * 2**middle_n) >= _LIMIT
        low_n, high_n = torch.where(is_enough_n, low_n, middle_n), torch.where(is_enough_n, middle_n, high_n)
    least = (lr_n * 2**high_n).tolist()
    return [rate if arrives else None for rate, arrives in zip(least, arrives_n.tolist(), strict=True)]


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
