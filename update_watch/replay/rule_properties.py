"""What an optimizer will do, tried before the first step on synthetic parameters.

A twin of the optimizer (`replay.shell`) trains tiny parameters: which states does it make, by what factor do they
decay, is an update about as large as the learning rate, does weight decay get a rounding of its own, is the rest of a
rounded update kept somewhere? Nothing is concluded from the name of a class. The real optimizer, its parameters and
all random states stay as they are.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.replay.copier import Copier
from update_watch.replay.twin import ReplayError, rule_of, settings_of, shell, without_effects

_LIMIT = 2**20  # elements of tensors the optimizer keeps outside its state
_STEPS = 48
_SECONDS = 1.0  # for one trial of a slow rule
_LR = 2.0**-10  # of the trials: far above the resolution of FP32 weights of the size used
_ABOUT = (0.5, 2.0)  # |update| / lr of a rule whose updates are "about the learning rate"


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


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What was found out for parameters of one format and number of dimensions in one parameter group."""

    step_size: float | None = None  # |update| / learning rate where that is about the same for all gradients
    keeps_remainder: bool = False  # what rounding takes from the weight is made good later
    decouples_decay: bool = False  # weight decay acts on the weight, not on the gradient
    merges_decay: bool = False  # decay and gradient reach the weight in one rounding


def rehearse(optimizer: Optimizer, group: int, dtype: torch.dtype, ndim: int) -> Rehearsal:
    """Try the rule of `optimizer.param_groups[group]` on parameters of `dtype` with `ndim` dimensions.

    Raises `ReplayError` when the rule does not run on synthetic parameters; the message says why.
    """
    shape = _small(ndim)
    with _undisturbed(optimizer, torch.device("cpu")):
        step_size = _step_size(optimizer, group, shape)
        keeps = step_size is not None and _keeps_remainder(optimizer, group, dtype, shape, step_size)
        decouples, merges = _decay(optimizer, group, dtype, ndim)
    return Rehearsal(step_size, keeps, decouples, merges)


def states(optimizer: Optimizer, group: int, param: Tensor) -> dict[str, StateForm]:
    """The states that parameters like `param` (see `likeness`) will get, by name.

    Raises `ReplayError` when the rule does not run on a stand-in.
    """
    shape = _stand_in(tuple(param.shape))
    device = torch.device("cpu") if param.is_meta else param.device
    with _undisturbed(optimizer, device):
        trial = _Trial(optimizer, group, _normal(shape), param.dtype, device)
        trial.step(_normal(shape, seed=1))
        first = dict(trial.state)
        dynamics = _dynamics(optimizer, group, len(shape))
    forms = {name: _form(value, shape, dynamics.get(name, StateForm(""))) for name, value in first.items()}
    return {name: form for name, form in forms.items() if form is not None}


def likeness(optimizer: Optimizer, group: int, param: Tensor) -> Hashable:
    """Parameters of one optimizer that are equal in this have one rehearsal and states of one form."""
    settings = optimizer.param_groups[group].items()
    rule = tuple((k, repr(v)) for k, v in settings if k not in ("params", "lr", "weight_decay", "initial_lr"))
    return id(optimizer), rule, param.dtype, param.device, _stand_in(tuple(param.shape))


class _Trial:
    """One synthetic parameter and the twin that trains it."""

    def __init__(
        self,
        optimizer: Optimizer,
        group: int,
        start: Tensor,
        dtype: torch.dtype,
        device: torch.device | None = None,
        *,
        lr: float | None = _LR,
        weight_decay: float = 0.0,
    ) -> None:
        self._name = type(optimizer).__name__
        self._rule = rule_of(optimizer)
        self.param = torch.nn.Parameter(start.to(device=device, dtype=dtype, copy=True))
        copier = Copier(_LIMIT, optimizer=optimizer)
        settings = settings_of(optimizer.param_groups[group], [self.param], copier)
        if lr is not None and "lr" in settings:
            old = settings["lr"]
            settings["lr"] = torch.full_like(old, lr) if isinstance(old, Tensor) else lr
        if "weight_decay" in settings and isinstance(settings["weight_decay"], (int, float)):
            settings["weight_decay"] = weight_decay
        self._twin = shell(optimizer, [settings], None, copier)
        train = getattr(type(optimizer), "train", None)
        if callable(train):  # schedule-free rules refuse to step before it
            train(self._twin)

    def step(self, grad: Tensor) -> None:
        """One step of the rule with this gradient."""
        self.param.grad = grad.to(device=self.param.device, dtype=self.param.dtype, copy=True)
        try:
            with torch.no_grad():
                self._rule(self._twin)
        except Exception as error:
            raise ReplayError(f"{self._name} fails on a synthetic parameter: {error!r}") from error

    @property
    def state(self) -> dict[str, Any]:
        return self._twin.state.get(self.param) or {}

    def value(self) -> Tensor:
        """The parameter in FP64 on the CPU."""
        return self.param.detach().to("cpu", torch.float64, copy=True)


def _undisturbed(optimizer: Optimizer, device: torch.device) -> AbstractContextManager[Any]:
    # torch's own rules draw no random numbers, call no hook and compile nothing; keeping compilation from happening
    # would import the compiler: seconds
    is_native = type(optimizer).__module__.startswith("torch.optim")
    return nullcontext() if is_native else without_effects(device)


# --- trials ---------------------------------------------------------------------------------------


def _step_size(optimizer: Optimizer, group: int, shape: tuple[int, ...]) -> float | None:
    """|update| / lr, if constant gradients of any size lead to updates about as large as the learning rate."""
    found: list[float] = []
    grad = _spread(shape)
    for scale in (1.0, 16.0):
        trial = _Trial(optimizer, group, 0.05 * _normal(shape), torch.float32)
        started = time.perf_counter()
        for _ in range(_STEPS):
            before = trial.value()
            trial.step(grad * scale)
            if time.perf_counter() - started > _SECONDS:
                return None
        size = (trial.value() - before).abs() / _LR
        if not _ABOUT[0] <= float(size.min()) <= float(size.max()) <= _ABOUT[1]:
            return None
        found.append(float(size.mean()))
    return sum(found) / len(found)


def _keeps_remainder(
    optimizer: Optimizer, group: int, dtype: torch.dtype, shape: tuple[int, ...], step_size: float
) -> bool:
    """Updates of an eighth of half a gap: plain rounding never moves the weight, anything that remembers does."""
    half_gap = torch.finfo(dtype).eps / 4  # the smallest one between 1 and 2
    trial = _Trial(optimizer, group, 1.0 + _spread(shape).abs(), dtype, lr=half_gap / 8 / step_size)
    grad = _spread(shape)
    start = trial.value()
    started = time.perf_counter()
    for _ in range(_STEPS + 16):
        trial.step(grad)
        if time.perf_counter() - started > _SECONDS:
            return False
    intended = half_gap / 8 * (_STEPS + 16)
    return float((trial.value() - start).abs().mean()) > intended / 4


def _decay(optimizer: Optimizer, group: int, dtype: torch.dtype, ndim: int) -> tuple[bool, bool]:
    """Whether decay shrinks the weight itself; whether it shares a rounding with the gradient."""
    shape = {0: (256,), 1: (256,), 2: (16, 16), 3: (8, 8, 4)}.get(ndim, (4, 4, 4, 4) + (1,) * (ndim - 4))
    rate = torch.finfo(dtype).eps / 16  # lr * weight_decay, a quarter of what a rounding of its own never lets pass
    start = (0.02 * _normal(shape)).to(dtype).double()

    def train(kind: torch.dtype, weight_decay: float) -> tuple[Tensor, Tensor]:
        """The weight at the end, and its sum over the steps."""
        trial = _Trial(optimizer, group, start, kind, weight_decay=weight_decay)
        summed = torch.zeros_like(start)
        # several steps: the first update of many rules is one number for all elements, on the format's own grid
        for seed in range(4):
            summed += trial.value()
            trial.step(_normal(shape, seed))
        return trial.value(), summed

    end, summed = train(torch.float64, 0.0)
    expected = -rate * summed
    off = train(torch.float64, rate / _LR)[0] - end - expected
    if not float(off.norm() / expected.norm()) < 0.1:
        return False, False
    shrunk = train(dtype, rate / _LR)[0] - train(dtype, 0.0)[0]
    return True, float((shrunk * expected).sum() / (expected * expected).sum()) > 0.5


def _dynamics(optimizer: Optimizer, group: int, ndim: int) -> dict[str, StateForm]:
    """Decay and kind of each state with one value per weight, and the counters."""
    trial = _Trial(optimizer, group, 0.05 * _normal(_small(ndim)), torch.float32)
    grad = _spread(_small(ndim))
    started = time.perf_counter()
    # an eighth of the gradient: sums still grow, maxima do not; none of it: what decays, decays. Twice, because a
    # factor that changes with time is none.
    looks: list[dict[str, Tensor]] = []
    for steps in (_STEPS // 3, _STEPS):
        for scale in (*[1.0] * steps, 0.125, 0.0):
            trial.step(grad * scale)
            looks.append(_snapshot(trial.state))
            if time.perf_counter() - started > _SECONDS:
                return {}
    early = looks[_STEPS // 3 : _STEPS // 3 + 2]
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
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            taken[name] = torch.tensor([float(value)], dtype=torch.float64)
        elif type(value) is Tensor and not value.is_complex():
            taken[name] = value.detach().to("cpu", torch.float64, copy=True)
    return taken


# --- shapes and bytes -------------------------------------------------------------------------------

# above the 4096 elements from which some optimizers quantise, in whole blocks of 256, and the 128 columns from which
# some factor; each dimension of a size of its own
_LARGE: dict[int, tuple[int, ...]] = {1: (4352,), 2: (160, 128), 3: (32, 16, 12), 4: (32, 16, 4, 3)}


def _small(ndim: int) -> tuple[int, ...]:
    return {0: (), 1: (48,), 2: (6, 8), 3: (4, 3, 6)}.get(ndim, (2,) * (ndim - 3) + (3, 4, 5))


def _stand_in(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the synthetic parameter that stands for parameters of `shape`."""
    if math.prod(shape) < 4096:
        return _small(len(shape))
    return _LARGE.get(len(shape), (16, 8, 6, 4) + (2,) * (len(shape) - 4))


def _form(value: Any, stand_in: tuple[int, ...], dynamics: StateForm) -> StateForm | None:
    """None for what is no number: settings kept in the state."""
    tensors = [v for v in value if isinstance(v, Tensor)] if isinstance(value, (list, tuple)) else [value]
    if tensors and all(isinstance(t, Tensor) for t in tensors):
        parts = tuple((stored_bytes(t), tuple(t.shape)) for t in tensors)
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


def _normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _spread(shape: tuple[int, ...]) -> Tensor:
    """Values from 0.01 to 1 of both signs: gradients of one size would hide a rule that divides by their norm."""
    count = math.prod(shape)
    values = torch.logspace(-2, 0, count, dtype=torch.float32, device="cpu")
    values[::2] *= -1
    return values[torch.arange(count) * 7 % count if count % 7 else torch.arange(count)].reshape(shape)
