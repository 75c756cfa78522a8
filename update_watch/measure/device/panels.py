"""How the rows of one device are measured: all of them in every window or, of many, a panel of them, for a window at a time.

What a look costs grows with the tensors that are looked at. Where one launch reads all of them that is little; else more than
`FEW` tensors are shared out among panels, as those who are asked in a survey: each step of a window looks at so many tensors
and no more, however large the model is, and each panel has one window of as many as there are panels. A panel is a fair part of
the model: every so manieth tensor of each kind. In the first windows all panels are looked at.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Hashable, Sequence

from torch.optim import Optimizer

from update_watch.measure.cohort import Cohort
from update_watch.measure.device.gradient_pace import GradientPace
from update_watch.measure.device.turns import MOST_TURNS, turns_of
from update_watch.measure.device_rows import DeviceRows, Measured
from update_watch.measure.learning_rates import as_number
from update_watch.measure.parameters import Row
from update_watch.measure.row_facts import KnownFacts, WindowFacts
from update_watch.measure.sampling import local
from update_watch.measure.step_order import Roster
from update_watch.measure.transfer import Batch
from update_watch.measure.window_evidence import CohortWindow, SumsWindow
from update_watch.replay.twin import Twin

FEW = 320  # tensors, up to which all take turns in every window: 40 in a step
_AT_ONCE = 32  # tensors of a panel that are looked at in one step
_PER_STEP = 8  # tensors that are looked at in a step, in the mean: a few looks at many cost less than many looks at few
_LEAST, _MOST = 32, 256  # tensors of a panel
_WAITING = 8  # steps' measurements that wait, of several panels
# turns, from which on half of the tensors are looked at in two of so many steps instead: a few looks at many cost less
_MANY_TURNS, _HALVES = 4, 2
_TIMES = 4  # in windows in which they come less often, single steps would make the numbers of many tensors at once


class Plan:
    """What measures the rows of one optimizer, and in which steps."""

    def __init__(
        self,
        optimizer: Optimizer,
        twin: Twin | None,
        rows: Sequence[Row],
        samples: int,
        rng: random.Random,
        window: int,
        in_panels: bool,
    ) -> None:
        """`rows`: that can be measured. `window`: steps of one. `in_panels`: whether there may be several panels."""
        self.blocks: list[DeviceRows] = []
        self.panels = 1
        devices = dict.fromkeys(local(row.param).device for row in rows)
        cycle, measured = 0, window
        self._pace: GradientPace | None = None
        for device in devices:
            assert twin is not None  # else nothing can be measured
            own = [row for row in rows if local(row.param).device == device]
            turns = turns_of([local(row.param).numel() for row in own], samples, device)
            is_plain = all(row.scheme.name == "plain" for row in own)
            is_long = _TIMES * turns <= window
            if len(devices) == 1 and turns >= _MANY_TURNS and len(own) <= FEW and is_plain and is_long:
                self._pace = GradientPace.of([row.param for row in own], rng)
                if self._pace is not None:
                    cycle, turns = turns, _HALVES
                    measured = max(window // cycle, 1) * turns
            if in_panels and turns == MOST_TURNS and len(own) > FEW and len(devices) == 1:
                size = min(max(window, _LEAST), _MOST)
                self.panels, turns = math.ceil(len(own) / size), max(size // _AT_ONCE, 2)
                cycle = size // _PER_STEP
                # in a window of its own each row is measured once in a cycle
                measured = max(window // cycle, 1) * turns
            for panel in range(self.panels):
                of_panel = own[panel :: self.panels]
                self.blocks.append(
                    DeviceRows(optimizer, twin, of_panel, samples, rng, measured, turns, self._pace is not None)
                )
        self.cohorts = [cohort for block in self.blocks for cohort in block.cohorts]
        self.home = {cohort: block for block in self.blocks for cohort in block.cohorts}
        everybody: list[tuple[Cohort, ...]] = [(cohort,) for cohort in self.cohorts]
        by_panel: Sequence[Sequence[Cohort]] = ()
        if self.panels > 1:
            everybody = [tuple(self.cohorts[k::MOST_TURNS]) for k in range(MOST_TURNS)]
            by_panel = [block.cohorts for block in self.blocks]
        # id of a parameter -> the panel it is in, where there are several
        self.panel_of: dict[int, int] = {}
        for panel, block in enumerate(self.blocks if self.panels > 1 else ()):
            self.panel_of.update({id(row.param): panel for cohort in block.cohorts for row in cohort.rows})
        self.roster: Roster[Cohort] = Roster(everybody, window, rng, by_panel, cycle)
        self._window = window
        self._optimizer, self._squared_rate = optimizer, 1.0
        self._last: Cohort | None = None  # that was measured, of the open window
        self._between: list[float] = []  # steps since then in which nobody was: squared learning rates
        self._facts: dict[Hashable, KnownFacts] = {}  # of the tensors of several blocks

    @property
    def open(self) -> list[DeviceRows]:
        """Those that are measured in the open window."""
        panel = self.roster.panel
        return self.blocks if panel is None else [self.blocks[panel]]

    @property
    def open_rows(self) -> list[Row]:
        """The rows of these."""
        return [row.of or row for block in self.open for cohort in block.cohorts for row in cohort.rows if row.is_first]

    # --- in the step -----------------------------------------------------------------------------

    def next(self, turns: int, is_resting: bool) -> tuple[Sequence[Cohort], int, bool]:
        """Who are measured in the next step, see `Roster.next`, and whether because it is unlike those before it.

        Where nobody is in most steps, all are in one whose gradients are unlike those before: else nobody could tell how large
        its updates were. `is_resting`: other steps pass unseen, of which nothing is known; nor of this one what is usual.
        """
        cohorts, group = self.roster.next(turns)
        if self._pace is None:
            return cohorts, group, False
        if not is_resting and self._pace.is_unlike():
            return self.cohorts, group, True  # which tells of no other step
        squared_rate = self._rate_now()
        for cohort in cohorts:
            cohort.looks_told.add()
            if squared_rate:  # else nothing is wanted in it, whatever the others are
                self._tell(cohort)
        if not cohorts:
            self._between.append(squared_rate)
        return cohorts, group, False

    def _rate_now(self) -> float:
        """The square of the first group's learning rate; where it cannot be read, that of the step before, or always the same.

        0 is 0 here: of a step that nobody looks at, 1 would make the largest of all.
        """
        rate = as_number(self._optimizer.param_groups[0].get("lr"))
        if rate is not None and math.isfinite(rate):
            self._squared_rate = rate**2
        return self._squared_rate

    def _tell(self, cohort: Cohort | None) -> None:
        """Who is measured now, after steps in which nobody was: what those had is between what the last one and this one have.
        None: the window is closed."""
        for i, squared_rate in enumerate(self._between, 1):
            share = i / (len(self._between) + 1)
            if self._last is not None:
                self._last.looks_told.hold(squared_rate, 1.0 if cohort is None else 1 - share)
            if cohort is not None:
                cohort.looks_told.hold(squared_rate, 1.0 if self._last is None else share)
        self._between, self._last = [], cohort

    def after(self, measured: Sequence[Measured], steps: int) -> None:
        """Gather what was stored, and add steps that wait. `steps`: of the window, before this one.

        Of several panels so many in each step as are measured, the fullest first: all at once would take three times what
        the other steps do. Towards the window's end less and less may wait for it.
        """
        opened = self.open
        for cohort, snapshot in measured:
            self.home[cohort].after((cohort, snapshot), adds=len(opened) == 1)
        if len(opened) == 1 or not measured:
            return
        waiting = sum(block.waiting for block in opened)
        left = min(max(self._window - steps - 1, 0), MOST_TURNS)
        share = waiting / max(math.ceil(left / 2), 1) if left < MOST_TURNS else waiting / _WAITING
        for block in sorted(opened, key=lambda block: -block.waiting):
            if share <= 0 or not block.waiting:
                break
            share -= block.waiting
            block.add()

    # --- at the end of a window --------------------------------------------------------------------

    def add(self) -> list[Row]:
        """Add the steps that wait. Returns those of the open ones that were in no step of the window: their first rows."""
        for block in self.open:
            block.add()
        cohorts = [cohort for block in self.open for cohort in block.cohorts if not cohort.steps]
        return [cohort.rows[i] for cohort in cohorts for i in cohort.firsts]

    def close_window(self, batch: Batch, facts: WindowFacts, steps: int, who: tuple[int, ...]) -> list[CohortWindow]:
        """Hand the sums of what is open to `batch`, and start new ones. Several panels are judged side by side.

        `steps`: of the window. `who`: by which cohorts of one optimizer are known.
        """
        self._tell(None)
        alike: dict[Hashable, list[tuple[int, DeviceRows]]] = {}
        for number, own in enumerate(self.open):
            if any(cohort.steps for cohort in own.cohorts):
                kind = own.device, own.sums.has_clusters, tuple(own.cohorts[0].states)
                alike.setdefault(kind, []).append((number, own))
        found: list[CohortWindow] = []
        for key, blocks in alike.items():
            measured = [cohort for _, own in blocks for cohort in own.cohorts if cohort.steps]
            known = blocks[0][1].facts if len(blocks) == 1 else self._facts.setdefault(key, KnownFacts())
            vectors = [
                (
                    batch.add_later(own.device, own.packing(steps, batch.is_later(own.device))),
                    own.sums.layout(own.parts),
                )
                for _, own in blocks
            ]
            sums = SumsWindow(tuple(vectors), tuple(measured[0].states), facts.facts_of(measured, known))
            start = 0
            for number, own in blocks:
                # of several panels each is told by itself what it has not seen
                owner = *who, number if self.panels > 1 else 0
                found += [
                    self._closed(own, cohort, sums, steps, owner, start) for cohort in own.cohorts if cohort.steps
                ]
                start += own.sums.rows
        for blocks in alike.values():
            for _, own in blocks:
                own.open_window()
        return found

    def _closed(
        self, own: DeviceRows, cohort: Cohort, sums: SumsWindow, steps: int, owner: tuple[int, ...], start: int
    ) -> CohortWindow:
        """`start`: of its block's rows among those of the sums."""
        return CohortWindow(
            sums,
            cohort.counted_steps(self.roster.group_steps, own.gradients),
            steps,
            owner,
            slice(start + cohort.place.start, start + cohort.place.stop),
            functools.partial(own.gradients.suspect, cohort.place.start),
            cohort.draw_from,
            tuple(cohort.firsts),
            cohort.usual,
            None if self._pace is None else cohort.told(),
        )
