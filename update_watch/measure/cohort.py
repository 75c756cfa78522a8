"""Rows of an optimizer that are measured in the same steps.

`before` gathers weights, gradients and states just before the rule runs, `after` what was stored. What is made of both is
`device_rows`' to say, some steps later.

Legend: n rows, K samples.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch import formats
from update_watch.formats import Format
from update_watch.measure.device import joint_reads
from update_watch.measure.device.kernel_gathers import gathers_of
from update_watch.measure.gathers import Common
from update_watch.measure.learning_rates import rate_size
from update_watch.measure.parameters import Row
from update_watch.measure.sampling import local
from update_watch.measure.step_order import OneOf
from update_watch.measure.step_replay import Span, StepReplay
from update_watch.measure.sums.added_steps import Look
from update_watch.measure.sums.layout import GROUPS, parts_for
from update_watch.measure.sums.step_sizes import UsualSizes
from update_watch.measure.sums.steps import Looks, Steps, Told
from update_watch.measure.sums.whole_gradients import WholeGradients
from update_watch.replay.rule import Kind
from update_watch.replay.twin import GroupSettings, Twin

_HEADROOM_EVERY = 8  # measured steps of which one looks at headroom and decay: they change slowly
_LIGHT, _ENOUGH_LARGE = 0.25, 0.1  # weight of a large cell, which is met four times as often; share of such draws
_FULL_EVERY = 2  # measured steps of which one compares states too, and not weights alone


class Snapshot:
    """One step of a cohort, from `before` until it is added."""

    __slots__ = (
        "after",
        "drawn",
        "full",
        "group",
        "held",
        "is_asked",
        "live",
        "look",
        "moving_first",
        "rate",
        "rates",
        "settings",
        "spans",
        "states",
        "turn",
    )

    def __init__(self, held: Any, live: list[bool], spans: list[Span], settings: GroupSettings | None) -> None:
        # `held`, `after`: what was read, as the gathers have it
        self.held, self.live, self.spans = held, live, spans
        self.settings = settings  # None: it cannot wait
        self.states: list[dict[str, Any]] | None = None  # of the optimizer, where it cannot wait
        self.full = self.look = self.moving_first = False
        self.group = 0  # of neighbouring steps of the window
        self.is_asked = False  # measured because it is unlike the steps before it
        self.turn = 0  # whose positions it is at
        self.drawn: dict[int, Tensor] = {}  # weights of rows that are read where their gradient is large
        self.rate = 1.0  # of the first group; where it cannot be read, always the same
        self.rates: list[float | None] = []  # learning rates of the runs of like rows, where it looks at headroom
        self.after: Any = None


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
        common: Common,
        place: slice,
        has_asked: bool = False,
    ) -> None:
        """`window`: steps of one in which it will be measured. `common`: of all rows on the device, of which these are those
        at `place` when they are ordered by cohorts. `has_asked`: see `DeviceRows`.
        """
        self.optimizer, self.rows, self.samples, self.place = optimizer, rows, samples, place
        self.gathers = gathers_of(optimizer, rows, samples, rng, common)
        self.device, self.samplers, self.states = self.gathers.device, self.gathers.samplers, self.gathers.states
        self.replay = StepReplay(optimizer, twin, self.gathers)
        self.runs = _runs_of(rows)
        self._fresh = list(range(len(rows)))  # rows that had no state yet
        # at least twice in a window
        self._full = OneOf(max(min(_FULL_EVERY, window // 2), 1) if self.states else 1, rng)
        self._look = OneOf(max(min(_HEADROOM_EVERY, window // 2), 1), rng)
        # of each tensor its first row: it may be read in several
        self.firsts = [i for i, row in enumerate(rows) if row.is_first]
        self._most_parts, self._has_asked = parts_for(window), has_asked
        self._is_plain_n = np.array([row.scheme.name == "plain" for row in rows])
        self._is_whole_n = np.array([row.is_whole for row in rows])
        self.usual = UsualSizes()  # of its tensors' updates, as windows tell on the background thread
        self._drawn: tuple[int, ...] = ()
        self.steps = 0  # measured in this window, those that are still to be added included
        self._large_n = np.zeros(len(rows))
        self.open_window()
        if self.gathers.keeps:
            self.draw_from(self.firsts)

    def open_window(self) -> None:
        """Start a new one."""
        n = len(self.rows)
        self.gathers.open_window()
        if self._drawn and self.steps:
            tensors = zip(self.firsts, [*self.firsts[1:], n], strict=True)
            large = {i: self._large_n[i:stop].mean() / self.steps for i, stop in tensors}
            self._drawn = tuple(i for i in self._drawn if large[i] >= _ENOUGH_LARGE)
        self._large_n, self.steps = np.zeros(n), 0
        # steps, those that were asked for apart; of the others so many in a part, twice as many when the parts are full
        self._added, self._asked, self._per_part = 0, 0, 1
        self.looks_told = Looks()
        self._gradless_n = np.zeros(n, np.float32)
        self._live_Pn = np.zeros((self._most_parts + self._has_asked, n), np.float32)  # counts
        self._live_Gn = np.zeros((GROUPS, n), np.float32)
        self._rates_2P = np.zeros((2, len(self._live_Pn)))  # steps, and squared learning rates added up
        self.first_rates: dict[int, float] = {}  # group -> learning rate at the first look

    @property
    def can_wait(self) -> bool:
        """Whether its steps can be added later."""
        return self.replay.can_wait

    def draw_from(self, tensors: Iterable[int]) -> None:
        """From now on read these tensors, given by their first rows, where gradients and states are large: few elements carry
        what moves. May be called from another thread.

        They stay so for as long as many of the draws are of large cells. Of what keeps a set of samples all are, at first.
        """
        able = {
            i
            for i in tensors
            if not self.rows[i].is_whole
            and self.rows[i].rule.kind is Kind.elementwise
            and self.rows[i].scheme.name == "plain"
            and self.gathers.reads_any_cell
        }
        self._drawn = tuple(sorted(able | {*self._drawn}))

    def _draw(
        self, live: Sequence[bool], grads: Sequence[Tensor | None], states: Sequence[Mapping[str, Any]]
    ) -> dict[int, Tensor]:
        """Weights of the rows that are read so in this step, see `Gathers.draw`."""
        drawn = self.gathers.draw([i for i in self._drawn if live[i]], grads, states)
        for i in drawn:
            self._large_n[i] += float(drawn[i].lt(_LIGHT).float().mean())
        return drawn

    def problem(self, row: Row) -> str:
        """Why a row of it cannot be read now; "" when it can."""
        return self.gathers.problem(row)

    # --- in the step -----------------------------------------------------------------------------

    def before(self, group: int, is_asked: bool = False) -> Snapshot:
        """Gather; call when gradients are final and the rule has not run. `group`: of neighbouring steps of the window.
        `is_asked`: the step is unlike those before it."""
        turn, moving_first = self.gathers.move()
        states = self.gathers.stored_states()
        grads = [row.param.grad for row in self.rows]
        for row, state in zip(self.rows, states, strict=True):
            row.check(state)
        dense = grads
        if any([g is not None and (g.layout is not torch.strided or g.is_complex()) for g in grads]):
            dense = [None if g is None or _left_out(row, g) else g for g, row in zip(grads, self.rows, strict=True)]
        live = [
            g is not None and row.is_measured and not (row.rule.skips_first and not state)
            for g, row, state in zip(grads, self.rows, states, strict=True)
        ]
        drawn = self._draw(live, dense, states) if self._drawn else {}
        spans = self.replay.spans(states, live)
        counters = self.replay.counters(spans)
        held, copies = self.gathers.before(states, dense, [scalars[name] for scalars, name in counters])
        for (scalars, name), copy in zip(counters, copies, strict=True):
            scalars[name] = copy
        can_wait = self.replay.can_wait and not hasattr(self.optimizer, "found_inf")
        snapshot = Snapshot(held, live, spans, self.replay.settings(spans) if can_wait else None)
        snapshot.group, snapshot.turn, snapshot.moving_first = group, turn, moving_first
        snapshot.drawn, snapshot.is_asked = drawn, is_asked
        snapshot.full, snapshot.look = self._full.now(), self._look.now()
        snapshot.rate = rate_size(self.optimizer.param_groups[0].get("lr")) or 1.0
        if snapshot.look:
            snapshot.rates = [rate_size(self.optimizer.param_groups[run.group].get("lr")) for run in self.runs]
        if not all(live):
            self._gradless_n += [g is None for g in grads]
        if not can_wait:
            snapshot.states = states
        return snapshot

    def take_gradients(self, snapshot: Snapshot) -> None:
        """Gather gradients that did not exist at `before`, in a step that can wait; call when the rule has run."""
        gradients_nK = self.gathers.gradients([row.param.grad for row in self.rows])
        joint_reads.launch()
        snapshot.held = self.gathers.unpacked(snapshot.held)
        snapshot.held[-len(self.rows) :].copy_(self.gathers.unpacked(gradients_nK))

    def after(self, snapshot: Snapshot) -> None:
        """Gather what was stored."""
        states = None
        if snapshot.full or self.gathers.carried:
            states = self.gathers.stored_states()
            if self._fresh and self.states:  # made in this step: what was in them before is nothing
                for i in self._fresh:
                    self.rows[i].check(states[i])
                self._fresh = [i for i in self._fresh if not states[i]]
        snapshot.after = self.gathers.after(states)
        self.steps += 1

    # --- some steps later ------------------------------------------------------------------------

    def count(self, snapshot: Snapshot, merge: Callable[[], None]) -> int:
        """Note a step that is added, in the order of time, when `live` is final. Returns the part of the window it belongs to.

        `merge` makes two parts one in the sums, where all are in use.
        """
        part, most = self._added // self._per_part, self._most_parts
        if snapshot.is_asked:
            part = most
            self._asked += 1
        else:
            if part == most:
                merge()
                part = half = most // 2
                self._per_part *= 2
                self._live_Pn[:half] = self._live_Pn[:most].reshape(half, 2, -1).sum(1)
                self._live_Pn[half:most] = 0
                self._rates_2P[:, :half] = self._rates_2P[:, :most].reshape(2, half, 2).sum(-1)
                self._rates_2P[:, half:most] = 0
            self._added += 1
        self._live_Pn[part] += snapshot.live
        self._rates_2P[:, part] += 1.0, snapshot.rate**2
        self._live_Gn[snapshot.group] += snapshot.live
        if snapshot.look:
            for run, rate in zip(self.runs, snapshot.rates, strict=True):
                if rate:
                    self.first_rates.setdefault(run.group, rate)
        return part

    def looks(self, snapshot: Snapshot, start: int) -> list[Look]:
        """The runs of like rows whose headroom is counted in a step. `start`: of the first row."""
        found = []
        for (rows, fmt, group), rate in zip(self.runs, snapshot.rates, strict=True):
            octaves = 0.0
            if rate:  # at 0 nothing is wanted, save what momentum or decay of other kinds do
                octaves = math.log2(rate / self.first_rates[group])
            found.append(Look(slice(start + rows.start, start + rows.stop), fmt, octaves))
        return found

    # --- at the end of a window --------------------------------------------------------------------

    def stored(self, kept: int) -> Tensor:
        """[n, kept]: what is stored now at the positions of the kept set, FP32."""
        self.gathers.settle()
        return self.gathers.widened(self.gathers.after(None), False)[0, :, :kept].float()

    def counted_steps(self, group_steps: list[int], gradients: WholeGradients) -> Callable[[], Steps]:
        """The steps behind the sums; made on the background thread. `group_steps`: of the window, by group."""
        rates_2P, gradless_n, live_Pn, live_Gn = self._rates_2P, self._gradless_n, self._live_Pn, self._live_Gn
        parts, measured, looks_n = self.parts, self.steps, gradients.looks_n[self.place]
        blind_n = gradients.blind(self.place, measured)
        kinds, has_asked = (self._is_whole_n, self._is_plain_n), self._asked > 0

        def made() -> Steps:
            counts_Pn, counts_Gn = live_Pn[:parts].astype(np.float64), live_Gn.astype(np.float64)
            with_gradient_n = 1 - gradless_n.astype(np.float64) / max(measured, 1)
            window_Gn = np.outer(group_steps, with_gradient_n)
            count_P, squares_P = rates_2P[:, :parts]
            rates_P = squares_P / np.maximum(count_P, 1)
            steps = Steps(counts_Pn, counts_Gn, window_Gn, looks_n, rates_P, *kinds, blind_n, has_asked)
            return steps if len(self.firsts) == len(self.rows) else steps.of(self.firsts)

        return made

    def told(self) -> Callable[[Steps], Told]:
        """What its looks tell of the other steps, from `counted_steps`; made on the background thread."""
        return functools.partial(self.looks_told.told, self._added, self._per_part)

    @property
    def parts(self) -> int:
        """Parts of the window that are in use, or lie before such."""
        return self._most_parts + 1 if self._asked else -(-self._added // self._per_part)

    @property
    def gradless_steps(self) -> list[int]:
        """Measured steps in which each row had no gradient."""
        steps: list[int] = self._gradless_n.astype(int).tolist()
        return steps


def _left_out(row: Row, grad: Tensor) -> bool:
    """Whether samples of a gradient cannot be taken as real numbers; its row gets the reason."""
    if grad.layout is not torch.strided:
        row.reason = row.reason or f"its gradients are sparse ({grad.layout})"
    elif grad.is_complex():
        row.reason = row.reason or "its gradients are complex"
    else:
        return False
    return True


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
