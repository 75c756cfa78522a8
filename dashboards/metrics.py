"""What is logged: every metric key with its unit, its meaning and how it is computed from a report.

This is the one table. The W&B sink logs from it, the workspace draws from it, and docs/metrics.md is
printed from it: `python -m update_watch.dashboards.metrics > docs/metrics.md`.

A value that is not known in a window is left out of the row, never logged as zero.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from update_watch.report import Health, Report, TensorReport, weighted_mean

RUN_SECTION = "update_watch"
UNWELL = (Health.broken, Health.stalled, Health.stalling)

# BF16 keeps 7 mantissa bits: the gap between neighbours is 2^-7 of the value at a power of two and 2^-8 just
# below the next, so half a gap lies between 2^-9 and 2^-8.
BF16_EPSILON = 2.0**-7
BF16_HALF_ULP = (2.0**-9, 2.0**-8)


@dataclasses.dataclass(frozen=True)
class RunMetric:
    """One number per row for the whole run."""

    name: str  # the key is update_watch/<name>
    unit: str
    meaning: str
    formula: str  # `compute` in words
    compute: Callable[[Report], float | None]

    @property
    def key(self) -> str:
        return f"{RUN_SECTION}/{self.name}"


@dataclasses.dataclass(frozen=True)
class Series:
    """One number per row and tensor (or layer, where a model has more tensors than are logged)."""

    section: str  # the key is <section>/<tensor name>
    unit: str
    meaning: str
    formula: str
    compute: Callable[[Sequence[TensorReport]], float | None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Something logged that is not a number per row."""

    key: str
    kind: str  # histogram | table | summary | config
    meaning: str


def lost_fraction(tensors: Iterable[TensorReport]) -> float | None:
    """Lost over wanted elements of all `tensors` together, 0..1."""
    return weighted_mean((t.lost_fraction, t.numel * (t.wanted_fraction or 0.0)) for t in tensors)


def critical_lr_ratio(tensor: TensorReport) -> float | None:
    """Critical over current learning rate; above 1 more than half of the wanted updates are lost."""
    return tensor.critical_lr / tensor.lr if tensor.critical_lr is not None and tensor.lr else None


def stalled_share(report: Report) -> float | None:
    """Share of the trainable elements that lie in stalled or broken tensors, 0..1."""
    trainable = [t for t in report.tensors if t.trainable]
    total = sum(t.numel for t in trainable)
    stalled = sum(t.numel for t in trainable if t.health in (Health.stalled, Health.broken))
    return stalled / total if total else None


def unwell(report: Report) -> list[TensorReport]:
    """Broken, stalled and stalling tensors, worst first: by health, then by efficiency."""
    found = [t for t in report.tensors if t.health in UNWELL]
    return sorted(found, key=lambda t: (UNWELL.index(t.health), math.inf if t.efficiency is None else t.efficiency))


def _known(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


def _least(values: Iterable[float | None]) -> float | None:
    return min(_known(values), default=None)


def _greatest(values: Iterable[float | None]) -> float | None:
    return max(_known(values), default=None)


def _median(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return statistics.median(known) if known else None


def _state_efficiencies(report: Report) -> Iterable[float | None]:
    return (a.efficiency for t in report.tensors for a in t.accumulators.values() if a.name != "weight_decay")


def _decay_efficiency(report: Report) -> float | None:
    decays = ((t.accumulators.get("weight_decay"), t.numel) for t in report.tensors)
    return weighted_mean((a.efficiency, numel) for a, numel in decays if a is not None)


def _farthest_state_factor(report: Report) -> float | None:
    factors = [f for f in _known(t.state_factor for t in report.tensors) if f > 0]
    return max(factors, key=lambda f: abs(math.log(f)), default=None)


def _count(health: Health, meaning: str) -> RunMetric:
    return RunMetric(
        f"tensors_{health}",
        "tensors",
        meaning,
        f"number of tensors with health `{health}`",
        lambda report: float(sum(t.health is health for t in report.tensors)),
    )


def _line(name: str, value: float, meaning: str) -> RunMetric:
    return RunMetric(name, "ratio", meaning, f"constant 2^{round(math.log2(value))}", lambda report: value)


RUN_METRICS: tuple[RunMetric, ...] = (
    RunMetric(
        "efficiency",
        "ratio",
        "How much of the intended update arrived in the stored weights: 1 = all of it, 0 = none.",
        "mean of `efficiency` over tensors, weighted by number of elements",
        lambda r: r.efficiency,
    ),
    RunMetric(
        "efficiency_worst",
        "ratio",
        "The same for the tensor that is worst off.",
        "smallest `efficiency`",
        lambda r: _least(t.efficiency for t in r.tensors),
    ),
    RunMetric(
        "displacement_efficiency",
        "ratio",
        "Net progress: how far the weights moved over the window, of what was intended. Right also where the "
        "remainder is carried elsewhere (FP32 master, Kahan, stochastic rounding).",
        "mean of `displacement_efficiency`, weighted by number of elements",
        lambda r: weighted_mean((t.displacement_efficiency, t.numel) for t in r.tensors),
    ),
    RunMetric(
        "lost_fraction",
        "fraction",
        "Of the elements that should have changed, those whose stored value did not.",
        "lost over wanted elements, all tensors together",
        lambda r: lost_fraction(r.tensors),
    ),
    RunMetric(
        "stalled_share",
        "fraction",
        "How much of the model stands still.",
        "elements of trainable tensors with health `stalled` or `broken`, over all trainable elements",
        stalled_share,
    ),
    _count(Health.healthy, "Tensors that receive their updates."),
    _count(Health.stalling, "Tensors that lose part of their updates."),
    _count(Health.stalled, "Tensors that receive next to nothing."),
    _count(Health.idle, "Tensors that no signal reaches: nothing was intended."),
    _count(Health.frozen, "Tensors frozen on purpose."),
    _count(Health.broken, "Tensors with NaN or infinity."),
    _count(Health.unknown, "Tensors that cannot be judged; the reason is in their advice."),
    RunMetric(
        "update_ratio",
        "ratio",
        "Size of the intended update against the weight it is added to.",
        "median over tensors of rms(intended) / rms(before)",
        lambda r: _median(t.update_ratio for t in r.tensors),
    ),
    RunMetric(
        "applied_ratio",
        "ratio",
        "Size of the update that arrived against the weight; below `update_ratio` by what was lost.",
        "median over tensors of rms(applied) / rms(before)",
        lambda r: _median(t.applied_ratio for t in r.tensors),
    ),
    _line("bf16_epsilon", BF16_EPSILON, "BF16 epsilon, drawn beside the ratios."),
    _line("bf16_half_ulp_low", BF16_HALF_ULP[0], "An update smaller than this against its weight is always lost."),
    _line("bf16_half_ulp_high", BF16_HALF_ULP[1], "An update larger than this against its weight always arrives."),
    RunMetric(
        "critical_lr_ratio",
        "ratio",
        "How close the learning rate is to the edge, for the tensor nearest to it: at 1 half of its wanted updates "
        "are lost; 0.1 means that the learning rate may still fall tenfold.",
        "largest `critical_lr / lr` over tensors",
        lambda r: _greatest(critical_lr_ratio(t) for t in r.tensors),
    ),
    RunMetric(
        "state_efficiency_worst",
        "ratio",
        "Efficiency of the accumulator that is worst off: optimizer state, averaged model, gradient buffer.",
        "smallest `efficiency` over all accumulators except `weight_decay`",
        lambda r: _least(_state_efficiencies(r)),
    ),
    RunMetric(
        "state_factor_worst",
        "ratio",
        "Update with the stored optimizer state against the same with FP32 state: outside 0.67..1.5 the state is at "
        "fault.",
        "the `state_factor` farthest from 1 in either direction",
        _farthest_state_factor,
    ),
    RunMetric(
        "decay_efficiency",
        "ratio",
        "How much of the weight decay alone would arrive.",
        "mean of the `weight_decay` accumulator's `efficiency`, weighted by number of elements",
        _decay_efficiency,
    ),
    RunMetric(
        "skipped_steps",
        "steps",
        "Steps of the window that the gradient scaler skipped for overflow.",
        "`skipped_steps`",
        lambda r: float(r.skipped_steps),
    ),
    RunMetric(
        "cost_ms",
        "ms/step",
        "What watching costs the training thread.",
        "`cost_ms`: host time of the watch per optimizer step",
        lambda r: r.cost_ms,
    ),
    RunMetric(
        "alert",
        "0/1",
        "1 where something changed that somebody should hear of. Every alert is here, sent or not.",
        "1 if there was an alert in this window or in one since the previous row",
        lambda r: float(bool(r.alerts)),
    ),
)

SERIES: tuple[Series, ...] = (
    Series(
        "update_efficiency",
        "ratio",
        "Efficiency of the tensor; of a layer: of its worst tensor.",
        "smallest `efficiency`",
        lambda tensors: _least(t.efficiency for t in tensors),
    ),
    Series(
        "update_ratio",
        "ratio",
        "rms(intended) / rms(before) of the tensor; of a layer: the smallest.",
        "smallest `update_ratio`",
        lambda tensors: _least(t.update_ratio for t in tensors),
    ),
    Series(
        "update_lost",
        "fraction",
        "Lost over wanted elements of the tensor; of a layer: the largest.",
        "largest `lost_fraction`",
        lambda tensors: _greatest(t.lost_fraction for t in tensors),
    ),
)

HEADROOM = f"{RUN_SECTION}/headroom"
HEATMAP = f"{RUN_SECTION}/heatmap"
HEADROOM_LAYERS = f"{RUN_SECTION}/headroom_layers"
TENSORS = f"{RUN_SECTION}/tensors"

ENTRIES: tuple[Entry, ...] = (
    Entry(
        HEADROOM,
        "histogram",
        "Elements by headroom, log2(|intended| / half a gap), in one-octave bins: left of 0 the update is lost.",
    ),
    Entry(
        HEATMAP,
        "table",
        "`layer, begin, step, efficiency`: worst efficiency per layer after step `begin` up to `step`, for the heatmap.",
    ),
    Entry(
        HEADROOM_LAYERS,
        "table",
        "`layer, octave, share`: share of a layer's wanted elements with headroom from `octave` to one more, last "
        "window.",
    ),
    Entry(TENSORS, "table", "The tensors that are not well, worst first, with cause and advice, last window."),
    Entry(f"{RUN_SECTION}/health", "summary", "Health of the run."),
    Entry(f"{RUN_SECTION}/headline", "summary", "One sentence: what is wrong, since when, what to change."),
    Entry(f"{RUN_SECTION}/since_step", "summary", "First step of the trouble that began earliest and still lasts."),
    Entry(f"{RUN_SECTION}/worst_tensor", "summary", "Name of the tensor that is worst off."),
    Entry(f"{RUN_SECTION}/worst_cause", "summary", "Its cause."),
    Entry(f"{RUN_SECTION}/worst_advice", "summary", "What to change for it."),
    Entry(f"{RUN_SECTION}/alerts", "summary", "Number of alerts so far, sent or held back."),
    Entry(f"{RUN_SECTION}/last_alert", "summary", "Title of the last alert."),
    Entry(f"{RUN_SECTION}/last_alert_text", "summary", "Its text."),
    Entry(f"{RUN_SECTION}/last_alert_step", "summary", "Its step."),
    Entry(f"{RUN_SECTION}/audit_*", "summary", "Numbers and texts of the audit before the first step."),
    Entry(RUN_SECTION, "config", "Settings of the watch and the audit before the first step (`WandbSink.describe`)."),
)


def run_values(report: Report) -> dict[str, float]:
    """Run-level key -> value, without what is not known."""
    values = ((metric.key, metric.compute(report)) for metric in RUN_METRICS)
    return {key: float(value) for key, value in values if value is not None and math.isfinite(value)}


def summary_values(report: Report) -> dict[str, str | int]:
    """Texts for the run's summary. What no longer holds becomes empty, so that old trouble does not stay."""
    troubled = unwell(report)
    since = [t.since_step for t in troubled if t.since_step is not None]
    worst = troubled[0] if troubled else None
    values: dict[str, str | int] = {
        "health": report.health.value,
        "headline": report.headline,
        "since_step": min(since) if since else "",
        "worst_tensor": worst.name if worst else "",
        "worst_cause": worst.cause.value if worst and worst.cause else "",
        "worst_advice": worst.advice if worst else "",
    }
    return {f"{RUN_SECTION}/{name}": value for name, value in values.items()}


def markdown() -> str:
    """The table as a documentation page."""
    lines = [
        "# Metrics",
        "",
        "<!-- Made from dashboards/metrics.py: python -m update_watch.dashboards.metrics > docs/metrics.md -->",
        "",
        "What `WandbSink` logs. A value that is not known in a window is left out, never logged as zero.",
        "",
        "## The run",
        "",
        "| key | unit | meaning | computed as |",
        "|---|---|---|---|",
        *(f"| `{m.key}` | {m.unit} | {m.meaning} | {m.formula} |" for m in RUN_METRICS),
        "",
        "## Every tensor",
        "",
        "Dots in a name become underscores. Beyond `max_tensors` tensors these are layers.",
        "",
        "| key | unit | meaning | computed as |",
        "|---|---|---|---|",
        *(f"| `{s.section}/<name>` | {s.unit} | {s.meaning} | {s.formula} |" for s in SERIES),
        "",
        "## Pictures, tables, texts",
        "",
        "| key | kind | meaning |",
        "|---|---|---|",
        *(f"| `{e.key}` | {e.kind} | {e.meaning} |" for e in ENTRIES),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
