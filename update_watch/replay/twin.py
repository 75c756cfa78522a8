"""What an FP32 accumulator would have been told to add: the optimizer's own rule, run once more on FP32 copies.

No formula is written here. A twin of the optimizer is made without running `__init__` (same class, same attributes,
same hyperparameters, no hooks) and given FP32 copies of weights, gradients and state; its `step` is the rule itself.
Elementwise rules are run on the samples alone, all samples of like parameters joined into one parameter.
Rules that look at a whole tensor are run on whole tensors. Which of the two an optimizer is, `rule_kind` finds out.

The twin shares nothing that can be written with the real optimizer: hyperparameters, counters, containers and tensor
attributes are copied at every replay (`copier`), random number generators are put back, and no hook fires.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.replay.copier import Copier, ReplayError, is_plain
from update_watch.replay.optimizer_copy import LIMIT, OWN, copy_of, rule_of, settings_of, shadows_method
from update_watch.replay.side_effects import without_effects

__all__ = ["GroupSettings", "Run", "Twin"]

_SCALING = frozenset({"grad_scale", "found_inf"})  # set by a GradScaler for one step


GroupSettings = dict[int, dict[str, Any]]  # index in optimizer.param_groups -> copies of the group's settings


class Run(NamedTuple):
    """Parameters of one group replayed as one parameter; `param` and `state` are overwritten by `replay`."""

    group: int  # index in optimizer.param_groups
    param: Tensor  # FP32, any shape
    grad: Tensor | None  # FP32, same shape; the rule may write into it
    state: dict[str, Any]  # per-element tensors in FP32, scalars as they are


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
        self._copy = copy_of(optimizer, [])
        self._seen = self._attributes()
        for group in optimizer.param_groups:
            settings_of(group, [], Copier(LIMIT, optimizer=optimizer))

    @property
    def can_wait(self) -> bool:
        """A step can be replayed later, given the `settings` it was taken with: the rule depends on nothing else."""
        return self._is_native

    def settings(self, groups: Iterable[int]) -> GroupSettings:
        """GroupSettings of some groups as they are now, for a later `replay`."""
        copier = Copier(LIMIT, optimizer=self._optimizer)
        return {i: settings_of(self._optimizer.param_groups[i], [], copier) for i in groups}

    def replay(
        self, runs: Sequence[Run], changes: Mapping[str, Any] | None = None, settings: GroupSettings | None = None
    ) -> list[Run]:
        """Run the rule on copies, with some settings of its groups changed (`{"weight_decay": 0.0}`).

        `settings`: those of an earlier step; None: as they are now.
        `param`, `grad` and `state` tensors are updated in place where the rule does so; read the returned runs, which
        hold whatever the rule left. Containers in `state` are copied first. Raises `ReplayError` when the rule fails.
        """
        return self._run(_owning(runs), changes, settings)

    def replay_steps(self, runs: Sequence[Run], steps: Iterable[GroupSettings]) -> list[Run]:
        """Several steps in a row, for a rule that can wait: half the work of one `replay` each.

        `steps` puts a step's gradients (and weights) into the tensors of `runs` and gives its settings. Else as `replay`.
        """
        params, members, state = _parameters(runs := _owning(runs))
        groups: list[dict[str, Any]] = []
        try:
            for settings in steps:
                if not groups:
                    groups = [{**settings[i], "params": group} for i, group in members.items()]
                    copier = Copier(LIMIT, optimizer=self._optimizer)
                    twin = self._native(groups, state, copier, is_earlier=True)
                else:
                    for i, group in zip(members, groups, strict=True):
                        group.update(settings[i], params=members[i])
                    _leave_counters(groups, state)
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
        self, runs: Sequence[Run], changes: Mapping[str, Any] | None = None, settings: GroupSettings | None = None
    ) -> list[Run]:
        params, members, state = _parameters(runs)
        try:
            copier = Copier(LIMIT, optimizer=self._optimizer)
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
                twin = copy_of(self._optimizer, groups, state, copier)
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
        """The copy with groups and state of this step. torch's own rules write to no other attribute, so the rest of it is
        kept, but for what has changed in the real optimizer (a GradScaler sets some for one step, never for an earlier one
        that could wait).
        """
        now = self._attributes(_SCALING if is_earlier else frozenset())
        for name in now.keys() | self._seen.keys() if now.keys() != self._seen.keys() else now:
            if name not in now:
                self._copy.__dict__.pop(name, None)
            elif now[name] is not self._seen.get(name, self) and not shadows_method(
                type(self._optimizer), name, now[name]
            ):
                setattr(self._copy, name, copier.copy(now[name], f"{self._name}.{name}"))
        self._seen = now
        _leave_counters(groups, state)
        self._copy.param_groups, self._copy.state = groups, state
        return self._copy

    def _attributes(self, but: frozenset[str] = frozenset()) -> dict[str, Any]:
        """The optimizer's attributes beside its groups, states and hooks, which must not be held here."""
        return {k: v for k, v in vars(self._optimizer).items() if k not in OWN and k not in but}


def _eps_of(group: dict[str, Any], dtype: torch.dtype) -> dict[str, Any] | None:
    """An eps left open (torch's Adafactor) means that of the weight's format, which is no longer that of an FP32 copy."""
    eps = group.get("eps")
    if not isinstance(eps, (tuple, list)) or None not in eps or not dtype.is_floating_point:
        return None
    return {"eps": tuple(torch.finfo(dtype).eps if value is None else value for value in eps)}


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


def _leave_counters(groups: list[dict[str, Any]], state: _States) -> None:
    """Counters that were moved to the device (`torch.compile` of the step does that) are not to be read from there."""
    for group in groups:
        if group.get("capturable") is False and not group.get("fused"):
            counters = (state[param].get("step") for param in group["params"] if param in state)
            group["capturable"] = any(isinstance(step, Tensor) and step.device.type != "cpu" for step in counters)


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
