"""A group of an optimizer's parameters that is measured in the same steps.

`before` gathers weights, gradients and states just before the rule runs and replays the rule on them in FP32; `after`
gathers what was stored and adds both to the tally. Everything between is arithmetic on small tensors on the device.

Legend: A accumulators (0 the weight, then states), n rows, K samples.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch import formats
from update_watch.decay import decay_sums
from update_watch.formats import Format
from update_watch.probe import Kind
from update_watch.replay import Run, Twin
from update_watch.rows import Row
from update_watch.sampling import gather, local, mask
from update_watch.tally import Tally
from update_watch.twin_copy import ReplayError

_HEADROOM_EVERY = 8  # measured steps between two looks at headroom and decay: they change slowly
_PATH_EVERY = 8  # measured steps between two at the window's own positions; these are full steps
_FULL_EVERY = 2  # measured steps between two in which states and gradients are compared and not weights alone
_DECAY_MEMORY = 0.9  # weight of a window's decay sums in the next
_WHOLE_PER_STEP = 2**22  # elements replayed as whole tensors in one step, beyond the first tensor


class Snapshot(NamedTuple):
    """What `before` leaves for `after`."""

    before_AnK: Tensor
    intended_AnK: Tensor  # the replayed values
    nonzero_nK: Tensor | None  # gradients other than zero; None: this step compares weights alone
    mask_nK: Tensor | None
    live: tuple[bool, ...]


class Cohort:
    """Rows of one optimizer on one device, measured together."""

    def __init__(self, optimizer: Optimizer, twin: Twin, rows: list[Row], samples: int, rng: random.Random) -> None:
        self._rng = rng
        self.optimizer, self.twin, self.rows, self.samples = optimizer, twin, rows, samples
        self.device = local(rows[0].param).device
        self.samplers = [row.sampler for row in rows if row.sampler is not None]
        carriers = {row.scheme.carrier for row in rows if row.scheme.carrier}
        self.states = sorted(carriers.union(*(row.rule.element_states for row in rows)))
        self._slots = {name: 1 + i for i, name in enumerate(self.states)}
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
        # states that hold what rounding took from the weight (Kahan summation): the stored value is their sum
        self._carriers = [(i, row.scheme.carrier) for i, row in enumerate(rows) if row.scheme.carrier]
        self.open_window()

    def open_window(self) -> None:
        """Start new sums."""
        old = getattr(self, "tally", None)
        self.tally = Tally(1 + len(self.states), len(self.rows), self.samples, self.device)
        if old is not None:
            # a decay far below one step of the format shows only over many windows: they are pooled, the old ones less
            self.tally.decay_5n.copy_(old.decay_5n).mul_(_DECAY_MEMORY)
        self.live_steps = [0] * len(self.rows)
        self.full_steps = [0] * len(self.rows)
        self.gradless_steps = [0] * len(self.rows)

    # --- in the step -----------------------------------------------------------------------------

    def before(self) -> Snapshot:
        """Gather and replay; call when gradients are final and the rule has not run."""
        self._move(None if self._keeps_place() else self._rng)
        states = self._states()
        grads = [row.param.grad for row in self.rows]
        for row, state in zip(self.rows, states, strict=True):
            row.check(state)
        views = self._weight_views() + self._state_views(states) + self._views(grads)
        held = self._gathered(views)
        before_AnK, grad_nK = held[:-1], held[-1]
        nonzero_nK = grad_nK.ne(0) if self._is_full() else None  # now: the rule may write into the gradient
        for i, name in self._carriers:
            before_AnK[0, i].add_(before_AnK[self._slots[name], i])
            before_AnK[self._slots[name], i].zero_()  # joined: an FP32 weight has no remainder
        intended_AnK = before_AnK.clone()
        live = [g is not None and row.is_measured for g, row in zip(grads, self.rows, strict=True)]
        self._replay_samples(intended_AnK, grad_nK, states, live)
        self._replay_whole(intended_AnK, states, live)
        for i, name in self._carriers:
            intended_AnK[0, i].add_(intended_AnK[self._slots[name], i])
            intended_AnK[self._slots[name], i].zero_()
        if not all(live):
            for i, grad in enumerate(grads):
                self.gradless_steps[i] += grad is None
        return Snapshot(before_AnK, intended_AnK, nonzero_nK, self._current_mask(tuple(live)), tuple(live))

    def _keeps_place(self) -> bool:
        # a path over the window needs the same elements again; all other sums gain from other elements
        return self.tally.steps % _PATH_EVERY == 0

    def _is_full(self) -> bool:
        return not self.states or self.tally.steps % _FULL_EVERY == 0

    def _move(self, rng: random.Random | None) -> None:
        for row in self.rows:
            row.move(rng)

    def after(self, snapshot: Snapshot) -> None:
        """Gather what was stored and add the step to the tally."""
        full = snapshot.nonzero_nK is not None
        views = self._weight_views()
        if full or self._carriers:
            views += self._state_views(self._states())
        after_AnK = self._gathered(views)
        for i, name in self._carriers:
            after_AnK[0, i].add_(after_AnK[self._slots[name], i])
            after_AnK[self._slots[name], i].zero_()
        look = self.tally.steps == 0 or self.tally.steps % _HEADROOM_EVERY == _HEADROOM_EVERY - 1
        present = len(after_AnK) if full else 1
        self.tally.add(
            snapshot.before_AnK[:present],
            snapshot.intended_AnK[:present],
            after_AnK[:present],
            snapshot.nonzero_nK,
            snapshot.mask_nK,
            path=self._keeps_place(),
        )
        if look:
            intended_nK = snapshot.intended_AnK[0]
            if snapshot.mask_nK is not None:
                intended_nK = torch.where(snapshot.mask_nK > 0, intended_nK, self._zero)
            for rows, fmt in self._formats:
                self.tally.add_headroom(snapshot.before_AnK[0], intended_nK, rows, fmt)
        for i, is_live in enumerate(snapshot.live):
            self.live_steps[i] += is_live
            self.full_steps[i] += is_live and full

    def pack(self) -> Tensor:
        """The window's sums in one vector on the device; see `tally.Sums`."""
        self._move(None)
        return self.tally.pack(self._gathered(self._weight_views())[0], self._formats)

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

    def _gathered(self, views: list[Tensor]) -> Tensor:
        """[accumulators, n, K] FP32 from one view per accumulator and row."""
        n = len(self.rows)
        return gather(views, self.samplers * (len(views) // n)).view(-1, n, self.samples)

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

    def _replay_samples(
        self, intended_AnK: Tensor, grad_nK: Tensor, states: list[dict[str, Any]], live: list[bool]
    ) -> None:
        runs, spans = [], []
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
            runs.append(self._sample_run(intended_AnK, grad_nK, states[start], start, stop))
            spans.append((start, stop))
            start = stop
        if not runs:
            return
        if self.tally.steps % _HEADROOM_EVERY == 0:
            self._look_at_decay(runs, spans, states)
        try:
            results = self.twin.replay(runs)
        except ReplayError as error:
            for start, stop in spans:
                for i in range(start, stop):
                    self.rows[i].reason, live[i] = str(error), False
            return
        for run, result, (start, stop) in zip(runs, results, spans, strict=True):
            if result.param.untyped_storage()._cdata != run.param.untyped_storage()._cdata:  # p.data was replaced
                intended_AnK[0, start:stop].copy_(result.param.view(stop - start, -1))
            for name, slot in self._slots.items():
                replayed = result.state.get(name)
                if isinstance(replayed, Tensor) and replayed is not run.state.get(name):
                    intended_AnK[slot, start:stop].copy_(replayed.view(stop - start, -1))

    def _look_at_decay(self, runs: list[Run], spans: list[tuple[int, int]], states: list[dict[str, Any]]) -> None:
        for run, (start, stop) in zip(runs, spans, strict=True):
            row = self.rows[start]
            dtype = local(row.param).dtype
            decay = self.optimizer.param_groups[row.group].get("weight_decay")
            if not row.decouples_decay or not isinstance(decay, (int, float)) or not decay > 0:
                continue
            dtypes = {k: v.dtype for k, v in states[start].items() if isinstance(v, Tensor)}
            try:
                sums_5n = decay_sums(self.twin, row.group, dtype, run, dtypes, stop - start)
            except ReplayError:
                row.decouples_decay = False  # the rule does not run on copies in the stored format
                continue
            self.tally.decay_5n[:, start:stop].add_(sums_5n)

    def _sample_run(self, intended_AnK: Tensor, grad_nK: Tensor, state: dict[str, Any], start: int, stop: int) -> Run:
        row = self.rows[start]
        shape = (stop - start, self.samples) if row.rule.rows else (-1,)
        copied: dict[str, Any] = {}
        for name, value in state.items():
            if name in self._slots:
                copied[name] = value if value is None else intended_AnK[self._slots[name], start:stop].view(shape)
            else:
                copied[name] = value.clone() if isinstance(value, Tensor) else value
        return Run(row.group, intended_AnK[0, start:stop].view(shape), grad_nK[start:stop].view(shape), copied)

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
    return twin.replay_whole(row.group, local(row.param.detach()), local(grad), shards)


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
