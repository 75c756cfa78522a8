"""Which states a parameter will get, of what form, and how each of them forgets: tried on a stand-in before the first step."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.odd_tensors import shape_of, unreadable
from update_watch.replay.synthetic_parameter import (
    SECONDS,
    STEPS,
    SyntheticParameter,
    normal,
    small_shape,
    spread,
    undisturbed,
)

_HUGE = 1e300  # Python's whole numbers may be too large for a float; no counter is


@dataclasses.dataclass(frozen=True)
class StateForm:
    """One state that a parameter will get, as seen on a stand-in for it."""

    dtype: str  # "bfloat16"; "int" or "float" of a plain Python number, which takes 0 bytes
    is_counter: bool = False  # one number that grows by 1 at each step
    decay: float | None = None  # a step without gradient multiplies it by this; None where that was not found
    is_sum: bool = False  # it adds terms up and never decays
    stand_in: tuple[int, ...] = ()  # shape of the parameter it was seen on
    parts: tuple[tuple[int, tuple[int, ...]], ...] = ()  # bytes and shape of its tensors there

    def bytes_for(self, shape: tuple[int, ...]) -> int:
        """Bytes of this state for a parameter of `shape`."""
        return sum(round(size * self._growth(part, shape)) for size, part in self.parts)

    def _growth(self, part: tuple[int, ...], shape: tuple[int, ...]) -> float:
        if math.prod(part) == math.prod(self.stand_in):
            return math.prod(shape) / math.prod(part)
        # factored states: a dimension as long as one of the parameter's grows with it
        return math.prod(
            shape[self.stand_in.index(length)] / length for length in part if length > 1 and length in self.stand_in
        )


def find_states(optimizer: Optimizer, group: int, param: Tensor) -> dict[str, StateForm]:
    """The states that parameters like `param` (see `likeness`) will get, by name.

    Raises `ReplayError` when the rule does not run on a stand-in.
    """
    shape = _stand_in(tuple(param.shape))
    device = torch.device("cpu") if param.is_meta else param.device
    quiet = undisturbed(optimizer, device)
    with quiet, quiet:
        trial = SyntheticParameter(optimizer, group, normal(shape), param.dtype, device)
        trial.step(normal(shape, seed=1))
        first = dict(trial.state)
        dynamics = _dynamics(optimizer, group, len(shape))
    forms = {name: _form(value, shape, dynamics.get(name, StateForm(""))) for name, value in first.items()}
    return {name: form for name, form in forms.items() if form is not None}


def likeness(optimizer: Optimizer, group: int, param: Tensor) -> Hashable:
    """Parameters of one optimizer that are equal in this have rules of the same properties and states of one form."""
    settings = optimizer.param_groups[group].items()
    rule = tuple((k, repr(v)) for k, v in settings if k not in ("params", "lr", "weight_decay", "initial_lr"))
    return id(optimizer), rule, param.dtype, param.device, _stand_in(tuple(param.shape))


def _dynamics(optimizer: Optimizer, group: int, ndim: int) -> dict[str, StateForm]:
    """Decay and kind of each state with one value per weight, and the counters."""
    trial = SyntheticParameter(optimizer, group, 0.05 * normal(small_shape(ndim)), torch.float32)
    grad = spread(small_shape(ndim))
    started = time.thread_time()
    # an eighth of the gradient: sums still grow, maxima do not; none of it: what decays, decays. Twice, because a
    # factor that changes with time is none.
    looks: list[dict[str, Tensor]] = []
    for steps in (STEPS // 3, STEPS):
        for scale in (*[1.0] * steps, 0.125, 0.0):
            trial.step(grad * scale)
            looks.append(_snapshot(trial.state))
            if time.thread_time() - started > SECONDS:
                return {}
    early = looks[STEPS // 3 : STEPS // 3 + 2]
    found: dict[str, StateForm] = {}
    for name, last in looks[-1].items():
        if any(name not in look for look in looks):
            continue
        before, smaller, after = (look[name] for look in looks[-3:])
        if last.numel() == 1:
            counts = float(smaller - before) == float(after - smaller) == 1.0
            found[name] = StateForm("", is_counter=counts)
        elif last.shape == trial.param.shape:
            factor, factor_early = _factor(smaller, after), _factor(early[0][name], early[1][name])
            is_steady = factor is not None and factor_early is not None and abs(factor - factor_early) < 1e-4
            is_sum = is_steady and factor == 1.0 and bool((smaller.abs() > before.abs()).all())
            found[name] = StateForm("", decay=factor if is_steady else None, is_sum=is_sum)
    return found


def _factor(before: Tensor, after: Tensor) -> float | None:
    """`after / before`, if it is one number for all elements and shrinks them."""
    if not bool((before != 0).all()):
        return None
    ratio = after / before
    factor = float(ratio.mean())
    return factor if float((ratio - factor).abs().max()) < 1e-5 and 0 < factor <= 1 else None


def _snapshot(state: Mapping[str, Any]) -> dict[str, Tensor]:
    taken: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _HUGE:
            taken[name] = torch.tensor([float(value)], dtype=torch.float64)
        elif type(value) is Tensor and not unreadable(value) and not value.is_complex():
            taken[name] = value.detach().to("cpu", torch.float64, copy=True)
    return taken


# above the 4096 elements from which some optimizers quantise, in whole blocks of 256, and the 128 columns from which
# some factor; each dimension of a size of its own
_LARGE: dict[int, tuple[int, ...]] = {1: (4352,), 2: (160, 128), 3: (32, 16, 12), 4: (32, 16, 4, 3)}


def _stand_in(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the synthetic parameter that stands for parameters of `shape`."""
    if math.prod(shape) < 4096:
        return small_shape(len(shape))
    return _LARGE.get(len(shape), (16, 8, 6, 4) + (2,) * (len(shape) - 4))


def _form(value: Any, stand_in: tuple[int, ...], dynamics: StateForm) -> StateForm | None:
    """None for what is no number: settings kept in the state."""
    tensors = [v for v in value if isinstance(v, Tensor)] if isinstance(value, (list, tuple)) else [value]
    if tensors and all(isinstance(t, Tensor) for t in tensors):
        parts = tuple((stored_bytes(t), shape_of(t)) for t in tensors)
        return dataclasses.replace(dynamics, dtype=dtype_name(tensors[0]), stand_in=stand_in, parts=parts)
    return dataclasses.replace(dynamics, dtype=type(value).__name__) if dynamics.is_counter else None


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor, those inside a subclass (quantised) included."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) is not Tensor:
        inner, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in inner)
    return tensor.numel() * tensor.element_size()


def dtype_name(tensor: Tensor) -> str:
    """ "bfloat16"; for a subclass with a format of its own the name of the class."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (Tensor, torch.nn.Parameter):
        return type(tensor).__name__
    return str(tensor.dtype).removeprefix("torch.")
