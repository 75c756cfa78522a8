"""What is said of the tensors of a window: names, settings, counters. Noted when it closes, made on the background thread."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from update_watch import formats
from update_watch.evidence import TensorEvidence, changed, made
from update_watch.measure.accumulators.counters import short_counters
from update_watch.measure.cohort import Cohort
from update_watch.measure.identity.names import describe
from update_watch.measure.parameters import Row
from update_watch.measure.sampling import local, unsamplable
from update_watch.measure.sums.measured_block import RowFacts
from update_watch.worker import unhurried


def _low_states(row: Row, state: Mapping[str, Any] | None) -> int | None:
    """How many states of the parameter's shape are in 16 bits, beside what is kept there of the weight itself."""
    if not state:
        return None
    kept = [value for name, value in state.items() if name != row.scheme.carrier and isinstance(value, Tensor)]
    return sum(
        value.dtype in formats.HALVES and value.shape == row.param.shape and not unsamplable(local(value))
        for value in kept
    )


class WindowFacts:
    """Of one optimizer. `groups`: what is said of all tensors of a group, by its number."""

    def __init__(self, optimizer: Optimizer, groups: Mapping[int, Mapping[str, Any]], twin_error: str) -> None:
        self._optimizer, self._groups, self._twin_error = optimizer, groups, twin_error

    def identity(self, row: Row) -> TensorEvidence:
        """What is known without measuring."""
        if row.identity is None and not row.has_changed:  # what was put into it for now is not what it is
            row.identity = self._described(row)
        identity = (row.identity or self._described(row)) | {
            "reason": row.reason or self._twin_error,
            "trainable": row.param.requires_grad,
        }
        if row.piece is not None:
            identity["trainable"] = True  # a flat tensor need not say so
        if is_lazy(row.param):  # no forward pass has used it
            identity["gradless_steps"] = self._groups[row.group]["steps"]
        state = self._optimizer.state.get(row.param)
        return made(**identity, **self._groups[row.group], low_states=_low_states(row, state))

    def _described(self, row: Row) -> dict[str, Any]:
        """What stays, for as long as the row is what was planned for."""
        identity = describe(row.param, row.names) | {"dtype": str(row.layout[1]).removeprefix("torch.")}
        if row.piece is not None:
            shape = row.piece.shape
            identity |= {"shape": shape, "numel": math.prod(shape), "held": row.piece.held}
        return identity | {"scheme": row.scheme.name}

    def facts_of(self, cohort: Cohort) -> Callable[[], tuple[RowFacts, ...]]:
        """Note what changes when the cohort's next window begins; the facts are made when they are asked for."""
        noted = cohort.steps, cohort.gradless_steps, cohort.first_rates
        return functools.partial(self._make, cohort, *noted)

    def _make(
        self, cohort: Cohort, steps: int, gradless: Sequence[int], first_rates: Mapping[int, float]
    ) -> tuple[RowFacts, ...]:
        found = []
        stops = [*cohort.firsts[1:], len(cohort.rows)]
        for i, stop in unhurried(list(zip(cohort.firsts, stops, strict=True))):
            row = cohort.rows[i]
            state = self._optimizer.state.get(row.param) or {}
            dtypes = tuple(
                str(state[name].dtype).removeprefix("torch.")
                if isinstance(state.get(name), Tensor) and name in row.rule.exact_states
                else ""
                for name in cohort.states
            )
            rates = tuple(row.rates.get(name) for name in cohort.states)
            evidence = changed(
                self.identity(row),
                steps=steps,
                gradless_steps=gradless[i],
                # a master is given its gradient, and need not say that it requires one
                trainable=row.param.requires_grad or gradless[i] < steps,
                requires_grad=row.param.requires_grad,
                accumulators=short_counters(row, state),
            )
            size = sum([sampler.size for sampler in cohort.samplers[i:stop]])
            found.append(RowFacts(evidence, size, dtypes, rates, first_rates.get(row.group)))
        return tuple(found)
