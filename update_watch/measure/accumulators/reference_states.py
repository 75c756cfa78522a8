"""The states of a few parameters in FP32, advanced by the optimizer's own rule beside the stored ones; see `shadow`.

Legend: A gradients and, where they are needed, weights, n rows (parameters), S states, K samples per row, 2: from stored
states, from FP32 states.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.measure.accumulators.fixed_samples import FixedSamples
from update_watch.measure.device import joint_reads
from update_watch.measure.device.one_thread import OnOneThread
from update_watch.measure.parameters import Row
from update_watch.measure.sampling import local, mask
from update_watch.measure.transfer import Batch, Part
from update_watch.replay.rule import Kind
from update_watch.replay.twin import GroupSettings, Run, Twin

_SAMPLES = 64
_COMPARE_EVERY = 16  # steps


class ShadowWindow(NamedTuple):
    """One window's sums on their way to the host."""

    names: tuple[str, ...]
    steps: int  # that the copy has run since it began
    sums: Part


def short_states(row: Row, state: dict[str, Any]) -> list[str]:
    """The states of a row that are stored below FP32 and can be kept in FP32 as well."""
    row.check(state)
    if not row.is_measured or row.rule.kind is not Kind.elementwise or not row.rule.widens or row.sampler is None:
        return []
    return [
        name
        for name, value in state.items()
        if isinstance(value, Tensor)
        and value.dtype.is_floating_point
        and value.dtype.itemsize < 4
        and (name in row.rule.element_states or row.rule.forms.get(name) == "scalar")
        and name != row.scheme.carrier
    ]


def form(row: Row, state: dict[str, Any]) -> tuple[Any, ...]:
    """Rows of one copy agree in this."""
    names = tuple(n for n, v in state.items() if is_element(row, n) and isinstance(v, Tensor))
    return local(row.param).device, names, row.scheme.addend, row.left_out, row.rule.scaled, row.rule.may_draw


def is_element(row: Row, name: str) -> bool:
    return (name in row.rule.element_states or name == row.scheme.addend) and name not in row.left_out


class _Part:
    """What is replayed as one parameter, in views of the copy's buffers. `state` holds scalars as well."""

    def __init__(
        self, group: int, param: Tensor, grad: Tensor, state: dict[str, Any], of: Callable[[Tensor], Tensor]
    ) -> None:
        self.group, self.param, self.grad, self.state = group, param, grad, state
        self.of = of  # its part of a buffer [n, 2, K]


class _Span(NamedTuple):
    """Rows with one history: `start` to `stop` of the copy's rows."""

    start: int
    stop: int
    parts: tuple[_Part, ...]  # one; where counters are rounded too: of stored states, of FP32 states


class _Step(NamedTuple):
    """A step that is still to be replayed: many in a row cost less than each on its own."""

    held: (
        Any  # [A, n, h, K] gradients and, where they are needed, weights: once, or for both halves; see `FixedSamples`
    )
    spans: list[_Span]  # with gradients
    settings: GroupSettings | None  # of the groups; None: as they are when it is replayed, at once


class FullStates:
    """The states of some rows in FP32, at positions that stay."""

    def __init__(
        self, optimizer: Optimizer, twin: Twin, spans: list[list[Row]], rng: random.Random, needs_weight: bool
    ) -> None:
        self._optimizer, self._twin, self._needs_weight = optimizer, twin, needs_weight
        self.steps = 0
        self._waiting: list[_Step] = []
        self.rows = [row for rows in spans for row in rows]
        self._samplers = [row.sampler_of(_SAMPLES) for row in self.rows]
        for sampler in self._samplers:
            sampler.redraw(rng)
        self._device, self._names, carrier, self._left_out, *_ = form(self.rows[0], optimizer.state[self.rows[0].param])
        self._carrier = carrier if carrier in self._names else ""
        short = {name for row in self.rows for name in short_states(row, optimizer.state[row.param])}
        self._is_split = not short.issubset(self._names)
        self._sums_n2K = torch.zeros(len(self.rows), 2, _SAMPLES, device=self._device)  # of single elements
        self._states_Sn2K = self._buffer(len(self._names))
        self._lay_out([(rows, tuple(self._scalars(rows[0]) for _ in range(1 + self._is_split))) for rows in spans])
        self._take_states()
        self._states_Sn2K[:, :, 1].copy_(self._states_Sn2K[:, :, 0])
        self.mark()

    # --- in the step -----------------------------------------------------------------------------

    def mark(self) -> None:
        """Remember how the rule has left the states."""
        self._marks: list[Any] | None = self._versions()

    def is_disturbed(self) -> bool:
        """Whether somebody has written to the states since, or a step has failed, or came to wait for too long."""
        return self._marks is None or self._marks != self._versions() or bool(self._waiting and self._is_scaled())

    def advance(self) -> None:
        """Take the step that the optimizer is about to take."""
        live = [row.param.grad is not None for row in self.rows]
        if any(len({*live[span.start : span.stop]}) > 1 for span in self._spans):
            self._replay(compare=False)
            self._drop_idle(live)
            live = [row.param.grad is not None for row in self.rows]
        self._marks = None
        self.steps += 1
        compare = self.steps % _COMPARE_EVERY == 0
        grads = [row.param if row.param.grad is None else row.param.grad for row in self.rows]  # of idle ones: anything
        weights = [row.param for row in self.rows] if compare or self._needs_weight else []
        held = self._reads.read([local(t) for t in grads + weights])
        spans = [span for span in self._spans if live[span.start]]
        can_wait = self._twin.can_wait and not self._is_scaled()
        self._waiting.append(_Step(held, spans, self._twin.settings(self._groups) if can_wait else None))
        if compare or not can_wait:
            self._replay(compare)

    def _replay(self, compare: bool) -> None:
        """Run the steps that wait; with `compare` the last one from the stored states as well."""
        waiting, self._waiting = self._waiting, []
        joint_reads.launch()
        alone = OnOneThread(self._device)
        with alone, alone:
            self._replay_all(waiting, waiting.pop() if compare else None)

    def _replay_all(self, waiting: list[_Step], compared: _Step | None) -> None:
        waiting = [step._replace(held=self._reads.tensor(step.held)) for step in waiting]
        for _, alike in itertools.groupby(waiting, lambda step: (step.spans, step.settings is None)):
            steps = list(alike)
            self._run([span.parts[-1] for span in steps[0].spans], steps)
        if compared is not None:
            compared = compared._replace(held=self._reads.tensor(compared.held))
            self._take_states()
            self._run([part for span in compared.spans for part in span.parts], [compared])
            self._add(compared.held[1, :, :1])

    def _run(self, parts: list[_Part], steps: list[_Step]) -> None:
        if not parts:
            return
        rule = self.rows[0].rule  # `form`: rows of one copy are replayed in one way
        runs = [Run(part.group, part.param, part.grad, part.state, rule.scaled, rule.may_draw) for part in parts]
        if steps[0].settings is None:
            self._fill(steps[0])
            results = self._twin.replay(runs)
        else:
            results = self._twin.replay_steps(runs, map(self._fill, steps))
        for part, result in zip(parts, results, strict=True):
            if result.param.untyped_storage()._cdata != part.param.untyped_storage()._cdata:  # p.data was replaced
                part.param.copy_(result.param)
            for name, value in result.state.items():
                ours = part.state.get(name)
                if name not in self._names:
                    part.state[name] = value
                elif value is not ours and isinstance(ours, Tensor):
                    ours.copy_(value)  # into the buffer, whatever the rule has put in its place

    def _fill(self, step: _Step) -> GroupSettings:
        """Gradients and weights of a step into the buffers."""
        if self._reads.are_once:
            self._values_2n2K[: len(step.held)].copy_(step.held)
            return step.settings or {}
        # read for both halves: where a gradient lies is changed, which is no launch
        for span in self._spans:
            for part in span.parts:
                part.grad.data = part.of(step.held[0])
        if len(step.held) > 1:
            self._values_2n2K[1].copy_(step.held[1])
        return step.settings or {}

    def _is_scaled(self) -> bool:
        # in a GradScaler's fused step the optimizer has attributes that the rule reads
        return hasattr(self._optimizer, "found_inf")

    def _add(self, before_n1K: Tensor) -> None:
        moved_n2K = self._values_2n2K[1] - before_n1K
        products_n2K = moved_n2K * moved_n2K[:, 1:]
        if self._mask_n1K is not None:
            products_n2K.mul_(self._mask_n1K)
        self._sums_n2K.add_(products_n2K)

    def _take_states(self) -> None:
        """Start the half of the stored states from them."""
        stored = self._optimizer.state
        tensors = [local(stored[row.param][name]) for name in self._names for row in self.rows]
        stored_SnhK = self._reads.tensor(self._reads.read(tensors))
        joint_reads.launch()
        self._states_Sn2K[:, :, 0].copy_(stored_SnhK[:, :, 0])
        if self._carrier:  # an FP32 weight has no remainder that would have to be added to the update
            self._states_Sn2K[self._names.index(self._carrier), :, 0].zero_()
        if self._is_split:
            for span in self._spans:
                stored = self._optimizer.state[self.rows[span.start].param].items()
                span.parts[0].state.update({k: _own(v, widen=False) for k, v in stored if self._is_scalar(k)})

    # --- at the end of a window --------------------------------------------------------------------

    def close(self, batch: Batch) -> ShadowWindow:
        """Hand the sums to `batch` and start new ones."""
        names = tuple(row.names[0] for row in self.rows)
        window = ShadowWindow(names, self.steps, batch.add(self._packed().reshape(-1)))
        self._sums_n2K.zero_()
        return window

    def _packed(self) -> Tensor:
        """[n, 5]: dot, want, and over elements the sums of dot^2, dot want, want^2; in units of each row's largest want."""
        largest_n1 = self._sums_n2K[:, 1].amax(-1, keepdim=True).unsqueeze(-1)
        dot_nK, want_nK = (self._sums_n2K / torch.where(largest_n1 > 0, largest_n1, 1.0)).unbind(1)
        squares = dot_nK * dot_nK, dot_nK * want_nK, want_nK * want_nK
        return torch.stack([part_nK.sum(-1) for part_nK in (dot_nK, want_nK, *squares)], -1)

    # --- buffers and views -------------------------------------------------------------------------

    def _buffer(self, count: int) -> Tensor:
        """[count, n, 2, K]. What is replayed as one parameter is one block of it: halves of a row, or rows of a half."""
        n = len(self.rows)
        if self._is_split:
            return torch.zeros(count, 2, n, _SAMPLES, device=self._device).transpose(1, 2)
        return torch.zeros(count, n, 2, _SAMPLES, device=self._device)

    def _lay_out(self, spans: list[tuple[list[Row], tuple[dict[str, Any], ...]]]) -> None:
        """Buffers and parts of `spans`: rows, and scalar state for each part."""
        self._values_2n2K = self._buffer(2)  # gradients, weights
        self._reads = FixedSamples(self.rows, self._samplers, self._is_split, self._device)
        valid_nK = mask(self._samplers, self._device)
        self._mask_n1K = None if valid_nK is None else valid_nK.unsqueeze(1)
        self._spans: list[_Span] = []
        start = 0
        for rows, scalars in spans:
            stop = start + len(rows)
            parts = tuple(self._part(start, stop, i, scalar) for i, scalar in enumerate(scalars))
            self._spans.append(_Span(start, stop, parts))
            start = stop
        # who writes to states writes to those of all parameters: a look at each span's last row is enough
        self._marked = [self.rows[span.stop - 1].param for span in self._spans]
        self._groups = {part.group for span in self._spans for part in span.parts}

    def _part(self, start: int, stop: int, half: int, scalars: dict[str, Any]) -> _Part:
        row = self.rows[start]
        shape = (-1, _SAMPLES) if row.rule.rows else (-1,)

        def view(buffer_n2K: Tensor) -> Tensor:
            block = buffer_n2K[start:stop, half] if self._is_split else buffer_n2K[start:stop]
            return block.view(shape)

        state = {name: view(self._states_Sn2K[k]) for k, name in enumerate(self._names)}
        grads_n2K, weights_n2K = self._values_2n2K
        return _Part(row.group, view(weights_n2K), view(grads_n2K), {**state, **scalars}, view)

    def _drop_idle(self, live: list[bool]) -> None:
        """Let go of rows whose gradient is None where that of like rows is not: they have histories of their own now."""
        kept, spans = [], []
        for span in self._spans:
            inside = range(span.start, span.stop)
            staying = [i for i in inside if live[i]] or list(inside)
            scalars = tuple({k: v for k, v in part.state.items() if k not in self._names} for part in span.parts)
            spans.append(([self.rows[i] for i in staying], scalars))
            kept += staying
        old_Sn2K, old_n2K = self._states_Sn2K, self._sums_n2K
        self.rows = [self.rows[i] for i in kept]
        self._samplers = [self._samplers[i] for i in kept]
        self._states_Sn2K = self._buffer(len(self._names))
        self._sums_n2K = torch.stack([old_n2K[i] for i in kept])
        for k, i in enumerate(kept):
            self._states_Sn2K[:, k].copy_(old_Sn2K[:, i])
        self._lay_out(spans)

    def _scalars(self, row: Row) -> dict[str, Any]:
        return {k: _own(v) for k, v in self._optimizer.state[row.param].items() if self._is_scalar(k)}

    def _is_scalar(self, name: str) -> bool:
        return name not in self._names and name not in self._left_out

    def _versions(self) -> list[Any]:
        """Identity and number of writes of every state tensor looked at."""
        states = [self._optimizer.state.get(param) or {} for param in self._marked]
        return [(id(v), v._version) for state in states for v in state.values() if isinstance(v, Tensor)]


def _own(value: Any, widen: bool = True) -> Any:
    """A scalar state of one's own; containers are copied by the replay itself."""
    if not isinstance(value, Tensor):
        return value
    is_short = value.dtype.is_floating_point and value.dtype.itemsize < 4
    return value.to(torch.float32 if widen and is_short else value.dtype, copy=True)
