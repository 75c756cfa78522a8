"""What a window measured, before anybody judges it.

`watch` fills these values from the sums that left the device; `diagnosis` turns them into
healths, causes and advice. Plain Python numbers: everything here can be written by hand in a test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from update_watch.report import HEADROOM_LOW


class Numbers(NamedTuple):
    """The numbers every accumulator has over a window; None where nothing was wanted or measured."""

    efficiency: float | None = None  # sum <applied, intended> / sum <intended, intended>
    efficiency_error: float | None = None  # standard error of `efficiency`, from its spread over steps
    displacement_efficiency: float | None = None  # <sum applied, sum intended> / |sum intended|^2
    wanted_fraction: float | None = None  # elements with intended != 0, of those sampled
    lost_fraction: float | None = None  # of the wanted ones, those whose stored value did not change
    # what the ratios weigh when those of several ranks are joined; None: taken as alike on all ranks
    weight: float | None = None  # <intended, intended> per element and step
    path_weight: float | None = None  # |sum intended|^2 over the window, per element and step
    lost_fraction_error: float | None = None  # standard error of `lost_fraction`
    displacement_error: float | None = None  # standard error of `displacement_efficiency`
    # of `efficiency_error`, what large steps that were not measured make of it: windows do not average it out
    unseen_error: float | None = None


class AccumulatorEvidence(NamedTuple):
    """One accumulator beside the weight: an optimizer state, an average, `.grad`, the decay."""

    name: str
    dtype: str
    numbers: Numbers
    growth: Numbers = Numbers()  # the part of the changes that moves away from zero
    decay: Numbers = Numbers()  # the part that moves towards zero
    reason: str = ""  # why nothing could be measured, if so
    # what the rule is, where it is known: rate = 1 - beta of `x <- beta*x + (1-beta)*y`
    rate: float | None = None
    value: float | None = None  # of a counter (the `step` state): its stored value now
    is_updated: bool | None = None  # of an average: it was written, or moved, in this window; None: not looked at
    note: str = ""  # a finding of its own, e.g. "rounded by validation swap"


@dataclasses.dataclass(frozen=True)
class TensorEvidence:
    """One parameter over a window."""

    name: str
    dtype: str
    numel: int
    names: tuple[str, ...] = ()
    layer: str = ""
    optimizer_group: str = ""  # "optimizer/group"; "" when no optimizer holds it
    shape: tuple[int, ...] = ()
    trainable: bool = True
    requires_grad: bool = True  # False beside `trainable`: it is still given gradients
    reason: str = ""  # why the update cannot be replayed ("" when it can)
    steps_copy: bool = False  # beside `reason`: the rule moves a state that began as the weight, and never the weight
    note: str = ""  # how it came about that no optimizer holds it
    steps: int = 0  # optimizer steps of its optimizer in the window
    measured_steps: int = 0  # of those, steps in which its update was measured
    gradless_steps: int = 0  # of those, steps in which its grad was None
    # it was not its turn in this window, of a model that is too large to be looked at as a whole: what was said of it stands
    is_resting: bool = False
    skipped_steps: int = 0  # of those, steps the gradient scaler skipped
    zero_gradient_fraction: float | None = None  # sampled gradients equal to 0, 0..1
    finite: bool = True  # False: NaN or infinity among sampled weights, gradients or updates
    numbers: Numbers = Numbers()
    changed_fraction: float | None = None  # sampled elements whose stored bits changed, per step
    # the ledger: what is in the model's own tensor, whoever writes to it
    net_efficiency: float | None = None  # <stored at the end - at the begin, sum intended> / |sum intended|^2
    net_efficiency_error: float | None = None  # standard error of `net_efficiency`
    written_between: float | None = None  # rms written to it between steps / rms(before), per step; 0: nothing was
    # share of what the steps applied that is gone again and went nowhere else, 0..1; 1: all of it
    undone_fraction: float | None = None
    written_steps: int = 0  # steps of the ledger's span of windows after which it was written
    written_step: int | None = None  # the last of them
    written_every: float | None = None  # steps between two of them
    # how far it got in that span, in what the steps from one write to the next can move it by
    travelled: float | None = None
    moved: float | None = None  # rms(stored at the end - at the begin) / rms(before); 0: not one sampled bit changed
    unmoved_fraction: float | None = None  # elements whose stored value is at the end what it was at the begin
    is_at_zero: bool = False  # what is written to it sets all elements that are read to 0
    may_be_zero: bool = False  # beside it: all that is stored may be what steps applied since
    # all elements that are read are set to one value, which takes all of their updates back in one direction; or held at bounds,
    # or as rows of one element are that are normalised
    is_one_sided: bool = False
    touched_fraction: float | None = None  # of the elements that were read and written: those that steps had moved
    # to the bit, all of what is written to it, or most: as a grid does that is too coarse for its steps
    is_put_back: bool = False
    # the same of a part of its elements, always the same ones; the others are left alone
    held_fraction: float | None = None
    is_alike: bool = False  # what was undone is the same share of each element, and some is left
    may_be_alike: bool = False  # the gaps of its format may hide whether it is
    is_master: bool = False  # its optimizer steps a copy of it, from which it must be written
    # the gradients that were looked at, after unscaling and clipping
    gradient_looks: int = 0  # steps in which they were
    gradient_blind: int = 0  # steps in which they were not, though all of them could have been: the next window shows
    gradient_rms: float | None = None
    gradient_max: float | None = None
    gradient_spread: float | None = None  # standard deviation of the rms over the parts of the window, by their mean
    copy_changed: float | None = None  # FP32 weights: share of their values in BF16 that a step changes
    copy_changed_window: float | None = None  # and that the window changes
    was_rounded: bool = False  # FP32 weights, of which all values at the window's begin were values of BF16
    update_ratio: float | None = None
    update_ratio_error: float | None = None
    applied_ratio: float | None = None
    headroom_histogram: tuple[float, ...] | None = None
    movement_histogram: tuple[float, ...] | None = None  # the same bins, by intended^2, at `movement_lr`
    movement_lr: float | None = None
    movement_places: tuple[float, ...] | None = None  # shares of the same by quarter of an octave
    lr: float | None = None  # at the end of the window
    lr_max: float | None = None  # the largest in the window
    lr_min: float | None = None  # the smallest in the window
    weight_decay: float | None = None
    critical_lr: float | None = None
    state_factor: float | None = None
    state_factor_error: float | None = None
    state_factor_steps: int = 0  # how many steps the FP32 shadow behind it has run
    # "plain": rounding to nearest; "stochastic"; "carried:<state>": the remainder lives in that state tensor and
    # `numbers` are of the joined value; "carried": something carries the remainder, it is not known what;
    # "unknown" when it was not found out
    scheme: str = "unknown"
    # elements covered by |sum intended| >= half a gap: how much evidence a displacement carries, 0..1
    displacement_evidence: float | None = None
    accumulators: Mapping[str, AccumulatorEvidence] = dataclasses.field(default_factory=dict)
    what_if: Mapping[str, float] | None = None
    low_states: int | None = None  # states of its own size that its optimizer keeps in a 16-bit format; None: not known
    options: tuple[str, ...] = ()  # of `cures.OPTIONS`, those its optimizer has; "fused=True": it is on
    held: int | None = None  # elements of it that lie on this rank, of a DTensor
    stored: float | None = None  # rms of the weights before the steps
    part: str | None = None  # which part of it this rank holds, where replicas are compared
    checksum: int | None = None  # of stored values at fixed positions
    replicas_differ: bool = False


@dataclasses.dataclass(frozen=True)
class WindowEvidence:
    """All tensors of a window."""

    step: int
    window: int
    tensors: Sequence[TensorEvidence]
    time: float = 0.0
    cost_ms: float | None = None
    skipped_steps: int = 0
    observed_steps: int | None = None  # looked at
    cost_share: float | None = None  # of the window's time, what the watch took


_DEFAULTS: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(TensorEvidence)
    if field.default is not dataclasses.MISSING
}


def made(**fields: Any) -> TensorEvidence:
    """As `TensorEvidence(**fields)`, in a third of the time: a frozen dataclass sets its fields one by one, past its own lock.

    Fields without a default must be given.
    """
    new = object.__new__(TensorEvidence)
    new.__dict__.update(_DEFAULTS)
    new.__dict__["accumulators"] = {}
    new.__dict__.update(fields)
    return new


def changed(old: TensorEvidence, **fields: Any) -> TensorEvidence:
    """As `dataclasses.replace(old, **fields)`, in a tenth of the time."""
    new = object.__new__(TensorEvidence)
    new.__dict__.update(old.__dict__)
    new.__dict__.update(fields)
    return new


def median_headroom(histogram: Sequence[float]) -> float | None:
    """Median of a headroom histogram (log2), interpolated within its octave; None when empty."""
    half = sum(histogram) / 2
    below = 0.0
    for i, count in enumerate(histogram):
        if count > 0 and below + count >= half:
            return HEADROOM_LOW + i + (half - below) / count
        below += count
    return None
