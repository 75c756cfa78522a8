"""What is said of the tensors of a window: names, settings, counters. Noted when it closes, made on the background thread."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from update_watch import formats
from update_watch.columns.evidence_columns import Lists
from update_watch.evidence import TensorEvidence, made
from update_watch.measure.accumulators.counters import short_counters
from update_watch.measure.cohort import Cohort
from update_watch.measure.identity.names import describe
from update_watch.measure.parameters import Row
from update_watch.measure.sampling import local, unsamplable
from update_watch.measure.sums.measured_block import CohortFacts, StateFacts
from update_watch.replay.kept_states import states_of
from update_watch.worker import unhurried

_dtype = operator.attrgetter("dtype")
_NO_COUNTERS: Mapping[str, Any] = {}
Resting = Callable[[], Mapping[str, list[Any]]]  # values of each of some tensors, by the names of `TensorEvidence`


def _low_states(row: Row, state: Mapping[str, Any] | None) -> int | None:
    """How many states of the parameter's shape are in 16 bits, beside what is kept there of the weight itself."""
    if not state:
        return None
    kept = [value for name, value in state.items() if name != row.scheme.carrier and isinstance(value, Tensor)]
    short = [value for value in kept if value.dtype in formats.HALVES]
    shape = row.param.shape if short else None
    return sum([value.shape == shape and not unsamplable(local(value)) for value in short])


class WindowFacts:
    """Of one optimizer. `groups`: what is said of all tensors of a group, by its number."""

    def __init__(self, optimizer: Optimizer, groups: Mapping[int, Mapping[str, Any]], twin_error: str) -> None:
        self._optimizer, self._groups, self._twin_error = optimizer, groups, twin_error

    def identity(self, row: Row) -> TensorEvidence:
        """What is known without measuring."""
        identity = self._identity(row) | {
            "reason": row.reason or self._twin_error,
            "trainable": row.param.requires_grad,
            "requires_grad": row.param.requires_grad,
        }
        if row.piece is not None:
            identity["trainable"] = True  # a flat tensor need not say so
        if is_lazy(row.param):  # no forward pass has used it
            identity["gradless_steps"] = self._groups[row.group]["steps"]
        state = states_of(self._optimizer).get(row.param)
        return made(**identity, **self._groups[row.group], low_states=_low_states(row, state))

    def _identity(self, row: Row) -> dict[str, Any]:
        if row.identity is None and not row.has_changed:  # what was put into it for now is not what it is
            row.identity = self._described(row)
        return row.identity or self._described(row)

    def _described(self, row: Row) -> dict[str, Any]:
        """What stays, for as long as the row is what was planned for."""
        identity = describe(row.param, row.names) | {"dtype": str(row.layout[1]).removeprefix("torch.")}
        if row.piece is not None:
            shape = row.piece.shape
            identity |= {"shape": shape, "numel": math.prod(shape), "held": row.piece.held}
        return identity | {"scheme": row.scheme.name, "steps_copy": row.rule.steps_copy}

    def _identities(self, rows: Sequence[Row], of_groups: Iterable[str]) -> dict[str, list[Any]]:
        """Who they are, and what these settings of their groups are."""
        identities = [self._identity(row) for row in unhurried(rows)]
        groups = [self._groups[row.group] for row in rows]
        given = {name: [of[name] for of in identities] for name in identities[0]}
        return given | {name: [of[name] for of in groups] for name in of_groups}

    def resting(self, rows: Sequence[Row]) -> Resting:
        """What is known of tensors that were not looked at, since it was not their turn; made when it is asked for."""
        return functools.partial(self._make_resting, rows)

    def _make_resting(self, rows: Sequence[Row]) -> Mapping[str, list[Any]]:
        given = self._identities(rows, self._groups[rows[0].group])
        given["reason"] = [row.reason or self._twin_error for row in rows]
        given["requires_grad"] = requires = [row.param.requires_grad for row in rows]
        given["trainable"] = [of or row.piece is not None for of, row in zip(requires, rows, strict=True)]
        given["is_resting"] = [True] * len(rows)
        states = states_of(self._optimizer)
        given["low_states"] = [
            _low_states(row, states.get(row.param)) if row.state_facts is None else row.state_facts.low
            for row in unhurried(rows)
        ]
        return given

    def facts_of(self, cohorts: Sequence[Cohort], known: KnownFacts) -> Callable[[], CohortFacts]:
        """Note what changes when the next window of cohorts that were measured begins; the facts of their tensors are made
        when they are asked for. `known`: what was said of them before.
        """
        noted = [(cohort, cohort.steps, cohort.gradless_steps, cohort.first_rates) for cohort in cohorts]
        return functools.partial(self._make, noted, known)

    def _make(
        self, noted: Sequence[tuple[Cohort, int, Sequence[int], Mapping[int, float]]], known: KnownFacts
    ) -> CohortFacts:
        cohorts = [cohort for cohort, *_ in noted]
        rows = [cohort.rows[i] for cohort in cohorts for i in cohort.firsts]
        params = [row.param for row in rows]
        states = self._states(params)
        in_groups, reasons = [row.group for row in rows], [row.reason or self._twin_error for row in rows]
        of_groups = {group: (of["optimizer_group"], of["options"]) for group, of in self._groups.items()}
        stays = known.of(
            (
                *_kinds_of(states),
                [row.identity or object() for row in rows],
                [row.rates for row in rows],
                reasons,
                in_groups,
                of_groups,
                cohorts,
            ),
            lambda: self._stays(rows, states, cohorts, reasons),
        )
        given: dict[str, list[Any]] = {**stays.lists.values}
        for name in ("lr", "lr_max", "weight_decay"):
            of_group = {group: of[name] for group, of in self._groups.items()}
            given[name] = list(map(of_group.__getitem__, in_groups))
        given["steps"] = [steps for cohort, steps, *_ in noted for _ in cohort.firsts]
        given["gradless_steps"] = gradless = [of[i] for cohort, _, of, _ in noted for i in cohort.firsts]
        given["requires_grad"] = requires = [param.requires_grad for param in params]
        # a master is given its gradient, and need not say that it requires one
        given["trainable"] = [
            of_row or without < steps for of_row, without, steps in zip(requires, gradless, given["steps"], strict=True)
        ]
        counters = [_NO_COUNTERS] * len(rows)
        for i in unhurried(stays.counting):
            counters[i] = short_counters(rows[i], states[i])
        given["accumulators"] = counters
        rates = [first_rates.get(row.group) for row, (_, _, _, first_rates) in zip(rows, _each(noted), strict=True)]
        return CohortFacts(given, stays.sizes, stays.states, rates, stays.lists)

    def _states(self, params: Sequence[Tensor]) -> list[Mapping[str, Any]]:
        state = states_of(self._optimizer)
        if 2 * len(params) < len(state):
            return [state.get(param) or {} for param in params]
        # by their ids, as a tensor's hash takes longer; of a copy, as a step may add some meanwhile
        by_id = {id(param): of_one for param, of_one in dict(state).items()}
        return [by_id.get(id(param)) or {} for param in params]

    def _stays(
        self, rows: Sequence[Row], states: Sequence[Mapping[str, Any]], cohorts: Sequence[Cohort], reasons: list[str]
    ) -> _Stays:
        given = self._identities(rows, ("optimizer_group", "options"))
        names = cohorts[0].states
        facts = [_state_facts(row, state, names) for row, state in zip(unhurried(rows), states, strict=True)]
        given |= {"low_states": [one.low for one in facts], "reason": reasons}
        sizes = []
        for cohort in cohorts:
            of_rows = [sampler.size for sampler in cohort.samplers]
            sizes += [
                sum(of_rows[i:stop]) for i, stop in zip(cohort.firsts, [*cohort.firsts[1:], len(of_rows)], strict=True)
            ]
        found = {}
        for k, name in enumerate(names):
            at = [i for i, one in enumerate(facts) if one.formats[k]]
            formats, rates = [facts[i].formats[k] for i in at], [rows[i].rates.get(name) for i in at]
            found[name] = StateFacts(np.array(at, dtype=np.intp), formats, rates)
        return _Stays(Lists(given), sizes, found, [i for i, one in enumerate(facts) if one.may_be_short])


def _each(noted: Sequence[tuple[Cohort, int, Sequence[int], Mapping[int, float]]]) -> Iterator[Any]:
    """Once for each tensor."""
    return itertools.chain.from_iterable(itertools.repeat(one, len(one[0].firsts)) for one in noted)


class _Stays(NamedTuple):
    """Of the tensors of some cohorts, what seldom changes."""

    lists: Lists  # by the names of `TensorEvidence`
    sizes: list[int]
    states: dict[str, StateFacts]
    counting: list[int]  # rows with a counter in 16 bits: its value is read anew


class KnownFacts:
    """What was said of the same tensors in the window before, by what it was made of."""

    def __init__(self) -> None:
        self._made_of: Any = None
        self._known: Any = None

    def of(self, made_of: Any, make: Callable[[], _Stays]) -> _Stays:
        """As it was, or made anew."""
        if self._known is None or made_of != self._made_of:
            self._known, self._made_of = make(), made_of
        return self._known  # type: ignore[no-any-return]


def _kinds_of(states: Sequence[Mapping[str, Any]]) -> tuple[list[Any], ...]:
    """What the facts of states are made of, of all in a row."""
    values = [value for state in states for value in state.values()]
    names = [name for state in states for name in state]
    try:
        dtypes: list[Any] = list(map(_dtype, values))
    except AttributeError:  # counters that are numbers
        dtypes = [getattr(value, "dtype", None) for value in values]
    return list(map(len, states)), names, list(map(type, values)), dtypes


class _StateFacts(NamedTuple):
    """What is said of a tensor's states for as long as they are of the same kinds."""

    kinds: list[tuple[str, type, Any]]
    states: tuple[str, ...]  # of all rows side by side
    low: int | None
    formats: tuple[str, ...]  # of `states`
    may_be_short: bool  # a counter in 16 bits


def _state_facts(row: Row, state: Mapping[str, Any], states: Sequence[str]) -> _StateFacts:
    kinds = [(name, type(value), getattr(value, "dtype", None)) for name, value in state.items()]
    known = row.state_facts
    if known is None or known.kinds != kinds or known.states != tuple(states):
        found = tuple([_format_of(row, state, name) for name in states])
        are_short = any([dtype in formats.HALVES and row.rule.forms.get(name) == "scalar" for name, _, dtype in kinds])
        known = row.state_facts = _StateFacts(kinds, tuple(states), _low_states(row, state), found, are_short)
    return known  # type: ignore[no-any-return]


def _format_of(row: Row, state: Mapping[str, Any], name: str) -> str:
    """Of a state whose replay is exact; else ""."""
    value = state.get(name)
    if not isinstance(value, Tensor) or name not in row.rule.exact_states:
        return ""
    return str(value.dtype).removeprefix("torch.")
