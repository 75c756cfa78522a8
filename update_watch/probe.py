"""How an optimizer's updates can be replayed, found out by trying it on a small synthetic training.

Three ways are tried, the cheapest first: on samples as one vector, on samples as a matrix, on whole tensors. Before
every synthetic step a replay is made, after it the two are compared. The first way that is always right is the rule's
kind. If none is, nothing may be said about this optimizer's updates, and the reason is kept. Nothing is guessed from
names, and the real optimizer is not touched.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from update_watch.replay import Run, Twin, without_effects
from update_watch.synthetic import Numbers, RuleError, Settings, World, mimic, resolving, sampled, small, uncounted
from update_watch.twin_copy import Copier, ReplayError

_STEPS = 13  # past the switches of RAdam (5), Lookahead (5, 6) and the like
_STEPS_SMALL = 4
_FEW = 256  # elements
_SECONDS = 1.0  # for one way; slow rules are tried on fewer steps
_STEPS_THERE = 3  # at each step the counters are moved to: the one before, it, the one after
TOLERANCE = 1e-5  # of the largest update; torch's own rules differ by exactly 0
_WIDE_TOLERANCE = 0.05  # the same where the rule keeps BF16 state, which replays hold in FP32
_ROUNDING = 2.0**-22  # of the stored value: two FP32 roundings, of vectorised against scalar arithmetic
_TYPICAL: dict[int, tuple[int, ...]] = {0: (1,), 1: (4096,), 2: (128, 128), 3: (32, 16, 32), 4: (32, 32, 3, 3)}
Shapes = tuple[tuple[int, ...], tuple[int, ...]]


class Kind(Enum):
    elementwise = "elementwise"
    whole = "whole"
    unknown = "unknown"


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the updates of one group's parameters of one shape can be replayed."""

    kind: Kind
    reason: str = ""
    rows: bool = False  # the samples must be given as a matrix, not as a vector
    element_states: frozenset[str] = frozenset()  # states with one value per weight
    error: float = 0.0  # largest difference seen, as a share of the largest update
    exact_states: frozenset[str] = frozenset()  # of `element_states`, those whose replay may be judged as well
    forms: Mapping[str, str] = dataclasses.field(default_factory=dict)  # state -> "element", "scalar" or "other"
    apart: bool = False  # scalar state differs by parameter, beyond step counts: replay each parameter on its own

    def misfit(self, param: Tensor, state: Mapping[str, Any]) -> str:
        """Why what was found out does not hold for this parameter, judged by its state; "" when it fits.

        A rule may treat large parameters otherwise (factored, quantised): it then keeps other state than in the probe.
        """
        plain = (Tensor, torch.nn.Parameter, type(param), type(param.data))
        for name, value in state.items():
            expected = self.forms.get(name)
            if expected is None and self.kind is Kind.elementwise:
                return f"its optimizer keeps state '{name}' for it, which was not met when the rule was probed"
            if not isinstance(value, Tensor):
                continue
            if expected == "element" and (value.shape != param.shape or type(value) not in plain):
                return f"state '{name}' is a {type(value).__name__} of shape {tuple(value.shape)}, not one value per weight"
            if expected == "scalar" and value.numel() != 1:
                return f"state '{name}' has {value.numel()} values, but was one number when the rule was probed"
        return ""


class _Way(Enum):
    flat = "samples as one vector"
    rows = "samples as a matrix"
    whole = "one whole tensor"


def probe(optimizer: Optimizer, group: int, ndim: int, *, shape: tuple[int, ...] | None = None) -> Rule:
    """Find out how parameters of `optimizer.param_groups[group]` can be replayed.

    Args:
        ndim: number of dimensions of the parameters.
        shape: their shape; without it a typical one, which may be on the other side of a limit the rule has
            (factored from 128 columns). Shapes of the same `synthetic.mimic` have the same rule.

    Costs 10 to 40 ms for torch's optimizers. Random states, parameters and optimizer state stay untouched.
    """
    shape = _TYPICAL[min(ndim, 4)] if shape is None else tuple(shape)
    reasons: list[str] = []
    for device in dict.fromkeys((torch.device("cpu"), _device(optimizer, group))):
        with without_effects(device):
            try:
                Twin(optimizer)
                settings = Settings(optimizer, group, small(shape), device)
                _refuse_unseen(settings)
                return _find(settings, shape)
            except ReplayError as error:
                reasons.append(str(error))
    return Rule(Kind.unknown, reasons[0])


def _find(settings: Settings, shape: tuple[int, ...]) -> Rule:
    """The first way that is right in every world."""
    starts = _starts(settings)
    # a few elements show little: what is said of them has to hold for a parameter of some size as well
    sizes = [] if math.prod(shape) >= _FEW else [small(_TYPICAL[min(len(shape), 4)])]
    reason = ReplayError()
    for way in _Way:
        if way is _Way.rows and len(shape) < 2:
            continue
        try:
            rules = []
            for start in starts:
                if way is _Way.whole:
                    rules += [_right(start._replace(shapes=s), way) for s in (*sizes, small(shape))]
                else:
                    _Trial(start, way).run(_STEPS_SMALL)  # most that will fail fail here, on few elements
                    rules += [_right(start._replace(shapes=s), way) for s in (*sizes, mimic(shape))]
            return _merged(rules)
        except ReplayError as error:
            reason = error
    raise reason


def _starts(settings: Settings) -> list[Settings]:
    """Worlds with the group's counters at their start and as they are now, where the rule runs with them at all."""
    starts: list[Settings] = []
    problems: list[RuleError] = []
    for change in (uncounted, lambda unchanged: unchanged):
        try:
            start = resolving(change(settings))
            starts += [start] if start not in starts else []
        except RuleError as error:
            problems.append(error)
    if not starts:
        raise problems[-1]
    return starts


def _right(settings: Settings, way: _Way) -> Rule:
    trial = _Trial(settings, way)
    trial.run(_STEPS)
    if trial.keeps_low_precision():
        _Trial(settings, way, widen=True).run(_STEPS_SMALL)
    return trial.rule()


def _merged(rules: list[Rule]) -> Rule:
    """What holds in all worlds; the last one is the one with the parameter's own shape."""
    return dataclasses.replace(
        rules[-1],
        error=max(rule.error for rule in rules),
        element_states=frozenset.intersection(*(rule.element_states for rule in rules)),
        exact_states=frozenset.intersection(*(rule.exact_states for rule in rules)),
        forms={name: form for rule in rules for name, form in rule.forms.items()},
        apart=any(rule.apart for rule in rules),
    )


class _Trial:
    """One synthetic training, replayed in one way. `widen`: low-precision state is replayed in FP32."""

    def __init__(self, settings: Settings, way: _Way, widen: bool = False) -> None:
        self.world = World(settings)
        self.way, self.widen = way, widen
        self.twin = Twin(self.world.optimizer)
        self.error = 0.0
        self.state_errors: dict[str, float] = {}
        self.forms: dict[str, str] = {}
        self.apart = False

    def run(self, steps: int) -> None:
        """Train, replay, compare. Raises `ReplayError` when a replay fails or differs."""
        started = time.perf_counter()
        for _ in range(steps):
            earlier = self.world.numbers()
            self._step()
            if time.perf_counter() - started > _SECONDS:
                return
        if steps == _STEPS:
            self._run_ahead(earlier)

    def _run_ahead(self, earlier: Numbers) -> None:
        """Move the step counters to where the rule may change its ways, and go on from there."""
        counters = [
            put for key, (value, put) in self.world.numbers().items() if key in earlier and value - earlier[key][0] == 1
        ]
        for target in self.world.targets() if counters else ():
            for put in counters:
                put(target - 2)
            for _ in range(_STEPS_THERE):
                try:
                    self._step()
                except ReplayError:
                    if self.world.can_step():
                        raise
                    return  # the rule itself fails there, as schedules of fixed length do

    def rule(self) -> Rule:
        """What a successful run has found."""
        is_whole = self.way is _Way.whole
        elements = frozenset(name for name, form in self.forms.items() if form == "element")
        exact = frozenset(name for name in elements if self.state_errors.get(name, math.inf) <= TOLERANCE)
        return Rule(
            Kind.whole if is_whole else Kind.elementwise,
            rows=self.way is _Way.rows,
            element_states=elements,
            error=self.error,
            exact_states=exact,
            forms=self.forms,
            apart=self.apart,
        )

    def keeps_low_precision(self) -> bool:
        """Some state is kept in fewer bits than FP32."""
        copier = Copier(None, widen=True)
        for state in self.world.states():
            copier.copy(list(state.values()), "the state")
        return copier.has_widened

    def _step(self) -> None:
        world = self.world
        world.set_gradients()
        before = world.look()
        replayed = self._replay()
        world.step()
        for name, form in world.forms().items():
            self.forms[name] = form if self.forms.get(name, form) == form else "other"
        for seen, start, after in zip(replayed, before, world.look(), strict=True):
            for name, stored in after.items():
                error = _difference(seen[name], stored, start.get(name)) if name in seen else math.inf
                if name:
                    self.state_errors[name] = max(self.state_errors.get(name, 0.0), error)
                else:
                    self.error = max(self.error, error)
        if self.error > (_WIDE_TOLERANCE if self.widen else TOLERANCE):
            raise ReplayError(
                f"{world.name} replayed on {self.way.value} differs from its own step by {self.error:.1e} of the update"
            )

    def _replay(self) -> list[dict[str, Tensor]]:
        """The step to come, replayed; values as from `World.look`."""
        count = len(self.world.params)
        if self.way is _Way.whole:
            values = [_values(self._replay_whole(i)) for i in range(count)]
            return [
                {name: sampled(value, at) for name, value in found.items()}
                for found, at in zip(values, self.world.drawn, strict=True)
            ]
        parts = [self._part(i) for i in range(count)]
        if _alike(*(part.state for part in parts)):
            result = _values(self._replay_parts(parts))
            return [{name: value.reshape(count, -1)[i] for name, value in result.items()} for i in range(count)]
        self.apart = True
        return [{k: v.reshape(-1) for k, v in _values(self._replay_parts([part])).items()} for part in parts]

    def _replay_whole(self, i: int) -> Run:
        param, state = self.world.params[i], self.world.states()[i]
        assert param.grad is not None
        if self.widen:
            return self.twin.replay_whole(0, param, param.grad, state)
        copier = Copier(None)
        copies = {name: copier.copy(value, f"state '{name}'") for name, value in state.items()}
        return self.twin.replay([Run(0, param.detach().clone(), param.grad.clone(), copies)])[0]

    def _part(self, i: int) -> Run:
        param, at, state = self.world.params[i], self.world.drawn[i], self.world.states()[i]
        assert param.grad is not None
        drawn: dict[str, Any] = {}
        for name, value in state.items():
            form = self.world.form(name)
            if form == "other":
                kind = f"{type(value).__name__} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "value"
                raise ReplayError(f"{self.world.name} keeps state '{name}', a {kind} that cannot be sampled")
            if form == "element" and value is not None:
                drawn[name] = sampled(value, at).float() if self.widen else sampled(value, at)
            else:
                drawn[name] = value.clone() if isinstance(value, Tensor) else value
        return Run(0, sampled(param.detach(), at), sampled(param.grad, at), drawn)

    def _replay_parts(self, parts: list[Run]) -> Run:
        def joined(tensors: list[Tensor]) -> Tensor:
            stacked = torch.stack(tensors)
            return stacked if self.way is _Way.rows else stacked.reshape(-1)

        state = {
            name: joined([part.state[name] for part in parts]) if _is_element(value, parts[0].param) else value
            for name, value in parts[0].state.items()
        }
        grads = [part.grad for part in parts if part.grad is not None]
        return self.twin.replay([Run(0, joined([part.param for part in parts]), joined(grads), state)])[0]


def _is_element(value: Any, part: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == part.shape


def _alike(first: dict[str, Any], *others: dict[str, Any]) -> bool:
    """The states differ in nothing but values that come one per weight."""
    for other in others:
        if list(first) != list(other):
            return False
        for name, value in first.items():
            mine, theirs = (v if isinstance(v, Tensor) and v.numel() == 1 else None for v in (value, other[name]))
            if mine is not None and theirs is not None:
                if not torch.equal(mine, theirs):
                    return False
            elif isinstance(value, Tensor) != isinstance(other[name], Tensor):
                return False
            elif not isinstance(value, Tensor) and value != other[name]:
                return False
    return True


def _values(run: Run) -> dict[str, Tensor]:
    """The replayed weight under "", and every state with as many values."""
    states = {k: v for k, v in run.state.items() if type(v) is Tensor and v.shape == run.param.shape}
    return {"": run.param, **states}


def _difference(replayed: Tensor, stored: Tensor, start: Tensor | None) -> float:
    """Largest difference beyond rounding, as a share of the largest change; equal NaNs do not differ."""
    replayed, stored = replayed.float(), stored.float()
    if torch.equal(replayed, stored):
        return 0.0
    difference = (replayed - stored).abs() - stored.abs() * _ROUNDING
    unequal = difference[~(replayed.isnan() & stored.isnan())]
    worst = float(unequal.max()) if unequal.numel() else 0.0
    if not worst > 0:
        return math.inf if math.isnan(worst) else 0.0
    largest = float((stored if start is None else stored - start.float()).abs().max())
    return worst / largest if largest > 0 else math.inf


def _device(optimizer: Optimizer, group: int) -> torch.device:
    params = optimizer.param_groups[group]["params"]
    return params[0].device if params and params[0].device.type != "meta" else torch.device("cpu")


def _refuse_unseen(settings: Settings) -> None:
    """Raise `ReplayError` for what a replay cannot give to the rule: talk with other ranks, marks on parameters."""
    cls = type(settings.optimizer)
    if cls.__module__.startswith("torch.optim."):
        return
    looked_up: set[str] = set()

    class Listening(torch.nn.Parameter):
        __torch_function__ = torch._C._disabled_torch_function_impl

        def __getattr__(self, name: str) -> Any:  # only asked for what a parameter does not have
            looked_up.add(name)
            raise AttributeError(name)

    world = World(settings, Listening)
    try:
        with _NoCommunication() if torch.distributed.is_available() and torch.distributed.is_initialized() else nullcontext():
            for _ in range(2):
                world.set_gradients()
                world.step()
    except ReplayError as error:
        if isinstance(error.__cause__, _Communicates):
            raise ReplayError(f"{cls.__name__} talks to other processes in its step") from error
    for param in settings.optimizer.param_groups[settings.group]["params"]:
        if marks := looked_up & set(getattr(param, "__dict__", ())):
            raise ReplayError(f"{cls.__name__} reads {sorted(marks)} from its parameters, which samples do not have")


class _Communicates(RuntimeError):
    pass


class _NoCommunication(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            raise _Communicates(str(func))
        return func(*args, **(kwargs or {}))
