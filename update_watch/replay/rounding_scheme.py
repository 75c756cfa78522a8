"""What becomes of the part of an update that the stored weight cannot hold.

Found out by a trial: a twin of the optimizer trains a small low-precision parameter with updates far below half an ulp,
beside an FP32 one. If the low-precision weight stays behind, rounding takes the updates ("plain"). If it keeps up, either
the rule rounds at random ("stochastic"), or something carries the remainder. A state s is named ("carried:s") where weight
and s together are on the FP32 path, in one of the ways of `Join`; anything else is only known to exist ("carried").
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch import formats
from update_watch.odd_tensors import unreadable
from update_watch.replay.side_effects import RandomStates
from update_watch.replay.synthetic_parameter import SyntheticParameter, undisturbed

_STEPS = 160
_TRIES = 5
_LATEST = 160  # steps, in which each element passes a few gaps
_LAGS = 0.4  # behind its master, as a share of the way
_SMALLER, _LARGER = 1 / 8, 3.0
_ELEMENTS = 256
_STAYS_BEHIND = 0.3  # share of the FP32 displacement
_KEEPS_UP = 0.6
_SMALL, _FAR, _MOST = 0.9, 1.2, 0.9  # steps, and ways, in half gaps; share of the elements that came as far
_GROWTH = 1000.0  # of steps, where a sum of all gradients grows by _STEPS: of a rule with step sizes of its own (Rprop)
_ON_THE_PATH = 0.05  # distance to the FP32 path, as a share of the displacement: other states may be rounded as well
_NEARER = 0.5  # distance of what is whole to the path, as a share of that of the weight alone


class Join(Enum):
    """How the FP32 weight is made of the stored one and a state."""

    sum = "weight + state"  # Kahan summation
    master = "state"  # the weight is the state rounded
    low_bits = "bits of weight, then of state"  # split weights: the weight is cut off after its upper 16 bits
    signed_bits = "bits of weight + state"  # the same with the weight rounded to nearest and a remainder of either sign


_BIT_DTYPES = (torch.uint16, torch.int16)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """`name` as in `TensorEvidence.scheme`; `carrier`: the state that holds what the weight cannot, or "".

    `is_late`: a master that is written to the weight only after some steps, and may be far from it in between.
    `is_part`: the weight is made of it and of other states, and moves about as it does; it is no copy of the weight.
    """

    name: str
    carrier: str = ""
    join: Join = Join.sum
    is_late: bool = False
    is_part: bool = False

    @property
    def addend(self) -> str:
        """The carrier, if it is to be added to the weight."""
        return self.carrier if self.join is Join.sum else ""

    def joined(self, weight: Tensor, state: Tensor, fmt: formats.Format) -> Tensor:
        """FP32 weights of stored ones and carrier, both widened to FP32; `fmt`: of the stored ones.

        A carrier of zeros, as before the first step, gives the stored weight.
        """
        if self.join is Join.sum:
            return weight + state
        if self.join is Join.master:
            # the neighbour that was rounded to is at most a gap away; else the weight is not that of this master
            is_own = (state - weight).abs() <= weight.abs() * fmt.epsilon + fmt.min_subnormal
            if self.is_late:
                is_own = is_own | state.ne(0)
            return torch.where(is_own, state, weight)
        bits = state.to(torch.int32)
        if self.join is Join.low_bits:
            bits = bits & 0xFFFF
        return (weight.view(torch.int32) + bits).view(torch.float32)

    def complete(self, weight: Tensor, state: Tensor) -> None:
        """Make FP32 weights whole, in place, that the rule has stepped beside their carrier since they were `joined`."""
        if self.is_late:  # it may have stepped the master alone
            weight.copy_(state)
        elif self.addend:
            weight.add_(state)

    def parted(self, whole: Tensor, dtype: torch.dtype, state_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Stored weights of `dtype` and a carrier of `state_dtype` that together are `whole` (FP32), as near as they can."""
        raw = whole.view(torch.int32)
        if self.join is Join.low_bits:
            return (raw & ~0xFFFF).view(torch.float32).to(dtype), (raw & 0xFFFF).to(state_dtype)
        if self.join is Join.signed_bits:
            rounded = (raw + 0x8000) & ~0xFFFF
            return rounded.view(torch.float32).to(dtype), (raw - rounded).to(state_dtype)
        weight = whole.to(dtype)
        return weight, (whole if self.join is Join.master else whole - weight.float()).to(state_dtype)


def find_scheme(optimizer: Optimizer, group: int, dtype: torch.dtype, ndim: int) -> Scheme:
    """Try the rule of `optimizer.param_groups[group]` on a parameter of `dtype`. Costs about 20 ms for torch's rules."""
    fmt = formats.of(dtype)
    if fmt is None:
        return Scheme("unknown")
    if fmt.mantissa_bits >= formats.FP32.mantissa_bits:
        return Scheme("plain")
    device = torch.device("cpu")
    lr, size = fmt.epsilon / 37, 1.0  # no power of two: a carrier would be empty just after so many steps
    try:
        quiet = undisturbed(optimizer, device)
        with quiet, quiet:
            for _ in range(_TRIES):
                found = _try(optimizer, group, dtype, ndim, lr, size)
                is_unknown = found == Scheme("unknown")
                if isinstance(found, Scheme) and not is_unknown:
                    return found
                sets_its_rate = _sets_its_rate(optimizer, group, dtype, lr)
                if is_unknown and not sets_its_rate:
                    break
                factor = found if isinstance(found, float) else _SMALLER  # some of its steps may arrive, and others not
                if sets_its_rate:  # for weights of another size its steps are others
                    size /= factor
                else:
                    lr *= factor
    except Exception:  # also torch's own, of formats and states that it cannot compute with
        pass
    # torch's own rules keep nothing of what rounding takes, also where gradients that stay the same show nothing
    return Scheme("plain" if type(optimizer).__module__.startswith("torch.optim") else "unknown")


def _sets_its_rate(optimizer: Optimizer, group: int, dtype: torch.dtype, lr: float) -> bool:
    """Whether a step takes another learning rate than it is given."""
    tried = SyntheticParameter(optimizer, group, torch.ones(_ELEMENTS), dtype, lr=lr)
    tried.step(torch.ones(_ELEMENTS))
    return tried.lr is not None and tried.lr != lr


def _try(optimizer: Optimizer, group: int, dtype: torch.dtype, ndim: int, lr: float, size: float) -> Scheme | float:
    """What was seen of weights near `size`, or by what factor another learning rate would show more."""
    shape = (_ELEMENTS,) if ndim < 2 else (16, _ELEMENTS // 16)
    start = (size * torch.linspace(1.05, 1.95, _ELEMENTS)).to(dtype).float()
    start[::2] *= -1
    start = start.reshape(shape)
    grad = torch.linspace(0.9, 1.1, _ELEMENTS).reshape(shape)
    low = SyntheticParameter(optimizer, group, start, dtype, lr=lr)
    full = SyntheticParameter(optimizer, group, start, torch.float32, lr=lr)
    random = RandomStates(torch.device("cpu"))
    draws = False
    first_moves = 0.0
    fmt = formats.of(dtype)
    assert fmt is not None
    early = start, start  # both weights while steps have been small
    are_small = True
    first_step = latest_step = 0.0  # rms of the FP32 weight's steps, but for a factor
    for step in range(_STEPS):
        before, behind = low.param.detach().clone(), full.param.detach().clone()
        low.step(grad)
        if step < 8:
            first_moves += float(low.param.detach().ne(before).float().mean())
            draws = draws or random.have_moved()
        full.step(grad)
        now = full.param.detach()
        latest_step = float((now - behind).norm())
        first_step = first_step or latest_step
        are_small = are_small and bool(((now - behind).abs() < _SMALL * fmt.half_gap(start, now - behind)).all())
        if are_small:
            early = low.param.detach().float().clone(), now.clone()
    reference = full.param.detach() - start
    length = float(reference.square().sum())
    if not length > 0 or not torch.isfinite(reference).all():
        return _LARGER
    if float((reference.abs() < 2 * fmt.half_gap(start, reference)).float().mean()) > 0.5:
        return _LARGER
    if not are_small and latest_step > _GROWTH * first_step and _stayed_behind(start, *early, fmt):
        return Scheme("plain")
    stored = low.param.detach().float()
    share = float(((stored - start) * reference).sum()) / length
    alone = _distance(stored - start, reference)
    if alone < _ON_THE_PATH:
        return _SMALLER  # what it cannot hold makes no difference
    for name, value in low.state.items():
        if isinstance(value, Tensor) and not unreadable(value) and value.shape == start.shape:
            for join in _ways(value, dtype, size):
                scheme = Scheme(f"carried:{name}", name, join)
                whole = scheme.joined(stored, value.detach().float(), fmt)
                is_near = _distance(whole - start, reference) < min(_ON_THE_PATH, _NEARER * alone)
                is_near = is_near or (join is Join.master and _are_alike(value, full.state.get(name), start, reference))
                if is_near and join is Join.master:
                    is_written = _is_written(low, name, grad)
                    is_part = not is_written  # as in schedule-free rules
                    scheme = dataclasses.replace(scheme, is_late=is_part or False in is_written, is_part=is_part)
                if is_near:
                    return scheme
    if share < _STAYS_BEHIND:
        return Scheme("plain")
    if first_moves / 8 > 0.9:
        return _SMALLER  # nearly every step arrived: this says nothing
    if not _KEEPS_UP <= share <= 1 / _KEEPS_UP:
        return Scheme("unknown")
    if draws:
        return Scheme("stochastic")
    # what is carried comes when there is a gap of it; a weight that strays further is not the one intended
    strays = (stored - start - reference).abs() > 2 * fmt.ulp(stored)
    return Scheme("unknown" if bool(strays.any()) else "carried")


def _stayed_behind(start: Tensor, low: Tensor, full: Tensor, fmt: formats.Format) -> bool:
    """Whether hardly any of what small steps came to arrived, of a rule whose steps grow (Rprop): large ones arrive anyhow."""
    way = full - start
    if float((way.abs() > _FAR * fmt.half_gap(start, way)).float().mean()) < _MOST:
        return False
    return float(((low - start) * way).sum()) < _STAYS_BEHIND * float(way.square().sum())


def _are_alike(state: Tensor, other: Any, start: Tensor, reference: Tensor) -> bool:
    """Whether states are masters of the BF16 and of the FP32 weight, of which the latter lags behind its own."""
    if not isinstance(other, Tensor) or other.shape != start.shape:
        return False
    way = other.detach().float() - start
    is_on_it = _distance(way, reference) < _LAGS
    return is_on_it and _distance(state.detach().float() - start, way) < _ON_THE_PATH


def _is_written(low: SyntheticParameter, master: str, grad: Tensor) -> set[bool]:
    """Whether the weight is the master rounded: after every step, after some; nothing where it moves and is not."""
    are_equal = set()
    for _ in range(_LATEST):
        before = low.param.detach().clone()
        low.step(grad)
        state = low.state.get(master)
        if not isinstance(state, Tensor):
            return {True}
        is_equal = torch.equal(state.detach().to(low.param.dtype), low.param.detach())
        if not is_equal and not torch.equal(before, low.param.detach()):
            return set()
        are_equal.add(is_equal)
    return are_equal


def _ways(state: Tensor, dtype: torch.dtype, size: float) -> list[Join]:
    """How this state could complete a weight of `dtype` and that size."""
    if not bool(state.any()):
        return []
    if state.dtype in _BIT_DTYPES:
        return [Join.low_bits, Join.signed_bits] if dtype is torch.bfloat16 else []
    if not state.dtype.is_floating_point:
        return []
    ways = []
    if state.dtype.itemsize > dtype.itemsize:
        ways.append(Join.master)
    if float(state.detach().abs().max()) <= 2 * size * torch.finfo(dtype).eps:  # all that rounding can take
        ways.append(Join.sum)
    return ways


def ways_to_join(weight: Tensor, state: Tensor, dtype: torch.dtype) -> list[Join]:
    """How the values of a state could complete those of a weight of `dtype`."""
    if not bool(state.any()):
        return []
    if state.dtype in _BIT_DTYPES:
        return [Join.low_bits, Join.signed_bits] if dtype is torch.bfloat16 else []
    if not state.dtype.is_floating_point or not bool(state.isfinite().all()):
        return []
    value, rest = weight.detach().float(), state.detach().float()
    gap = value.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
    ways = []
    if state.dtype.itemsize > dtype.itemsize and bool(((rest - value).abs() <= gap).all()):
        ways.append(Join.master)
    if bool((rest.abs() <= gap).all()):
        ways.append(Join.sum)
    return ways


def _distance(path: Tensor, reference: Tensor) -> float:
    return float((path - reference).norm() / reference.norm())
