"""What is said of the tensors of a window: names, settings, counters. Noted when it closes, made on the background thread."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from update_watch import formats
from update_watch.evidence import TensorEvidence, made
from update_watch.measure.accumulators.counters import short_counters
from update_watch.measure.cohort import Cohort
from update_watch.measure.identity.names import describe
from update_watch.measure.parameters import Row
from update_watch.measure.sampling import local, unsamplable
from update_watch.measure.sums.measured_block import CohortFacts
from update_watch.worker import unhurried

_LEAST = ("name", "dtype", "numel")


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
        state = self._optimizer.state.get(row.param)
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
        return identity | {"scheme": row.scheme.name}

    def facts_of(self, cohort: Cohort) -> Callable[[], CohortFacts]:
        """Note what changes when the cohort's next window begins; the facts are made when they are asked for."""
        noted = cohort.steps, cohort.gradless_steps, cohort.first_rates
        return functools.partial(self._make, cohort, *noted)

    def _make(
        self, cohort: Cohort, steps: int, gradless: Sequence[int], first_rates: Mapping[int, float]
    ) -> CohortFacts:
        rows = [cohort.rows[i] for i in cohort.firsts]
        identities = [self._identity(row) for row in unhurried(rows)]
        given: dict[str, list[Any]] = {
            name: [of[name] for of in identities] for name in (identities[0] if rows else _LEAST)
        }
        groups = [self._groups[row.group] for row in rows]
        given |= {name: [of[name] for of in groups] for name in (groups[0] if rows else ())}
        given["reason"] = [row.reason or self._twin_error for row in rows]
        given["steps"], given["gradless_steps"] = [steps] * len(rows), [gradless[i] for i in cohort.firsts]
        given["requires_grad"] = requires = [row.param.requires_grad for row in rows]
        # a master is given its gradient, and need not say that it requires one
        given["trainable"] = [
            of_row or without < steps for of_row, without in zip(requires, given["gradless_steps"], strict=True)
        ]
        given["low_states"], given["accumulators"], dtypes = [], [], []
        for row in unhurried(rows):
            state = self._optimizer.state.get(row.param) or {}
            facts = _state_facts(row, state, cohort.states)
            given["low_states"].append(facts.low)
            given["accumulators"].append(short_counters(row, state) if facts.may_be_short else {})
            dtypes.append(facts.formats)
        stops = [*cohort.firsts[1:], len(cohort.rows)]
        sizes = [sampler.size for sampler in cohort.samplers]
        return CohortFacts(
            given,
            [sum(sizes[i:stop]) for i, stop in zip(cohort.firsts, stops, strict=True)],
            dtypes,
            [tuple([row.rates.get(name) for name in cohort.states]) for row in rows],
            [first_rates.get(row.group) for row in rows],
        )


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
