"""The result types: what one window of optimizer steps showed.

A `Report` is plain, immutable data: floats, strings, tuples. Everything that shows, stores or sends results (dashboards, alerts,
journals) reads these types and nothing else. `None` always means "not known in this window", never zero.
Ratios are without unit. "Step" is the optimizer's counted by the watch, or the trainer's global step where one tells it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from enum import Enum
from importlib import import_module
from typing import Any, TypeVar

from update_watch.columns.late_fields import allow
from update_watch.foresight.divergence import Divergence, divergence_of
from update_watch.foresight.forecasts import Case, Forecast, Plan, TensorForecast
from update_watch.foresight.rounding_curve import Places, efficiency_of, keeps_all, octaves_for, place_of

_T = TypeVar("_T")
SCHEMA_VERSION = 1


class Health(str, Enum):
    """State of one tensor or accumulator over a window."""

    healthy = "healthy"
    stalling = "stalling"  # part of the intended update is lost
    stalled = "stalled"  # next to nothing of it arrives
    idle = "idle"  # nothing is intended: no signal reaches it
    frozen = "frozen"  # on purpose: requires_grad=False
    broken = "broken"  # NaN or infinity
    unknown = "unknown"  # cannot be known; the reason is in `advice`

    def __str__(self) -> str:
        return self.value


SEVERITY: tuple[Health, ...] = (  # worst first
    Health.broken,
    Health.stalled,
    Health.stalling,
    Health.unknown,
    Health.idle,
    Health.frozen,
    Health.healthy,
)


class Cause(str, Enum):
    """Why a tensor or accumulator is not healthy."""

    weight_rounding = "weight_rounding"
    state_rounding = "state_rounding"
    decay_rounding = "decay_rounding"
    average_rounding = "average_rounding"
    accumulation_rounding = "accumulation_rounding"
    overwritten = "overwritten"  # what the steps applied is gone before the next one
    not_copied_back = "not_copied_back"  # the optimizer's master moves, the model's tensor does not
    average_diverges = "average_diverges"
    average_not_updated = "average_not_updated"
    negligible_gradient = "negligible_gradient"  # at the level of round-off: no signal, and no matter of precision
    requires_grad_off = "requires_grad_off"
    not_in_optimizer = "not_in_optimizer"
    no_gradient = "no_gradient"
    zero_gradient = "zero_gradient"
    zero_learning_rate = "zero_learning_rate"
    skipped_steps = "skipped_steps"
    not_written = "not_written"
    non_finite = "non_finite"
    replicas_differ = "replicas_differ"
    not_replayable = "not_replayable"

    def __str__(self) -> str:
        return self.value


class Level(str, Enum):
    """Severity of an alert."""

    info = "INFO"
    warn = "WARN"
    error = "ERROR"

    def __str__(self) -> str:
        return self.value


# headroom: bins of log2(|intended| / h), bin i from HEADROOM_LOW + i to one more; the first and the last hold what is beyond, too
HEADROOM_LOW, HEADROOM_BINS, PLACES = -16, 32, 4  # places within an octave


@dataclasses.dataclass(frozen=True)
class AccumulatorReport:
    """One accumulator of a tensor (an optimizer state, an average, `.grad`, the decay) over a window."""

    name: str  # "exp_avg_sq", "weight_decay", "average:ema", "grad", ...
    dtype: str  # "bfloat16"
    health: Health
    cause: Cause | None = None
    advice: str = ""
    efficiency: float | None = None  # sum <applied, intended> / sum <intended, intended>
    displacement_efficiency: float | None = None
    lost_fraction: float | None = None  # lost / wanted, 0..1
    wanted_fraction: float | None = None  # wanted / sampled, 0..1
    growth_efficiency: float | None = None  # the part of the changes that moves away from zero
    decay_efficiency: float | None = None  # the part of the changes that moves towards zero


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """One watched parameter over a window."""

    name: str  # "blocks.0.norm1.weight"; the first name of a tied tensor
    health: Health
    cause: Cause | None = None
    advice: str = ""  # one sentence: what was seen and what to change
    names: tuple[str, ...] = ()  # every name of a tied tensor
    layer: str = ""  # module path: "blocks.0.norm1"
    optimizer_group: str = ""  # "0/1": optimizer 0, group 1; "" when no optimizer holds it
    dtype: str = ""  # "bfloat16"
    shape: tuple[int, ...] = ()
    numel: int = 0
    trainable: bool = True
    efficiency: float | None = None
    efficiency_error: float | None = None  # standard error of `efficiency`
    net_efficiency: float | None = None  # <stored at the end - at the begin, sum intended> / |sum intended|^2
    net_efficiency_error: float | None = None  # standard error of `net_efficiency`
    displacement_efficiency: float | None = None
    lost_fraction: float | None = None  # lost / wanted, 0..1
    lost_fraction_error: float | None = None  # standard error of `lost_fraction`
    wanted_fraction: float | None = None  # wanted / sampled, 0..1
    update_ratio: float | None = None  # rms(intended) / rms(before)
    update_ratio_error: float | None = None  # standard error of `update_ratio`
    applied_ratio: float | None = None  # rms(applied) / rms(before)
    weight_rms: float | None = None  # rms(before)
    written_between: float | None = None  # rms of what was written to it between steps / rms(before), per step
    moved: float | None = None  # where the rule cannot be replayed: rms(stored at the end - at the begin) / rms(before)
    unmoved_fraction: float | None = None  # and the share that is at the end as at the begin
    gradient_rms: float | None = None  # as the optimizer got it: after unscaling and clipping
    gradient_max: float | None = None  # the largest sampled one
    gradient_spread: float | None = None  # standard deviation of `gradient_rms` over parts of the window, by its mean
    gradient_zeros: float | None = None  # share of sampled gradients that are exactly 0, 0..1
    copy_changed: float | None = None  # FP32 weights: share of their values in BF16 that another step changes
    copy_changed_window: float | None = None  # and that the whole window changes
    was_rounded: bool = False  # FP32 weights that held nothing but BF16 values when the window began
    headroom_histogram: tuple[float, ...] | None = None  # HEADROOM_BINS shares that sum to 1
    movement_histogram: tuple[float, ...] | None = None  # the same bins by intended^2, were all steps at `movement_lr`
    movement_lr: float | None = None
    movement_places: tuple[float, ...] | None = None  # by quarter of an octave: even, save where all are alike
    lr: float | None = None  # at the end of the window
    critical_lr: float | None = None  # below it half of the wanted updates are lost
    state_factor: float | None = None  # 1 healthy; outside 0.67..1.5 the state is at fault
    state_factor_error: float | None = None  # standard error of `state_factor`
    since_step: int | None = None  # first step of the window in which `health` began
    accumulators: Mapping[str, AccumulatorReport] = dataclasses.field(default_factory=dict)
    what_if: Mapping[str, float] | None = None  # FP32 tensors: {"bfloat16": lost fraction if kept so}
    # what rounding takes is, by a trial, "plain": lost; "stochastic": rounded at random; "carried:<state>": kept there, the
    # numbers above are of the whole weight; "carried": kept somewhere; else it was not found out
    scheme: str = ""
    low_states: int | None = None  # states of its size that are in 16 bits, beside what is of the weight
    options: tuple[str, ...] = ()  # what its optimizer can be told, of `cures.OPTIONS`; "fused=True": it is

    def efficiency_at(self, lr: float) -> float | None:
        """The efficiency these updates would have at another learning rate; None where it is not known.

        Updates scale with the rate; each keeps what rounding leaves of it: 1 where the rest is carried, or rounding is at random.

        Raises:
            ValueError: `lr` is no number above 0.
        """
        if not 0 < lr < math.inf:
            raise ValueError(f"efficiency_at(lr={lr!r}) must be a number above 0")
        if self.movement_histogram is None or not self.movement_lr:
            return None
        if self.keeps_all:
            return 1.0
        first = HEADROOM_LOW + math.log2(lr / self.movement_lr)
        return efficiency_of(self.movement_histogram, first, self.places)

    def learning_rate_for(self, efficiency: float) -> float | None:
        """The smallest learning rate from which on these updates arrive with at least this efficiency; None if unknown.

        To a twelfth part. 0.0 where every rate does, since the rest of an update is carried.

        Raises:
            ValueError: `efficiency` is not between 0 and 1.
        """
        if not 0 < efficiency < 1:
            raise ValueError(f"learning_rate_for(efficiency={efficiency!r}) must be between 0 and 1")
        if self.movement_histogram is None or not self.movement_lr:
            return None
        octaves = octaves_for(self.movement_histogram, HEADROOM_LOW, efficiency, self.places)
        octaves = -math.inf if self.keeps_all else octaves
        return None if octaves is None else self.movement_lr * 2**octaves

    @property
    def places(self) -> Places:
        """Where in an octave of headroom its updates lie, at `movement_lr`: exactly, where they are all of one size."""
        sizes = self.update_ratio, self.weight_rms, self.wanted_fraction, self.lr, self.movement_lr
        return place_of(self.movement_places, *sizes)

    @property
    def keeps_all(self) -> bool:
        """Whether what rounding takes of an update arrives in the end: it is carried, or rounding is at random."""
        return keeps_all(self.scheme)


allow(TensorReport, ("advice", "accumulators", "what_if"))
allow(TensorReport, ("headroom_histogram", "movement_histogram", "movement_places"))


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """A module's tensors rolled up: the worst health, the tensors that have it."""

    name: str
    health: Health
    tensors: tuple[str, ...]
    efficiency: float | None = None  # weighted by numel over tensors where known


@dataclasses.dataclass(frozen=True)
class Alert:
    """A change of state somebody should hear of."""

    step: int
    level: Level
    title: str  # under 64 characters
    text: str  # the worst tensors with advice, the rest counted
    tensors: tuple[str, ...] = ()
    cause: Cause | None = None
    model: str = ""  # where a process watches several: which


@dataclasses.dataclass(frozen=True, repr=False)  # thousands of tensors in a notebook's cell say nothing
class Report:
    """One closed window.

    Example: `[t.name for t in report.tensors if t.health is Health.stalled]`.
    """

    step: int  # optimizer step at the end of the window
    window: int  # optimizer steps in it
    health: Health  # of the run
    headline: str  # one sentence: what is wrong with the run, since when, what to change
    tensors: tuple[TensorReport, ...]
    layers: tuple[LayerReport, ...] = ()
    alerts: tuple[Alert, ...] = ()
    time: float = 0.0  # seconds since the epoch, when the window closed
    cost_ms: float | None = None  # host time of the watch per optimizer step (ms)
    skipped_steps: int = 0  # steps in the window skipped for overflow (GradScaler)
    observed_steps: int | None = None  # steps of the window in which something was measured
    cost_share: float | None = None  # of the time between steps, what the watch took, 0..1
    forecast: Forecast | None = None  # where the schedule is known; read from a journal it has no `tensors`
    divergence: Divergence | None = None  # where the run is heading, from the windows so far
    observed_at: int | None = None  # step of the last report of which anything was seen: that verdict stands

    def __str__(self) -> str:
        return f"step {self.step:,}: {self.headline}"

    def __repr__(self) -> str:
        return f"<update_watch.Report, {self}>"

    @property
    def counts(self) -> dict[str, int]:
        """Number of tensors per health, all healths present."""
        counts = {h.value: 0 for h in Health}
        for tensor in self.tensors:
            counts[tensor.health.value] += 1
        return counts

    @property
    def efficiency(self) -> float | None:
        """Efficiency over all tensors where it is known, weighted by number of elements."""
        return weighted_mean((t.efficiency, t.numel) for t in self.tensors)

    def what_if(self, floor: float | None = None) -> tuple[Case, ...]:
        """The run as it is, and under each cure, with bytes; `floor`: a least learning rate to try. See `foresight.what_if`."""
        return tuple(import_module("update_watch.foresight.what_if").cases(self, floor))  # knows this file's types

    def plan(self, without: Iterable[str] = ()) -> Plan:
        """The cheapest set of changes after which nothing is lost, `without` some cures. `print` it. See `foresight.plan`."""
        found: Plan = import_module("update_watch.foresight.plan").plan(self, without)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data (NaN and infinity become None); `from_dict` reads it back."""
        return {"schema": SCHEMA_VERSION, **_plain(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Rebuild a report from `to_dict` data; unknown keys (of later versions) are ignored."""
        tensors = tuple(_tensor(t) for t in data["tensors"])
        layers = tuple(_build(LayerReport, layer, health=Health) for layer in data.get("layers", ()))
        alerts = tuple(_build(Alert, a, level=Level, cause=Cause) for a in data.get("alerts", ()))
        ahead = {"forecast": _forecast(data.get("forecast")), "divergence": divergence_of(data.get("divergence"))}
        return _build(cls, {**data, "tensors": tensors, "layers": layers, "alerts": alerts, **ahead}, health=Health)


allow(Report, ("tensors", "layers"))


def weighted_mean(pairs: Any) -> float | None:
    """Mean of the known values of `(value, weight)` pairs; None when nothing is known."""
    above = total = 0.0
    for value, weight in pairs:
        if value is not None and math.isfinite(value):
            above, total = above + value * weight, total + weight
    return above / total if total else None


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _build(cls: type[_T], data: Mapping[str, Any], **enums: Any) -> _T:
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # they all are dataclasses
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in names}
    for key, enum in enums.items():
        if kwargs.get(key) is not None:
            kwargs[key] = enum(kwargs[key])
    return cls(**kwargs)


def _tensor(data: Mapping[str, Any]) -> TensorReport:
    accumulators = {
        name: _build(AccumulatorReport, a, health=Health, cause=Cause)
        for name, a in (data.get("accumulators") or {}).items()
    }
    return _build(TensorReport, {**data, "accumulators": accumulators}, health=Health, cause=Cause)


def _forecast(data: Mapping[str, Any] | None) -> Forecast | None:
    if data is None:
        return None
    tensors = tuple(_build(TensorForecast, t) for t in data["tensors"])
    return _build(Forecast, {**data, "tensors": tensors, "course": tuple(map(tuple, data.get("course", ())))})
