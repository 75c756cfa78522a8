"""Which tensors of a checkpoint would stall at a learning rate: what of one step would arrive in them, as they are stored.

With an optimizer state (Adam's moments, a momentum buffer) the step is the one it would make if gradients went on as they were;
without one every update is as large as the rate, as Adam's and Lion's are at most. Elements are sampled; each is really rounded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from update_watch import formats
from update_watch.checkpoints.files import CheckpointError, read_optimizer, read_tensors
from update_watch.checkpoints.header import IntArray
from update_watch.checkpoints.rows import Floats, batches, number_at
from update_watch.checkpoints.stored import StoredTensors
from update_watch.columns.late_rows import LateRows
from update_watch.wording import end_of, fixed, listed, number, plural, printable

_SAMPLES = 2**14
_TOGETHER = 2**15 - 1  # elements that are rounded at once: torch starts no threads for so few
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


@dataclasses.dataclass(frozen=True, eq=False)
class AtRates(LateRows[AtRate]):
    """Those of n tensors, worst first: the fields of `AtRate` as arrays (n,), NaN for None."""

    names: Sequence[str]
    dtypes: Sequence[torch.dtype]  # those there are
    dtype: IntArray  # the place of each tensor's in `dtypes`
    efficiency: Floats
    least_lr: Floats
    is_of_state: npt.NDArray[np.bool_]

    def row(self, at: int) -> AtRate:
        dtype = str(self.dtypes[self.dtype[at]]).removeprefix("torch.")
        basis = _FROM_STATE if self.is_of_state[at] else _AS_LARGE
        return AtRate(self.names[at], dtype, float(self.efficiency[at]), number_at(self.least_lr, at), basis)

    def __len__(self) -> int:
        return len(self.names)


def at_rate(weights: Mapping[str, Tensor], lr: float, optimizer: Mapping[str, Any] | None = None) -> AtRates:
    """The low-precision tensors among these, worst first. `optimizer`: the `state_dict()` of one that has them in this order.

    Raises:
        ValueError: `lr` is no number above 0.
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"--at {lr!r} must be a learning rate above 0")
    directions = _directions(weights, optimizer or {})
    names = list(weights)
    places_P = weights.places(names) if isinstance(weights, StoredTensors) else None
    kinds, kind_P = _kinds(weights, places_P)
    efficiency_P, least_P = np.full((2, len(names)), np.nan)
    moves_P, is_of_state_P = np.zeros((2, len(names)), dtype=bool)
    for code, at in batches(kind_P, [max(1, _TOGETHER // min(numel, _SAMPLES)) for _, numel in kinds]):
        if isinstance(weights, StoredTensors) and places_P is not None and kinds[code][1] <= _SAMPLES:
            w_nK = weights.rows(places_P[at])  # of one size, and maybe of several shapes
        else:
            w_nK = torch.stack([_sample(weights[names[i]]) for i in at.tolist()])
        direction_nK = torch.ones(w_nK.shape, dtype=torch.float64)
        for n, i in enumerate(at.tolist() if directions else ()):
            if names[i] in directions:
                direction_nK[n], is_of_state_P[i] = directions[names[i]], True
        efficiency_P[at], least_P[at] = _of_batch(w_nK, direction_nK, lr)
        moves_P[at] = (direction_nK != 0).any(1).numpy()
    (found,) = np.nonzero(moves_P)
    found = found[np.argsort(efficiency_P[found], kind="stable")]
    columns = (kind_P[found], efficiency_P[found], least_P[found], is_of_state_P[found])
    return AtRates(list(map(names.__getitem__, found.tolist())), [dtype for dtype, _ in kinds], *columns)


def _kinds(weights: Mapping[str, Tensor], places_P: IntArray | None) -> tuple[list[tuple[torch.dtype, int]], IntArray]:
    """Formats with numbers of elements, and which of them each tensor has; -1: it is in no low format, or empty."""
    known: dict[tuple[torch.dtype, int], int] = {}

    def code(dtype: torch.dtype, numel: int) -> int:
        return known.setdefault((dtype, numel), len(known)) if numel and _is_low(dtype) else -1

    if isinstance(weights, StoredTensors) and places_P is not None:
        codes = np.array([code(kind.dtype, kind.numel) for kind in weights.kinds], np.int64)[weights.codes(places_P)]
    else:
        dense = (w.layout is torch.strided and not w.is_meta for w in weights.values())
        each = [code(w.dtype, w.numel()) if fine else -1 for w, fine in zip(weights.values(), dense, strict=True)]
        codes = np.array(each, np.int64)
    return list(known), codes


def _sample(tensor: Tensor) -> Tensor:
    """[K] elements, evenly spaced, of a tensor that may be expanded to a size that nothing holds."""
    step = max(1, -(-tensor.numel() // _SAMPLES))
    if tensor.is_contiguous():
        return tensor.reshape(-1)[::step]
    return tensor[torch.unravel_index(torch.arange(0, tensor.numel(), step), tensor.shape)]


def of_files(
    path: str | os.PathLike[str],
    lr: float,
    optimizer: str | os.PathLike[str] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> AtRates:
    """The same of files; the optimizer's state is looked for beside the weights where no file of it is given.

    Args:
        weights: those of `path`, where they have been read.

    Raises:
        FileNotFoundError, CheckpointError: as `read_tensors`; also where a given file holds no optimizer's state.
        ValueError: `lr` is no number above 0.
    """
    state = read_optimizer(path if optimizer is None else optimizer)
    if state is None and optimizer is not None:
        raise CheckpointError(f"{optimizer}: there is no state of an optimizer in it (the `state_dict()` of one)")
    return at_rate(read_tensors(path) if weights is None else weights, lr, state)


def text(found: AtRates, lr: float, limit: int | None = None) -> str:
    """A table, worst first, and one sentence."""
    if not found:
        return f"At a learning rate of {number(lr)}: no low-precision weights, so none is lost to their format."
    shown = found[:limit]
    names = [end_of(t.name) for t in shown]
    width = max(map(len, names))
    lines = [f"{'tensor':{width}}  {'format':8}  arrives  least rate for {_LIMIT}  from"]
    lines += [
        f"{name:{width}}  {t.dtype:8}  {fixed(t.efficiency):>7}  {'-' if t.least_lr is None else number(t.least_lr):>18}  {t.basis}"
        for name, t in zip(names, shown, strict=True)
    ]
    stalled = list(map(found.names.__getitem__, np.flatnonzero(found.efficiency < _LIMIT).tolist()))
    first = max(found.least_lr[~np.isnan(found.least_lr)].tolist(), default=0.0)
    said = f"At a learning rate of {number(lr)} {plural(len(stalled), 'tensor')} of {len(found)} would lose updates"
    lines.append(
        f"{said}: {printable(listed(stalled))}." if stalled else f"{said}; the first does under {number(first)}."
    )
    if not found.is_of_state.all():
        lines.append(
            "Where the optimizer's state is not known, updates are taken to be as large as the rate, which is the most they are."
        )
    return "\n".join(lines)


def _is_low(dtype: torch.dtype) -> bool:
    return dtype in formats.HALVES and formats.of(dtype) is not None


def _of_batch(w_nK: Tensor, direction_nK: Tensor, lr: float) -> tuple[Floats, Floats]:
    """Of n tensors the efficiency at the rate, and the least rate, [n] each; NaN where there is none.

    The latter to a sixteenth of an octave; where efficiency does not rise with the rate throughout, one of the rates it passes at.
    """
    wide_nK, turned_nK = w_nK.double().numpy(), -direction_nK.numpy()

    def efficiency(lr_n: Floats) -> Floats:
        update_nK = lr_n[:, None] * turned_nK
        # torch rounds to the format; NumPy adds up, and starts no threads
        applied_nK = torch.from_numpy(wide_nK + update_nK).to(w_nK.dtype).double().numpy() - wide_nK
        found: Floats = (applied_nK * update_nK).sum(1) / np.square(update_nK).sum(1)
        return found

    lr_n = np.full(len(w_nK), lr)
    low_n, high_n = np.full((2, len(w_nK)), float(_OCTAVES))
    low_n = -low_n
    with np.errstate(all="ignore"):
        now_n, arrives_n = efficiency(lr_n), efficiency(lr_n * 2**high_n) >= _LIMIT
        while float((high_n - low_n).max()) > 1 / 16:
            middle_n = (low_n + high_n) / 2
            is_enough_n = efficiency(lr_n * 2**middle_n) >= _LIMIT
            low_n, high_n = np.where(is_enough_n, low_n, middle_n), np.where(is_enough_n, middle_n, high_n)
        return now_n, np.where(arrives_n, lr_n * 2**high_n, np.nan)


def _directions(weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> dict[str, Tensor]:
    """Steps over the rate by name, [K] samples each. States have numbers, not names: they are taken if they fit the weights one
    after the other."""
    states, groups = optimizer.get("state"), optimizer.get("param_groups")
    if not isinstance(states, Mapping) or not isinstance(groups, (list, tuple)):
        return {}
    group_of = {
        index: group
        for group in groups
        if isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple))
        for index in group["params"]
        if isinstance(index, int)
    }
    names, found = iter(weights), {}
    for index in sorted(key for key in states if isinstance(key, int) and key in group_of):
        known = None
        with contextlib.suppress(Exception):  # a file may hold anything under these names: such a state is not known
            known = _direction(states[index], group_of[index])
        if known is None or known[1].is_meta:
            continue
        shape, direction = known
        name = next((name for name in names if weights[name].shape == shape), None)
        if name is None:
            return {}  # of another model, or in another order
        found[name] = direction
    return found


def _direction(state: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[torch.Size, Tensor] | None:
    """The shape of the tensor, and samples of the update over the rate that this state makes; None of a rule that is not known."""
    if "exp_avg" in state and "exp_avg_sq" in state and "betas" in group:
        (b1, b2), step = group["betas"], float(state.get("step", 0)) or math.inf
        mean, square = (_sample(state[name]).double() for name in ("exp_avg", "exp_avg_sq"))
        found: Tensor = mean / (1 - b1**step) / ((square / (1 - b2**step)).sqrt() + group.get("eps", 1e-8))
        return state["exp_avg"].shape, found.clone()
    if isinstance(state.get("momentum_buffer"), Tensor):
        return state["momentum_buffer"].shape, _sample(state["momentum_buffer"]).to(torch.float64, copy=True)
    return None
