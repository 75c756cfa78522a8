"""Measured steps once more by the rule in FP32: rows of one history joined, waiting steps in one call, whole tensors in turn.

Legend: A accumulators (0 the weight, then states), n rows, R rows of all steps side by side, K samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch import formats
from update_watch.measure.accumulators.decay import Decayed, decay_sums
from update_watch.measure.gathers import Gathers
from update_watch.measure.identity.names import members_of
from update_watch.measure.parameters import WHOLE_LIMIT, Row, holds_elements
from update_watch.measure.sampling import local
from update_watch.replay.absent import ReplayError
from update_watch.replay.attribute_copy import is_plain
from update_watch.replay.kept_states import states_of
from update_watch.replay.rounding_scheme import Join
from update_watch.replay.rule import Kind, Rule
from update_watch.replay.twin import GroupSettings, Run, Twin

_WHOLE_PER_STEP = 2**22  # elements replayed as whole tensors in one step, beyond the first tensor


class Span(NamedTuple):
    """Neighbouring rows that are replayed as one."""

    start: int
    stop: int
    scalars: dict[str, Any]  # state that is not per element, as it was before the step
    dtypes: dict[str, torch.dtype]  # of state tensors


class Step(NamedTuple):
    """One of the steps that are replayed together."""

    replay: StepReplay
    rows: slice  # its place among the R
    spans: list[Span]
    settings: GroupSettings | None  # of an earlier step; None: as they are now
    live: list[bool]  # rows that take part; what turns out not to be replayable is taken out
    decay_5n: Tensor | None  # sums that the decay's part is added to


class StepReplay:
    """Replays the steps of some rows of one optimizer."""

    def __init__(self, optimizer: Optimizer, twin: Twin, gathers: Gathers) -> None:
        self._optimizer, self._twin, self._gathers = optimizer, twin, gathers
        self.rows, self._slots = gathers.rows, gathers.slots
        self._turn = 0  # where among the whole tensors the next step goes on
        self._saved = WHOLE_LIMIT  # elements that could have been replayed since all tensors were, together
        self.can_wait = twin.can_wait and all(row.rule.kind is Kind.elementwise for row in self.rows)

    def spans(self, states: list[dict[str, Any]], live: list[bool]) -> list[Span]:
        """Runs of rows that can be replayed as one, with their scalar state; tensors are still the optimizer's own."""
        spans = []
        n, start = len(self.rows), 0
        while start < n:
            row = self.rows[start]
            if not live[start] or row.rule.kind is not Kind.elementwise:
                start += 1
                continue
            likeness = row.step_likeness(states[start])
            stop = start + 1
            while stop < n and live[stop] and self.rows[stop].step_likeness(states[stop]) == likeness:
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
                    scalars[name] = value
                if is_tensor:
                    dtypes[name] = value.dtype
            spans.append(Span(start, stop, scalars, dtypes))
            start = stop
        return spans

    def counters(self, spans: list[Span]) -> list[tuple[dict[str, Any], str]]:
        """Where in the scalars of some spans there are tensors, which the step will write to."""
        return [
            (span.scalars, name)
            for span in spans
            for name, value in span.scalars.items()
            if isinstance(value, Tensor) and name not in self._slots
        ]

    def settings(self, spans: list[Span]) -> GroupSettings:
        """Of the groups of some spans, as they are now: what a step needs to be replayed later."""
        return self._twin.settings({self.rows[span.start].group for span in spans})

    def prepare(self, step: Step, intended_ARK: Tensor) -> None:
        """What the rule is to find: it may step a master instead of the weight."""
        for i, slot, row in self._gathers.carried:
            if row.scheme.join is Join.master:
                intended_ARK[slot, step.rows.start + i].copy_(intended_ARK[0, step.rows.start + i])

    def conclude(self, step: Step, intended_ARK: Tensor) -> None:
        """Make the weights whole that the rule has left in two parts."""
        for i, slot, row in self._gathers.carried:
            at = step.rows.start + i
            row.scheme.complete(intended_ARK[0, at], intended_ARK[slot, at])
            intended_ARK[slot, at].zero_()

    def runs(self, step: Step, intended_ARK: Tensor, grad_RK: Tensor) -> list[Run]:
        """A step's samples as the optimizer is to see them: views, of each span as one parameter."""
        return [self._sample_run(span, intended_ARK[:, step.rows], grad_RK[step.rows]) for span in step.spans]

    def take(self, step: Step, runs: Sequence[Run], results: Sequence[Run], intended_ARK: Tensor) -> None:
        """What the rule has put elsewhere than into the views."""
        intended_AnK = intended_ARK[:, step.rows]
        for run, result, span in zip(runs, results, step.spans, strict=True):
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

    def refuse(self, step: Step, error: ReplayError) -> None:
        """The rule has failed on a step's samples."""
        for span in step.spans:
            for i in range(span.start, span.stop):
                self.rows[i].reason, step.live[i] = str(error), False

    def decayed(self, step: Step, runs: Sequence[Run]) -> list[tuple[slice, Decayed]]:
        """Of the spans whose weight decay is rounded on its own: their rows, and what was before the step."""
        found = []
        groups = self._optimizer.param_groups
        for run, span in zip(runs, step.spans, strict=True):
            row = self.rows[span.start]
            # a window may be closed after the group was taken away
            decay = groups[row.group].get("weight_decay") if row.group < len(groups) else None
            if row.decouples_decay and isinstance(decay, (int, float)) and decay > 0:
                of_span = Decayed(run, local(row.param).dtype, span.dtypes, span.stop - span.start)
                found.append((slice(span.start, span.stop), of_span))
        return found

    def leave_decay_out(self, rows: slice) -> None:
        """The rule does not run on copies in the stored format."""
        self.rows[rows.start].decouples_decay = False

    def _sample_run(self, span: Span, intended_AnK: Tensor, grad_nK: Tensor) -> Run:
        row, rows = self.rows[span.start], slice(span.start, span.stop)
        shape = (span.stop - span.start, self._gathers.samples) if row.rule.rows else (-1,)
        state = {
            name: intended_AnK[value, rows].view(shape) if name in self._slots and value is not None else value
            for name, value in span.scalars.items()
        }
        param, rule = intended_AnK[0, rows].view(shape), row.rule
        if rule.scaled is None and rule.widens:  # with FP32 weights, numbers in the weight's format would be FP32
            state |= {n: v.float() for n, v in state.items() if isinstance(v, Tensor) and v.dtype in formats.HALVES}
        return Run(row.group, param, grad_nK[rows].view(shape), state, rule.scaled, rule.may_draw)

    def replay_whole(
        self, intended_AnK: Tensor, states: list[dict[str, Any]], live: list[bool], moving_first: bool
    ) -> None:
        """Replay a bounded number of elements as whole tensors, in turn; the other such rows sit this step out.

        Where a rule needs all tensors together, that is one replay in so many steps as they are too large for one.
        `moving_first`: how their samples are read, see `Gathers`.
        """
        self._replay_together(intended_AnK, live, moving_first)
        # of a tensor that is read in several rows the first; the others go with it
        waiting = [i for i, row in enumerate(self.rows) if live[i] and row.rule.kind is Kind.whole and row.is_first]
        if not waiting:
            return
        first = next((k for k, i in enumerate(waiting) if i >= self._turn), 0)
        budget = _WHOLE_PER_STEP
        chosen: list[int] = []
        for i in waiting[first:] + waiting[:first]:
            numel = local(self.rows[i].param).numel()
            if chosen and numel > budget:
                break
            budget -= numel
            chosen.append(i)
        self._turn = chosen[-1] + 1
        live[:] = [was and row.rule.kind is not Kind.whole for was, row in zip(live, self.rows, strict=True)]
        for i in chosen:
            own = [k for k, row in enumerate(self.rows) if row.param is self.rows[i].param]
            try:
                result = _replay_whole(self._twin, self.rows[i], states[i])
            except ReplayError as error:
                for k in own:
                    self.rows[k].reason = str(error)
                continue
            for k in own:
                self._take_whole(k, result, intended_AnK, moving_first)
                live[k] = True

    def _replay_together(self, intended_AnK: Tensor, live: list[bool], moving_first: bool) -> None:
        waiting = [i for i, row in enumerate(self.rows) if live[i] and row.rule.kind is Kind.together]
        if not waiting:
            return
        self._saved += _WHOLE_PER_STEP
        results: dict[int, Run] = {}
        if self._saved >= sum(local(param).numel() for param in members_of(self._optimizer)):
            self._saved = 0
            try:
                results = _replay_together(self._twin, self._optimizer, self.rows[waiting[0]].rule)
            except ReplayError as error:
                for i in waiting:
                    self.rows[i].reason = str(error)
        for i in waiting:
            live[i] = bool(results)
            if results:
                self._take_whole(i, results[id(self.rows[i].param)], intended_AnK, moving_first)

    def _take_whole(self, i: int, result: Run, intended_AnK: Tensor, moving_first: bool) -> None:
        intended_AnK[0, i] = self._gathers.samples_of(i, result.param, moving_first)
        for name, slot in self._slots.items():
            value = result.state.get(name)
            if isinstance(value, Tensor) and holds_elements(value, result.param.shape):
                intended_AnK[slot, i] = self._gathers.samples_of(i, value, moving_first)


def replay_samples(
    twin: Twin, steps: Sequence[Step], before_ARK: Tensor, gradient_RK: Tensor, intended_ARK: Tensor, grad_RK: Tensor
) -> None:
    """Make of `intended`, which is what was stored before some steps, what an FP32 accumulator would hold after them.

    `grad` may be overwritten; `before` and `gradient` hold the same as it and `intended`, and stay. A row that turns out not
    to be replayable gets its reason.
    """
    for step in steps:
        step.replay.prepare(step, intended_ARK)
    steps = [step for step in steps if step.spans]
    if not steps:
        return
    settings, keys = _joined_settings(steps)
    runs = [
        [run._replace(group=key[run.group]) for run in step.replay.runs(step, intended_ARK, grad_RK)]
        for step, key in zip(steps, keys, strict=True)
    ]
    _look_at_decay(twin, steps, runs, settings)
    try:
        results = twin.replay([run for of_step in runs for run in of_step], settings=settings)
    except ReplayError as error:
        if len(steps) == 1:
            steps[0].replay.refuse(steps[0], error)
        for step in steps if len(steps) > 1 else ():  # find out which it was
            intended_ARK[:, step.rows].copy_(before_ARK[:, step.rows])
            grad_RK[step.rows].copy_(gradient_RK[step.rows])
            alone = [step._replace(decay_5n=None)]
            replay_samples(twin, alone, before_ARK, gradient_RK, intended_ARK, grad_RK)
        return
    start = 0
    for step, of_step in zip(steps, runs, strict=True):
        step.replay.take(step, of_step, results[start : start + len(of_step)], intended_ARK)
        start += len(of_step)


def _joined_settings(steps: Sequence[Step]) -> tuple[GroupSettings | None, list[dict[int, int]]]:
    """Settings of all steps, alike ones once; of each step under which number those of a group are."""
    joined: GroupSettings = {}
    keys: list[dict[int, int]] = []
    for step in steps:
        if step.settings is None:  # it did not wait, and is alone
            return None, [{row.group: row.group for row in step.replay.rows}]
        key: dict[int, int] = {}
        for group, settings in step.settings.items():
            last = keys[-1].get(group) if keys else None
            is_known = last is not None and _are_alike(joined[last], settings)
            key[group] = last if is_known and last is not None else len(joined)
            joined[key[group]] = settings
        keys.append(key)
    return joined, keys


def _are_alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        value is b[name] or (is_plain(value) and is_plain(b[name]) and value == b[name])
        for name, value in a.items()
        if name != "params"
    )


def _look_at_decay(
    twin: Twin, steps: Sequence[Step], runs: Sequence[list[Run]], settings: GroupSettings | None
) -> None:
    looks = [
        (step, rows, of_span)
        for step, of_step in zip(steps, runs, strict=True)
        if step.decay_5n is not None
        for rows, of_span in step.replay.decayed(step, of_step)
    ]
    for dtype in dict.fromkeys(of_span.dtype for _, _, of_span in looks):
        alike = [look for look in looks if look[2].dtype is dtype]
        try:
            sums_5R = decay_sums(twin, [of_span for _, _, of_span in alike], settings)
        except ReplayError:
            for step, rows, _ in alike:
                step.replay.leave_decay_out(rows)
            continue
        start = 0
        for step, rows, of_span in alike:
            assert step.decay_5n is not None
            step.decay_5n[:, rows].add_(sums_5R[:, start : start + of_span.rows])
            start += of_span.rows


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
        row.group, weight, local(grad), shards, **rule.formats, scaled=rule.scaled, may_draw=rule.may_draw
    )


def _replay_together(twin: Twin, optimizer: Optimizer, rule: Rule) -> dict[int, Run]:
    """Of all tensors of an optimizer, by their ids."""
    runs, states = dict[int, Run](), states_of(optimizer)
    for index, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            state = states.get(param) or {}
            shards = {name: local(value) if isinstance(value, Tensor) else value for name, value in state.items()}
            grad = None if param.grad is None else local(param.grad)
            runs[id(param)] = Run(index, local(param.detach()), grad, shards)
    return dict(zip(runs, twin.replay_together(list(runs.values()), **rule.formats), strict=True))
