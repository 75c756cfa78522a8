"""All measured rows of an optimizer on one device: cohorts of them take turns, and their sums lie side by side.

Steps that can be replayed later wait for the next ones, whichever cohorts they are of, and are added together: their rows
lie next to each other as if they were those of one step, so that the number of operators does not grow with them, in caches
that training has used since.

Legend: A accumulators (0 the weight, then states), n rows, R rows of all steps that are added, K samples.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from update_watch.measure.cohort import Cohort, Snapshot
from update_watch.measure.device import joint_reads, multi_gather
from update_watch.measure.device.one_thread import OnOneThread
from update_watch.measure.device.turns import shared_out, stretched
from update_watch.measure.gathers import Common, side_by_side, whole_of
from update_watch.measure.ledger import kernel_sheet_sums
from update_watch.measure.parameters import Row
from update_watch.measure.row_facts import KnownFacts
from update_watch.measure.sampling import local
from update_watch.measure.step_replay import Step, replay_samples
from update_watch.measure.sums import kernel_sums
from update_watch.measure.sums.added_steps import AddedSteps, Look, Slot
from update_watch.measure.sums.device_sums import DeviceSums
from update_watch.measure.sums.host_sums import HostSums
from update_watch.measure.sums.layout import COUNT, parts_for
from update_watch.measure.sums.packing import Reach, packed
from update_watch.measure.sums.whole_gradients import WholeGradients
from update_watch.replay.twin import Twin

_AT_MOST, _AT_LEAST = 8, 4  # steps that are added together,
_HELD = 1 / 400  # or as many as take so much of the weights' bytes,
_LEAST_ROWS = 32  # and where each step is of half of the tensors no fewer rows than these,
# or so many samples: on a CPU more at once are no faster; on a GPU they would take memory in the step, 0.2 KB each by torch's
# operators, 0.07 by the kernel
_ENOUGH, _ENOUGH_ON_GPU, _ENOUGH_FOR_KERNEL = 2**16, 2**19, 2**20
_DECAY_MEMORY = 0.9  # weight of a window's decay sums in the next

Measured = tuple[Cohort, Snapshot]
_RunT = TypeVar("_RunT", Look, Reach)


class DeviceRows:
    """Measures the rows of one optimizer on one device, a cohort in a step."""

    def __init__(
        self,
        optimizer: Optimizer,
        twin: Twin,
        rows: list[Row],
        samples: int,
        rng: random.Random,
        window: int,
        turns: int,
        has_asked: bool = False,
    ) -> None:
        """`window`: steps of one; each row will be measured in one of so many `turns` of them. `has_asked`: and in steps that are
        unlike the others."""
        self._twin, self._samples = twin, samples
        self._waiting: list[Measured] = []
        self.cohorts: list[Cohort] = []
        is_plain = all(row.scheme.name == "plain" for row in rows)
        has_way = (
            turns == 1 or not is_plain
        )  # of plain rows in turns the displacement could not be told from a few steps
        if turns == 1:
            rows = stretched(rows, samples)
        # whether single elements are added up: where steps are not independent
        has_clusters = any(row.is_whole and row.scheme.name != "plain" for row in rows)
        self._parts = parts_for(window // turns) + has_asked
        start, common = 0, Common.of(rows, has_way)
        for own in shared_out(rows, turns):
            place = slice(start, start + len(own))
            self.cohorts.append(Cohort(optimizer, twin, own, samples, rng, window // turns, common, place, has_asked))
            start = place.stop
        self._rows = start
        self.device = self.cohorts[0].device
        self._enough = _ENOUGH_ON_GPU
        if not multi_gather.is_available(self.device):
            weights = sum(local(row.param).numel() * local(row.param).element_size() for row in rows)
            arrays = 2 * len(self.cohorts[0].states) + 3  # before and after, gradients
            row = arrays * samples * local(rows[0].param).element_size()
            least = _LEAST_ROWS if has_asked else _AT_LEAST * len(self.cohorts[0].rows)
            self._enough = min(max(int(weights * _HELD / row), least) * samples, _ENOUGH)
        gathers = [cohort.gathers for cohort in self.cohorts]
        self._whole_n1 = whole_of(gathers)
        cells = 0 if gathers[0].are_whole else samples // 2 // common.cell
        kinds = self._whole_n1 is not None, has_clusters, has_way
        self._kind = kernel_sums.Kind(len(gathers[0].states), samples, cells, gathers[0].dtype, *kinds)
        self._way = HostSums if self.device.type == "cpu" else DeviceSums
        if kernel_sums.is_right(self.device, self._kind):
            self._way, self._enough = kernel_sums.KernelSums, _ENOUGH_FOR_KERNEL
            kernel_sheet_sums.check(self.device)
        self._sums: DeviceSums | None = None
        self._decay_5n: Tensor | None = None  # of the windows before
        self.tensors = [cohort.rows[i] for cohort in self.cohorts for i in cohort.firsts]  # of each its first row
        ordered = [row for cohort in self.cohorts for row in cohort.rows]
        are_sampled = [not row.is_whole and row.is_first for row in ordered]
        self.facts = KnownFacts()
        self.gradients = WholeGradients([row.param for row in ordered], are_sampled)
        # in the step that is running, of those that cannot wait
        self._now: dict[Cohort, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def sums(self) -> DeviceSums:
        """Of the open window; made when they are asked for: of many panels they would take most of a window's end."""
        if self._sums is None:
            self._sums = self._kind.sums(self._way, self._rows, self._whole_n1, self.device, self._parts)
            if self._decay_5n is not None:
                self._sums.decay_5n.copy_(self._decay_5n)
        return self._sums

    # --- in the step -----------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Measured steps that are still to be added."""
        return len(self._waiting)

    def look(self) -> None:
        """In every step, before the rule runs: at whole gradients."""
        self.gradients.look(lambda: self.sums)

    def before(self, cohort: Cohort, group: int, is_asked: bool = False) -> Measured:
        """Gather, see `Cohort.before`."""
        snapshot = cohort.before(group, is_asked)
        if snapshot.look:
            self.gradients.look_at(cohort.place, self.sums)
        if snapshot.settings is None:
            self.add()
            self._now[cohort] = self._replayed([(cohort, snapshot)])
        return cohort, snapshot

    def after(self, measured: Measured, adds: bool = True) -> None:
        """Gather what was stored; add what waits, if it is enough and it `adds` itself."""
        cohort, snapshot = measured
        cohort.after(snapshot)
        now = self._now.pop(cohort, None)
        if now is not None:
            joint_reads.launch()
            self._add([measured], *now)
            return
        self._waiting.append(measured)
        rows = sum(len(waiting.rows) for waiting, _ in self._waiting)
        if adds and (len(self._waiting) >= _AT_MOST or rows * self._samples >= self._enough):
            self.add()

    def add(self) -> None:
        """Add the steps that wait."""
        # compared in full first, and those that look at headroom next to each other
        waiting = sorted(self._waiting, key=lambda one: (not one[1].full, one[1].look == one[1].full))
        self._waiting = []
        alone = OnOneThread(self.device)
        with alone, alone:
            if waiting:
                self._add(waiting, *self._replayed(waiting))

    def _replayed(self, measured: Sequence[Measured]) -> tuple[Tensor, Tensor, Tensor]:
        """[A, R, K] what was stored before some steps, [A, R, K] what they were meant to make of it, [R, K] gradients."""
        joint_reads.launch()
        held_ARK = side_by_side([(cohort.gathers, one.held, one.moving_first) for cohort, one in measured])
        before_ARK, grad_RK = held_ARK[:-1], held_ARK[-1]
        steps = []
        start = 0
        for cohort, one in measured:
            rows = slice(start, start + len(cohort.rows))
            decay_5n = self.sums.decay_5n[:, cohort.place] if one.look else None
            steps.append(Step(cohort.replay, rows, one.spans, one.settings, one.live, decay_5n))
            cohort.gathers.join(before_ARK[:, rows])
            start = rows.stop
        intended_ARK, gradient_RK = before_ARK.clone(), grad_RK.clone()  # the rule may write into the gradient
        replay_samples(self._twin, steps, before_ARK, gradient_RK, intended_ARK, grad_RK)
        for step, (_, one) in zip(steps, measured, strict=True):
            if one.states is not None:
                step.replay.replay_whole(intended_ARK[:, step.rows], one.states, one.live, one.moving_first)
                one.states = None
            step.replay.conclude(step, intended_ARK)
        return before_ARK, intended_ARK, gradient_RK

    def _add(self, measured: Sequence[Measured], before_ARK: Tensor, intended_ARK: Tensor, gradient_RK: Tensor) -> None:
        """Add some steps to the sums: those to be compared in full first."""
        in_time = sorted(measured, key=lambda one: one[1].turn)
        parts = self._parts_of(in_time)
        pairs = ((one, cohort.gathers.weights_of(one.turn, one.drawn)) for cohort, one in in_time)
        weights = {one: pair for one, pair in pairs if pair is not None}
        slots: list[Slot] = []
        looks: list[Look] = []
        looked: list[Slot] = []
        start = 0
        for cohort, one in measured:
            slots.append(Slot(cohort.place, start, parts[one], one.group))
            if one.look:
                looks += cohort.looks(one, start)
                looked.append(slots[-1])
            start = slots[-1].stop
        after_RK, states_SRK = self._stored(measured)
        sets = list(zip(*(weights[one] for _, one in measured), strict=True)) if weights else []
        masks = [cohort.gathers.mask_of(tuple(one.live)) for cohort, one in measured]
        added = AddedSteps(
            before_ARK,
            intended_ARK,
            after_RK,
            states_SRK,
            gradient_RK,
            _joined_masks(masks, measured),
            torch.stack([_together(set_nJ) for set_nJ in sets], 1) if sets else None,
            slots,
            _joined_runs(looks),
            looked,
            whole_of([cohort.gathers for cohort, _ in measured]),
            any(one.drawn for _, one in measured),
        )
        self.sums.add(added)

    def _parts_of(self, measured: Sequence[Measured]) -> dict[Snapshot, int]:
        """The part of the window that each step, given in the order of time, belongs to."""
        parts: dict[Snapshot, int] = {}
        for cohort, one in measured:
            own = [other for of, other in measured if of is cohort]

            def merge(cohort: Cohort = cohort, own: list[Snapshot] = own) -> None:
                self.sums.merge_parts(cohort.place)
                parts.update({other: parts[other] // 2 for other in own if other in parts and not other.is_asked})

            parts[one] = cohort.count(one, merge)
        return parts

    def _stored(self, measured: Sequence[Measured]) -> tuple[Tensor, Tensor | None]:
        """[R, K] weights and [S, R', K] states after some steps, the latter of those that are compared in full."""
        full = [one for one in measured if one[1].full and one[0].states]
        if any(cohort.gathers.carried for cohort, _ in measured):
            stored = [_joined_with_rest(*one) for one in measured]
            weights_RK = torch.cat([after_AnK[0] for after_AnK in stored])
            states = [after_AnK[1:] for after_AnK in stored[: len(full)]]
            return weights_RK, torch.cat(states, 1) if states else None
        weights_RK = side_by_side([_after(*one) for one in measured], slice(0, 1))[0]
        return weights_RK, side_by_side([_after(*one) for one in full], slice(1, None)) if full else None

    # --- at the end of a window --------------------------------------------------------------------

    @property
    def parts(self) -> int:
        """Parts of the window that are in use."""
        return max(cohort.parts for cohort in self.cohorts)

    def zeros(self) -> set[int]:
        """Ids of the tensors of which all gradients that were measured in this window are 0; on the host, others would wait."""
        if self.device.type != "cpu":
            return set()
        self.add()
        counts_n = self.sums.views["parts_PFn"][: self.parts, COUNT].sum(0)
        are_zeros = (self.sums.views["gradient_max_n"].eq(0) & counts_n.gt(0)).tolist()
        rows = [row for cohort in self.cohorts for row in cohort.rows]
        others = {id(row.param) for row, is_zero in zip(rows, are_zeros, strict=True) if not is_zero}
        return {id(row.param) for row in rows} - others

    def packing(self, window_steps: int, is_later: bool) -> Callable[[], Tensor]:
        """Makes the window's sums one vector on the device; see `WindowSums`.

        `is_later`: when the next window has begun, by another thread.
        """
        stored_nK = None
        if self._kind.has_way and not any(row.has_changed for cohort in self.cohorts for row in cohort.rows):
            stored_nK = _together([cohort.stored(self.sums.kept) for cohort in self.cohorts])
        weights = [cohort.gathers.kept_weights for cohort in self.cohorts]
        known = [weights_nJ for weights_nJ in weights if weights_nJ is not None]
        scaled = [
            Reach(
                slice(cohort.place.start + rows.start, cohort.place.start + rows.stop), fmt, window_steps / cohort.steps
            )
            for cohort in self.cohorts
            for rows, fmt, _ in cohort.runs
            if cohort.steps
        ]
        kept_weights_nJ = _together(known) if known else None
        given = self.parts, stored_nK, kept_weights_nJ, _joined_runs(scaled)
        if isinstance(self.sums, kernel_sums.KernelSums) and not is_later:
            return functools.partial(self.sums.packed, *given)
        return functools.partial(packed, self.sums, *given)

    def open_window(self) -> None:
        """Start new sums."""
        # a decay far below one step of the format shows only over many windows: they are pooled, the old ones less
        self._decay_5n, self._sums = torch.mul(self.sums.decay_5n, _DECAY_MEMORY), None
        self.gradients.open_window()
        self._now.clear()
        for cohort in self.cohorts:
            cohort.open_window()


def _together(arrays: Sequence[Tensor]) -> Tensor:
    return arrays[0] if len(arrays) == 1 else torch.cat(list(arrays))


def _after(cohort: Cohort, snapshot: Snapshot) -> tuple[Any, Tensor, bool]:
    snapshot.after = cohort.gathers.unpacked(
        snapshot.after
    )  # once: of full steps weights and states are asked for apart
    return cohort.gathers, snapshot.after, snapshot.moving_first


def _joined_with_rest(cohort: Cohort, snapshot: Snapshot) -> Tensor:
    after_AnK = side_by_side([_after(cohort, snapshot)])
    cohort.gathers.join(after_AnK)
    return after_AnK


def _joined_masks(masks: Sequence[Tensor | None], measured: Sequence[Measured]) -> Tensor | None:
    known = [mask_nK for mask_nK in masks if mask_nK is not None]
    if not known:
        return None
    ones = [
        torch.ones(len(cohort.rows), cohort.samples, device=cohort.device) if mask_nK is None else mask_nK
        for mask_nK, (cohort, _) in zip(masks, measured, strict=True)
    ]
    return _together(ones)


def _joined_runs(looks: Sequence[_RunT]) -> list[_RunT]:
    """Neighbours with all the same as one."""
    found: list[_RunT] = []
    for look in looks:
        if found and found[-1][1:] == look[1:] and found[-1].rows.stop == look.rows.start:
            found[-1] = look._replace(rows=slice(found[-1].rows.start, look.rows.stop))
        else:
            found.append(look)
    return found
