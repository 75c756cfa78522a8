"""Rows of an optimizer that are measured in the same steps.

`before` gathers weights, gradients and states just before the rule runs, `after` what was stored; `add` replays the rule
on them in FP32 and adds both to the sums. `add` may wait for a few steps: several in a row cost half as much as each on
its own, in caches that training has used since. Everything is arithmetic on small tensors on the device.

Legend: A accumulators (0 the weight, then states), n rows, K samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch import formats
from update_watch.formats import Format
from update_watch.measure.device_sums import DeviceSums
from update_watch.measure.gathers import Gathers
from update_watch.measure.parameters import Row
from update_watch.measure.sampling import local
from update_watch.measure.step_replay import Span, StepReplay
from update_watch.replay.rule_kind import Kind
from update_watch.replay.twin import GroupSettings, Twin

_HEADROOM_EVERY = 8  # measured steps between two looks at headroom and decay: they change slowly
_PATH_EVERY = 8  # of so many measured steps one is at the window's own positions; it is a full step
_FULL_EVERY = 2  # measured steps between two in which states and gradients are compared and not weights alone
_DECAY_MEMORY = 0.9  # weight of a window's decay sums in the next


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
        self.optimizer, self.rows, self.samples = optimizer, rows, samples
        self.gathers = Gathers(optimizer, rows, samples)
        self.device, self.samplers, self.states = self.gathers.device, self.gathers.samplers, self.gathers.states
        self._replay = StepReplay(optimizer, twin, self.gathers)
        # rows that count at the path's positions too: [n, 1], or true or false for all of them
        self._counts = [row.is_whole or row.rule.kind is Kind.whole for row in rows]
        self._counts_n1: Tensor | bool = all(self._counts)
        if any(self._counts) and not all(self._counts):
            self._counts_n1 = torch.zeros(len(rows), 1, dtype=torch.bool, device=self.device)
            for i, counts in enumerate(self._counts):
                if counts:
                    self._counts_n1[i].fill_(True)
        self._zero = torch.zeros((), device=self.device)
        self._formats = _format_runs(rows)
        self._fresh = list(range(len(rows)))  # rows that had no state yet
        self.steps = 0  # measured in this window, those that are still to be added included
        self.open_window()

    def open_window(self) -> None:
        """Start new sums."""
        old = getattr(self, "sums", None)
        self.sums = DeviceSums(1 + len(self.states), len(self.rows), self.samples, self.device)
        if old is not None:
            # a decay far below one step of the format shows only over many windows: they are pooled, the old ones less
            self.sums.decay_5n.copy_(old.decay_5n).mul_(_DECAY_MEMORY)
        self.steps = 0
        self.live_steps = [0] * len(self.rows)
        self.full_steps = [0] * len(self.rows)
        self.gradless_steps = [0] * len(self.rows)

    @property
    def can_wait(self) -> bool:
        """Whether its steps can be added later."""
        return self._replay.can_wait

    def problem(self, row: Row) -> str:
        """Why a row of it cannot be read now; "" when it can."""
        return self.gathers.problem(row)

    # --- in the step -----------------------------------------------------------------------------

    def before(self) -> Snapshot:
        """Gather; call when gradients are final and the rule has not run."""
        steps = self.steps
        # not always the same one of eight: some parameters are trained in every eighth step only
        path = steps % _PATH_EVERY == 6 * (steps // _PATH_EVERY) % _PATH_EVERY
        # a path over the window needs the same elements again; all other sums gain from other elements
        self.gathers.move(path)
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
        live = [g is not None and row.is_measured for g, row in zip(grads, self.rows, strict=True)]
        spans = self._replay.spans(states, live)
        can_wait = self._replay.can_wait and not hasattr(self.optimizer, "found_inf")
        snapshot = Snapshot(held, live, spans, self._replay.settings(spans) if can_wait else None)
        snapshot.path = path
        # the path's elements are met in many steps: in the sums they would outweigh all others
        snapshot.counts_all = not path or steps == 0
        snapshot.full = not self.states or steps % _FULL_EVERY == 0
        snapshot.look = steps == 0 or steps % _HEADROOM_EVERY == _HEADROOM_EVERY - 1
        if not all(live):
            for i, grad in enumerate(grads):
                self.gradless_steps[i] += grad is None
        if not can_wait:
            self._run(snapshot, states)
        return snapshot

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
        before_AnK, intended_AnK, grad_nK = snapshot.before_AnK, snapshot.intended_AnK, snapshot.grad_nK
        assert (
            before_AnK is not None and intended_AnK is not None and grad_nK is not None and snapshot.after is not None
        )
        after_AnK = self.gathers.widened(snapshot.after)
        self.gathers.join(after_AnK)
        live, full = tuple(snapshot.live), snapshot.full
        present = len(after_AnK) if full else 1
        mask_nK = self.gathers.mask_of(live)
        intended_AnK = intended_AnK[:present]
        self.sums.add(
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
                self.sums.add_headroom(before_AnK[0], intended_nK, rows, fmt)
        for i, is_live in enumerate(live):
            if is_live and (snapshot.counts_all or self._counts[i]):
                self.live_steps[i] += 1
                self.full_steps[i] += full

    def _run(self, snapshot: Snapshot, states: list[dict[str, Any]] | None) -> None:
        """Replay a step. `states`: given where it is replayed at once, whole tensors with it."""
        held_AnK = self.gathers.widened(snapshot.held)
        before_AnK, grad_nK = held_AnK[:-1], held_AnK[-1]
        # before the rule, which may write into the gradient
        snapshot.before_AnK, snapshot.grad_nK = before_AnK, grad_nK.clone() if snapshot.full else grad_nK
        self.gathers.join(before_AnK)
        snapshot.intended_AnK = self._replay.run(
            before_AnK,
            grad_nK,
            snapshot.spans,
            snapshot.settings,
            snapshot.live,
            states,
            self.sums.decay_5n if snapshot.path else None,
        )

    def pack(self) -> Tensor:
        """The window's sums in one vector on the device; see `window_sums.WindowSums`."""
        self.gathers.move(path=True)
        has_changed = any(row.has_changed for row in self.rows)
        return self.sums.pack(None if has_changed else self.gathers.weights(), self._formats)


def _left_out(row: Row, grad: Tensor) -> bool:
    """Whether samples of a gradient cannot be taken as real numbers; its row gets the reason."""
    if grad.layout is not torch.strided:
        row.reason = row.reason or f"its gradients are sparse ({grad.layout})"
    elif grad.is_complex():
        row.reason = row.reason or "its gradients are complex"
    else:
        return False
    return True


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
