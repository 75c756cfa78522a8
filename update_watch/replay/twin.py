"""What an FP32 accumulator would have been told to add: the optimizer's own rule, run once more on FP32 copies.

No formula is written here. A twin of the optimizer is made without running `__init__` (same class, same attributes,
same hyperparameters, no hooks) and given FP32 copies of weights, gradients and state; its `step` is the rule itself.
Elementwise rules are run on the samples alone, all samples of like parameters joined into one parameter.
Rules that look at a whole tensor are run on whole tensors, one or all together. Which of these an optimizer is, `rule_kind`
finds out.

The twin shares nothing that can be written with the real optimizer: hyperparameters, counters, containers and tensor
attributes are copied at every replay (`copier`), random number generators are put back, and no hook fires.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.replay.absent import ReplayError
from update_watch.replay.attribute_copy import Copier, is_plain
from update_watch.replay.kept_states import states_of
from update_watch.replay.optimizer_copy import LIMIT, OWN, copy_of, rule_of, settings_of, shadows_method
from update_watch.replay.scaled_weights import ScaledWeights
from update_watch.replay.side_effects import WithoutEffects

__all__ = ["GroupSettings", "Run", "Twin"]

_SCALING = frozenset({"grad_scale", "found_inf"})  # set by a GradScaler for one step


GroupSettings = dict[int, dict[str, Any]]  # index in optimizer.param_groups -> copies of the group's settings


class Run(NamedTuple):
    """Parameters of one group replayed as one parameter; `param` and `state` are overwritten by `replay`."""

    group: int  # index in optimizer.param_groups
    param: Tensor  # FP32, any shape
    grad: Tensor | None  # FP32, same shape; the rule may write into it
    state: dict[str, Any]  # per-element tensors in FP32, scalars as they are
    scaled: ScaledWeights | None = None  # the rule is run in the weight's own format
    may_draw: bool = (
        False  # a rule that throws dice: every replay throws others, and the update does not depend on them
    )


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
        self.has_drawn = False  # random numbers, in one replay or another
        # from a generator that the optimizer keeps: a copy of all tensors draws the same
        self.has_drawn_of_its_own = False
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
        kinds = dict.fromkeys((run.scaled and (run.scaled.exponent, run.scaled.decays)) for run in runs)
        if len(kinds) < 2:
            return self._run(_owning(runs), changes, settings)
        # in one group, some settings are multiplied for scaled weights and not for others
        found: dict[int, Run] = {}
        for kind in kinds:
            chosen = [i for i, r in enumerate(runs) if (r.scaled and (r.scaled.exponent, r.scaled.decays)) == kind]
            found.update(zip(chosen, self.replay([runs[i] for i in chosen], changes, settings), strict=True))
        return [found[i] for i in range(len(runs))]

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
        finally:
            self._let_go()
        return _results(runs, params, state)

    def replay_whole(
        self,
        group: int,
        param: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        *,
        widen: bool = True,
        kept: Collection[str] = (),
        scaled: ScaledWeights | None = None,
        may_draw: bool = False,
    ) -> Run:
        """Run the rule on FP32 copies of a whole parameter, its gradient and all of its state; nothing is overwritten.

        `widen`: state below FP32 is widened as well, also inside lists and objects, but for those `kept`. Integers and
        tensor subclasses (quantised state) are copied as they are. Raises `ReplayError` when the rule fails.
        """
        copies = _copied(state, _copiers(widen), kept)
        run = Run(group, _widened(param.detach()), _widened(grad.detach()), copies, scaled, may_draw)
        return self._run([run], _eps_of(self._optimizer.param_groups[group], param.dtype), is_whole=True)[0]

    def replay_together(self, runs: Sequence[Run], *, widen: bool = True, kept: Collection[str] = ()) -> list[Run]:
        """The same of all parameters of all groups at once, in the order of the groups, those without a gradient too: for a
        rule with numbers over all tensors. Raises `ReplayError` when it fails.
        """
        copiers = _copiers(widen)
        copies = [
            run._replace(
                param=_widened(run.param),
                grad=None if run.grad is None else _widened(run.grad),
                state=_copied(run.state, copiers, kept),
            )
            for run in runs
        ]
        return self._run(copies, is_whole=True, is_all=True)

    def _run(
        self,
        runs: Sequence[Run],
        changes: Mapping[str, Any] | None = None,
        settings: GroupSettings | None = None,
        is_whole: bool = False,
        is_all: bool = False,
    ) -> list[Run]:
        given, scaled = runs, runs[0].scaled
        if scaled is not None:
            changes = {**scaled.changes, **(changes or {})}
            runs, starts = _in_own_format(runs, is_whole)
        params, members, state = _parameters(runs)
        real = self._optimizer.param_groups
        if is_all:  # a rule may look at a group without parameters, at the first one above all
            members = {i: members.get(i, []) for i in range(len(real))}
        try:
            copier = Copier(LIMIT, optimizer=self._optimizer)
            if settings is None:
                groups = [settings_of(real[i], group, copier) for i, group in members.items()]
            else:
                groups = [{**settings[i], "params": group} for i, group in members.items()]
            for group in groups if changes else ():
                group.update(
                    (k, v(group[k]) if callable(v) else v)
                    for k, v in (changes or {}).items()
                    if not callable(v) or k in group
                )
            left: Mapping[Tensor, dict[str, Any]]
            if self._is_native:
                self._rule(self._native(groups, state, copier, is_earlier=settings is not None))
                left = state
            else:
                twin = copy_of(self._optimizer, groups, state, copier)
                for key, value in self._optimizer.state.items():
                    if not isinstance(key, Tensor):  # state of all parameters together: MADGRAD's counter
                        state[key] = copier.copy(value, f"state '{key}'")
                quiet = WithoutEffects(params[0].device)
                with quiet, quiet:
                    self._rule(twin)
                    left = states_of(twin)
                    self.has_drawn_of_its_own = self.has_drawn_of_its_own or copier.have_drawn
                    has_drawn = (
                        quiet.random_states.have_moved()
                    )  # now: rounding at random draws for a stored format alone
                    self.has_drawn = self.has_drawn or has_drawn
                    if has_drawn and not all(run.may_draw for run in runs):
                        raise ReplayError(f"{self._name} draws random numbers in its step, and a replay draws others")
        except ReplayError:
            raise
        except Exception as error:
            copies = "FP32 copies" if scaled is None else "scaled copies"
            raise ReplayError(f"{self._name} fails on {copies}: {error!r}") from error
        finally:
            self._let_go()
        results = _results(runs, params, left)
        return results if scaled is None else [_in_fp32(*found) for found in zip(given, starts, results, strict=True)]

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

    def _let_go(self) -> None:
        """Of the samples, which the copy would hold until the next replay."""
        self._copy.param_groups, self._copy.state = [], defaultdict(dict)

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


def _results(
    runs: Sequence[Run], params: list[torch.nn.Parameter], state: Mapping[Tensor, dict[str, Any]]
) -> list[Run]:
    return [
        Run(run.group, param.detach(), run.grad, dict(state.get(param, ())))
        for run, param in zip(runs, params, strict=True)
    ]


def _in_own_format(runs: Sequence[Run], is_whole: bool) -> tuple[list[Run], list[Tensor]]:
    """The runs with scaled weights, and these weights in FP32."""
    stored, starts = [], []
    for run in runs:
        assert run.scaled is not None
        param, grad, state = run.scaled.stored(run.param, run.grad, run.state, is_whole=is_whole)
        stored.append(run._replace(param=param, grad=grad, state=state))
        starts.append(run.scaled.whole(param, state))
    return stored, starts


def _in_fp32(given: Run, start: Tensor, result: Run) -> Run:
    """What a run on scaled weights says of those in FP32: no state holds a rest of them."""
    scaled = given.scaled
    assert scaled is not None
    # the update is what it is: only the weight was scaled
    param = given.param + (scaled.whole(result.param, result.state) - start)
    state = {
        name: value.float() if _is_element(value, result.param) else value
        for name, value in result.state.items()
        if name != scaled.scheme.carrier
    }
    return Run(given.group, param, result.grad, state)


def _is_element(value: Any, param: Tensor) -> bool:
    return type(value) is Tensor and value.shape == param.shape and value.is_floating_point()


def _owning(runs: Sequence[Run]) -> list[Run]:
    copier = Copier(None)
    return [r._replace(state=_own(r.state, copier)) for r in runs]


def _own(state: dict[str, Any], copier: Copier) -> dict[str, Any]:
    return {
        name: value if is_plain(value) or isinstance(value, Tensor) else copier.copy(value, f"state '{name}'")
        for name, value in state.items()
    }


def _copiers(widen: bool) -> tuple[Copier, Copier]:
    """Of states that stay in their format, of others."""
    return Copier(None), Copier(None, widen=widen)


def _copied(state: dict[str, Any], copiers: tuple[Copier, Copier], kept: Collection[str]) -> dict[str, Any]:
    return {name: copiers[name not in kept].copy(value, f"state '{name}'") for name, value in state.items()}


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True)
