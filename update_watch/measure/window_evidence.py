"""From a window's sums to evidence: numbers per tensor, on the host, in FP64."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from update_watch.evidence import (
    AccumulatorEvidence,
    Numbers,
    TensorEvidence,
    WindowEvidence,
    changed,
    median_headroom,
)
from update_watch.measure.accumulators.average_windows import AverageWindow, UnreadWindow
from update_watch.measure.accumulators.average_windows import read as read_average
from update_watch.measure.accumulators.gradient_accumulation import AccumulationWindow
from update_watch.measure.accumulators.gradient_accumulation import read as read_accumulation
from update_watch.measure.accumulators.reference_states import ShadowWindow
from update_watch.measure.accumulators.replicas import ChecksumWindow
from update_watch.measure.accumulators.replicas import read as read_checksums
from update_watch.measure.accumulators.state_factor import read as read_shadow
from update_watch.measure.ledger.ledger import with_ledger
from update_watch.measure.ledger.sheet import SheetWindow
from update_watch.measure.sums.error_bars import Array, Unseen, sizes_of, unseen
from update_watch.measure.sums.layout import WANT, Layout
from update_watch.measure.sums.missed_steps import Missed, missed_steps
from update_watch.measure.sums.steps import Steps
from update_watch.measure.sums.window_sums import WindowSums
from update_watch.measure.transfer import Later, Part, Transfer
from update_watch.worker import unhurried


@dataclasses.dataclass(frozen=True)
class RowFacts:
    """What the host knows of a row when its window closes."""

    evidence: TensorEvidence  # identity, settings and counters; no numbers yet
    size: int  # real samples per step
    state_dtypes: tuple[str, ...]  # "" for a state that does not exist or whose replay is not exact
    state_rates: tuple[float | None, ...]  # 1 - beta, where it is known
    first_rate: float | None  # learning rate at the window's first look at headroom


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
    facts: Callable[[], tuple[RowFacts, ...]]  # thousands of objects: made on the background thread
    states: tuple[str, ...]
    steps: Steps
    window_steps: int
    optimizer: tuple[int, int]  # cohorts of one optimizer are measured in steps of one window
    place: slice  # of its rows among those of the sums
    suspect: Callable[[frozenset[int]], None] | None = None  # told the rows whose whole gradients are to be looked at
    draw_from: Callable[[frozenset[int]], None] | None = None  # told the rows of which nearly all gradients are 0
    firsts: tuple[int, ...] = ()  # rows of `place` at which tensors begin; (): each is one

    def sums(self) -> WindowSums:
        """Its own, by tensor. Waits for the device."""
        own = self.of_all.sums.of(self.place, len(self.steps.parts_Pn))
        return own if len(self.firsts) in (0, self.place.stop - self.place.start) else own.joined(self.firsts)

    def tell(self, own: WindowSums) -> None:
        """Have whole gradients looked at, and few rows read where they are."""
        firsts = self.firsts or range(self.place.stop - self.place.start)
        for tell, tensors in ((self.suspect, own.suspects(self.steps)), (self.draw_from, own.sparse(self.steps))):
            if tell is not None:
                tell(frozenset(firsts[i] for i in tensors))

    @functools.cached_property
    def rows(self) -> tuple[RowFacts, ...]:
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


@np.errstate(all="ignore")  # sums of updates that overflow are infinite: that is a verdict and no warning
def read(window: Window) -> WindowEvidence:
    """Wait for the device and make the evidence. Runs on the background thread."""
    skipped = max((int(t.wait()[0]) for t in window.skipped), default=0)
    tensors = list(window.others)
    sums = [cohort.sums() for cohort in window.cohorts]
    for cohort, own, of_others in zip(window.cohorts, sums, _unmeasured(window.cohorts, sums), strict=True):
        tensors += _tensors(own, cohort, of_others, skipped)
        cohort.tell(own)
    tensors = with_ledger(_one_each(tensors), window.ledger)
    others = [read_average(average) for average in window.averages]
    others += [read_accumulation(accumulation) for accumulation in window.accumulations]
    for found in others:
        tensors = [
            changed(t, accumulators={**t.accumulators, found[t.name].name: found[t.name]}) if t.name in found else t
            for t in tensors
        ]
    factors = {name: factor for shadow in window.shadows for name, factor in read_shadow(shadow).items()}
    tensors = [
        changed(
            t,
            state_factor=factors[t.name].value,
            state_factor_error=factors[t.name].error,
            state_factor_steps=factors[t.name].steps,
        )
        if t.name in factors
        else t
        for t in tensors
    ]
    sums_of = read_checksums(window.checksums)
    tensors = [
        changed(t, part=sums_of[t.name][0], checksum=sums_of[t.name][1]) if t.name in sums_of else t for t in tensors
    ]
    tensors.sort(key=lambda t: window.order.get(t.name, len(window.order)))
    head = window.step, window.window, tuple(tensors), window.time
    return WindowEvidence(*head, window.cost_ms, skipped, window.observed, window.cost_share)


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
        sizes = [sizes_of(*each) for each in zip(energies, steps, rates, strict=True)]
        window_steps = cohorts[own[0]].window_steps
        pairs = zip(unseen(energies, steps, window_steps, sizes), missed_steps(sizes, rates, window_steps), strict=True)
        found |= zip(own, pairs, strict=True)
    return [found[i] for i in range(len(cohorts))]


_NOTHING = Numbers()


def _tensors(
    sums: WindowSums, cohort: CohortWindow, others: tuple[Unseen, Missed | None], skipped: int
) -> list[TensorEvidence]:
    """The evidence of all rows of a cohort."""
    numbers = _columns(sums.numbers(cohort.steps, *others))
    own_names = [name for name in numbers if name not in Numbers._fields and name != "what_if"]
    own_rows = list(zip(*(numbers[name] for name in own_names), strict=True))
    weights = _rows(numbers)
    parts = sums.state_numbers()
    states = [
        [_numbers({name: values_Sn[k] for name, values_Sn in part.items()}) for part in parts]
        for k in range(len(cohort.states))
    ]
    decays = _numbers(sums.decay_numbers())
    finite, measured = sums.is_finite().tolist(), cohort.steps.measured_n.tolist()
    looks, blind = cohort.steps.checks_n.tolist(), cohort.steps.blind_n.tolist()
    untouched = (sums.is_untouched() & cohort.steps.is_whole_n).tolist()
    evidence, movements, places = sums.evidence_n.tolist(), sums.movement_nB.tolist(), sums.places_nQ.tolist()
    histograms, at_rate = (histogram_nB.tolist() for histogram_nB in sums.headroom_2nB)
    tensors = []
    for i, facts in enumerate(unhurried(cohort.rows)):
        base = facts.evidence
        if not measured[i] or base.reason:
            tensors.append(changed(base, skipped_steps=skipped))
            continue
        histogram, by_rate = histograms[i], at_rate[i]
        total = sum(histogram)
        movement = movements[i]
        moved = sum(movement) if facts.first_rate else 0.0
        headroom = median_headroom(by_rate) if facts.first_rate else None
        what_if = numbers["what_if"][i]
        accumulators = {
            name: AccumulatorEvidence(
                name=name,
                dtype=facts.state_dtypes[k],
                numbers=states[k][0][i],
                growth=states[k][1][i],
                decay=states[k][2][i],
                rate=facts.state_rates[k],
            )
            for k, name in enumerate(cohort.states)
            if facts.state_dtypes[k]
        }
        if decays[i].wanted_fraction is not None:
            accumulators["weight_decay"] = AccumulatorEvidence("weight_decay", base.dtype, decays[i])
        kept = facts.size if cohort.steps.is_whole_n[i] else facts.size // 2
        tensors.append(
            changed(
                base,
                **dict(zip(own_names, own_rows[i], strict=True)),
                measured_steps=round(measured[i]),
                gradient_looks=round(max(measured[i], looks[i])),
                gradient_blind=0 if untouched[i] and any(facts.state_dtypes) else round(blind[i]),
                skipped_steps=skipped,
                finite=finite[i],
                numbers=weights[i],
                headroom_histogram=tuple([count / total for count in histogram]) if total else None,
                movement_histogram=tuple([part / moved for part in movement]) if 0 < moved < math.inf else None,
                movement_lr=facts.first_rate if 0 < moved < math.inf else None,
                movement_places=tuple([part / moved for part in places[i]]) if 0 < moved < math.inf else None,
                critical_lr=facts.first_rate * 2**-headroom if facts.first_rate and headroom is not None else None,
                displacement_evidence=evidence[i] / kept,
                accumulators={**base.accumulators, **accumulators},
                what_if=None if what_if is None else {"bfloat16": what_if},
            )
        )
    return tensors


def _columns(arrays: Mapping[str, Array]) -> dict[str, list[Any]]:
    """The values of all rows under their names, None for what is not known."""
    columns: dict[str, list[Any]] = {}
    for name, array in arrays.items():
        columns[name] = values = array.tolist()
        for i in np.flatnonzero(np.isnan(array)).tolist():
            values[i] = None
    return columns


def _numbers(arrays: Mapping[str, Array]) -> list[Numbers]:
    """Of each row."""
    return _rows(_columns(arrays))


def _rows(columns: Mapping[str, list[Any]]) -> list[Numbers]:
    """Tens of thousands in a window; those that know nothing are one."""
    n = len(next(iter(columns.values())))
    rows = zip(*(columns.get(name) or itertools.repeat(None, n) for name in Numbers._fields), strict=True)
    return [_NOTHING if row == _NOTHING else Numbers._make(row) for row in unhurried(rows)]
