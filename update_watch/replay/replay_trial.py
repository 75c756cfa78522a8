"""One synthetic training in which every step is replayed first, in one way, and compared afterwards."""

from __future__ import annotations

import math
import random
import time
from contextlib import suppress
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from update_watch import formats
from update_watch.odd_tensors import described, unreadable
from update_watch.replay.absent import AbsentError, CopySteppedError, ReplayError
from update_watch.replay.attribute_copy import Copier
from update_watch.replay.synthetic_training import Counters, RuleError, SyntheticTraining, TrainingSettings, sampled
from update_watch.replay.twin import Run, Twin

STEPS = 13  # past the switches of RAdam (5), Lookahead (5, 6) and the like
TOLERANCE = 1e-5  # of the largest update; torch's own rules differ by exactly 0
_WIDE_TOLERANCE = 0.05  # the same where the rule keeps BF16 state, which replays hold in FP32
_STEPS_THERE = 3  # at each step the counters are moved to: the one before, it, the one after
_STANDING, _NEAR = 1e-8, 0.01  # of the learning rate, and of the weight: where a copy of it stays
_SECONDS = 1.0  # of this thread, whatever else the machine does, for one training; slow rules are tried on fewer steps
_LARGE = 0.25  # of the weights' rms: updates that any rounding lets pass
_FINE = 2.0**-13  # of the weights' rms: updates that FP32 holds, and no coarser grid
_ROUNDING = 2.0**-22  # of the stored value: two FP32 roundings, of vectorised against scalar arithmetic


class Way(Enum):
    flat = "samples as one vector"
    rows = "samples as a matrix"
    whole = "one whole tensor"
    together = "all whole tensors together"


class ReplayTrial:
    """One synthetic training, replayed in one way. `widen`: low-precision state is replayed in FP32."""

    def __init__(self, settings: TrainingSettings, way: Way, widen: bool = False) -> None:
        self.training = SyntheticTraining(settings)
        self.settings, self.way, self.widen = settings, way, widen
        self._start = [param.detach().clone() for param in self.training.params]
        self.twin = Twin(self.training.optimizer)
        self.error = 0.0
        self.state_errors: dict[str, float] = {}
        self.forms: dict[str, str] = {}
        self.apart = False
        self.skips_first = settings.skips_first  # or, found here: only the first step draws random numbers, for states
        self._is_native = type(settings.optimizer).__module__.startswith("torch.optim")

    def run(self, steps: int) -> None:
        """Train, replay, compare. Raises `ReplayError` when a replay fails or differs."""
        started = time.thread_time()
        for _ in range(steps):
            earlier = self.training.numbers()
            self._step()
            if time.thread_time() - started > _SECONDS:
                return
        if steps == STEPS:
            self._run_ahead(earlier)

    def _run_ahead(self, earlier: Counters) -> None:
        """Move the step counters to where the rule may change its ways, and go on from there."""
        counters = [
            put
            for key, (value, put) in self.training.numbers().items()
            if key in earlier and value - earlier[key][0] == 1
        ]
        for target in self.training.targets() if counters else ():
            for put in counters:
                put(target - 2)
            for _ in range(_STEPS_THERE):
                try:
                    self._step()
                except RuleError:
                    return  # as schedules of fixed length do

    def refuse_rounded(self) -> None:
        """Raise `ReplayError` where the rule rounds its FP32 weights to fewer bits, or to another grid: its replay would lose what
        the step loses, and call that the update.
        """
        values = torch.cat([param.detach().reshape(-1) for param in self.training.params])
        for dtype in formats.HALVES if values.dtype is torch.float32 and bool(values.any()) else ():
            if torch.equal(values.to(dtype).float(), values):
                fmt = str(dtype).removeprefix("torch.")
                raise ReplayError(
                    f"{self.training.name} rounds FP32 weights to {fmt}, and would round those of a replay"
                )
        if not self._is_native and _stays_at_small_steps(self.settings):
            raise ReplayError(
                f"{self.training.name} rounds FP32 weights to a grid of its own, and would round those of a replay"
            )

    def refuse_unmoved(self) -> None:
        """Raise `CopySteppedError` where no weight has moved, but a state that began as the weight has."""
        params = self.training.params
        if not all(torch.equal(param.detach(), start) for param, start in zip(params, self._start, strict=True)):
            return
        slow = SyntheticTraining(self.settings._replace(lr_factor=_STANDING))
        slow.set_gradients()
        slow.step()
        each = zip(self._start, self.training.states(), slow.states(), strict=True)
        for name in set.intersection(*(_copies(start, *states) for start, *states in each)):
            raise CopySteppedError(
                f"in its trial {self.training.name} stepped a copy of the weight and never the weight (its state '{name}')"
            )

    def fails_in_fp64(self) -> bool:
        """Whether the rule does not run on FP64 samples, by which what FP32 weights lose is seen: it may cast to FP32 itself."""
        if self._is_native or self.way not in (Way.flat, Way.rows):
            return False
        self.training.set_gradients()
        parts = [self._part(i) for i in range(len(self.training.params))]
        try:
            for part in parts:
                state = {k: v.double() if is_element(v, part.param) else v for k, v in part.state.items()}
                assert part.grad is not None
                self._replay_parts([part._replace(param=part.param.double(), grad=part.grad.double(), state=state)])
        except ReplayError:
            return True
        return False

    def low_states(self) -> frozenset[str]:
        """Those that are kept in fewer bits than FP32."""
        found = set()
        for name, value in ((name, value) for state in self.training.states() for name, value in state.items()):
            copier = Copier(None, widen=True)
            copier.copy([value], "the state")
            if copier.has_widened:
                found.add(name)
        return frozenset(found)

    def _step(self) -> None:
        training = self.training
        training.set_gradients()
        if self.settings.skips_first and training.steps == 0:
            training.step()
            if not all(training.states()):  # by which the first step of a real parameter is known
                raise ReplayError(f"{training.name} keeps no state that tells a first step from others")
            return
        before = training.look()
        try:
            self._seed(1)
            replayed = self._replay()
        except ReplayError:
            training.step()  # if the rule itself fails here, that is the reason
            raise
        is_drawn_start = training.steps == 0 and self.twin.has_drawn
        self._seed(2)
        training.step()
        for name, form in training.forms().items():
            known = self.forms.get(name, "none")
            self.forms[name] = form if known in (form, "none") else known if form == "none" else "other"
        errors: dict[str, float] = {}
        for seen, start, after in zip(replayed, before, training.look(), strict=True):
            for name, stored in after.items():
                error = _difference(seen[name], stored, start.get(name)) if name in seen else math.inf
                errors[name] = max(errors.get(name, 0.0), error)
        if is_drawn_start and max(errors.values()) > TOLERANCE:
            # states that are drawn at the start can be replayed from the next step on
            self.skips_first, self.twin.has_drawn = True, False
            return
        self.error = max(self.error, errors.pop("", 0.0))
        for name, error in errors.items():
            self.state_errors[name] = max(self.state_errors.get(name, 0.0), error)
        if self.error > (_WIDE_TOLERANCE if self.widen else TOLERANCE):
            if self.twin.has_drawn:
                raise ReplayError(f"{training.name} draws random numbers in its step, and a replay draws others")
            if self.twin.has_drawn_of_its_own:
                raise ReplayError(
                    f"{training.name} draws random numbers from a generator of its own, and a replay of less than all tensors"
                    " draws others"
                )
            raise ReplayError(
                f"{training.name} replayed on {self.way.value} differs from its own step by {self.error:.1e} of the update"
            )

    def _seed(self, seed: int) -> None:
        # a replay must not be right because it happens to draw what the step draws
        if not self._is_native:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)

    def _replay(self) -> list[dict[str, Tensor]]:
        """The step to come, replayed; values as from `SyntheticTraining.look`."""
        count = len(self.training.params)
        if self.way in (Way.whole, Way.together):
            together = self.way is Way.together
            runs = self._replay_together() if together else [self._replay_whole(i) for i in range(count)]
            values = [_values(run) for run in runs]
            return [
                {name: sampled(value, at) for name, value in found.items()}
                for found, at in zip(values, self.training.drawn, strict=True)
            ]
        parts = [self._part(i) for i in range(count)]
        if alike(*(part.state for part in parts)):
            result = _values(self._replay_parts(parts))
            return [{name: value.reshape(count, -1)[i] for name, value in result.items()} for i in range(count)]
        self.apart = True
        return [{k: v.reshape(-1) for k, v in _values(self._replay_parts([part])).items()} for part in parts]

    def _replay_whole(self, i: int) -> Run:
        param, state = self.training.params[i], self.training.states()[i]
        assert param.grad is not None
        return self.twin.replay_whole(0, param, param.grad, state, widen=self.widen, may_draw=True)

    def _replay_together(self) -> list[Run]:
        params = zip(self.training.params, self.training.states(), strict=True)
        return self.twin.replay_together([Run(0, p.detach(), p.grad, state) for p, state in params], widen=self.widen)

    def _part(self, i: int) -> Run:
        param, at, state = self.training.params[i], self.training.drawn[i], self.training.states()[i]
        assert param.grad is not None
        drawn: dict[str, Any] = {}
        for name, value in state.items():
            form = self.training.form(name)
            if form == "other":
                kind = described(value) if isinstance(value, Tensor) else "a value"
                raise ReplayError(f"{self.training.name} keeps state '{name}', {kind} that cannot be sampled")
            if form == "element" and value is not None:
                drawn[name] = sampled(value, at).float() if self.widen else sampled(value, at)
            else:
                drawn[name] = value.clone() if isinstance(value, Tensor) else value
        return Run(0, sampled(param.detach(), at), sampled(param.grad, at), drawn)

    def _replay_parts(self, parts: list[Run]) -> Run:
        def joined(tensors: list[Tensor]) -> Tensor:
            stacked = torch.stack(tensors)
            return stacked if self.way is Way.rows else stacked.reshape(-1)

        state = {
            name: joined([part.state[name] for part in parts]) if is_element(value, parts[0].param) else value
            for name, value in parts[0].state.items()
        }
        grads = [part.grad for part in parts if part.grad is not None]
        return self.twin.replay([Run(0, joined([part.param for part in parts]), joined(grads), state, may_draw=True)])[
            0
        ]


def is_element(value: Any, part: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == part.shape


def alike(first: dict[str, Any], *others: dict[str, Any]) -> bool:
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


def _copies(start: Tensor, moved: dict[str, Any], slow: dict[str, Any]) -> set[str]:
    """States that began as the weight and have moved: at hardly any learning rate they are still where it is."""
    found = set()
    for name, value in slow.items():
        if isinstance(value, Tensor) and not unreadable(value) and value.shape == start.shape and name in moved:
            is_near = (value.float() - start.float()).norm() < _NEAR * start.float().norm()
            if is_near and not torch.equal(moved[name].float(), start.float()):
                found.add(name)
    return found


def _values(run: Run) -> dict[str, Tensor]:
    """The replayed weight under "", and every state with as many values."""
    states = {
        k: v for k, v in run.state.items() if type(v) is Tensor and not unreadable(v) and v.shape == run.param.shape
    }
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


def _ways(settings: TrainingSettings) -> Tensor:
    """How far elements come in the second and third step, by the rms of their weight: the first may put them on a grid."""
    training = SyntheticTraining(settings)
    sizes = [p.detach().square().mean().sqrt() for p in training.params]
    before: list[Tensor] = []
    for _ in range(3):
        training.set_gradients()
        training.step()
        before = before or [p.detach().clone() for p in training.params]
    each = zip(training.params, before, sizes, strict=True)
    return torch.cat([((p.detach() - b).abs() / size).reshape(-1) for p, b, size in each])


def _stays_at_small_steps(settings: TrainingSettings) -> bool:
    """Whether most weights that large updates move do not move under small ones, and the others do so by leaps."""
    for power in range(12):
        large = _ways(settings._replace(lr_factor=64.0**power))
        if not (size := float(large.median())) < _LARGE:
            break
    if not 0 < size < math.inf:
        return False
    factor = 64.0**power * _FINE / size
    small = _ways(settings._replace(lr_factor=factor))
    if float(small[large > 0].eq(0).float().mean()) <= 0.5:
        return False
    while not bool(small.any()) and factor < 1e30:
        factor *= 8.0
        small = _ways(settings._replace(lr_factor=factor))
    return bool(small.any()) and float(small[small > 0].min()) > _FINE / 8  # what FP32 takes begins far below


def refuse_marks(settings: TrainingSettings) -> None:
    """Raise `AbsentError` when the rule asks its parameters for attributes that samples would not have."""
    looked_up: set[str] = set()

    class Listening(torch.nn.Parameter):
        __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch does itself

        def __getattr__(self, name: str) -> Any:  # only asked for what a parameter does not have
            looked_up.add(name)
            raise AttributeError(name)

    training = SyntheticTraining(settings, Listening)
    with suppress(RuleError):
        for _ in range(2):
            training.set_gradients()
            training.step()
    for param in settings.optimizer.param_groups[settings.group]["params"]:
        if marks := looked_up & set(getattr(param, "__dict__", ())):
            raise AbsentError(f"{training.name} reads {sorted(marks)} from its parameters, which samples do not have")
