"""What each cure would give: efficiency of every tensor and of the run, and bytes. `plan` chooses among them.

Everything is worked out from the numbers of one window, so it costs nothing. A tensor's movement histogram (shares of sum of
intended^2 by octave of headroom) moves up by the bits that another way of keeping the weight has more: BF16 holds 8 bits, FP16 11,
FP32 24, and a BF16 weight with a BF16 remainder at least 17. Rounding at random arrives in expectation. FP32 states leave the format
as it is and change the size of the updates: by the state factor, as another learning rate would. What would need another replay of
the rule, such as another beta, is not told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from update_watch.cures import TITLES, Cure, extra_bytes
from update_watch.foresight.forecasts import Case
from update_watch.foresight.rounding_curve import efficiency_of
from update_watch.report import HEADROOM_LOW, Report, TensorReport, weighted_mean
from update_watch.wording import number

BITS = {"bfloat16": 8, "float16": 11}  # significant ones; formats that hold all there is to hold are left as they are
_FP32, _PAIR = 24, 9  # bits of FP32; what a remainder in the same format adds at least


def cases(report: Report, floor: float | None = None) -> tuple[Case, ...]:
    """The run as it is, and under each cure; empty where no low-precision weight was measured.

    `floor`: a least learning rate to be tried, in the unit of `TensorReport.lr`; None: the forecast's, if there is one.

    Raises:
        ValueError: `floor` is not above 0.
    """
    if floor is not None and not floor > 0:
        raise ValueError(f"what_if(floor={floor!r}) must be a learning rate above 0")
    known = [t for t in report.tensors if t.trainable and t.efficiency is not None]
    low = [t for t in known if t.dtype in BITS]
    if not low:
        return ()
    vectors = [t for t in low if len(t.shape) == 1]
    small = {t.name for t in vectors}
    found = [
        _case("as it is", "as it is", known, lambda t: t.efficiency, 0),
        _case(Cure.masters, TITLES[Cure.masters], known, in_fp32, cost_of(Cure.masters, low)),
        _case(Cure.kahan, TITLES[Cure.kahan], known, lambda t: _with_bits(t, _PAIR), cost_of(Cure.kahan, low)),
        _case(Cure.stochastic_rounding, TITLES[Cure.stochastic_rounding], known, _at_random, 0),
    ]
    if vectors and len(vectors) < len(low):
        cost = cost_of(Cure.masters, vectors)
        title = "keep norms and biases in FP32"
        found.append(_case("fp32_norms", title, known, lambda t: in_fp32(t) if t.name in small else t.efficiency, cost))
    if any(t.state_factor is not None and _low_states(t) for t in low):
        cost = cost_of(Cure.fp32_states, low)
        found.append(_case(Cure.fp32_states, TITLES[Cure.fp32_states], known, _with_fp32_states, cost))
    if any(t.dtype == "bfloat16" for t in low):
        found.append(_case("float16", "keep the weights in FP16", known, _in_fp16, 0))
    floor = floor if floor is not None else report.forecast.floor if report.forecast is not None else None
    if floor is not None:
        least = floor
        title = f"a learning rate of at least {number(least)}"
        found.append(_case("floor", title, known, lambda t: _at_least(t, least), 0))
    return tuple(found)


def cost_of(cure: Cure, tensors: Iterable[TensorReport]) -> int:
    """Bytes of memory that the cure takes for these tensors; those in full precision cost nothing."""
    return sum(extra_bytes(cure, t.numel, _low_states(t)) for t in tensors if t.dtype in BITS)


def _case(
    name: str, title: str, tensors: Iterable[TensorReport], rule: Callable[[TensorReport], float | None], cost: int
) -> Case:
    found = {t.name: (rule(t), t.numel) for t in tensors}
    values = {name: value for name, (value, _) in found.items() if value is not None}
    return Case(str(name), title, weighted_mean(found.values()), values, cost)


def _with_bits(t: TensorReport, more: float) -> float | None:
    """With so many significant bits more."""
    if t.dtype not in BITS or t.keeps_all or not more:
        return t.efficiency
    if t.movement_histogram is None or not t.movement_lr or not t.lr:
        return None
    return efficiency_of(t.movement_histogram, HEADROOM_LOW + more + _octaves(t), t.movement_places)


def _octaves(t: TensorReport) -> float:
    """From the rate at which the histogram was taken to the present one."""
    return math.log2(t.lr / t.movement_lr) if t.lr and t.movement_lr else 0.0


def in_fp32(t: TensorReport) -> float | None:
    """The efficiency of these updates in FP32 weights."""
    return _with_bits(t, _FP32 - BITS.get(t.dtype, _FP32))


def _in_fp16(t: TensorReport) -> float | None:
    return _with_bits(t, BITS["float16"] - BITS["bfloat16"]) if t.dtype == "bfloat16" else t.efficiency


def _at_random(t: TensorReport) -> float | None:
    return 1.0 if t.dtype in BITS else t.efficiency


def _at_least(t: TensorReport, floor: float) -> float | None:
    return t.efficiency if t.lr is None or t.lr >= floor else t.efficiency_at(floor)


def _low_states(t: TensorReport) -> int:
    """How many states of its optimizer are in a 16-bit format."""
    if t.low_states is not None:
        return t.low_states
    return sum(a.dtype in BITS and not _is_beside(name) for name, a in t.accumulators.items())


def _is_beside(name: str) -> bool:
    return name in ("weight_decay", "grad") or name.startswith("average:")


def _with_fp32_states(t: TensorReport) -> float | None:
    """Updates are `state_factor` of what FP32 states would give."""
    if not t.state_factor or t.state_factor < 0 or not t.lr:
        return t.efficiency
    return t.efficiency_at(t.lr / t.state_factor)
