"""From a window's sums to evidence: numbers per tensor, on the host, in FP64."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from update_watch.evidence import AccumulatorEvidence, TensorEvidence, WindowEvidence, median_headroom
from update_watch.measure.accumulators.averages import AverageWindow, UnreadWindow
from update_watch.measure.accumulators.averages import read as read_average
from update_watch.measure.accumulators.gradient_accumulation import AccumulationWindow
from update_watch.measure.accumulators.gradient_accumulation import read as read_accumulation
from update_watch.measure.accumulators.reference_states import ShadowWindow
from update_watch.measure.accumulators.replicas import ChecksumWindow
from update_watch.measure.accumulators.replicas import read as read_checksums
from update_watch.measure.accumulators.state_factor import read as read_shadow
from update_watch.measure.device_sums import UNCHANGED
from update_watch.measure.ledger.ledger import with_ledger
from update_watch.measure.ledger.sheet import SheetWindow
from update_watch.measure.transfer import Part, Transfer
from update_watch.measure.window_sums import WindowSums


@dataclasses.dataclass(frozen=True)
class RowFacts:
    """What the host knows of a row when its window closes."""

    evidence: TensorEvidence  # identity, settings and counters; no numbers yet
    size: int  # real samples per step
    live_steps: int
    full_steps: int  # of these, the ones in which states, gradients and the weights' size were looked at
    state_dtypes: tuple[str, ...]  # "" for a state that does not exist or whose replay is not exact
    state_rates: tuple[float | None, ...]  # 1 - beta, where it is known


@dataclasses.dataclass(frozen=True)
class CohortWindow:
    """A cohort's closed window on its way to the background thread."""

    transfer: Transfer | Part
    rows: tuple[RowFacts, ...]
    states: tuple[str, ...]
    samples: int
    steps: int  # cohort steps


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
    for cohort in window.cohorts:
        sums = WindowSums.unpack(cohort.transfer.wait(), 1 + len(cohort.states), len(cohort.rows))
        for i, facts in enumerate(cohort.rows):
            tensors.append(_tensor(sums, i, facts, cohort, skipped))
    tensors = with_ledger(_one_each(tensors), window.ledger)
    others = [read_average(average) for average in window.averages]
    others += [read_accumulation(accumulation) for accumulation in window.accumulations]
    for found in others:
        tensors = [
            dataclasses.replace(t, accumulators={**t.accumulators, found[t.name].name: found[t.name]})
            if t.name in found
            else t
            for t in tensors
        ]
    factors = {name: factor for shadow in window.shadows for name, factor in read_shadow(shadow).items()}
    tensors = [
        dataclasses.replace(t, state_factor=factors[t.name][0], state_factor_steps=factors[t.name][1])
        if t.name in factors
        else t
        for t in tensors
    ]
    sums_of = read_checksums(window.checksums)
    tensors = [
        dataclasses.replace(t, part=sums_of[t.name][0], checksum=sums_of[t.name][1]) if t.name in sums_of else t
        for t in tensors
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


def _tensor(sums: WindowSums, i: int, facts: RowFacts, cohort: CohortWindow, skipped: int) -> TensorEvidence:
    base = facts.evidence
    sampled = float(facts.size * facts.live_steps)
    if not sampled or base.reason:
        return dataclasses.replace(base, skipped_steps=skipped)
    numbers = sums.numbers(0, i, sampled)
    in_full = float(facts.size * facts.full_steps)
    intended, applied = sums.root_mean_squares(i, sampled)
    before = sums.stored(i, in_full)
    # padding and steps the row sat out were counted as unchanged
    idle = cohort.samples * cohort.steps - sampled
    changed = 1 - (float(sums.sums_FAn[UNCHANGED, 0, i]) - idle) / sampled
    histogram = sums.headroom_nB[i]
    zeros, gradient_rms, gradient_max = sums.gradients(i, in_full)
    total = histogram.sum()
    headroom = median_headroom(histogram.tolist())
    what_if = None
    if sums.what_if_2n[1, i] > 0:
        what_if = {"bfloat16": float(sums.what_if_2n[0, i] / sums.what_if_2n[1, i])}
    accumulators = {
        name: _state(sums, 1 + k, i, name, dtype, rate, in_full)
        for k, (name, dtype, rate) in enumerate(zip(cohort.states, facts.state_dtypes, facts.state_rates, strict=True))
        if dtype
    }
    decay = sums.weight_decay(i, sampled)
    if decay is not None:
        accumulators["weight_decay"] = AccumulatorEvidence("weight_decay", base.dtype, decay)
    return dataclasses.replace(
        base,
        measured_steps=facts.live_steps,
        skipped_steps=skipped,
        zero_gradient_fraction=zeros,
        gradient_looks=facts.full_steps,
        gradient_rms=gradient_rms,
        gradient_max=gradient_max,
        finite=sums.is_finite(i),
        numbers=numbers,
        changed_fraction=min(max(changed, 0.0), 1.0),
        update_ratio=intended / before if before else None,
        applied_ratio=applied / before if before else None,
        headroom_histogram=tuple(float(x) for x in histogram / total) if total else None,
        critical_lr=base.lr * 2**-headroom if base.lr and headroom is not None else None,
        displacement_evidence=float(sums.evidence_n[i]) / facts.size,
        accumulators={**base.accumulators, **accumulators},
        what_if=what_if,
        stored=before,
    )


def _state(
    sums: WindowSums, slot: int, i: int, name: str, dtype: str, rate: float | None, sampled: float
) -> AccumulatorEvidence:
    growth, decay = sums.growth_and_decay(slot, i, sampled)
    return AccumulatorEvidence(name, dtype, sums.numbers(slot, i, sampled), growth, decay, rate=rate)
