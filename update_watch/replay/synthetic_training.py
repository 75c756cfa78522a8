"""A small synthetic training of two FP32 parameters, in which an optimizer's rule can be tried without harm.

The optimizer is a twin with the real one's hyperparameters; the parameters are shaped like the real one, bounded in
size. Gradients are made to expose rules that are elementwise only at first sight: scales that differ between
parameters, rows and columns and jump from step to step (clipping, trust ratios), and zeros. Step counters can be moved
ahead to where a setting says that the rule may change its ways (warm-up, a projection every 200 steps).
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.odd_tensors import unreadable
from update_watch.replay.absent import Absent, AbsentError, ReplayError, asks_for_closure
from update_watch.replay.attribute_copy import Copier
from update_watch.replay.kept_states import states_of
from update_watch.replay.optimizer_copy import copy_of, rule_of, settings_of
from update_watch.replay.premade_state import state_for

SAMPLES = 96  # elements looked at in each parameter
# gradients by step: their scale, and how they lie to those of the step before and to the weights
_GRADIENTS = (
    (1.0, "new"),
    (0.3, "same"),
    (1.0, "nearly orthogonal"),  # to each row of the weights: what AdamP and SGDP project
    (10.0, "new"),
    (1.0, "same"),  # a steady direction lets learning rates grow that adapt themselves
    (1.0, "same"),
    (1e-2, "new"),
    (1.0, "along"),
    (1e-3, "new"),
    (1.0, "nearly orthogonal"),
    (0.0, "new"),
    (1.0, "same"),
    (1.0, "new"),
)
_WEIGHTS = (0.05, 0.2)  # rms of the two parameters: small, so that FP32 resolves their updates
_RESOLVED = 1e-3  # of the weights' rms; smaller updates drown in rounding, and every rule looks like any other
_FAR = 1000  # a step that divides by most of what rules count in
_MOST_TARGETS = 6
_HUGE = 1e300  # counted in nothing; Python's whole numbers may be too large for a float


# (place, name) -> value and what sets it
Counters = dict[tuple[int, str], tuple[float, Callable[[float], None]]]


class RuleError(ReplayError):
    """The rule itself cannot be run in this training."""


class TrainingSettings(NamedTuple):
    """What a training is made of."""

    optimizer: Optimizer
    group: int  # index in optimizer.param_groups
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    device: torch.device
    instead: Mapping[str, Any] = {}  # group settings replaced; a value of None leaves the setting out
    lr_factor: float = 1.0
    gradient: float = 1.0  # scale of all gradients
    dtype: torch.dtype = torch.float32  # of parameters and gradients
    premade: Mapping[str, Any] = {}  # state that the optimizer makes with itself, for every parameter alike
    is_gentle: bool = False  # fresh gradients of one scale only, for rules that break on others
    skips_first: bool = False  # the first step is not compared: it may set up what the later ones go by


class SyntheticTraining:
    """Two synthetic parameters and the optimizer that trains them."""

    def __init__(self, settings: TrainingSettings, cls: type[torch.nn.Parameter] = torch.nn.Parameter) -> None:
        generator = torch.Generator().manual_seed(0)
        optimizer, device = settings.optimizer, settings.device

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

        self.device = device
        self.name = type(optimizer).__name__
        self.params = [
            cls((normal(*shape) * rms).to(device, settings.dtype))
            for shape, rms in zip(settings.shapes, _WEIGHTS, strict=True)
        ]
        self.drawn = [_draw(p.numel(), generator).to(device) for p in self.params]
        self._dtype = settings.dtype
        self._profiles = [_profile(shape, normal) for shape in settings.shapes]
        self._noise = normal(max(p.numel() for p in self.params) + 1024)
        self._noise[3::7] = 0.0
        self._rule = rule_of(optimizer)
        copier = Copier(None, optimizer=optimizer)
        group = settings_of(optimizer.param_groups[settings.group], list(self.params), copier)
        _adapt(group, settings)
        self.optimizer = copy_of(optimizer, [group], None, copier, are_synthetic=True)
        for key, value in optimizer.state.items():
            if not isinstance(key, Tensor):  # state of all parameters together
                self.optimizer.state[key] = copier.copy(value, f"state '{key}'")
        for param in self.params if settings.premade else ():
            # each its own: a counter that two parameters share would be counted twice
            self.optimizer.state[param] = state_for(param, settings.premade, Copier(None, optimizer=optimizer))
        self._gradients = ((1.0, "new"),) if settings.is_gentle else _GRADIENTS
        self._scale = settings.gradient
        self.steps = 0
        self._start = 0

    @property
    def _format(self) -> str:
        return "FP32" if self._dtype is torch.float32 else str(self._dtype).removeprefix("torch.")

    @property
    def group(self) -> dict[str, Any]:
        """The one parameter group."""
        return self.optimizer.param_groups[0]

    def states(self) -> list[dict[str, Any]]:
        """The state of each parameter."""
        states = states_of(self.optimizer)
        return [states.get(param) or {} for param in self.params]

    def form(self, name: str) -> str:
        """ "element": one FP value per weight; "scalar": one number; "none": None so far; "other": anything else."""
        forms = {_form(s[name], p) for s, p in zip(self.states(), self.params, strict=True) if name in s}
        forms = forms - {"none"} or {"none"}
        return forms.pop() if len(forms) == 1 else "other"

    def forms(self) -> dict[str, str]:
        """The form of every state there is."""
        return {name: self.form(name) for name in dict.fromkeys(n for state in self.states() for n in state)}

    def look(self) -> list[dict[str, Tensor]]:
        """Per parameter the values at `drawn`: of the weight under "", of states with one value per weight."""
        names = [name for name, form in self.forms().items() if form == "element"]
        return [
            {"": sampled(param.detach(), at)}
            | {n: sampled(state[n], at) for n in names if isinstance(state.get(n), Tensor)}
            for param, state, at in zip(self.params, self.states(), self.drawn, strict=True)
        ]

    # --- training ---------------------------------------------------------------------------------

    def set_gradients(self) -> None:
        """Gradients of the next step."""
        scale, direction = self._gradients[self.steps % len(self._gradients)]
        scale *= self._scale
        if direction != "same":
            self._start = self.steps * 131 % 512
        for i, (param, factor) in enumerate(zip(self.params, (1.0, 20.0), strict=True)):
            start = self._start + 512 * i
            noise = self._noise[start : start + param.numel()].view(param.shape)
            grad = (noise * self._profiles[i]).mul_(scale * factor).to(self.device)
            if direction == "along":
                grad = param.detach().float() * (scale * factor)
            elif direction == "nearly orthogonal":
                grad = _turned(grad, param.detach().float())
            param.grad = grad.to(self._dtype)

    def step(self) -> None:
        """One step of the rule. Raises `RuleError` when it fails."""
        try:
            self._rule(self.optimizer)
        except AbsentError as error:
            raise RuleError(str(error)) from error
        except Exception as error:
            if asks_for_closure(functools.partial(self._rule, self.optimizer)):
                raise RuleError(
                    f"the step of {self.name} calls a closure that evaluates the model, and a replay has none"
                ) from error
            if "dense gradients" in str(error):  # no fault of it, and none of the trial
                raise RuleError(f"{self.name} takes sparse gradients, of which no step is replayed") from error
            raise RuleError(f"{self.name} fails on a plain {self._format} parameter: {error!r}") from error
        self.steps += 1
        if not all(bool(param.isfinite().all()) for param in self.params):
            raise RuleError(f"{self.name} makes a plain {self._format} parameter infinite or NaN")

    # --- counting ---------------------------------------------------------------------------------

    def numbers(self) -> Counters:
        """Every number the rule could count steps in."""
        found: Counters = {}
        states = [self.optimizer.state.get(param) or {} for param in self.params]  # to be written to
        for i, place in enumerate((self.group, vars(self.optimizer), *states)):
            for name, value in place.items():
                if type(value) is Absent:
                    continue
                if type(value) is Tensor and not unreadable(value) and value.numel() == 1 and value.dim() == 0:
                    if not value.is_complex():
                        found[i, name] = (float(value), _filler(value))
                elif isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _HUGE:
                    found[i, name] = (float(value), _setter(place, name, type(value)))
        return found

    def targets(self) -> list[int]:
        """Steps at which the rule may change its ways: the whole numbers among its settings, and one far away."""
        found: set[int] = set()
        for place in (self.group, vars(self.optimizer)):
            found.update(n for n in _whole_numbers(place.values(), 0) if self.steps < n <= 10**6)
        return [*sorted(found)[:_MOST_TARGETS], _FAR]


@functools.lru_cache(1024)  # models repeat their shapes
def mimic(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that a rule should treat like `shape`, each of at most some 20,000 elements.

    Sizes up to 128 stay as they are: rules ask for dimensions from 128, and for 4096 elements.
    """
    return _bounded(shape, 4096 if len(shape) == 1 else 128, 16384)


def small(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The same with at most some thousand elements, for rules whose cost grows faster than the parameter."""
    return _bounded(shape, 256 if len(shape) == 1 else 32, 1024)


def _bounded(shape: tuple[int, ...], size_limit: int, limit: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    sizes: list[int] = [min(size, size_limit) for size in shape] or [1]
    while math.prod(sizes) > limit:
        largest = sizes.index(max(sizes))
        sizes[largest] = (sizes[largest] + 1) // 2
    # larger in one dimension: a state that is no copy of the parameter's shape cannot have the shape of both
    other = list(sizes)
    largest = sizes.index(max(sizes))
    other[largest] += max(other[largest] // 4, 1)
    return tuple(sizes), tuple(other)


def sampled(tensor: Tensor, at: Tensor) -> Tensor:
    """The elements of `tensor` at the positions `at`, counted in row-major order."""
    return tensor.reshape(-1)[at]


def resolving(settings: TrainingSettings) -> TrainingSettings:
    """The settings with a learning rate that makes updates large enough for FP32 to resolve."""
    training = SyntheticTraining(settings)
    largest = 0.0
    for _ in range(2):
        before = [p.detach().clone() for p in training.params]
        training.set_gradients()
        training.step()
        for param, start, rms in zip(training.params, before, _WEIGHTS, strict=True):
            largest = max(largest, float((param.detach() - start).abs().max()) / rms)
    if largest >= _RESOLVED or not math.isfinite(largest):
        return settings
    return settings._replace(lr_factor=min(10 * _RESOLVED / largest, 1e9) if largest else 1e6)


def uncounted(settings: TrainingSettings) -> TrainingSettings:
    """The settings with everything the rule itself writes into a group (counters, buffers) as it was at the start."""
    defaults = settings.optimizer.defaults
    group = settings.optimizer.param_groups[settings.group]
    fresh = {name: defaults.get(name) for name in group if name != "params" and group[name] is not defaults.get(name)}
    if not fresh:
        return settings
    training = SyntheticTraining(settings._replace(instead=fresh))
    before = dict(training.group)
    for _ in range(2):
        training.set_gradients()
        training.step()
    written = [name for name in fresh if name not in before or training.group.get(name) is not before[name]]
    return settings._replace(instead={name: fresh[name] for name in written})


def _adapt(group: dict[str, Any], settings: TrainingSettings) -> None:
    for name, value in settings.instead.items():
        if value is None:
            group.pop(name, None)
        else:
            group[name] = value
    for name, value in group.items():
        if type(value) is not Absent and isinstance(value, Tensor):
            group[name] = value.to(settings.device)
    if settings.device.type == "cpu" and "capturable" in group:
        group["capturable"] = False  # only accelerators have it; same arithmetic
    lr = group.get("lr")
    if isinstance(lr, (float, int, Tensor)):
        if not float(lr) > 0:  # warm-up begins at zero
            lr = torch.full_like(lr, 1e-3) if isinstance(lr, Tensor) else 1e-3
        group["lr"] = lr * settings.lr_factor if settings.lr_factor != 1.0 else lr


def _profile(shape: tuple[int, ...], normal: Callable[..., Tensor]) -> Tensor:
    # gradient scales that differ along every dimension
    profile = torch.ones(shape, dtype=torch.float32, device="cpu")
    for dim, size in enumerate(shape):
        profile = profile * normal(size).exp().view([size if d == dim else 1 for d in range(len(shape))])
    return profile


def _turned(grad: Tensor, weight: Tensor) -> Tensor:
    """`grad` with cosines of 0.03 / sqrt(row length) to the rows of the weight."""
    weight_RC, grad_RC = (t.reshape(len(t), -1) if t.dim() > 1 else t.reshape(1, -1) for t in (weight, grad))
    if grad_RC.shape[1] == 1:
        return grad
    unit_RC = weight_RC / weight_RC.norm(dim=1, keepdim=True)
    across_RC = grad_RC - (grad_RC * unit_RC).sum(1, keepdim=True) * unit_RC
    along_R1 = across_RC.norm(dim=1, keepdim=True) * (0.03 / math.sqrt(grad_RC.shape[1]))
    turned: Tensor = (across_RC + along_R1 * unit_RC).view(weight.shape)
    return turned


def _draw(numel: int, generator: torch.Generator) -> Tensor:
    # small parameters are read whole and padded with their first element, as in the samples of real ones
    drawn = torch.randperm(numel, generator=generator, device="cpu")[:SAMPLES]
    return torch.cat([drawn, drawn.new_zeros(SAMPLES - len(drawn))])


def _form(value: Any, param: Tensor) -> str:
    if value is None:
        return "none"
    if type(value) is Tensor:
        if unreadable(value):
            return "other"
        if value.shape == param.shape and value.dtype.is_floating_point:
            return "element"
        return "scalar" if value.numel() == 1 else "other"
    return "scalar" if isinstance(value, (numbers.Number, str)) else "other"


def _setter(place: dict[str, Any], name: str, kind: type) -> Callable[[float], None]:
    def put(value: float) -> None:
        place[name] = kind(value)

    return put


def _filler(tensor: Tensor) -> Callable[[float], None]:
    def put(value: float) -> None:
        tensor.fill_(value)

    return put


def _whole_numbers(values: Any, depth: int) -> Iterator[int]:
    for value in values:
        if type(value) is Absent:
            continue
        if type(value) is int:
            yield value
        elif isinstance(value, (list, tuple, dict)) and depth < 2:
            yield from _whole_numbers(value.values() if isinstance(value, dict) else value, depth + 1)
