"""Rows of an optimizer that are measured in the same steps.

`before` gathers weights, gradients and states just before the rule runs, `after` what was stored; `add` replays the rule
on them and adds both to the sums. `add` may wait for a few steps: several in a row cost half as much as each on its own,
in caches that training has used since. Everything is arithmetic on small tensors on the device.

Legend: A accumulators (0 the weight, then states), n rows, K samples.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch import formats
from update_watch.formats import Format
from update_watch.measure.device.kernel_gathers import gathers_of
from update_watch.measure.parameters import Row
from update_watch.measure.sampling import local
from update_watch.measure.step_order import OneOf
from update_watch.measure.step_replay import Span, StepReplay
from update_watch.measure.sums.device_sums import DeviceSums
from update_watch.measure.sums.layout import GROUPS, PARTS
from update_watch.measure.sums.window_sums import Steps
from update_watch.replay.twin import GroupSettings, Twin

_HEADROOM_EVERY = 8  # measured steps of which one looks at headroom and decay: they change slowly
_FULL_EVERY = 2  # measured steps of which one compares states too, and not weights alone
_DECAY_MEMORY = 0.9  # weight of a window's decay sums in the next


class Snapshot:
    """One step of a cohort, from `before` to `add`."""

    __slots__ = (
        "after",
        "before_AnK",
        "full",
        "group",
        "gradient_nK",
        "held",
        "intended_AnK",
        "live",
        "look",
        "moving_first",
        "rate",
        "rates",
        "settings",
        "spans",
        "turn",
    )

    def __init__(self, held: Tensor, live: list[bool], spans: list[Span], settings: GroupSettings | None) -> None:
        self.held, self.live, self.spans, self.settings = held, live, spans, settings
        self.full = self.look = self.moving_first = False
        self.group = 0  # of neighbouring steps of the window
        self.turn = 0  # whose positions it is at
        self.rate = 1.0  # of the first group; where it cannot be read, always the same
        self.rates: list[float | None] = []  # learning rates of the runs of like rows, where it looks at headroom
        self.after: Tensor | None = None
        self.before_AnK: Tensor | None = None
        self.intended_AnK: Tensor | None = None  # the replayed values
        self.gradient_nK: Tensor | None = None  # squared


class _Run(NamedTuple):
    """Neighbouring rows of one format and one group."""

    rows: slice
    format: Format
    group: int


class Cohort:
    """Rows of one optimizer on one device, measured together."""

    def __init__(
        self,
        optimizer: Optimizer,
        twin: Twin,
        rows: list[Row],
        samples: int,
        rng: random.Random,
        window: int,
        turns: int,
    ) -> None:
        """`window`: steps of one; it will be measured in one of so many `turns` of them."""
        window_steps, is_alone = window // turns, turns == 1
        self.optimizer, self.rows, self.samples = optimizer, rows, samples
        self.gathers = gathers_of(optimizer, rows, samples, rng)
        self.device, self.samplers, self.states = self.gathers.device, self.gathers.samplers, self.gathers.states
        self._replay = StepReplay(optimizer, twin, self.gathers)
        self._zero = torch.zeros((), device=self.device)
        self._runs = _runs_of(rows)
        self._fresh = list(range(len(rows)))  # rows that had no state yet
        # at least twice in a window
        self._full = OneOf(max(min(_FULL_EVERY, window_steps // 2), 1) if self.states else 1, rng)
        self._look = OneOf(max(min(_HEADROOM_EVERY, window_steps // 2), 1), rng)
        is_plain = [row.scheme.name == "plain" for row in rows]
        self._is_plain_n, self._is_whole_n = np.array(is_plain), np.array([row.is_whole for row in rows])
        # whether single elements are added up: where steps are not independent, and for the displacement; of plain rows in
        # turns that could not be told from a few steps
        has_way = is_alone or not all(is_plain)
        self._kinds = bool((~self._is_plain_n & self._is_whole_n).any()), has_way
        self.steps = 0  # measured in this window, those that are still to be added included
        # rows whose whole gradients are looked at: those of which all samples were 0; at first all, once
        self._suspects = frozenset(i for i, row in enumerate(rows) if not row.is_whole)
        self._is_first_look = True
        self.open_window()

    def open_window(self) -> None:
        """Start new sums."""
        old: DeviceSums | None = getattr(self, "sums", None)
        n = len(self.rows)
        whole, whole_n1 = self.gathers.are_whole, self.gathers.whole_n1
        self.sums = DeviceSums(len(self.states), n, self.samples, self.device, whole, whole_n1, *self._kinds)
        if old is not None:
            # a decay far below one step of the format shows only over many windows: they are pooled, the old ones less
            self.sums.decay_5n.copy_(old.decay_5n).mul_(_DECAY_MEMORY)
        self.gathers.open_window()
        self.steps = 0
        self._gradless_n, self._checks_n = np.zeros(n), np.zeros(n)
        self._live_Pn, self._live_Gn = np.zeros((PARTS, n)), np.zeros((GROUPS, n))
        self._rates_2P = np.zeros((2, PARTS))  # steps, and squared learning rates added up
        self.first_rates: dict[int, float] = {}  # group -> learning rate at the first look

    @property
    def can_wait(self) -> bool:
        """Whether its steps can be added later."""
        return self._replay.can_wait

    def problem(self, row: Row) -> str:
        """Why a row of it cannot be read now; "" when it can."""
        return self.gathers.problem(row)

    # --- in the step -----------------------------------------------------------------------------

    def before(self, group: int = 0) -> Snapshot:
        """Gather; call when gradients are final and the rule has not run. `group`: of neighbouring steps of the window."""
        turn, moving_first = self.gathers.move()
        states = self.gathers.stored_states()
        grads = [row.param.grad for row in self.rows]
        for row, state in zip(self.rows, states, strict=True):
            row.check(state)
        dense = grads
        if any([g is not None and (g.layout is not torch.strided or g.is_complex()) for g in grads]):
            dense = [None if g is None or _left_out(row, g) else g for g, row in zip(grads, self.rows, strict=True)]
        held = self.gathers.before(states, dense)
        if held.device != self.device:
            raise RuntimeError(f"parameters planned for on {self.device} are on {held.device}")
        live = [
            g is not None and row.is_measured and not (row.rule.starts_at_random and not state)
            for g, row, state in zip(grads, self.rows, states, strict=True)
        ]
        spans = self._replay.spans(states, live)
        can_wait = self._replay.can_wait and not hasattr(self.optimizer, "found_inf")
        snapshot = Snapshot(held, live, spans, self._replay.settings(spans) if can_wait else None)
        snapshot.group, snapshot.turn, snapshot.moving_first = group, turn, moving_first
        snapshot.full, snapshot.look = self._full.now(), self._look.now()
        snapshot.rate = _rate(self.optimizer.param_groups[0].get("lr")) or 1.0
        if snapshot.look:
            snapshot.rates = [_rate(self.optimizer.param_groups[run.group].get("lr")) for run in self._runs]
            self._look_at_gradients(dense)
        if not all(live):
            self._gradless_n += [g is None for g in grads]
        if not can_wait:
            self._run(snapshot, states)
        return snapshot

    def suspect(self, rows: frozenset[int]) -> None:
        """Look at the whole gradients of some rows from now on. May be called from another thread."""
        self._suspects = rows

    def _look_at_gradients(self, grads: list[Tensor | None]) -> None:
        for i in self._suspects:
            grad = grads[i]
            if grad is not None:
                self.sums.add_gradient(i, local(grad))
                self._checks_n[i] += 1
        if self._is_first_look:
            self._is_first_look, self._suspects = False, frozenset()

    def take_gradients(self, snapshot: Snapshot) -> None:
        """Gather gradients that did not exist at `before`, in a step that can wait; call when the rule has run."""
        snapshot.held[-len(self.rows) :].copy_(self.gathers.gradients([row.param.grad for row in self.rows]))

    def after(self, snapshot: Snapshot) -> bool:
        """Gather what was stored. True: `add` may wait for the next steps."""
        states = None
        if snapshot.full or self.gathers.carried:
            states = self.gathers.stored_states()
            if self._fresh and self.states:  # made in this step: what was in them before is nothing
                for i in self._fresh:
                    self.rows[i].check(states[i])
                self._fresh = [i for i in self._fresh if not states[i]]
        snapshot.after = self.gathers.after(states)
        self.steps += 1
        return snapshot.settings is not None

    # --- now or some steps later -------------------------------------------------------------------

    def add(self, snapshot: Snapshot) -> None:
        """Replay the step and add it to the sums."""
        if snapshot.intended_AnK is None:
            self._run(snapshot, None)
        before_AnK, intended_AnK, gradient_nK = snapshot.before_AnK, snapshot.intended_AnK, snapshot.gradient_nK
        assert (
            before_AnK is not None
            and intended_AnK is not None
            and gradient_nK is not None
            and snapshot.after is not None
        )
        after_AnK = self.gathers.widened(snapshot.after, snapshot.moving_first)
        self.gathers.join(after_AnK)
        live = tuple(snapshot.live)
        present = len(after_AnK) if snapshot.full else 1
        mask_nK = self.gathers.mask_of(live)
        part = self._part()
        self.sums.add(
            before_AnK[:present],
            intended_AnK[:present],
            after_AnK[:present],
            gradient_nK,
            mask_nK,
            self.gathers.weights_of(snapshot.turn),
            snapshot.group,
        )
        if snapshot.look:
            self._look_at_headroom(before_AnK[0], intended_AnK[0], mask_nK, snapshot)
        self._live_Pn[part] += live
        self._rates_2P[:, part] += 1.0, snapshot.rate**2
        self._live_Gn[snapshot.group] += live

    def _part(self) -> int:
        """Which part of the window the step that is added next belongs to."""
        before = self.sums.steps_per_part
        part = self.sums.next_part()
        if self.sums.steps_per_part != before:
            half = PARTS // 2
            self._live_Pn[:half] = self._live_Pn.reshape(half, 2, -1).sum(1)
            self._live_Pn[half:] = 0
            self._rates_2P[:, :half] = self._rates_2P.reshape(2, half, 2).sum(-1)
            self._rates_2P[:, half:] = 0
        return part

    def _look_at_headroom(
        self, before_nK: Tensor, intended_nK: Tensor, mask_nK: Tensor | None, snapshot: Snapshot
    ) -> None:
        before_nK, intended_nK = before_nK.float(), intended_nK.float()
        weights_n2J = self.gathers.weights_of(snapshot.turn)
        if mask_nK is not None:
            intended_nK = torch.where(mask_nK > 0, intended_nK, self._zero)
        for run, rate in zip(self._runs, snapshot.rates, strict=True):
            octaves = 0.0
            if rate:  # at 0 nothing is wanted, save what momentum or decay of other kinds do
                octaves = math.log2(rate / self.first_rates.setdefault(run.group, rate))
            self.sums.add_headroom(before_nK, intended_nK, weights_n2J, run.rows, run.format, octaves)

    def _run(self, snapshot: Snapshot, states: list[dict[str, Any]] | None) -> None:
        """Replay a step. `states`: given where it is replayed at once, whole tensors with it."""
        held_AnK = self.gathers.widened(snapshot.held, snapshot.moving_first)
        before_AnK, grad_nK = held_AnK[:-1], held_AnK[-1]
        # before the rule, which may write into the gradient
        snapshot.before_AnK, snapshot.gradient_nK = before_AnK, grad_nK.to(self.sums.dtype).square()
        self.gathers.join(before_AnK)
        snapshot.intended_AnK = self._replay.run(
            before_AnK,
            grad_nK,
            snapshot.spans,
            snapshot.settings,
            snapshot.live,
            states,
            snapshot.moving_first,
            self.sums.decay_5n if snapshot.look else None,
        )

    # --- at the end of a window --------------------------------------------------------------------

    def packing(self, window_steps: int) -> Callable[[], Tensor]:
        """Makes the window's sums one vector on the device, now or when the next window has begun; see `WindowSums`."""
        stored_nK = None
        if self._kinds[1] and not any(row.has_changed for row in self.rows):
            self.gathers.settle()
            kept = self.samples if self.gathers.are_whole or self.gathers.whole_n1 is not None else self.samples // 2
            stored_nK = self.gathers.widened(self.gathers.after(None), False)[0, :, :kept].float()
        formats = [(run.rows, run.format) for run in self._runs]
        scale = window_steps / max(self.steps, 1)
        return functools.partial(self.sums.pack, stored_nK, self.gathers.kept_weights, formats, scale)

    def counted_steps(self, group_steps: list[int]) -> Steps:
        """The steps behind the sums. `group_steps`: of the window, by group."""
        with_gradient_n = 1 - self._gradless_n / max(self.steps, 1)
        parts = self.sums.layout.parts
        window_Gn = np.outer(group_steps, with_gradient_n)
        count_P, squares_P = self._rates_2P[:, :parts]
        kinds = self._is_whole_n, self._is_plain_n
        rates_P = squares_P / np.maximum(count_P, 1)
        return Steps(self._live_Pn[:parts], self._live_Gn, window_Gn, self._checks_n, rates_P, *kinds)

    @property
    def gradless_steps(self) -> list[int]:
        """Measured steps in which each row had no gradient."""
        return [int(steps) for steps in self._gradless_n]


def _left_out(row: Row, grad: Tensor) -> bool:
    """Whether samples of a gradient cannot be taken as real numbers; its row gets the reason."""
    if grad.layout is not torch.strided:
        row.reason = row.reason or f"its gradients are sparse ({grad.layout})"
    elif grad.is_complex():
        row.reason = row.reason or "its gradients are complex"
    else:
        return False
    return True


def _rate(value: Any) -> float | None:
    """A learning rate that can be read without asking a device."""
    if isinstance(value, Tensor):
        value = float(value) if value.device.type == "cpu" and value.numel() == 1 else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) and value > 0 else None


def _runs_of(rows: list[Row]) -> list[_Run]:
    runs: list[_Run] = []
    start = 0
    while start < len(rows):
        key = local(rows[start].param).dtype, rows[start].group
        stop = start
        while stop < len(rows) and (local(rows[stop].param).dtype, rows[stop].group) == key:
            stop += 1
        fmt = formats.of(key[0])
        if fmt is not None:
            runs.append(_Run(slice(start, stop), fmt, key[1]))
        start = stop
    return runs
