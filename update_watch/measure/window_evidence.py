"""From a window's sums to evidence: numbers per tensor, on the host, in FP64."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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
from update_watch.measure.row_facts import Resting
from update_watch.measure.sums.layout import WANT, Layout
from update_watch.measure.sums.measured_block import CohortFacts, MeasuredBlock
from update_watch.measure.sums.missed_steps import Missed, missed_steps
from update_watch.measure.sums.step_sizes import Unseen, UsualSizes, aligned, sizes_of_each, unseen
from update_watch.measure.sums.steps import Steps, Told
from update_watch.measure.sums.window_sums import Mask, WindowSums
from update_watch.measure.transfer import Later, Part, Transfer
from update_watch.worker import rest, unhurried


@dataclasses.dataclass(frozen=True)
class SumsWindow:
    """The sums of a closed window, of all cohorts of an optimizer on one device, on their way to the background thread.

    They come in one vector, or in one of each panel: of as many rows, one after the other."""

    vectors: tuple[tuple[Transfer | Part | Later, Layout], ...]
    states: tuple[str, ...]
    facts: Callable[[], CohortFacts]  # of the tensors of all cohorts that were measured; made on the background thread

    @functools.cached_property
    def sums(self) -> WindowSums:
        """Waits for the device."""
        return WindowSums.side_by_side([WindowSums.unpack(vector.wait(), layout) for vector, layout in self.vectors])

    @property
    def rows(self) -> int:
        return sum(layout.rows for _, layout in self.vectors)


@dataclasses.dataclass(frozen=True)
class CohortWindow:
    """A cohort's closed window on its way to the background thread."""

    of_all: SumsWindow
    count: Callable[[], Steps]  # made on the background thread
    window_steps: int
    owner: tuple[int, ...]  # cohorts of one owner are measured in other steps of one window
    place: slice  # of its rows among those of the sums
    suspect: Callable[[frozenset[int]], None] | None = None  # told the rows whose whole gradients are to be looked at
    draw_from: Callable[[frozenset[int]], None] | None = None  # told the rows that few elements carry
    firsts: tuple[int, ...] = ()  # rows of `place` at which tensors begin; (): each is one
    usual: UsualSizes = dataclasses.field(default_factory=UsualSizes)  # the cohort's, of the windows before
    # of the steps that others sat out; None: it was somebody's turn in every step
    told: Callable[[Steps], Told] | None = None

    @functools.cached_property
    def steps(self) -> Steps:
        """Those that were measured."""
        return self.count()

    def tell(self, suspects: Mask, uneven: Mask) -> None:
        """Have whole gradients looked at, and tensors read where what moves is. [n] its tensors each."""
        firsts = self.firsts or range(self.place.stop - self.place.start)
        for tell, are_told in ((self.suspect, suspects), (self.draw_from, uneven)):
            if tell is not None:
                tell(frozenset(firsts[i] for i in np.flatnonzero(are_told).tolist()))


class _Measured:
    """The tensors of the cohorts whose sums came together, side by side."""

    def __init__(self, cohorts: Sequence[CohortWindow]) -> None:
        self.cohorts, self.of_all = cohorts, cohorts[0].of_all
        self.steps = Steps.side_by_side([cohort.steps for cohort in cohorts])
        stops = list(itertools.accumulate(cohort.steps.parts_Pn.shape[1] for cohort in cohorts))
        self.rows = [slice(*ends) for ends in zip([0, *stops], stops, strict=False)]  # of each cohort, by tensor
        self.sums = self._sums()

    def _sums(self) -> WindowSums:
        """By tensor. Waits for the device."""
        own = [np.arange(cohort.place.start, cohort.place.stop) for cohort in self.cohorts]
        rows = np.concatenate(own)
        is_whole = len(rows) == self.of_all.rows and (rows[1:] > rows[:-1]).all()
        found = self.of_all.sums.of(slice(None) if is_whole else rows, len(self.steps.parts_Pn))
        starts = itertools.accumulate(map(len, own), initial=0)
        firsts = [
            start + np.array(cohort.firsts or range(len(rows)), dtype=np.intp)
            for cohort, rows, start in zip(self.cohorts, own, starts, strict=False)
        ]
        joined = np.concatenate(firsts)
        return found if len(joined) == len(rows) else found.joined(joined)

    def tell(self) -> None:
        suspects, uneven = self.sums.suspects(self.steps), self.sums.uneven(self.steps)
        for cohort, rows in zip(self.cohorts, self.rows, strict=True):
            cohort.tell(suspects[rows], uneven[rows])


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
    resting: tuple[Resting, ...] = ()  # tensors whose turn it was not
    time: float = dataclasses.field(default_factory=time.time)


def read(window: Window) -> WindowEvidence:
    """Wait for the device and make the evidence. Runs on the background thread."""
    # sums of updates that overflow are infinite: that is a verdict and no warning; not as a decorator, which threads would share
    with np.errstate(all="ignore"):
        return _read(window)


def _read(window: Window) -> WindowEvidence:
    skipped = max((int(t.wait()[0]) for t in window.skipped), default=0)
    by_sums: defaultdict[int, list[CohortWindow]] = defaultdict(list)
    for cohort in window.cohorts:
        by_sums[id(cohort.of_all)].append(cohort)
    measured = [_Measured(cohorts) for cohorts in by_sums.values()]
    ledger, alone, blocks = Reading(window.ledger), list(window.others), []
    for one, of_others in zip(measured, _unmeasured(measured), strict=True):
        block, others = _tensors(one, of_others, skipped)
        alone += others
        blocks.append(block)
        one.tell()
        rest()
    for given in window.resting:
        blocks.append(MeasuredBlock.unmeasured(given()))
        blocks[-1].put({"skipped_steps": np.full(len(blocks[-1]), skipped)})
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
        if is_alone.any():
            block = block.kept(np.flatnonzero(~is_alone))
        _add(block, more)
        kept.append(block)
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


def _add(block: MeasuredBlock, more: Mapping[str, _More]) -> None:
    """The same of its tensors, as columns."""
    told = [(row, more[name]) for row, name in enumerate(block.names) if name in more] if more else []
    for field in dict.fromkeys(field for _, one in told for field in one.fields):
        of_field = [(row, one.fields[field]) for row, one in told if field in one.fields]
        block.put_some([row for row, _ in of_field], field, [value for _, value in of_field])
    for name in dict.fromkeys(name for _, one in told for name in one.accumulators):
        members = [(row, one.accumulators[name]) for row, one in told if name in one.accumulators]
        block.add(name, np.array([row for row, _ in members], dtype=np.intp), [member for _, member in members])


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


def _unmeasured(measured: Sequence[_Measured]) -> list[list[tuple[Unseen, Missed | None]]]:
    """Of each cohort; see `step_sizes` and `missed_steps`. Cohorts of one owner share its steps."""
    every = [
        (cohort, one.sums.parts_PFn[: len(cohort.steps.parts_Pn), WANT, rows])
        for one in measured
        for cohort, rows in zip(one.cohorts, one.rows, strict=True)
    ]
    sizes_of_all = sizes_of_each(
        [(energy_Pn, of.steps.parts_Pn, of.steps.squared_rates_P, of.usual) for of, energy_Pn in every]
    )
    found: dict[int, tuple[Unseen, Missed | None]] = {}
    by_owner: dict[tuple[int, ...], list[int]] = {}
    for i, (cohort, _) in enumerate(every):
        by_owner.setdefault(cohort.owner, []).append(i)
    for own in by_owner.values():
        cohorts, energies = zip(*[every[i] for i in own], strict=True)
        steps = [cohort.steps.parts_Pn for cohort in cohorts]
        rates = [cohort.steps.squared_rates_P for cohort in cohorts]
        sizes, window_steps = [sizes_of_all[i] for i in own], cohorts[0].window_steps
        told = [cohort.told(cohort.steps) for cohort in cohorts if cohort.told is not None]  # of all, or of none
        if told:
            sizes = aligned(sizes, told)
        of_steps = (
            unseen(list(energies), steps, window_steps, sizes, told, rates),
            missed_steps(sizes, rates, window_steps, told),
        )
        found |= zip(map(id, cohorts), zip(*of_steps, strict=True), strict=True)
        rest()
    return [[found[id(cohort)] for cohort in one.cohorts] for one in measured]


def _tensors(
    measured: _Measured, others: Sequence[tuple[Unseen, Missed | None]], skipped: int
) -> tuple[MeasuredBlock, list[TensorEvidence]]:
    """The evidence of all tensors: of those that were measured, and of the others."""
    facts, sums, steps = measured.of_all.facts(), measured.sums, measured.steps
    of_steps = Unseen(*(np.concatenate(kind) for kind in zip(*(one for one, _ in others), strict=True)))
    missed = [(rows, one) for rows, (_, one) in zip(measured.rows, others, strict=True) if one is not None]
    block = MeasuredBlock(sums, steps, sums.numbers(steps, of_steps, missed), facts, skipped)
    block.add_states(sums, measured.of_all.states, facts)
    has_numbers = (steps.measured_n != 0) & ~block.having("reason", bool)
    # a counter is read by itself, and is said of its tensor first
    is_plain = has_numbers & ~np.fromiter(map(bool, facts.given["accumulators"]), bool, len(facts))
    if is_plain.all():
        return block, []
    alone = [
        block.tensor(i) if has_numbers[i] else changed(facts.evidence(i), skipped_steps=skipped)
        for i in unhurried(np.flatnonzero(~is_plain).tolist())
    ]
    return block.kept(np.flatnonzero(is_plain)), alone
