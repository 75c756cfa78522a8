"""What each cure would give: efficiency of every tensor and of the run, and bytes. `plan` chooses among them.

Everything is worked out from the numbers of one window, so it costs nothing. A tensor's movement histogram (shares of sum of
intended^2 by octave of headroom) moves up by the bits that another way of keeping the weight has more: BF16 holds 8 bits, FP16 11,
FP32 24, and a BF16 weight with a BF16 remainder at least 17. Rounding at random arrives in expectation. FP32 states leave the format
as it is and change the size of the updates: by the state factor, as another learning rate would.

What also changes the gradients or the states from then on (another rate, another format, another beta2) cannot be had from one
window as a whole: there the result has ranges, as wide as nine of ten tensors need that were really trained so (bench/what_if.py).
Where a range is wider than 0.05 to a side, the tensor is in doubt (`Case.in_doubt`). A raised rate: `raised_rate`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from update_watch.cures import TITLES, Cure, extra_bytes
from update_watch.foresight.forecasts import Case
from update_watch.foresight.raised_rate import Raised, raised
from update_watch.foresight.rounding_curve import efficiency_of
from update_watch.report import HEADROOM_LOW, Health, Report, TensorReport, weighted_mean
from update_watch.wording import number
from update_watch.worker import unhurried

BITS = {"bfloat16": 8, "float16": 11}  # significant ones; formats that hold all there is to hold are left as they are
# octaves by which updates may be smaller or larger than foretold; where a beta2 changes, its bias correction does, by up to one
_OF_FP16, _OF_BETA2 = (-0.25, 0.25), (0.0, 1.0)
_USUAL_BETA2 = 0.5
_CURVE = 0.03  # error of the curves themselves, in efficiency
_TRIED = 12  # sizes between the smallest and the largest
_FOLLOWS = 0.1  # off 1, up to which a state factor is that of a state that follows
_OPTIONS = frozenset({"betas", "beta2"})
_FP32, _PAIR = 24, 9  # bits of FP32; what a remainder in the same format adds at least

_Range = tuple[float, float]


def cases(report: Report, floor: float | None = None) -> tuple[Case, ...]:
    """The run as it is, and under each cure; empty where no low-precision weight was measured.

    `floor`: a least learning rate to be tried, in the unit of `TensorReport.lr`; None: the forecast's, if there is one.

    Raises:
        ValueError: `floor` is not above 0, or not finite.
    """
    if floor is not None and not 0 < floor < math.inf:
        raise ValueError(f"what_if(floor={floor!r}) must be a learning rate above 0, and finite")
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
        found.append(_with_ranges(_case("float16", "keep the weights in FP16", known, _in_fp16, 0), known, _fp16_range))
    if any(_has_beta2(t) for t in low):
        title = f"a beta2 of at most {1 - 2.0 ** -min(BITS[t.dtype] for t in low if _has_beta2(t)):.4g}"
        found.append(_with_ranges(_case("beta2", title, known, _with_beta2, 0), known, _beta2_range))
    floor = floor if floor is not None else report.forecast.floor if report.forecast is not None else None
    if floor is not None:
        least = floor
        title = f"a learning rate of at least {number(least)}"
        case = _case("floor", title, known, lambda t: _at_least(t, least, report.window), 0)
        found.append(_with_ranges(case, known, lambda t: _floor_range(t, least, report.window)))
    return tuple(found)


def cost_of(cure: Cure, tensors: Iterable[TensorReport]) -> int:
    """Bytes of memory that the cure takes for these tensors; those in full precision cost nothing."""
    return sum(extra_bytes(cure, t.numel, _low_states(t)) for t in unhurried(tensors) if t.dtype in BITS)


def _case(
    name: str, title: str, tensors: Iterable[TensorReport], rule: Callable[[TensorReport], float | None], cost: int
) -> Case:
    found = {t.name: (rule(t), t.numel) for t in tensors}
    values = {name: value for name, (value, _) in found.items() if value is not None}
    return Case(str(name), title, weighted_mean(found.values()), values, cost)


def _with_ranges(case: Case, tensors: Sequence[TensorReport], rule: Callable[[TensorReport], _Range | None]) -> Case:
    """The case with what it may be as well, of tensors for which that is not certain."""
    ranges = {t.name: found for t in tensors if t.name in case.tensors and (found := rule(t)) is not None}
    if not ranges:
        return case
    low, high = (
        weighted_mean(
            (ranges[t.name][side] if t.name in ranges else case.tensors.get(t.name), t.numel) for t in tensors
        )
        for side in (0, 1)
    )
    return dataclasses.replace(case, ranges=ranges, low=low, high=high)


def _between(t: TensorReport, octaves: float, smaller: float, larger: float) -> _Range | None:
    """The least and the most that arrives where updates are moved by so many octaves, and by some more or less."""
    if t.movement_histogram is None or not t.movement_lr:
        return None
    first, steps = HEADROOM_LOW + octaves + _octaves(t), range(_TRIED + 1)
    tried = (first + smaller + (larger - smaller) * i / _TRIED for i in steps)
    known = [found for one in tried if (found := efficiency_of(t.movement_histogram, one, t.places)) is not None]
    return (max(min(known) - _CURVE, 0.0), min(max(known) + _CURVE, 1.0)) if known else None


def _fp16_range(t: TensorReport) -> _Range | None:
    if t.dtype != "bfloat16" or t.keeps_all:
        return None
    return _between(t, BITS["float16"] - BITS["bfloat16"], *_OF_FP16)


def _floor_range(t: TensorReport, floor: float, window: int) -> _Range | None:
    found = _raised_to(t, floor, window)
    return found and (found.low, found.high)


def _raised_to(t: TensorReport, floor: float, window: int) -> Raised | None:
    """What arrives where the floor is above its rate; None where it is not, or that is not known."""
    if t.dtype not in BITS or t.keeps_all or not t.lr or t.lr >= floor:
        return None
    return raised(t, math.log2(floor / t.lr), window)


def _has_beta2(t: TensorReport) -> bool:
    """Whether it has a second moment in a low format that does not follow, and its optimizer a beta2 to change."""
    square = t.accumulators.get("exp_avg_sq")
    if square is None or square.dtype not in BITS or t.dtype not in BITS or _OPTIONS.isdisjoint(t.options):
        return False
    is_off = t.state_factor is not None and abs(t.state_factor - 1) > _FOLLOWS
    return is_off or square.health in (Health.stalled, Health.stalling)


def _with_beta2(t: TensorReport) -> float | None:
    """Second moments that could only grow fall again, so updates grow: by what is known of the state, or by half an octave."""
    if not _has_beta2(t) or t.keeps_all or t.movement_histogram is None:
        return t.efficiency
    octaves = max(_too_small(t), _USUAL_BETA2)
    return efficiency_of(t.movement_histogram, HEADROOM_LOW + octaves + _octaves(t), t.places)


def _beta2_range(t: TensorReport) -> _Range | None:
    """From what it is now, since what the state has gathered leaves it slowly, to beyond what FP32 states give."""
    if not _has_beta2(t) or t.keeps_all:
        return None
    octaves = _too_small(t)
    return _between(t, 0.0, min(octaves, 0.0) + _OF_BETA2[0], max(octaves, 0.0) + _OF_BETA2[1])


def _too_small(t: TensorReport) -> float:
    """Octaves by which its state makes updates smaller than FP32 states would."""
    return -math.log2(t.state_factor) if t.state_factor is not None and t.state_factor > 0 else 0.0


def _with_bits(t: TensorReport, more: float) -> float | None:
    """With so many significant bits more."""
    if t.dtype not in BITS or t.keeps_all or not more:
        return t.efficiency
    if t.movement_histogram is None or not t.movement_lr or not t.lr:
        return None
    return efficiency_of(t.movement_histogram, HEADROOM_LOW + more + _octaves(t), t.places)


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


def _at_least(t: TensorReport, floor: float, window: int) -> float | None:
    if t.lr is None or t.lr >= floor:
        return t.efficiency
    found = _raised_to(t, floor, window)
    return t.efficiency_at(floor) if found is None else found.efficiency


def _low_states(t: TensorReport) -> int:
    """How many states of its optimizer are in a 16-bit format."""
    if t.low_states is not None:
        return t.low_states
    return sum(a.dtype in BITS and not is_beside(name) for name, a in t.accumulators.items())


def is_beside(name: str) -> bool:
    """Whether what accumulates under this name is no state of an optimizer."""
    return name in ("weight_decay", "grad") or name.startswith("average:")


def _with_fp32_states(t: TensorReport) -> float | None:
    """Updates are `state_factor` of what FP32 states would give: by so much the curve changes."""
    if not t.state_factor or t.state_factor < 0 or not t.lr or t.efficiency is None:
        return t.efficiency
    now, then = t.efficiency_at(t.lr), t.efficiency_at(t.lr / t.state_factor)
    return None if now is None or then is None else max(t.efficiency + then - now, 0.0)
