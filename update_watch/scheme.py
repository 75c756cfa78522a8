"""What becomes of the part of an update that the stored weight cannot hold.

Found out by a trial: a twin of the optimizer trains a small low-precision parameter with updates far below half an ulp,
beside an FP32 one. If the low-precision weight stays behind, rounding takes the updates ("plain"). If it keeps up, either
the rule rounds at random ("stochastic"), or something carries the remainder: a state s is named ("carried:s") if weight + s
is exactly on the FP32 path (Kahan summation), or s itself is and the weight is s rounded (master weights); anything else is
only known to exist ("carried").
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch import formats
from update_watch.rehearsal import _Trial as Trial
from update_watch.rehearsal import _undisturbed as undisturbed
from update_watch.replay import RandomStates
from update_watch.twin_copy import ReplayError

_STEPS = 160
_TRIES = 5
_SMALLER, _LARGER = 1 / 8, 3.0
_ELEMENTS = 256
_STAYS_BEHIND = 0.3  # share of the FP32 displacement
_KEEPS_UP = 0.6
_ON_THE_PATH = 0.02  # distance to the FP32 path, as a share of the displacement


@dataclasses.dataclass(frozen=True)
class Scheme:
    """`name` as in `TensorEvidence.scheme`; `carrier`: the state to add to the weight; `master`: to use instead; or ""."""

    name: str
    carrier: str = ""
    master: str = ""


def find_scheme(optimizer: Optimizer, group: int, dtype: torch.dtype, ndim: int) -> Scheme:
    """Try the rule of `optimizer.param_groups[group]` on a parameter of `dtype`. Costs about 20 ms for torch's rules."""
    fmt = formats.of(dtype)
    if fmt is None:
        return Scheme("unknown")
    if fmt.mantissa_bits >= formats.FP32.mantissa_bits:
        return Scheme("plain")
    device = torch.device("cpu")
    lr = fmt.epsilon / 37  # no power of two: a carrier would be empty just after so many steps
    try:
        with undisturbed(optimizer, device):
            for _ in range(_TRIES):
                found = _try(optimizer, group, dtype, ndim, lr)
                if isinstance(found, Scheme):
                    return found
                lr *= found
    except ReplayError:
        pass
    return Scheme("unknown")


def _try(optimizer: Optimizer, group: int, dtype: torch.dtype, ndim: int, lr: float) -> Scheme | float:
    """What was seen, or by what factor another learning rate would show more."""
    shape = (_ELEMENTS,) if ndim < 2 else (16, _ELEMENTS // 16)
    start = torch.linspace(1.05, 1.95, _ELEMENTS).to(dtype).float().reshape(shape)
    grad = torch.linspace(0.9, 1.1, _ELEMENTS).reshape(shape)
    low = Trial(optimizer, group, start, dtype, lr=lr)
    full = Trial(optimizer, group, start, torch.float32, lr=lr)
    random = RandomStates(torch.device("cpu"))
    draws = False
    first_moves = 0.0
    for step in range(_STEPS):
        before = low.param.detach().clone()
        low.step(grad)
        if step < 8:
            first_moves += float(low.param.detach().ne(before).float().mean())
            draws = draws or random.have_moved()
        full.step(grad)
    reference = full.param.detach() - start
    size = float(reference.square().sum())
    if not size > 0 or not torch.isfinite(reference).all():
        return _LARGER
    fmt = formats.of(dtype)
    assert fmt is not None
    if float((reference.abs() < 2 * fmt.half_gap(start, reference)).float().mean()) > 0.5:
        return _LARGER
    stored = low.param.detach().float() - start
    share = float((stored * reference).sum()) / size
    for name, value in low.state.items():
        if isinstance(value, Tensor) and value.shape == start.shape and value.dtype.is_floating_point:
            rest = value.detach().float()
            if value.dtype.itemsize > dtype.itemsize and torch.equal(rest.to(dtype), low.param.detach()):
                if _is_on(rest - start, reference):
                    return Scheme(f"carried:{name}", master=name)
            if float(rest.abs().max()) > 2 * fmt.epsilon:
                continue  # more than rounding a weight below 2 can take
            if _is_on(stored + rest, reference) and float(rest.abs().max()) > 0:
                return Scheme(f"carried:{name}", name)
    if share < _STAYS_BEHIND:
        return Scheme("plain")
    if first_moves / 8 > 0.9:
        return _SMALLER  # nearly every step arrived: this says nothing
    if share < _KEEPS_UP:
        return Scheme("unknown")
    return Scheme("stochastic" if draws else "carried")


def _is_on(path: Tensor, reference: Tensor) -> bool:
    return bool((path - reference).norm() < _ON_THE_PATH * reference.norm())
