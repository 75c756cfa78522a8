"""A group of an optimizer's parameters that is measured in the same steps.

`before` gathers weights, gradients and states just before the rule runs, `after` what was stored; `add` replays the rule
on them in FP32 and adds both to the tally. `add` may wait for a few steps: several in a row cost half as much as each on
its own, in caches that training has used since. Everything is arithmetic on small tensors on the device.

Legend: A accumulators (0 the weight, then states), n rows, K samples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch import formats
from update_watch.formats import Format
from update_watch.measure.accumulators.decay import decay_sums
from update_watch.measure.parameters import Row
from update_watch.measure.sampling import gather, local, mask, pack_views
from update_watch.measure.sums import Tally
from update_watch.replay.copier import ReplayError
from update_watch.replay.rounding_scheme import Join
from update_watch.replay.rule_kind import Kind
from update_watch.replay.twin import GroupSettings, Run, Twin

_HEADROOM_EVERY = 8  # measured steps between two looks at headroom and decay: they change slowly
_PATH_EVERY = 8  # of so many measured steps one is at the window's own positions; it is a full step
_FULL_EVERY = 2  # measured steps between two in which states and gradients are compared and not weights alone
_DECAY_MEMORY = 0.9  # weight of a window's decay sums in the next
_WHOLE_PER_STEP = 2**22  # elements replayed as whole tensors in one step, beyond the first tensor


class Span(NamedTuple):
    """Neighbouring rows that are replayed as one."""

    start: int
    stop: int
    scalars: dict[str, Any]  # state that is not per element, as it was before the step
    dtypes: dict[str, torch.dtype]  # of state tensors


class Snapshot:
    """One step of a cohort, from `before` to `add`."""

    __slots__ = (
        "after",
        "before_AnK",
        "counts_all",
        "full",
        "grad_nK",
        "held",
        "intended_AnK",
        "live",
        "look",
        "path",
        "settings",
        "spans",
    )

    def __init__(self, held: Tensor, live: list[bool], spans: list[Span], settings: GroupSettings | None) -> None:
        self.held, self.live, self.spans, self.settings = held, live, spans, settings
        self.full = self.path = self.look = False
        self.counts_all = True
        self.after: Tensor | None = None
        self.before_AnK: Tensor | None = None
        self.intended_AnK: Tensor | None = None  # the replayed values
        self.grad_nK: Tensor | None = None


class Cohort:
    """Rows of one optimizer on one device, measured together."""

    def __init__(self, optimizer: Optimizer, twin: Twin, rows: list[Row], samples: int) -> None:
        self.optimizer, self.twin, self.rows, self.samples = optimizer, twin, rows, samples
        self.device = local(rows[0].param).device
        self.samplers = [row.sampler for row in rows if row.sampler is not None]
        carriers = {row.scheme.carrier for row in rows if row.scheme.carrier}
        self.states = sorted(carriers.union(*(row.rule.element_states for row in rows)))
        self._slots = {name: 1 + i for i, name in enumerate(self.states)}
        # rows that count at the path's positions too: [n, 1], or true or false for all of them
        self._counts = [row.is_whole or row.rule.kind is Kind.whole for row in rows]
        self._counts_n1: Tensor | bool = all(self._counts)
        if any(self._counts) and not all(self._counts):
            self._counts_n1 = torch.zeros(len(rows), 1, dtype=torch.bool, device=self.device)
            for i, counts in enumerate(self._counts):
                if counts:
                    self._counts_n1[i].fill_(True)
        self._moving = [sampler for sampler in self.samplers if not sampler.is_whole]
        self._zero = torch.zeros((), device=self.device)
        self._zeros = [
            self._zero.to(local(row.param).dtype).expand(row.sampler.view_shape) for row in rows if row.sampler
        ]
        self._view = [sampler.view for sampler in self.samplers]
        self._is_sharded = any(local(row.param) is not row.param for row in rows)
        self._padding = mask(self.samplers, self.device)
        self._mask: Tensor | None = self._padding
        self._masked: tuple[bool, ...] = (True,) * len(rows)
        self._turn = 0
        self._formats = _format_runs(rows)
        # rows with a state that holds what rounding took from the weight: what is stored is both together
        self._carried = [(i, self._slots[row.scheme.carrier], row) for i, row in enumerate(rows) if row.scheme.carrier]
        self._fresh = list(range(len(rows)))  # rows that had no state yet
        self.steps = 0  # measured in this window, those that are still to be added included
        self._can_wait = twin.can_wait and all(row.rule.kind is Kind.elementwise for row in rows)
        self.open_window()

    def open_window(self) -> None:
        """Start new sums."""
        old = getattr(self, "tally", None)
        self.tally = Tally(1 + len(self.states), len(self.rows), self.samples, self.device)
        if old is not None:
            # a decay far below one step of the format shows only over many windows: they are pooled, the old ones less
            self.tally.decay_5n.copy_(old.decay_5n).mul_(_DECAY_MEMORY)
        self.steps = 0
        self.live_steps = [0] * len(self.rows)
        self.full_steps = [0] * len(self.rows)
        self.gradless_steps = [0] * len(self.rows)

    # --- in the step -----------------------------------------------------------------------------

    def before(self) -> Snapshot:
        """Gather; call when gradients are final and the rule has not run."""
        steps = self.steps
        # not always the same one of eight: some parameters are trained in every eighth step only
        path = steps % _PATH_EVERY == 6 * (steps // _PATH_EVERY) % _PATH_EVERY
        # a path over the window needs the same elements again; all other sums gain from other elements
        self._move(path)
        states = self._states()
        grads = [row.param.grad for row in self.rows]
        for row, state in zip(self.rows, states, strict=True):
            row.check(state)
        dense = grads
        if any([g is not None and g.layout is not torch.strided for g in grads]):
            dense = [g if g is None or g.layout is torch.strided else None for g in grads]
            for row, g, d in zip(self.rows, grads, dense, strict=True):
                row.reason = row.reason if g is d else f"its gradients are sparse ({g.layout})"  # type: ignore[union-attr]
        held = pack_views(self._weight_views() + self._state_views(states) + self._views(dense), self.samplers)
        if held.device != self.device:
            raise RuntimeError(f"parameters planned for on {self.device} are on {held.device}")
        live = [g is not None and row.is_measured for g, row in zip(grads, self.rows, strict=True)]
        spans = self._spans(states, live)
        can_wait = self._can_wait and not hasattr(self.optimizer, "found_inf")
        settings = self.twin.settings({self.rows[span.start].group for span in spans}) if can_wait else None
        snapshot = Snapshot(held, live, spans, settings)
        snapshot.path = path
        # the path's elements are met in many steps: in the sums they would outweigh all others
        snapshot.counts_all = not path or steps == 0
        snapshot.full = not self.states or steps % _FULL_EVERY == 0
        snapshot.look = steps == 0 or steps % _HEADROOM_EVERY == _HEADROOM_EVERY - 1
        if not all(live):
            for i, grad in enumerate(grads):
                self.gradless_steps[i] += grad is None
        if not can_wait:
            self._replay(snapshot, states)
        return snapshot

    def after(self, snapshot: Snapshot) -> bool:
        """Gather what was stored. True: `add` may wait for the next steps."""
        views = self._weight_views()
        if snapshot.full or self._carried:
            states = self._states()
            if self._fresh and self.states:  # made in this step: what was in them before is nothing
                for i in self._fresh:
                    self.rows[i].check(states[i])
                self._fresh = [i for i in self._fresh if not states[i]]
            views += self._state_views(states)
        snapshot.after = pack_views(views, self.samplers)
        self.steps += 1
        return snapshot.settings is not None

    def _move(self, path: bool) -> None:
        for sampler in self._moving:
            if path:
                sampler.settle()
            else:
                sampler.stray()

    # --- now or some steps later -------------------------------------------------------------------

    def add(self, snapshot: Snapshot) -> None:
        """Replay the step and add it to the tally."""
        if snapshot.intended_AnK is None:
            self._replay(snapshot, None)
        before_AnK, intended_AnK, grad_nK = snapshot.before_AnK, snapshot.intended_AnK, snapshot.grad_nK
        assert (
            before_AnK is not None and intended_AnK is not None and grad_nK is not None and snapshot.after is not None
        )
        after_AnK = self._widened(snapshot.after)
        self._join(after_AnK)
        live, full = tuple(snapshot.live), snapshot.full
        present = len(after_AnK) if full else 1
        mask_nK = self._current_mask(live)
        intended_AnK = intended_AnK[:present]
        self.tally.add(
            before_AnK[:present],
            intended_AnK,
            after_AnK[:present],
            grad_nK if full else None,
            mask_nK,
            path=snapshot.path,
            counted=snapshot.counts_all or self._counts_n1,
        )
        if snapshot.look:
            intended_nK = intended_AnK[0]
            if mask_nK is not None:
                intended_nK = torch.where(mask_nK > 0, intended_nK, self._zero)
            for rows, fmt in self._formats:
                self.tally.add_headroom(before_AnK[0], intended_nK, rows, fmt)
        for i, is_live in enumerate(live):
            if is_live and (snapshot.counts_all or self._counts[i]):
                self.live_steps[i] += 1
                self.full_steps[i] += full

    def _replay(self, snapshot: Snapshot, states: list[dict[str, Any]] | None) -> None:
        held_AnK = self._widened(snapshot.held)
        before_AnK, grad_nK = held_AnK[:-1], held_AnK[-1]
        # before the rule, which may write into the gradient
        snapshot.before_AnK, snapshot.grad_nK = before_AnK, grad_nK.ne(0) if snapshot.full else grad_nK
        self._join(before_AnK)
        intended_AnK = snapshot.intended_AnK = before_AnK.clone()
        for i, slot, row in self._carried:
            if row.scheme.join is Join.master:
                intended_AnK[slot, i].copy_(before_AnK[0, i])  # the rule may step it instead of the weight
        self._replay_samples(snapshot, intended_AnK, grad_nK)
        if states is not None:
            self._replay_whole(intended_AnK, states, snapshot.live)
        for i, slot, row in self._carried:
            if row.scheme.addend:
                intended_AnK[0, i].add_(intended_AnK[slot, i])
            intended_AnK[slot, i].zero_()

    def _join(self, values_AnK: Tensor) -> None:
        """Make the stored weights whole; the states that held the rest are empty then, as in FP32."""
        for i, slot, row in self._carried:
            fmt = formats.of(local(row.param).dtype)
            assert fmt is not None  # else there is no scheme
            values_AnK[0, i].copy_(row.scheme.joined(values_AnK[0, i], values_AnK[slot, i], fmt))
            values_AnK[slot, i].zero_()

    def pack(self) -> Tensor:
        """The window's sums in one vector on the device; see `tally.Sums`."""
        self._move(path=True)
        has_changed = any(row.has_changed for row in self.rows)
        stored_nK = None if has_changed else gather(self._weight_views(), self.samplers)
        return self.tally.pack(stored_nK, self._formats)

    # --- gathering ------------------------------------------------------------------------------

    def _states(self) -> list[dict[str, Any]]:
        found = self.optimizer.state
        return [found.get(row.param) or {} for row in self.rows]

    def _weight_views(self) -> list[Tensor]:
        return self._views([row.param for row in self.rows])

    def _state_views(self, states: list[dict[str, Any]]) -> list[Tensor]:
        """Views of all states, in the order of the slots; zeros for those that do not exist (yet)."""
        views: list[Tensor] = []
        for name in self._slots:
            views += self._views(
                [state.get(name) if name in row.shaped else None for row, state in zip(self.rows, states, strict=True)]
            )
        return views

    def _views(self, tensors: list[Tensor | None]) -> list[Tensor]:
        """One view per row. For this step only: kept, it would keep the memory of what training lets go."""
        if self._is_sharded:
            tensors = [None if tensor is None else local(tensor) for tensor in tensors]
        return [
            zeros if tensor is None else view(tensor)
            for view, zeros, tensor in zip(self._view, self._zeros, tensors, strict=True)
        ]

    def _widened(self, packed: Tensor) -> Tensor:
        """[accumulators, n, K] FP32 from one row per accumulator and parameter."""
        return packed.to(torch.float32).view(-1, len(self.rows), self.samples)

    def _current_mask(self, live: tuple[bool, ...]) -> Tensor | None:
        if live != self._masked:
            self._masked = live
            if all(live):
                self._mask = self._padding
            else:
                shape = (len(self.rows), self.samples)
                valid = torch.ones(shape, device=self.device) if self._padding is None else self._padding.clone()
                for i, is_live in enumerate(live):
                    if not is_live:
                        valid[i].fill_(0.0)
                self._mask = valid
        return self._mask

    # --- replaying ------------------------------------------------------------------------------

    def _spans(self, states: list[dict[str, Any]], live: list[bool]) -> list[Span]:
        """Runs of rows that can be replayed as one, with their scalar state."""
        spans = []
        n, start = len(self.rows), 0
        while start < n:
            row = self.rows[start]
            if not live[start] or row.rule.kind is not Kind.elementwise:
                start += 1
                continue
            likeness = _step_likeness(row, states[start])
            stop = start + 1
            while stop < n and live[stop] and _step_likeness(self.rows[stop], states[stop]) == likeness:
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

    def _replay_samples(self, snapshot: Snapshot, intended_AnK: Tensor, grad_nK: Tensor) -> None:
        if not snapshot.spans:
            return
        runs = [self._sample_run(span, intended_AnK, grad_nK) for span in snapshot.spans]
        if snapshot.path:
            self._look_at_decay(runs, snapshot)
        try:
            results = self.twin.replay(runs, settings=snapshot.settings)
        except ReplayError as error:
            for span in snapshot.spans:
                for i in range(span.start, span.stop):
                    self.rows[i].reason, snapshot.live[i] = str(error), False
            return
        for run, result, span in zip(runs, results, snapshot.spans, strict=True):
            rows = slice(span.start, span.stop)
            count = span.stop - span.start
            if result.param.untyped_storage()._cdata != run.param.untyped_storage()._cdata:  # p.data was replaced
                intended_AnK[0, rows].copy_(result.param.view(count, -1))
            for name, slot in self._slots.items():
                replayed = result.state.get(name)
                if isinstance(replayed, Tensor) and replayed is not run.state.get(name):
                    intended_AnK[slot, rows].copy_(replayed.view(count, -1))

    def _look_at_decay(self, runs: list[Run], snapshot: Snapshot) -> None:
        for run, span in zip(runs, snapshot.spans, strict=True):
            row = self.rows[span.start]
            decay = self.optimizer.param_groups[row.group].get("weight_decay")
            if not row.decouples_decay or not isinstance(decay, (int, float)) or not decay > 0:
                continue
            dtype, count = local(row.param).dtype, span.stop - span.start
            try:
                sums_5n = decay_sums(self.twin, row.group, dtype, run, span.dtypes, count, snapshot.settings)
            except ReplayError:
                row.decouples_decay = False  # the rule does not run on copies in the stored format
                continue
            self.tally.decay_5n[:, span.start : span.stop].add_(sums_5n)

    def _sample_run(self, span: Span, intended_AnK: Tensor, grad_nK: Tensor) -> Run:
        row, rows = self.rows[span.start], slice(span.start, span.stop)
        shape = (span.stop - span.start, self.samples) if row.rule.rows else (-1,)
        state = {
            name: intended_AnK[value, rows].view(shape) if name in self._slots and value is not None else value
            for name, value in span.scalars.items()
        }
        return Run(row.group, intended_AnK[0, rows].view(shape), grad_nK[rows].view(shape), state)

    def _replay_whole(self, intended_AnK: Tensor, states: list[dict[str, Any]], live: list[bool]) -> None:
        """Replay a bounded number of elements as whole tensors, in turn; the other such rows sit this step out."""
        waiting = [i for i, row in enumerate(self.rows) if live[i] and row.rule.kind is Kind.whole]
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
        for i in waiting:
            live[i] = False
        for i in chosen:
            row = self.rows[i]
            try:
                result = _replay_whole(self.twin, row, states[i])
            except ReplayError as error:
                row.reason = str(error)
                continue
            assert row.sampler is not None
            intended_AnK[0, i] = gather([row.sampler.view(result.param)], [row.sampler])[0]
            for name, slot in self._slots.items():
                value = result.state.get(name)
                if isinstance(value, Tensor) and value.shape == result.param.shape:
                    intended_AnK[slot, i] = gather([row.sampler.view(value)], [row.sampler])[0]
            live[i] = True


def _step_likeness(row: Row, state: dict[str, Any]) -> tuple[Any, ...]:
    """Rows equal in this can be replayed as one: same group, same form, same scalar state (step counters)."""
    scalars: list[Any] = []
    for name, value in state.items():
        if name in row.shaped or value is None:
            scalars.append(value is None)
        elif isinstance(value, Tensor):
            # a counter on the device is not read: equal histories have equal counters
            scalars.append(value.item() if value.is_cpu and value.numel() == 1 else row.lived)
        else:
            scalars.append(value)
    return row.form, scalars


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
    return twin.replay_whole(row.group, weight, local(grad), shards)


def _format_runs(rows: list[Row]) -> list[tuple[slice, Format]]:
    runs: list[tuple[slice, Format]] = []
    start = 0
    while start < len(rows):
        dtype = local(rows[start].param).dtype
        stop = start
        while stop < len(rows) and local(rows[stop].param).dtype == dtype:
            stop += 1
        fmt = formats.of(dtype)
        if fmt is not None:
            runs.append((slice(start, stop), fmt))
        start = stop
    return runs
