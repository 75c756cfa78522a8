"""A measured step once more by the optimizer's rule in FP32: rows of one history joined, whole tensors in turn.

Legend: A accumulators (0 the weight, then states), n rows, K samples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch import formats
from update_watch.measure.accumulators.decay import decay_sums
from update_watch.measure.gathers import Gathers
from update_watch.measure.parameters import Row, holds_elements
from update_watch.measure.sampling import local
from update_watch.replay.absent import ReplayError
from update_watch.replay.rounding_scheme import Join
from update_watch.replay.rule_kind import Kind
from update_watch.replay.twin import GroupSettings, Run, Twin

_WHOLE_PER_STEP = 2**22  # elements replayed as whole tensors in one step, beyond the first tensor


class Span(NamedTuple):
    """Neighbouring rows that are replayed as one."""

    start: int
    stop: int
    scalars: dict[str, Any]  # state that is not per element, as it was before the step
    dtypes: dict[str, torch.dtype]  # of state tensors


class StepReplay:
    """Replays the steps of some rows of one optimizer."""

    def __init__(self, optimizer: Optimizer, twin: Twin, gathers: Gathers) -> None:
        self._optimizer, self._twin, self._gathers = optimizer, twin, gathers
        self._rows, self._slots = gathers.rows, gathers.slots
        self._turn = 0  # where among the whole tensors the next step goes on
        self.can_wait = twin.can_wait and all(row.rule.kind is Kind.elementwise for row in self._rows)

    def spans(self, states: list[dict[str, Any]], live: list[bool]) -> list[Span]:
        """Runs of rows that can be replayed as one, with their scalar state."""
        spans = []
        n, start = len(self._rows), 0
        while start < n:
            row = self._rows[start]
            if not live[start] or row.rule.kind is not Kind.elementwise:
                start += 1
                continue
            likeness = row.step_likeness(states[start])
            stop = start + 1
            while stop < n and live[stop] and self._rows[stop].step_likeness(states[stop]) == likeness:
                stop += 1
            scalars: dict[str, Any] = {}
            dtypes = {}
            for name, value in states[start].items():
                if name in row.left_out:
                    continue
                is_tensor = isinstance(value, Tensor)
                if name in self._slots:
                    scalars[name] = value if value is None else self._slots[name]
                else:
                    scalars[name] = value.clone() if is_tensor else value
                if is_tensor:
                    dtypes[name] = value.dtype
            spans.append(Span(start, stop, scalars, dtypes))
            start = stop
        return spans

    def settings(self, spans: list[Span]) -> GroupSettings:
        """Of the groups of some spans, as they are now: what a step needs to be replayed later."""
        return self._twin.settings({self._rows[span.start].group for span in spans})

    def run(
        self,
        before_AnK: Tensor,
        grad_nK: Tensor,
        spans: list[Span],
        settings: GroupSettings | None,
        live: list[bool],
        states: list[dict[str, Any]] | None,
        moving_first: bool,
        decay_5n: Tensor | None,
    ) -> Tensor:
        """[A, n, K]: what an FP32 accumulator would hold after the step.

        `settings`: of an earlier step; None: as they are now. `states`: None where no whole tensor is to be replayed.
        `moving_first`: how samples of whole tensors are read, see `Gathers`.
        `decay_5n`: sums that the decay's part is added to, or None. A row that turns out not to be replayable gets its
        reason and is taken out of `live`, as is a whole tensor whose turn it is not. `grad_nK` may be overwritten.
        """
        intended_AnK = before_AnK.clone()
        carried = self._gathers.carried
        for i, slot, row in carried:
            if row.scheme.join is Join.master:
                intended_AnK[slot, i].copy_(before_AnK[0, i])  # the rule may step it instead of the weight
        self._replay_samples(intended_AnK, grad_nK, spans, settings, live, decay_5n)
        if states is not None:
            self._replay_whole(intended_AnK, states, live, moving_first)
        for i, slot, row in carried:
            if row.scheme.addend:
                intended_AnK[0, i].add_(intended_AnK[slot, i])
            intended_AnK[slot, i].zero_()
        return intended_AnK

    def _replay_samples(
        self,
        intended_AnK: Tensor,
        grad_nK: Tensor,
        spans: list[Span],
        settings: GroupSettings | None,
        live: list[bool],
        decay_5n: Tensor | None,
    ) -> None:
        if not spans:
            return
        runs = [self._sample_run(span, intended_AnK, grad_nK) for span in spans]
        if decay_5n is not None:
            self._look_at_decay(runs, spans, settings, decay_5n)
        try:
            results = self._twin.replay(runs, settings=settings)
        except ReplayError as error:
            for span in spans:
                for i in range(span.start, span.stop):
                    self._rows[i].reason, live[i] = str(error), False
            return
        for run, result, span in zip(runs, results, spans, strict=True):
            rows = slice(span.start, span.stop)
            count = span.stop - span.start
            if result.param.untyped_storage()._cdata != run.param.untyped_storage()._cdata:  # p.data was replaced
                intended_AnK[0, rows].copy_(result.param.view(count, -1))
            for name, slot in self._slots.items():
                replayed = result.state.get(name)
                # a rule that quantises large tensors may take the samples of many for one, when it makes their states
                if (
                    isinstance(replayed, Tensor)
                    and replayed is not run.state.get(name)
                    and holds_elements(replayed, run.param.shape)
                ):
                    intended_AnK[slot, rows].copy_(replayed.view(count, -1))

    def _look_at_decay(
        self, runs: list[Run], spans: list[Span], settings: GroupSettings | None, decay_5n: Tensor
    ) -> None:
        for run, span in zip(runs, spans, strict=True):
            row = self._rows[span.start]
            groups = self._optimizer.param_groups
            # a window may be closed after the group was taken away
            decay = groups[row.group].get("weight_decay") if row.group < len(groups) else None
            if not row.decouples_decay or not isinstance(decay, (int, float)) or not decay > 0:
                continue
            dtype, count = local(row.param).dtype, span.stop - span.start
            try:
                sums_5n = decay_sums(self._twin, row.group, dtype, run, span.dtypes, count, settings)
            except ReplayError:
                row.decouples_decay = False  # the rule does not run on copies in the stored format
                continue
            decay_5n[:, span.start : span.stop].add_(sums_5n)

    def _sample_run(self, span: Span, intended_AnK: Tensor, grad_nK: Tensor) -> Run:
        row, rows = self._rows[span.start], slice(span.start, span.stop)
        shape = (span.stop - span.start, self._gathers.samples) if row.rule.rows else (-1,)
        state = {
            name: intended_AnK[value, rows].view(shape) if name in self._slots and value is not None else value
            for name, value in span.scalars.items()
        }
        param, rule = intended_AnK[0, rows].view(shape), row.rule
        return Run(row.group, param, grad_nK[rows].view(shape), state, rule.scaled, rule.may_draw)

    def _replay_whole(
        self, intended_AnK: Tensor, states: list[dict[str, Any]], live: list[bool], moving_first: bool
    ) -> None:
        """Replay a bounded number of elements as whole tensors, in turn; the other such rows sit this step out."""
        waiting = [i for i, row in enumerate(self._rows) if live[i] and row.rule.kind is Kind.whole]
        if not waiting:
            return
        first = next((k for k, i in enumerate(waiting) if i >= self._turn), 0)
        budget = _WHOLE_PER_STEP
        chosen: list[int] = []
        for i in waiting[first:] + waiting[:first]:
            numel = local(self._rows[i].param).numel()
            if chosen and numel > budget:
                break
            budget -= numel
            chosen.append(i)
        self._turn = chosen[-1] + 1
        for i in waiting:
            live[i] = False
        for i in chosen:
            row = self._rows[i]
            try:
                result = _replay_whole(self._twin, row, states[i])
            except ReplayError as error:
                row.reason = str(error)
                continue
            intended_AnK[0, i] = self._gathers.samples_of(i, result.param, moving_first)
            for name, slot in self._slots.items():
                value = result.state.get(name)
                if isinstance(value, Tensor) and holds_elements(value, result.param.shape):
                    intended_AnK[slot, i] = self._gathers.samples_of(i, value, moving_first)
            live[i] = True


def _replay_whole(twin: Twin, row: Row, state: dict[str, Any]) -> Run:
    grad = row.param.grad
    assert grad is not None
    shards = {name: local(value) if isinstance(value, Tensor) else value for name, value in state.items()}
    weight, scheme = local(row.param.detach()), row.scheme
    rest = shards.get(scheme.carrier)
    if isinstance(rest, Tensor):
        fmt = formats.of(weight.dtype)
        assert fmt is not None  # else there is no scheme
        weight = scheme.joined(weight.float(), rest.float(), fmt)
        if scheme.carrier in row.left_out:
            del shards[scheme.carrier]
        elif scheme.join is not Join.master:
            shards[scheme.carrier] = torch.zeros_like(rest)
    rule = row.rule
    return twin.replay_whole(
        row.group, weight, local(grad), shards, widen=rule.widens, scaled=rule.scaled, may_draw=rule.may_draw
    )
