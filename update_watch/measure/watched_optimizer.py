"""One optimizer under watch: its rows, the cohorts they are measured in, its place in the window."""

from __future__ import annotations

import operator
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from update_watch.evidence import TensorEvidence
from update_watch.measure.accumulators.gradient_accumulation import Accumulation
from update_watch.measure.accumulators.state_factor import Shadow
from update_watch.measure.device.panels import Plan
from update_watch.measure.device.turns import samples_for
from update_watch.measure.device_rows import Measured
from update_watch.measure.identity.names import Names, members_of, outline_of
from update_watch.measure.identity.partitions import Piece
from update_watch.measure.learning_rates import LearningRates
from update_watch.measure.parameters import Row, build_rows, forget_failed_trials
from update_watch.measure.row_facts import Resting, WindowFacts
from update_watch.measure.sampling import local
from update_watch.measure.transfer import Batch, Part
from update_watch.measure.window_evidence import CohortWindow
from update_watch.odd_tensors import unreadable
from update_watch.replay.twin import Twin
from update_watch.wording import first_line


class Watched:
    """Plans and measures one optimizer, or one part of it (see `parts`). `names`: id(parameter) -> its names."""

    def __init__(
        self,
        optimizer: Optimizer,
        index: int,
        names: dict[int, tuple[str, ...]],
        samples: int,
        rng: random.Random,
        found: dict[Any, Any],
        pieces: Mapping[int, Sequence[Piece]] | None = None,
        part: int = 0,
        all_groups: list[dict[str, Any]] | None = None,
        window: int = 128,
        in_panels: bool = False,
    ) -> None:
        """`pieces`: id(flat tensor) -> what lies in it. `all_groups`: those of all parts. `window`: steps of a report.
        `in_panels`: of many tensors on a CPU windows may be of a part."""
        self.optimizer, self.index, self.part = optimizer, index, part
        self.groups = optimizer.param_groups  # a part's are not to be found there when it is not stepped
        self._all_groups = self.groups if all_groups is None else all_groups
        self._pieces = pieces
        self.steps = 0  # seen since attached
        self._was_set_up = False  # trials that failed before the first step have been repeated
        self.window_steps = 0
        self.earlier = self.earlier_in_window = 0  # steps of the run, and of the open window, before it was attached
        self.quiet_windows = 0  # closed in a row without a step of it
        self._excluded: set[int] = set()  # ids of tensors that are not its to answer for
        self._names, self._asked, self._rng, self.found = names, samples + samples % 2, rng, found  # two sets
        self._windows = window, in_panels
        self._members: list[Tensor] = []
        self._rates = LearningRates()
        self._twin_error = ""
        try:
            self._twin: Twin | None = Twin(optimizer)
        except Exception as error:  # whatever the optimizer holds
            self._twin, self._twin_error = None, first_line(error)
        self.accumulation = Accumulation(rng)
        self.shadow = Shadow(optimizer, self._twin, rng, found)
        self.turns = 1  # it is measured in one of so many steps
        self.is_shadowed = True
        self._is_replayed = False  # the step that is running
        self._odd: dict[int, str] = {}  # id of a parameter whose gradient or state could not be read -> why
        self.is_resting = False  # only some steps are looked at
        self._is_new_plan = False  # made in the step that is running
        self._has_gaps = False  # a parameter was without gradient while another had one
        self._plan()
        self.read_counters()

    def renew(self) -> None:
        """Throw away all that was measured in the window that is open, and what may be half done."""
        self._twin = None if self._twin is None else Twin(self.optimizer)
        self.accumulation.remove()
        self.accumulation = Accumulation(self._rng)
        self.shadow = Shadow(self.optimizer, self._twin, self._rng, self.found)
        self._rates = LearningRates()
        self.window_steps = self.earlier_in_window = 0
        self._plan()

    def _plan(self) -> None:
        """Rows and cohorts for the parameters the optimizer holds now."""
        self._measured: list[Measured] = []  # the step that is running
        self._members, self._sizes = members_of(self.optimizer), outline_of(self.optimizer)
        self.groups = self.optimizer.param_groups
        self.ids = frozenset(map(id, self._members))
        if isinstance(self._names, Names):  # a layer that came with its group has one
            self._names.learn(self._members)
        self.first = self._members[0] if self._members else None  # by which a part is known
        label = (f"optimizer{self.index}." if self.index else "") + (f"part{self.part}." if self.part else "")
        lived = {id(row.param): row.lived for row in getattr(self, "rows", [])}
        largest = max((local(param).numel() for param in self._members if not is_lazy(param)), default=0)
        self._samples = samples_for(self._asked, len(self._names), largest)
        rows = build_rows(self.optimizer, self._names, self._samples, label, self.found, self._pieces)
        self.rows = [row for row in rows if id(row.param) not in self._excluded]
        for row in self.rows:
            row.reason = row.reason or self._odd.get(id(row.param), "")
            row.lived = lived.get(id(row.param), ((), 0))
        self._counts_lives = any(local(row.param).device.type != "cpu" for row in self.rows)
        self._skipped: dict[torch.device, Tensor] = {}
        self._is_checked = False  # whether its tensors are what was planned for, in this window
        self.devices: tuple[torch.device, ...] = ()
        shapeless = [row for row in self.rows if is_lazy(row.param)]  # till a forward pass uses it
        self._signs = [*shapeless, *{local(row.param).dtype: row for row in self.rows}.values()]
        self.row_ids, self._used_groups = frozenset(id(r.param) for r in self.rows), {r.group for r in self.rows}
        measured = [row for row in self.rows if row.is_measured and self._twin is not None]
        self._plan_of = Plan(self.optimizer, self._twin, measured, self._samples, self._rng, *self._windows)
        self.cohorts, self._roster = self._plan_of.cohorts, self._plan_of.roster
        self._roster.pass_by(self.window_steps)  # what was measured of them was of other rows
        self._unnoted = 0
        self._open_rows = self.rows  # those that are looked at in the open window
        inside = {id(row.of or row) for cohort in self.cohorts for row in cohort.rows}
        self._outside = [row for row in self.rows if id(row) not in inside]  # of all cohorts
        self.devices = tuple(dict.fromkeys(c.device for c in self.cohorts if c.device.type != "cpu"))  # with streams

    @property
    def step(self) -> int:
        """Of the run: it may have been attached late."""
        return self.earlier + self.steps

    @property
    def window_step(self) -> int:
        """Of the open window."""
        return self.earlier_in_window + self.window_steps

    def panel_of(self, param: int) -> int | None:
        """Of a parameter, by its id; None where it is looked at in all windows."""
        return self._plan_of.panel_of.get(param)

    @property
    def open_panel(self) -> int | None:
        """The only one that is looked at in the open window; None: all are."""
        return self._roster.panel

    def exclude(self, ids: frozenset[int]) -> bool:
        """Tensors that an optimizer within this one steps, or that are no longer the model's. False: nothing is new."""
        if ids <= self._excluded:
            return False
        self._excluded |= ids
        if not ids.isdisjoint(id(row.param) for row in self.rows):
            self._plan()
            self.shadow = Shadow(self.optimizer, self._twin, self._rng, self.found)
        return True

    def fed(self) -> set[int]:
        """Ids of its tensors that had a gradient in this window."""
        found = {id(row.param) for row in self.rows if row.param.grad is not None}
        for cohort in self.cohorts:
            for row, gradless in zip(cohort.rows, cohort.gradless_steps, strict=True):
                if gradless < cohort.steps:
                    found.add(id(row.param))
        return found

    def zeros(self) -> set[int]:
        """Ids of those of which all gradients that were measured are 0."""
        return set().union(*(own.zeros() for own in self._plan_of.open))

    def read_counters(self) -> None:
        """Learn which parameters are at the same step. Reads device values: not for use inside a step."""
        if self._counts_lives:
            for row in self.rows:
                state = self.optimizer.state.get(row.param) or {}
                counters = (v for v in state.values() if isinstance(v, Tensor) and not unreadable(v) and v.numel() == 1)
                row.lived = tuple(map(float, counters)), 0

    # --- in the step -----------------------------------------------------------------------------

    def pass_by(self) -> bool:
        """Let a step go by unseen. Returns whether something has changed that should be looked at."""
        self.accumulation.pause()
        if self._has_gaps:
            self._count_lives()
        return self.rest()

    def may_rest(self, optimizer: Optimizer) -> bool:
        """Whether it is what `optimizer` is about to step, and `rest` enough for a step that passes unseen after another."""
        groups = optimizer.param_groups
        is_it = optimizer is self.optimizer and groups and groups[0]["params"] and groups[0]["params"][0] is self.first
        return bool(is_it) and not self._has_gaps

    def rest(self) -> bool:
        """Let one more step go by unseen, with as little code as there can be. Returns as `pass_by`."""
        self.steps += 1
        self.window_steps += 1
        self._unnoted += 1
        groups = self.optimizer.param_groups
        return self._rates.note(groups) or len(groups) != len(self._sizes)

    def _note_unseen(self) -> None:
        unnoted, self._unnoted = self._unnoted, 0
        self._roster.pass_by(unnoted)

    def before(self, is_replayed: bool = False) -> list[Measured]:
        """Measure the cohorts whose turn it is, just before the rule runs.

        `is_replayed`: in a CUDA graph, which makes the gradients too; they are read in `after`.
        """
        self._is_replayed = is_replayed
        # of panels all members are looked at in the first step of a window, and in the others who they seem to be
        is_first = not self._is_checked or self._plan_of.panels == 1
        members, sizes = members_of(self.optimizer) if is_first else self._members, outline_of(self.optimizer)
        # some optimizers set themselves up in their first step: what could not be tried before it may be tried now
        may_run = False
        if self.steps and not self._was_set_up:
            self._was_set_up = True
            may_run = forget_failed_trials(self.optimizer, self.rows, self.found)
        # moved or converted after attaching, made in the first forward pass: seen before the first look of a window; of all
        # that are of one format one is looked at in every step
        checked = self._signs if self._is_checked else self._open_rows
        has_changed = any([row.has_changed for row in checked])
        self._is_checked = True
        is_other = sizes != self._sizes or not all(map(operator.is_, members, self._members))
        if may_run or has_changed or is_other:
            self._plan()
            self._is_new_plan = True
            self.shadow.replan()
        self.groups = self.optimizer.param_groups
        if not is_replayed:
            if self.is_shadowed and not self.shadow.rest(self.is_resting):
                self.shadow.before()
            self.accumulation.before(self._open_rows)
        for block in self._plan_of.open:
            block.look()
        self._measured = []
        if not self.cohorts or (is_replayed and not self._can_be_replayed):
            return self._measured
        self._note_unseen()
        cohorts, group, is_asked = self._plan_of.next(self.turns, self.is_resting)
        try:
            for cohort in cohorts:
                self._measured.append(self._plan_of.home[cohort].before(cohort, group, is_asked))
        except Exception as error:
            self._leave_out(error)
        return self._measured

    def after(self, measured: list[Measured]) -> bool:
        """Add the step, just after the rule has run. Returns as `pass_by`."""
        is_open = measured is self._measured  # else the window was closed within the step
        try:
            for cohort, snapshot in measured if is_open and self._is_replayed else ():
                cohort.take_gradients(snapshot)
            self._plan_of.after(measured if is_open else (), self.window_steps)
        except Exception as error:
            self._leave_out(error)
        self._measured = []
        if not self._is_replayed:
            if self.is_shadowed and not self.is_resting:
                self.shadow.after(self._open_rows)
            self.accumulation.after()
        self._count_lives()
        overflow = getattr(self.optimizer, "found_inf", None)  # exists only inside a GradScaler's fused step
        if isinstance(overflow, Tensor):
            total = self._skipped.get(overflow.device)
            self._skipped[overflow.device] = overflow.clone() if total is None else total.add_(overflow)
        self.steps += 1
        self.window_steps += 1
        has_changed, self._is_new_plan = self._is_new_plan, False
        return self._rates.note(self.optimizer.param_groups) or has_changed

    def _leave_out(self, error: Exception) -> None:
        """Plan without the rows that cannot be read any more, and let this step pass; raise what is not their fault."""
        odd = {
            id(row.param): problem for cohort in self.cohorts for row in cohort.rows if (problem := cohort.problem(row))
        }
        if not odd and not any(row.has_changed or self._has_states_elsewhere(row) for row in self.rows):
            raise error
        self._odd.update(odd)
        self._plan()

    def _count_lives(self) -> None:
        """Count the steps with a gradient, by which parameters are known whose counters cannot be read."""
        if not self._counts_lives:
            return
        for row in self.rows:
            if row.param.grad is not None:
                row.lived = row.lived[0], row.lived[1] + 1
            else:
                self._has_gaps = True  # until then all are alike, however many steps pass unseen

    def _has_states_elsewhere(self, row: Row) -> bool:
        return bool(row.states_elsewhere(self.optimizer.state.get(row.param) or {}))

    @property
    def _can_be_replayed(self) -> bool:
        return all(cohort.can_wait for cohort in self.cohorts)

    @property
    def is_waiting(self) -> bool:
        """Whether measured steps are still to be added."""
        return any(block.waiting for block in self._plan_of.open)

    # --- at the end of a window --------------------------------------------------------------------

    def close_window(
        self, batch: Batch, is_full: bool = True
    ) -> tuple[list[CohortWindow], list[TensorEvidence], list[Part], list[Resting]]:
        """Hand the sums to `batch` and start a new window. `is_full`: all tensors are to be looked at in that one."""
        self._note_unseen()
        others: list[TensorEvidence] = []
        given = self.groups, self._all_groups, self._used_groups, self.index, self.window_steps
        window = WindowFacts(self.optimizer, self._rates.facts(*given), self._twin_error)
        self._measured = []
        resting = [block for block in self._plan_of.blocks if block not in self._plan_of.open]
        others += [window.identity(row) for row in self._plan_of.add()]
        who = self.index, self.part
        cohorts = self._plan_of.close_window(batch, window, self.window_steps, who)
        others += map(window.identity, self._outside)
        skipped = [batch.add(total.reshape(1).float()) for total in self._skipped.values()]
        self.quiet_windows = 0 if self.window_steps else self.quiet_windows + 1
        self._skipped, self.window_steps, self.earlier_in_window = {}, 0, 0
        self._is_checked = False
        self._rates.open_window()
        self._open_window(is_full)
        rows = [row for block in resting for row in block.tensors]
        return cohorts, others, skipped, [window.resting(rows)] if rows else []

    def _open_window(self, is_full: bool) -> None:
        self._roster.open_window(is_full)
        self._open_rows = self.rows if self._roster.panel is None else self._outside + self._plan_of.open_rows
