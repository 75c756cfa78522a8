"""What an FP32 accumulator would have been told to add: the optimizer's own rule, run once more on FP32 copies.

No formula is written here. A twin of the optimizer is made without running `__init__` (same class, same attributes,
same hyperparameters, no hooks) and given FP32 copies of weights, gradients and state; its `step` is the rule itself.
Elementwise rules are run on the samples alone, all samples of like parameters joined into one parameter.
Rules that look at a whole tensor are run on whole tensors. Which of the two an optimizer is, `probe` finds out.

The twin shares nothing that can be written with the real optimizer: hyperparameters, counters, containers and tensor
attributes are copied at every replay (`twin_copy`), random number generators are put back, and no hook fires.
"""

from __future__ import annotations

import random
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as _torch_optimizer

from update_watch.replay.copier import Copier, ReplayError, is_plain

__all__ = ["ReplayError", "Run", "Settings", "Twin", "rule_of", "settings_of", "shell", "without_effects"]

# attributes of torch.optim.Optimizer that the twin gets anew
_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
_OWN = frozenset({"param_groups", "state", *_HOOKS})
_SCALING = frozenset({"grad_scale", "found_inf"})  # set by a GradScaler for one step
# every function wrapped by torch to call step hooks runs this code
_HOOKED_CODE = Optimizer.profile_hook_step(lambda _: None).__code__
_LIMIT = 4096  # elements of tensor attributes; more would be too much to copy at every step


Settings = dict[int, dict[str, Any]]  # index in optimizer.param_groups -> copies of the group's settings


class Run(NamedTuple):
    """Parameters of one group replayed as one parameter; `param` and `state` are overwritten by `replay`."""

    group: int  # index in optimizer.param_groups
    param: Tensor  # FP32, any shape
    grad: Tensor | None  # FP32, same shape; the rule may write into it
    state: dict[str, Any]  # per-element tensors in FP32, scalars as they are


def rule_of(optimizer: Optimizer) -> Callable[..., Any]:
    """The class's `step` without torch's hook-calling wrapper.

    A learning-rate scheduler's wrapper sits on the instance and is not met. Only torch's own wrapper is taken off:
    a decorator of the user's is part of the rule, even where `functools.wraps` gave it the same marks.
    """
    step: Any = type(optimizer).step
    while getattr(step, "__code__", None) is _HOOKED_CODE:
        step = step.__wrapped__
    return step  # type: ignore[no-any-return]


class Twin:
    """Replays one optimizer. Built once; `replay` may be called at every step.

    Raises `ReplayError` at construction when the optimizer keeps something that cannot be copied at each step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._rule = rule_of(optimizer)
        self._name = type(optimizer).__name__
        # torch's own rules draw no random numbers, compile nothing and call no other step
        self._is_native = type(optimizer).__module__.startswith("torch.optim")
        self._shell = shell(optimizer, [])
        self._seen = self._attributes()
        for group in optimizer.param_groups:
            settings_of(group, [], Copier(_LIMIT, optimizer=optimizer))

    @property
    def can_wait(self) -> bool:
        """A step can be replayed later, given the `settings` it was taken with: the rule depends on nothing else."""
        return self._is_native

    def settings(self, groups: Iterable[int]) -> Settings:
        """Settings of some groups as they are now, for a later `replay`."""
        copier = Copier(_LIMIT, optimizer=self._optimizer)
        return {i: settings_of(self._optimizer.param_groups[i], [], copier) for i in groups}

    def replay(
        self, runs: Sequence[Run], changes: Mapping[str, Any] | None = None, settings: Settings | None = None
    ) -> list[Run]:
        """Run the rule on copies, with some settings of its groups changed (`{"weight_decay": 0.0}`).

        `settings`: those of an earlier step; None: as they are now.
        `param`, `grad` and `state` tensors are updated in place where the rule does so; read the returned runs, which
        hold whatever the rule left. Containers in `state` are copied first. Raises `ReplayError` when the rule fails.
        """
        return self._run(_owning(runs), changes, settings)

    def replay_steps(self, runs: Sequence[Run], steps: Iterable[Settings]) -> list[Run]:
        """Several steps in a row, for a rule that can wait: half the work of one `replay` each.

        `steps` puts a step's gradients (and weights) into the tensors of `runs` and gives its settings. Else as `replay`.
        """
        params, members, state = _parameters(runs := _owning(runs))
        groups: list[dict[str, Any]] = []
        try:
            for settings in steps:
                if not groups:
                    groups = [{**settings[i], "params": group} for i, group in members.items()]
                    copier = Copier(_LIMIT, optimizer=self._optimizer)
                    twin = self._native(groups, state, copier, is_earlier=True)
                else:
                    for i, group in zip(members, groups, strict=True):
                        group.update(settings[i], params=members[i])
                self._rule(twin)
        except ReplayError:
            raise
        except Exception as error:
            raise ReplayError(f"{self._name} fails on FP32 copies: {error!r}") from error
        return _results(runs, params, state)

    def replay_whole(
        self, group: int, param: Tensor, grad: Tensor, state: dict[str, Any], *, widen: bool = True
    ) -> Run:
        """Run the rule on FP32 copies of a whole parameter, its gradient and all of its state; nothing is overwritten.

        `widen`: state below FP32 is widened as well, also inside lists and objects. Integers and tensor subclasses
        (quantised state) are copied as they are. Raises `ReplayError` when the rule fails.
        """
        copier = Copier(None, widen=widen)
        copies = {name: copier.copy(value, f"state '{name}'") for name, value in state.items()}
        run = Run(group, _widened(param.detach()), _widened(grad.detach()), copies)
        return self._run([run], _eps_of(self._optimizer.param_groups[group], param.dtype))[0]

    def _run(
        self, runs: Sequence[Run], changes: Mapping[str, Any] | None = None, settings: Settings | None = None
    ) -> list[Run]:
        params, members, state = _parameters(runs)
        try:
            copier = Copier(_LIMIT, optimizer=self._optimizer)
            real = self._optimizer.param_groups
            if settings is None:
                groups = [settings_of(real[i], group, copier) for i, group in members.items()]
            else:
                groups = [{**settings[i], "params": group} for i, group in members.items()]
            for group in groups if changes else ():
                group.update(changes or {})
            if self._is_native:
                self._rule(self._native(groups, state, copier, is_earlier=settings is not None))
            else:
                twin = shell(self._optimizer, groups, state, copier)
                for key, value in self._optimizer.state.items():
                    if not isinstance(key, Tensor):  # state of all parameters together: MADGRAD's counter
                        state[key] = copier.copy(value, f"state '{key}'")
                with without_effects(params[0].device) as random_states:
                    self._rule(twin)
                    if random_states.have_moved():
                        raise ReplayError(f"{self._name} draws random numbers in its step, and a replay draws others")
        except ReplayError:
            raise
        except Exception as error:
            raise ReplayError(f"{self._name} fails on FP32 copies: {error!r}") from error
        return _results(runs, params, state)

    def _native(
        self, groups: list[dict[str, Any]], state: defaultdict[Tensor, dict[str, Any]], copier: Copier, is_earlier: bool
    ) -> Optimizer:
        """The shell with groups and state of this step. torch's own rules write to no other attribute, so the rest of it is
        kept, but for what has changed in the real optimizer (a GradScaler sets some for one step, never for an earlier one
        that could wait).
        """
        now = self._attributes(_SCALING if is_earlier else frozenset())
        for name in now.keys() | self._seen.keys() if now.keys() != self._seen.keys() else now:
            if name not in now:
                self._shell.__dict__.pop(name, None)
            elif now[name] is not self._seen.get(name, self) and not _shadows_method(
                type(self._optimizer), name, now[name]
            ):
                setattr(self._shell, name, copier.copy(now[name], f"{self._name}.{name}"))
        self._seen = now
        self._shell.param_groups, self._shell.state = groups, state
        return self._shell

    def _attributes(self, but: frozenset[str] = frozenset()) -> dict[str, Any]:
        """The optimizer's attributes beside its groups, states and hooks, which must not be held here."""
        return {k: v for k, v in vars(self._optimizer).items() if k not in _OWN and k not in but}


def shell(
    optimizer: Optimizer,
    groups: list[dict[str, Any]] | None = None,
    state: defaultdict[Tensor, dict[str, Any]] | None = None,
    copier: Copier | None = None,
) -> Optimizer:
    """An optimizer of the same class with copies of all attributes, given parameters and state, and no hooks.

    Raises `ReplayError` for attributes that cannot or must not be copied.
    """
    cls = type(optimizer)
    if hasattr(cls, "__del__"):  # DeepSpeedCPUAdam frees C++ state that a copy would share
        raise ReplayError(f"{cls.__name__} has a finalizer (__del__): the end of a copy could end what it uses itself")
    twin: Optimizer = object.__new__(cls)
    groups = [] if groups is None else groups
    state = defaultdict(dict) if state is None else state
    copier = Copier(_LIMIT, optimizer=optimizer) if copier is None else copier
    # attributes that point back, bound methods among them, point to the twin and its parts
    copier.replace(optimizer, twin)
    copier.replace(optimizer.param_groups, groups)
    copier.replace(optimizer.state, state)
    try:
        for name, value in _attributes(optimizer):
            if name in _OWN or _shadows_method(cls, name, value):
                continue
            copied = value if is_plain(value) else copier.copy(value, f"{cls.__name__}.{name}")
            object.__setattr__(twin, name, copied)
        for name in _HOOKS:
            setattr(twin, name, OrderedDict())
        twin.param_groups, twin.state = groups, state
        if twin.defaults.get("differentiable"):
            twin.defaults["differentiable"] = False  # same arithmetic; autograd through a replay helps nobody
    except AttributeError as error:
        raise ReplayError(f"{cls.__name__} cannot be built from its attributes: {error}") from error
    return twin


def settings_of(group: dict[str, Any], params: list[Tensor], copier: Copier) -> dict[str, Any]:
    """A copy of a parameter group's settings with other parameters."""
    copied: dict[str, Any] = {}
    copier.replace(group, copied)
    for name, value in group.items():
        if name != "params":
            # a list as long as the model has parameters, of names that nobody writes to
            is_shared = name == "param_names" or is_plain(value)
            copied[name] = value if is_shared else copier.copy(value, f"the group setting '{name}'")
    if copied.get("differentiable"):
        copied["differentiable"] = False
    copied["params"] = params
    return copied


def _eps_of(group: dict[str, Any], dtype: torch.dtype) -> dict[str, Any] | None:
    """An eps left open (torch's Adafactor) means that of the weight's format, which is no longer that of an FP32 copy."""
    eps = group.get("eps")
    if not isinstance(eps, (tuple, list)) or None not in eps or not dtype.is_floating_point:
        return None
    return {"eps": tuple(torch.finfo(dtype).eps if value is None else value for value in eps)}


def _attributes(optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    yield from vars(optimizer).items()
    for cls in type(optimizer).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(optimizer, name):
                yield name, getattr(optimizer, name)


def _shadows_method(cls: type, name: str, value: Any) -> bool:
    # a scheduler's wrapped `step` or a compiled method: bound to the real optimizer; the class has the plain one
    return callable(value) and isinstance(getattr(cls, name, None), types.FunctionType)


_States = defaultdict[Tensor, dict[str, Any]]


def _parameters(runs: Sequence[Run]) -> tuple[list[torch.nn.Parameter], dict[int, list[Tensor]], _States]:
    """The runs as an optimizer knows them: parameters, the same by group, states."""
    members: dict[int, list[Tensor]] = {}
    state: _States = defaultdict(dict)
    params: list[torch.nn.Parameter] = []
    for run in runs:
        param = torch.nn.Parameter(run.param)
        param.grad = run.grad
        if run.state:
            state[param] = run.state
        members.setdefault(run.group, []).append(param)
        params.append(param)
    return params, members, state


def _results(runs: Sequence[Run], params: list[torch.nn.Parameter], state: _States) -> list[Run]:
    return [
        Run(run.group, param.detach(), run.grad, dict(state.get(param, ())))
        for run, param in zip(runs, params, strict=True)
    ]


def _owning(runs: Sequence[Run]) -> list[Run]:
    copier = Copier(None)
    return [Run(r.group, r.param, r.grad, _own(r.state, copier)) for r in runs]


def _own(state: dict[str, Any], copier: Copier) -> dict[str, Any]:
    return {
        name: value if is_plain(value) or isinstance(value, Tensor) else copier.copy(value, f"state '{name}'")
        for name, value in state.items()
    }


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True)


class RandomStates:
    """The global generators of torch (CPU and `device`), Python and NumPy, as they are now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        module = sys.modules.get(f"torch.{device.type}") if device.type != "cpu" else None
        self._module: Any = module if hasattr(module, "get_rng_state") else None
        self._torch = self._torch_states()
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def have_moved(self) -> bool:
        """Somebody has drawn random numbers since (NumPy's are not looked at: that would cost more than a rule)."""
        moved = any(not torch.equal(a, b) for a, b in zip(self._torch, self._torch_states(), strict=True))
        return moved or random.getstate() != self._python

    def restore(self) -> None:
        """Put all generators back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch[0])
        if self._module is not None:
            self._module.set_rng_state(self._torch[1], self._device)

    def _torch_states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return states if self._module is None else [*states, self._module.get_rng_state(self._device)]


@contextmanager
def without_effects(device: torch.device) -> Iterator[RandomStates]:
    """What a rule that is not torch's own may do to the process is kept from happening, or undone."""
    hooks = _torch_optimizer._global_optimizer_pre_hooks, _torch_optimizer._global_optimizer_post_hooks
    states = RandomStates(device)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        if any(hooks):  # `super().step()` calls the hooks that are registered for all optimizers
            _set_global_hooks(OrderedDict(), OrderedDict())
        try:
            yield states
        finally:
            _set_global_hooks(*hooks)
            states.restore()


def _set_global_hooks(before: Any, after: Any) -> None:
    _torch_optimizer._global_optimizer_pre_hooks = before
    _torch_optimizer._global_optimizer_post_hooks = after
