"""From a window's sums to evidence: numbers per tensor, on the host, in FP64."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from update_watch.columns.evidence_columns import Columns, OneByOne, Tensors
from update_watch.evidence import AccumulatorEvidence, TensorEvidence, WindowEvidence, changed
from update_watch.measure.accumulators.average_windows import AverageWindow, UnreadWindow
from update_watch.measure.accumulators.average_windows import read as read_average
from update_watch.measure.accumulators.gradient_accumulation import AccumulationWindow
from update_watch.measure.accumulators.gradient_accumulation import read as read_accumulation
from update_watch.measure.accumulators.reference_states import ShadowWindow
from update_watch.measure.accumulators.replicas import ChecksumWindow
from update_watch.measure.accumulators.replicas import read as read_checksums
from update_watch.measure.accumulators.state_factor import read as read_shadow
from update_watch.measure.ledger.reading import Reading
from update_watch.measure.ledger.sheet import SheetWindow
from update_watch.measure.sums.layout import WANT, Layout
from update_watch.measure.sums.measured_block import CohortFacts, MeasuredBlock
from update_watch.measure.sums.missed_steps import Missed, missed_steps
from update_watch.measure.sums.step_sizes import Unseen, UsualSizes, sizes_of, unseen
from update_watch.measure.sums.steps import Steps
from update_watch.measure.sums.window_sums import WindowSums
from update_watch.measure.transfer import Later, Part, Transfer
from update_watch.worker import rest, unhurried


@dataclasses.dataclass(frozen=True)
class SumsWindow:
    """The sums of a closed window, of all cohorts of an optimizer on one device, on their way to the background thread."""

    transfer: Transfer | Part | Later
    layout: Layout

    @functools.cached_property
    def sums(self) -> WindowSums:
        """Waits for the device."""
        return WindowSums.unpack(self.transfer.wait(), self.layout)


@dataclasses.dataclass(frozen=True)
class CohortWindow:
    """A cohort's closed window on its way to the background thread."""

    of_all: SumsWindow
    facts: Callable[[], CohortFacts]  # of thousands of tensors: made on the background thread
    states: tuple[str, ...]
    steps: Steps
    window_steps: int
    optimizer: tuple[int, int]  # cohorts of one optimizer are measured in steps of one window
    place: slice  # of its rows among those of the sums
    suspect: Callable[[frozenset[int]], None] | None = None  # told the rows whose whole gradients are to be looked at
    draw_from: Callable[[frozenset[int]], None] | None = None  # told the rows that few elements carry
    firsts: tuple[int, ...] = ()  # rows of `place` at which tensors begin; (): each is one
    usual: UsualSizes = dataclasses.field(default_factory=UsualSizes)  # the cohort's, of the windows before

    def sums(self) -> WindowSums:
        """Its own, by tensor. Waits for the device."""
        own = self.of_all.sums.of(self.place, len(self.steps.parts_Pn))
        return own if len(self.firsts) in (0, self.place.stop - self.place.start) else own.joined(self.firsts)

    def tell(self, own: WindowSums) -> None:
        """Have whole gradients looked at, and tensors read where what moves is."""
        firsts = self.firsts or range(self.place.stop - self.place.start)
        for tell, tensors in ((self.suspect, own.suspects(self.steps)), (self.draw_from, own.uneven(self.steps))):
            if tell is not None:
                tell(frozenset(firsts[i] for i in tensors))

    @functools.cached_property
    def rows(self) -> CohortFacts:
        return self.facts()


@dataclasses.dataclass(frozen=True)
class Window:
    """A whole closed window."""

    step: int
    window: int
    cohorts: tuple[CohortWindow, ...]
    others: tuple[TensorEvidence, ...]  # tensors that are not measured
    order: dict[str, int]  # name -> place in the report
    cost_ms: float | None
    skipped: tuple[Transfer | Part, ...] = ()
    averages: tuple[AverageWindow | UnreadWindow, ...] = ()
    shadows: tuple[ShadowWindow, ...] = ()
    accumulations: tuple[AccumulationWindow, ...] = ()
    checksums: tuple[ChecksumWindow, ...] = ()
    observed: int | None = None  # steps looked at
    cost_share: float | None = None  # of the window's time, what the watch took
    ledger: tuple[SheetWindow, ...] = ()
    time: float = dataclasses.field(default_factory=time.time)


def read(window: Window) -> WindowEvidence:
    """Wait for the device and make the evidence. Runs on the background thread."""
    # sums of updates that overflow are infinite: that is a verdict and no warning; not as a decorator, which threads would share
    with np.errstate(all="ignore"):
        return _read(window)


def _read(window: Window) -> WindowEvidence:
    skipped = max((int(t.wait()[0]) for t in window.skipped), default=0)
    sums = [cohort.sums() for cohort in window.cohorts]
    ledger, alone, blocks = Reading(window.ledger), list(window.others), []
    for cohort, own, of_others in zip(window.cohorts, sums, _unmeasured(window.cohorts, sums), strict=True):
        block, others = _tensors(own, cohort, of_others, skipped)
        alone += others
        blocks.append(block)
        cohort.tell(own)
        rest()
    names = [tensor.name for tensor in alone] + [name for block in blocks for name in block.names]
    if len(set(names)) < len(names):
        every = [block.tensor(row) for block in blocks for row in unhurried(range(len(block)))]
        alone, blocks = _one_each(alone + every), []
    alone = [ledger.of(tensor) for tensor in unhurried(alone)]
    more = _beside(window)
    kept = []
    for block in blocks:
        columns, is_alone = ledger.of_all(block.names, block.column("numbers.displacement_efficiency"))
        alone += [ledger.of(block.tensor(row)) for row in unhurried(np.flatnonzero(is_alone).tolist())]
        block.put(columns)
        has_more = np.array([name in more for name in block.names], bool) & ~is_alone
        alone += [block.tensor(row) for row in unhurried(np.flatnonzero(has_more).tolist())]
        is_kept = ~(is_alone | has_more)
        kept.append(block if is_kept.all() else block.kept(np.flatnonzero(is_kept)))
    alone = [_with(tensor, more.get(tensor.name)) for tensor in unhurried(alone)]
    names = [tensor.name for tensor in alone] + [name for block in kept for name in block.names]
    places = np.array([window.order.get(name, len(window.order)) for name in names], dtype=np.intp)
    tensors = Tensors(Columns([OneByOne(alone), *kept], np.argsort(places, kind="stable")))
    head = window.step, window.window, tensors, window.time
    return WindowEvidence(*head, window.cost_ms, skipped, window.observed, window.cost_share)


class _More(NamedTuple):
    """What others than its optimizer's sums tell of a tensor."""

    accumulators: dict[str, AccumulatorEvidence]
    fields: dict[str, Any]


def _beside(window: Window) -> dict[str, _More]:
    """By name."""
    found: defaultdict[str, _More] = defaultdict(lambda: _More({}, {}))
    accumulators = [read_average(average) for average in window.averages]
    accumulators += [read_accumulation(accumulation) for accumulation in window.accumulations]
    for of_one in accumulators:
        for name, accumulator in of_one.items():
            found[name].accumulators[accumulator.name] = accumulator
    for shadow in window.shadows:
        for name, factor in read_shadow(shadow).items():
            found[name].fields.update(
                state_factor=factor.value, state_factor_error=factor.error, state_factor_steps=factor.steps
            )
    for name, (part, checksum) in read_checksums(window.checksums).items():
        found[name].fields.update(part=part, checksum=checksum)
    return found


def _with(tensor: TensorEvidence, more: _More | None) -> TensorEvidence:
    if more is None:
        return tensor
    return changed(tensor, accumulators={**tensor.accumulators, **more.accumulators}, **more.fields)


def _one_each(tensors: list[TensorEvidence]) -> list[TensorEvidence]:
    """Of a tensor that several optimizers step, what the one showed that stepped it most."""
    most: dict[str, TensorEvidence] = {}
    for tensor in tensors:
        known = most.get(tensor.name)
        if known is None or tensor.steps > known.steps:
            most[tensor.name] = tensor
    owner = {name: tensor.optimizer_group.partition("/")[0] for name, tensor in most.items()}
    return [tensor for tensor in tensors if tensor.optimizer_group.partition("/")[0] == owner[tensor.name]]


def _unmeasured(cohorts: Sequence[CohortWindow], sums: Sequence[WindowSums]) -> list[tuple[Unseen, Missed | None]]:
    """Per cohort; see `error_bars` and `missed_steps`. Cohorts of one optimizer share its steps."""
    found: dict[int, tuple[Unseen, Missed | None]] = {}
    for optimizer in dict.fromkeys(cohort.optimizer for cohort in cohorts):
        own = [i for i, cohort in enumerate(cohorts) if cohort.optimizer == optimizer]
        energies = [sums[i].parts_PFn[:, WANT] for i in own]
        steps = [cohorts[i].steps.parts_Pn for i in own]
        rates = [cohorts[i].steps.squared_rates_P for i in own]
        usual = [cohorts[i].usual for i in own]
        sizes = [sizes_of(*each) for each in zip(energies, steps, rates, usual, strict=True)]
        window_steps = cohorts[own[0]].window_steps
        pairs = zip(unseen(energies, steps, window_steps, sizes), missed_steps(sizes, rates, window_steps), strict=True)
        found |= zip(own, pairs, strict=True)
    return [found[i] for i in range(len(cohorts))]


def _tensors(
    sums: WindowSums, cohort: CohortWindow, others: tuple[Unseen, Missed | None], skipped: int
) -> tuple[MeasuredBlock, list[TensorEvidence]]:
    """The evidence of all rows of a cohort: of those that were measured, and of the others."""
    facts = cohort.rows
    block = MeasuredBlock(sums, cohort.steps, sums.numbers(cohort.steps, *others), facts, skipped)
    block.add_states(sums, cohort.states, facts)
    has_numbers = (cohort.steps.measured_n != 0) & np.array([not reason for reason in facts.given["reason"]], bool)
    # a counter is read by itself, and is said of its tensor first
    is_plain = has_numbers & np.array([not counters for counters in facts.given["accumulators"]], bool)
    if is_plain.all():
        return block, []
    alone = [
        block.tensor(i) if has_numbers[i] else changed(facts.evidence(i), skipped_steps=skipped)
        for i in unhurried(np.flatnonzero(~is_plain).tolist())
    ]
    return block.kept(np.flatnonzero(is_plain)), alone
