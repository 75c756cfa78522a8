"""What rounding in the optimizer states does to the updates: at a few elements the states are kept in FP32 as well.

A second moment that can only grow, a momentum that no longer decays, a step counter stuck at 256: every single step looks
right, since it starts from the states that are stored. Only a copy that was never rounded shows how far they have gone.
So at some elements of at most 16 tensors the states are kept in FP32 too and advanced by the optimizer's own rule, at
every step, with the real gradients. At every fourth step the same replay starts from the stored states as well:

    state factor = sum <from stored states, from FP32 states> / sum <from FP32 states, from FP32 states>

says by what factor the updates differ. The stored weight is taken anew at each step: only the update's size matters.

The copy begins with the states as they are stored when it begins, and counts the steps it has run since. It ends when
somebody else writes to the states (a checkpoint is loaded), and a new one begins with the next window. Where all states
are stored in FP32 there is none, and nothing is spent.

Legend: n rows (parameters), S states, K samples per row, 2: from stored states, from FP32 states.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch import rehearsal
from update_watch.cohort import _step_likeness as step_likeness
from update_watch.probe import Kind
from update_watch.replay import Run, Twin, rule_of, settings_of, shell
from update_watch.rows import Row
from update_watch.sampling import Sampler, gather, local, mask
from update_watch.transfer import Batch, Part
from update_watch.twin_copy import Copier, ReplayError

logger = logging.getLogger("update_watch")

_ROWS = 16
_SAMPLES = 64
_SPANS = 2  # with and without weight decay, say: each costs the operators of one update
_COMPARE_EVERY = 4  # steps
_SCALER = ("grad_scale", "found_inf")  # attributes an optimizer has within a GradScaler's fused step only
_LIMIT = 4096  # elements of tensors an optimizer may keep as attributes
_SAME = 1e-4  # states that do not depend on the weight differ by rounding alone


class ShadowWindow(NamedTuple):
    """One window's sums on their way to the host."""

    names: tuple[str, ...]
    steps: int  # that the copy has run since it began
    sums: Part


class Shadow:
    """The FP32 copy of one optimizer's states, as long as there is one. `before` and `after` surround every step."""

    def __init__(self, optimizer: Optimizer, twin: Twin | None, rng: random.Random, found: dict[Any, Any]) -> None:
        self._optimizer, self._twin, self._rng, self._found = optimizer, twin, rng, found
        self._copy: _Copy | None = None
        self._may_begin = True

    def before(self) -> None:
        """Advance by this step; call when gradients are final and the rule has not run."""
        if self._copy is None:
            return
        try:
            if self._copy.is_disturbed():
                self._copy = None
            else:
                self._copy.advance()
        except Exception as error:  # noqa: BLE001  a rule that does not run on copies at every step
            self._give_up(error)

    def after(self, rows: list[Row]) -> None:
        """Call just after the rule has run. A copy begins with the states it has left, if some are short of FP32."""
        if self._twin is None or (self._copy is None and not self._may_begin):
            return
        try:
            if self._copy is not None:
                self._copy.mark()
            elif any(self._optimizer.state.get(row.param) for row in rows):
                self._may_begin = False  # one look per window
                self._copy = _begin(self._optimizer, self._twin, rows, self._rng, self._found)
        except Exception as error:  # noqa: BLE001  as above
            self._give_up(error)

    def replan(self) -> None:
        """Parameters were added or removed: go on only if those looked at are where they were."""
        groups = self._optimizer.param_groups
        for row in self._copy.rows if self._copy is not None else ():
            members = groups[row.group]["params"] if row.group < len(groups) else ()
            if not any(row.param is member for member in members):
                self._copy = None
                return

    def close_window(self, batch: Batch) -> ShadowWindow | None:
        """Hand the sums to `batch` and start new ones."""
        self._may_begin = True
        return None if self._copy is None else self._copy.close(batch)

    def _give_up(self, error: Exception) -> None:
        logger.debug("update-watch: no state factor for %s: %r", type(self._optimizer).__name__, error)
        self._copy = self._twin = None


def read(window: ShadowWindow) -> dict[str, tuple[float | None, int]]:
    """State factor and steps behind it, by tensor. Runs on the background thread."""
    sums = window.sums.wait().reshape(-1, 2)
    return {
        name: (float(dot / want) if want > 0 else None, window.steps)
        for name, (dot, want) in zip(window.names, sums, strict=True)
    }


# --- choosing -----------------------------------------------------------------------------------------


def _begin(
    optimizer: Optimizer, twin: Twin, rows: list[Row], rng: random.Random, found: dict[Any, Any]
) -> _Copy | None:
    """A copy of states of some rows that have them below FP32; None when there are none."""
    alike: list[tuple[Any, list[Row]]] = []
    for row in rows:
        state = optimizer.state.get(row.param)
        if state and _short_states(row, state):
            key = (*_form(row, state), local(row.param).dtype, step_likeness(row, state))
            likes = next((likes for other, likes in alike if other == key), None)
            if likes is None:
                alike.append((key, [row]))
            else:
                likes.append(row)
    alike.sort(key=lambda item: -len(item[1]))
    chosen: list[list[Row]] = []
    for _, likes in alike:
        if len(chosen) < _SPANS and not _follow_weight(optimizer, likes[0], found):
            forms = [_form(likes[0], optimizer.state[likes[0].param]) for likes in (likes, *chosen[:1])]
            if forms[0] == forms[-1]:
                chosen.append(likes)
    if not chosen:
        return None
    spans = []
    left = _ROWS
    for i, likes in enumerate(reversed(chosen)):  # the smaller one first: what it does not need, the other may have
        count = min(len(likes), left // (len(chosen) - i))
        left -= count
        spans.append([likes[k * len(likes) // count] for k in range(count)])
    return _Copy(optimizer, twin, spans, rng)


def _short_states(row: Row, state: dict[str, Any]) -> list[str]:
    """The states of a row that are stored below FP32 and can be kept in FP32 as well."""
    row.check(state)
    if not row.is_measured or row.rule.kind is not Kind.elementwise or row.sampler is None:
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


def _form(row: Row, state: dict[str, Any]) -> tuple[Any, ...]:
    """Rows of one copy agree in this."""
    names = tuple(n for n, v in state.items() if _is_element(row, n) and isinstance(v, Tensor))
    return local(row.param).device, names, row.scheme.carrier


def _is_element(row: Row, name: str) -> bool:
    return name in row.rule.element_states or name == row.scheme.carrier


def _follow_weight(optimizer: Optimizer, row: Row, found: dict[Any, Any]) -> bool:
    """Whether a state depends on the weight itself (an average of it, say): kept in FP32 it would leave a stored weight
    that stalls behind, and differ for that. Found out on synthetic weights, without decay."""
    ndim = min(row.param.dim(), 2)
    key = ("follow", id(optimizer), row.group, ndim)
    if key not in found:
        found[key] = _differ_with_weight(optimizer, row.group, (48,) if ndim < 2 else (6, 8))
    return bool(found[key])


def _differ_with_weight(optimizer: Optimizer, group: int, shape: tuple[int, ...]) -> bool:
    start = torch.linspace(-1, 1, 48).reshape(shape)
    grad = torch.linspace(0.1, 1, 48).reshape(shape)
    ends: list[dict[str, Tensor]] = []
    try:
        with rehearsal._undisturbed(optimizer, torch.device("cpu")):
            for shift in (0.0, 0.5):
                trial = rehearsal._Trial(optimizer, group, start + shift, torch.float32)
                for scale in (1.0, -0.5, 0.25):
                    trial.step(scale * grad)
                ends.append({k: v.clone() for k, v in trial.state.items() if isinstance(v, Tensor)})
    except ReplayError:
        return True
    return any(not torch.allclose(ends[0][k].double(), ends[1][k].double(), rtol=_SAME, atol=1e-30) for k in ends[0])


# --- the copy -----------------------------------------------------------------------------------------


class _Part:
    """What is replayed as one parameter, in views of the copy's buffers. `state` holds scalars as well."""

    def __init__(self, group: int, param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        self.group, self.param, self.grad, self.state = group, param, grad, state


class _Span(NamedTuple):
    """Rows with one history: `start` to `stop` of the copy's rows."""

    start: int
    stop: int
    parts: tuple[_Part, ...]  # one; where counters are rounded too: of stored states, of FP32 states


class _Copy:
    """The states of some rows in FP32, at positions that stay."""

    def __init__(self, optimizer: Optimizer, twin: Twin, spans: list[list[Row]], rng: random.Random) -> None:
        self._optimizer, self._twin = optimizer, twin
        self.steps = 0
        self.rows = [row for rows in spans for row in rows]
        self._samplers = [Sampler(local(row.param), _SAMPLES) for row in self.rows]
        for sampler in self._samplers:
            sampler.redraw(rng)
        states = self._stored()
        self._device, self._names, self._carrier = _form(self.rows[0], states[0])
        short = [_short_states(row, state) for row, state in zip(self.rows, states, strict=True)]
        self._marked = [names[0] for names in short]
        self._is_split = any(name not in self._names for names in short for name in names)
        self._sums_n2 = torch.zeros(len(self.rows), 2, device=self._device)
        self._states_Sn2K = self._buffer(len(self._names))
        self._lay_out([(rows, tuple(self._scalars(rows[0]) for _ in range(1 + self._is_split))) for rows in spans])
        self._take_states(states)
        self._states_Sn2K[:, :, 1].copy_(self._states_Sn2K[:, :, 0])
        self.mark()

    # --- in the step -----------------------------------------------------------------------------

    def mark(self) -> None:
        """Remember how the rule has left the states."""
        self._marks: list[Any] | None = self._versions()

    def is_disturbed(self) -> bool:
        """Whether somebody has written to the states since, or a step has failed."""
        return self._marks is None or self._marks != self._versions()

    def advance(self) -> None:
        """Take the step that the optimizer is about to take."""
        live = [row.param.grad is not None for row in self.rows]
        if any(len({*live[span.start : span.stop]}) > 1 for span in self._spans):
            self._drop_idle(live)
            live = [row.param.grad is not None for row in self.rows]
        self._marks = None
        states = self._stored()
        compare = self.steps % _COMPARE_EVERY == 0
        weights = [sampler.view(local(row.param)) for row, sampler in zip(self.rows, self._samplers, strict=True)]
        grads = [
            view if row.param.grad is None else sampler.view(local(row.param.grad))
            for row, sampler, view in zip(self.rows, self._samplers, weights, strict=True)
        ]
        held_2nK = self._gather(weights + grads)
        if compare:
            self._take_states(states)
        if self._carrier:  # joined: an FP32 weight has no remainder
            held_2nK[0].add_(self._gather(self._views(states, self._carrier))[0])
            self._remainder().zero_()
        self._values_2n2K.copy_(held_2nK.unsqueeze(2))
        self._rule.run([p for span in self._spans if live[span.start] for p in span.parts[0 if compare else -1 :]])
        if compare:
            self._add(held_2nK[0])
        self.steps += 1

    def _add(self, before_nK: Tensor) -> None:
        moved_n2K = self._values_2n2K[0] - before_nK.unsqueeze(1)
        if self._carrier:
            moved_n2K.add_(self._remainder())
        products_n2K = moved_n2K * moved_n2K[:, 1:]
        if self._mask_n1K is not None:
            products_n2K.mul_(self._mask_n1K)
        self._sums_n2.add_(products_n2K.sum(-1))

    def _take_states(self, states: list[dict[str, Any]]) -> None:
        """Start the half of the stored states from them."""
        views = [view for name in self._names for view in self._views(states, name)]
        self._states_Sn2K[:, :, 0].copy_(self._gather(views))
        if self._is_split:
            for span in self._spans:
                stored = states[span.start].items()
                span.parts[0].state.update({k: _own(v, widen=False) for k, v in stored if k not in self._names})

    # --- at the end of a window --------------------------------------------------------------------

    def close(self, batch: Batch) -> ShadowWindow:
        """As `Shadow.close_window`."""
        names = tuple(row.names[0] for row in self.rows)
        window = ShadowWindow(names, self.steps, batch.add(self._sums_n2.reshape(-1).clone()))
        self._sums_n2.zero_()
        return window

    # --- buffers and views -------------------------------------------------------------------------

    def _buffer(self, count: int) -> Tensor:
        """[count, n, 2, K]. What is replayed as one parameter is one block of it: halves of a row, or rows of a half."""
        n = len(self.rows)
        if self._is_split:
            return torch.zeros(count, 2, n, _SAMPLES, device=self._device).transpose(1, 2)
        return torch.zeros(count, n, 2, _SAMPLES, device=self._device)

    def _lay_out(self, spans: list[tuple[list[Row], tuple[dict[str, Any], ...]]]) -> None:
        """Buffers and parts of `spans`: rows, and scalar state for each part."""
        self._values_2n2K = self._buffer(2)  # weights, gradients
        valid_nK = mask(self._samplers, self._device)
        self._mask_n1K = None if valid_nK is None else valid_nK.unsqueeze(1)
        self._spans: list[_Span] = []
        start = 0
        for rows, scalars in spans:
            stop = start + len(rows)
            parts = tuple(self._part(start, stop, i, scalar) for i, scalar in enumerate(scalars))
            self._spans.append(_Span(start, stop, parts))
            start = stop
        every = [part for span in self._spans for part in span.parts]
        is_native = type(self._optimizer).__module__.startswith("torch.optim")
        self._rule: _Standing | _Fresh = _Standing(self._optimizer, every) if is_native else _Fresh(self._twin)

    def _part(self, start: int, stop: int, half: int, scalars: dict[str, Any]) -> _Part:
        row = self.rows[start]
        shape = (-1, _SAMPLES) if row.rule.rows else (-1,)

        def view(buffer_n2K: Tensor) -> Tensor:
            block = buffer_n2K[start:stop, half] if self._is_split else buffer_n2K[start:stop]
            return block.view(shape)

        state = {name: view(self._states_Sn2K[k]) for k, name in enumerate(self._names)}
        weights_n2K, grads_n2K = self._values_2n2K
        return _Part(row.group, view(weights_n2K), view(grads_n2K), {**state, **scalars})

    def _drop_idle(self, live: list[bool]) -> None:
        """Let go of rows whose gradient is None where that of like rows is not: they have histories of their own now."""
        kept, spans = [], []
        for span in self._spans:
            inside = range(span.start, span.stop)
            staying = [i for i in inside if live[i]] or list(inside)
            scalars = tuple({k: v for k, v in part.state.items() if k not in self._names} for part in span.parts)
            spans.append(([self.rows[i] for i in staying], scalars))
            kept += staying
        old_Sn2K, old_n2 = self._states_Sn2K, self._sums_n2
        self.rows = [self.rows[i] for i in kept]
        self._samplers = [self._samplers[i] for i in kept]
        self._marked = [self._marked[i] for i in kept]
        self._states_Sn2K = self._buffer(len(self._names))
        self._sums_n2 = torch.stack([old_n2[i] for i in kept])
        for k, i in enumerate(kept):
            self._states_Sn2K[:, k].copy_(old_Sn2K[:, i])
        self._lay_out(spans)

    def _scalars(self, row: Row) -> dict[str, Any]:
        return {k: _own(v) for k, v in self._optimizer.state[row.param].items() if k not in self._names}

    def _stored(self) -> list[dict[str, Any]]:
        return [self._optimizer.state.get(row.param) or {} for row in self.rows]

    def _views(self, states: list[dict[str, Any]], name: str) -> list[Tensor]:
        return [sampler.view(local(state[name])) for sampler, state in zip(self._samplers, states, strict=True)]

    def _gather(self, views: list[Tensor]) -> Tensor:
        n = len(self.rows)
        return gather(views, self._samplers * (len(views) // n)).view(-1, n, _SAMPLES)

    def _remainder(self) -> Tensor:
        return self._states_Sn2K[self._names.index(self._carrier)]

    def _versions(self) -> list[Any]:
        tensors = [state.get(name) for state, name in zip(self._stored(), self._marked, strict=True)]
        return [(id(t), t._version) if isinstance(t, Tensor) else None for t in tensors]


def _own(value: Any, widen: bool = True) -> Any:
    """A scalar state of one's own; containers are copied by the replay itself."""
    if not isinstance(value, Tensor):
        return value
    is_short = value.dtype.is_floating_point and value.dtype.itemsize < 4
    return value.to(torch.float32 if widen and is_short else value.dtype, copy=True)


class _Standing:
    """A twin that stays from step to step: torch's own rules hold nothing but states and the settings of groups."""

    def __init__(self, optimizer: Optimizer, parts: list[_Part]) -> None:
        self._optimizer, self._parts = optimizer, parts
        self._rule = rule_of(optimizer)
        self._params = [torch.nn.Parameter(part.param) for part in parts]
        copier = Copier(_LIMIT, optimizer=optimizer)
        real = optimizer.param_groups
        groups = [settings_of(real[q.group], [p], copier) for p, q in zip(self._params, parts, strict=True)]
        state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        state.update({p: q.state for p, q in zip(self._params, parts, strict=True)})
        self._twin: Any = shell(optimizer, groups, state, copier)

    def run(self, parts: list[_Part]) -> None:
        """One step of the rule for some of the parts, with the settings of now."""
        used = {id(part) for part in parts}
        groups = self._twin.param_groups
        for part, param, group in zip(self._parts, self._params, groups, strict=True):
            param.grad = part.grad if id(part) in used else None
            settings = self._optimizer.param_groups[part.group]
            group.update({k: v for k, v in settings.items() if k not in ("params", "differentiable")})
        for name in _SCALER:
            setattr(self._twin, name, getattr(self._optimizer, name, None))
        self._rule(self._twin)


class _Fresh:
    """A new twin at every step, for the rules of others: they may keep anything."""

    def __init__(self, twin: Twin) -> None:
        self._twin = twin

    def run(self, parts: list[_Part]) -> None:
        """As `_Standing.run`."""
        results = self._twin.replay([Run(part.group, part.param, part.grad, part.state) for part in parts])
        for part, result in zip(parts, results, strict=True):
            part.param.copy_(result.param)
            for name, value in result.state.items():
                ours = part.state.get(name)
                if isinstance(ours, Tensor) and isinstance(value, Tensor) and ours.shape == value.shape:
                    ours.copy_(value)  # into the buffer, whatever the rule has put in its place
                else:
                    part.state[name] = value
