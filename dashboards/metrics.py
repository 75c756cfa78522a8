"""What is logged: every metric key with its unit, its meaning and how it is computed from a report.

This is the one table. The W&B sink logs from it, the workspace draws from it, and docs/metrics.md is
printed from it by `metrics_page`.

A value that is not known in a window is left out of the row, never logged as zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from update_watch.dashboards.known_values import least, median
from update_watch.dashboards.report_numbers import (
    decay_efficiency,
    farthest_state_factor,
    lost_fraction,
    lr_margin,
    stalled_share,
    state_efficiencies,
)
from update_watch.dashboards.unseen import is_unseen
from update_watch.report import Health, Report, TensorReport, weighted_mean

RUN_SECTION = "update_watch"
UNWELL = (Health.broken, Health.stalled, Health.stalling)


@dataclasses.dataclass(frozen=True)
class RunMetric:
    """One number per row for the whole run."""

    name: str  # the key is update_watch/<name>
    unit: str
    meaning: str
    formula: str  # `compute` in words
    compute: Callable[[Report], float | None]
    is_shown: bool = False  # drawn by W&B of itself; the others are there for charts that somebody makes
    is_summed_up: bool = False  # a column of the runs table, and a line of W&B's summary at the end
    is_by_host: bool = False  # known of a window of which nothing was looked at, too

    @property
    def key(self) -> str:
        return f"{RUN_SECTION}/{self.name}"


@dataclasses.dataclass(frozen=True)
class Series:
    """One number per row for a kind of tensors, or for one tensor."""

    section: str  # the key is update_watch/<section>/<name>
    unit: str
    meaning: str
    formula: str
    compute: Callable[[Sequence[TensorReport]], float | None]

    def key(self, name: str) -> str:
        return f"{RUN_SECTION}/{self.section}/{name}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Something logged that is not a number per row."""

    key: str
    kind: str  # histogram | table | summary | config
    meaning: str


def unwell(report: Report) -> list[TensorReport]:
    """Broken, stalled and stalling tensors, worst first: by health, then by efficiency."""
    found = [t for t in report.tensors if t.health in UNWELL]
    return sorted(found, key=lambda t: (UNWELL.index(t.health), math.inf if t.efficiency is None else t.efficiency))


def _count(health: Health, meaning: str, is_shown: bool = False) -> RunMetric:
    return RunMetric(
        f"tensors_{health}",
        "tensors",
        meaning,
        f"number of tensors with health `{health}`",
        lambda report: float(sum(t.health is health for t in report.tensors)),
        is_shown=is_shown,
        is_summed_up=health is Health.stalled,
    )


_AHEAD = (
    ("forecast.stalling_share", "fraction", "How much of the model will be stalled at the schedule's end."),
    ("forecast.lost_share", "fraction", "Of the movement that is still intended, what will be lost."),
    ("forecast.from_step", "steps", "When the first tensor that is well now begins to stall."),
    ("forecast.floor", "lr", "The learning rate that would keep all moving that move now."),
    ("forecast.error", "ratio", "How far the efficiencies of now are from what was forecast at half of the run."),
    ("divergence.weight_growth", "power", "The weights grow as the steps to this power: above 2.5, held by nothing."),
)


def _ahead(source: str, unit: str, meaning: str) -> RunMetric:
    """A number of the forecast, which there is where a schedule is known, or of `report.divergence`."""
    owner, _, field = source.partition(".")
    compute = lambda r: getattr(getattr(r, owner), field, None)  # noqa: E731
    return RunMetric(f"{owner}_{field}", unit, meaning, f"`report.{source}`", compute)


RUN_METRICS: tuple[RunMetric, ...] = (
    RunMetric(
        "efficiency",
        "ratio",
        "How much of the intended update arrived in the stored weights: 1 = all of it, 0 = none.",
        "mean of `efficiency` over tensors, weighted by number of elements",
        lambda r: r.efficiency,
        is_shown=True,
        is_summed_up=True,
    ),
    RunMetric(
        "efficiency_worst",
        "ratio",
        "The same for the tensor that is worst off.",
        "smallest `efficiency`",
        lambda r: least(t.efficiency for t in r.tensors),
        is_shown=True,
    ),
    RunMetric(
        "net_progress",
        "ratio",
        "How far the weights moved over the window, of what was intended. Right also where the "
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
        is_shown=True,
    ),
    RunMetric(
        "stalled_share",
        "fraction",
        "How much of the model stands still.",
        "elements of trainable tensors with health `stalled` or `broken`, over all trainable elements",
        stalled_share,
        is_shown=True,
    ),
    _count(Health.healthy, "Tensors that receive their updates."),
    _count(Health.stalling, "Tensors that lose part of their updates.", True),
    _count(Health.stalled, "Tensors that receive next to nothing.", True),
    _count(Health.idle, "Tensors that no signal reaches: nothing was intended."),
    _count(Health.frozen, "Tensors frozen on purpose."),
    _count(Health.broken, "Tensors with NaN or infinity.", True),
    _count(Health.unknown, "Tensors that cannot be judged; the reason is in their advice."),
    RunMetric(
        "update_ratio",
        "ratio",
        "Size of the intended update against the weight it is added to.",
        "median over tensors of rms(intended) / rms(before)",
        lambda r: median(t.update_ratio for t in r.tensors),
    ),
    RunMetric(
        "applied_ratio",
        "ratio",
        "Size of the update that arrived against the weight; below `update_ratio` by what was lost.",
        "median over tensors of rms(applied) / rms(before)",
        lambda r: median(t.applied_ratio for t in r.tensors),
    ),
    RunMetric(
        "lr_margin",
        "ratio",
        "The learning rate over the one at which the tensor nearest to it loses half of its updates: 12 means that it may "
        "still fall twelvefold; under 1 more than half is lost.",
        "smallest `lr / critical_lr` over tensors",
        lambda r: least(lr_margin(t) for t in r.tensors),
        is_shown=True,
    ),
    RunMetric(
        "state_efficiency_worst",
        "ratio",
        "Efficiency of the accumulator that is worst off: optimizer state, averaged model, gradient buffer.",
        "smallest `efficiency` over all accumulators except `weight_decay`",
        lambda r: least(state_efficiencies(r)),
        is_shown=True,
    ),
    RunMetric(
        "state_update_factor",
        "ratio",
        "Size of the updates with the optimizer's state as it is stored, against the same with FP32 state: outside "
        "0.67..1.5 the state is at fault.",
        "the `state_factor` farthest from 1 in either direction",
        farthest_state_factor,
    ),
    RunMetric(
        "decay_efficiency",
        "ratio",
        "How much of the weight decay alone would arrive.",
        "mean of the `weight_decay` accumulator's `efficiency`, weighted by number of elements",
        decay_efficiency,
    ),
    RunMetric(
        "gradient_rms",
        "gradient",
        "Size of the gradients as the optimizer got them, after unscaling and clipping.",
        "median of `gradient_rms` over tensors",
        lambda r: median(t.gradient_rms for t in r.tensors),
    ),
    RunMetric(
        "gradient_zeros",
        "fraction",
        "How many of the gradients were exactly 0.",
        "mean of `gradient_zeros`, weighted by number of elements",
        lambda r: weighted_mean((t.gradient_zeros, t.numel) for t in r.tensors),
    ),
    RunMetric(
        "copy_changed",
        "fraction",
        "FP32 weights: how many of their values in BF16 a step changes, as a copy that is served in BF16 would show.",
        "mean of `copy_changed`, weighted by number of elements",
        lambda r: weighted_mean((t.copy_changed, t.numel) for t in r.tensors),
    ),
    *(_ahead(*row) for row in _AHEAD),
    RunMetric(
        "skipped_steps",
        "steps",
        "Steps of the window that the gradient scaler skipped for overflow.",
        "`skipped_steps`",
        lambda r: float(r.skipped_steps),
        is_shown=True,
        is_by_host=True,
    ),
    RunMetric(
        "cost_ms",
        "ms/step",
        "What watching costs the training thread.",
        "`cost_ms`: host time of the watch per optimizer step",
        lambda r: r.cost_ms,
        is_shown=True,
        is_by_host=True,
    ),
    RunMetric(
        "unseen_steps",
        "steps",
        "How old the verdict is: 0 as long as windows are looked at. Where a budget let all steps of one pass, these alone are logged.",
        "`step` less `observed_at`",
        lambda r: None if r.observed_at is None else float(r.step - r.observed_at),
        is_by_host=True,
    ),
    RunMetric(
        "alert",
        "0/1",
        "1 where something changed that somebody should hear of. Every alert is here, sent or not.",
        "1 if there was an alert in this window or in one since the previous row",
        lambda r: float(bool(r.alerts)),
        is_shown=True,
        is_by_host=True,
    ),
)

BY_KIND = Series(
    "by_kind",
    "ratio",
    "How much of the update arrived for the tensors of a kind (`q_proj` of all layers): of the worst of them.",
    "smallest `efficiency`",
    lambda tensors: least(t.efficiency for t in tensors),
)
BY_TENSOR = Series(
    "tensors",
    "ratio",
    "The same for single tensors: the worst of those that are not well, and those that were asked for.",
    "`efficiency`",
    lambda tensors: least(t.efficiency for t in tensors),
)
SERIES: tuple[Series, ...] = (BY_KIND, BY_TENSOR)

HEADROOM = f"{RUN_SECTION}/headroom"
HEATMAP = f"{RUN_SECTION}/heatmap"
HEADROOM_KINDS = f"{RUN_SECTION}/headroom_by_kind"
TENSORS = f"{RUN_SECTION}/unwell"
VERDICT = f"{RUN_SECTION}/verdict"

ENTRIES: tuple[Entry, ...] = (
    Entry(
        HEADROOM,
        "histogram",
        "Elements by headroom, log2(|intended| / half a gap), in one-octave bins: left of 0 the update is lost.",
    ),
    Entry(
        HEATMAP,
        "table",
        "`kind, begin, step, efficiency`: worst efficiency per kind after step `begin` up to `step`, for the heatmap.",
    ),
    Entry(
        HEADROOM_KINDS,
        "table",
        "`kind, octave, share`: share of a kind's elements that should have changed with headroom from `octave` to one more, last "
        "window.",
    ),
    Entry(TENSORS, "table", "The tensors that are not well, worst first, with cause and advice, last window."),
    Entry(VERDICT, "page", "The verdict in one sentence, why, since when, and the cure as code; whenever it changes."),
    Entry(f"{RUN_SECTION}/health", "summary", "Health of the run."),
    Entry(f"{RUN_SECTION}/headline", "summary", "One sentence: what is wrong, since when, what to change."),
    Entry(
        f"{RUN_SECTION}/worst",
        "summary",
        "`tensor`, `cause`, `since_step` and `advice` of the tensor that is worst off.",
    ),
    Entry(
        f"{RUN_SECTION}/last_alert",
        "summary",
        "`title`, `text`, `step`, and `count` of alerts so far, sent or held back.",
    ),
    Entry(f"{RUN_SECTION}/audit", "summary", "Numbers and texts of the audit before the first step."),
    Entry(RUN_SECTION, "config", "Settings of the watch and the audit before the first step (`WandbSink.describe`)."),
)


def run_values(report: Report) -> dict[str, float]:
    """Run-level key -> value, without what is not known."""
    is_seen = not is_unseen(report)
    values = ((metric.key, metric.compute(report)) for metric in RUN_METRICS if is_seen or metric.is_by_host)
    return {key: float(value) for key, value in values if value is not None and math.isfinite(value)}


def summary_values(report: Report) -> dict[str, Any]:
    """For the run's summary. What no longer holds becomes empty, so that old trouble does not stay."""
    troubled = unwell(report)
    since = [t.since_step for t in troubled if t.since_step is not None]
    worst = troubled[0] if troubled else None
    # what has parts is no line of W&B's summary at the end, which has ten: the training's own numbers stay in it
    parts = {
        "tensor": worst.name if worst else "",
        "cause": worst.cause.value if worst and worst.cause else "",
        "since_step": min(since) if since else "",
        "advice": worst.advice if worst else "",
    }
    values = {"health": report.health.value, "headline": report.headline, "worst": parts}
    return {f"{RUN_SECTION}/{name}": value for name, value in values.items()}
