"""What the HTML report says in words and numbers, run by run: plain values for the template.

Nothing here is markup. The template escapes every text.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from update_watch.dashboards.frame import CAUSES, NO_CODE, Codes, Columns, Frame
from update_watch.dashboards.report.history import History, accumulator_names, efficiency_of
from update_watch.kinds import places
from update_watch.naming import without_prefix
from update_watch.report import SEVERITY, Cause, Health, Level

UNWELL = (Health.broken, Health.stalled, Health.stalling)
_ALERTS = 40  # listed; the others are counted
_FINDINGS = 6
_KINDS = 8

CAUSE_WORDS = {
    Cause.weight_rounding: "updates rounded away in the weights",
    Cause.state_rounding: "optimizer state rounded",
    Cause.decay_rounding: "weight decay rounded away",
    Cause.average_rounding: "averaged model does not follow",
    Cause.accumulation_rounding: "summed gradients lose micro-batches",
    Cause.requires_grad_off: "frozen",
    Cause.not_in_optimizer: "in no optimizer",
    Cause.no_gradient: "no gradient",
    Cause.zero_gradient: "zero gradient",
    Cause.zero_learning_rate: "learning rate zero or run out",
    Cause.skipped_steps: "steps skipped",
    Cause.not_written: "optimizer does not write its updates",
    Cause.non_finite: "NaN or infinity",
    Cause.replicas_differ: "differs between ranks",
    Cause.not_replayable: "update cannot be replayed",
}


class Fact(NamedTuple):
    """One number of the summary."""

    value: str
    unit: str
    meaning: str


class Finding(NamedTuple):
    """A cause, the tensors that have it, and what to do."""

    what: str
    counts: tuple[tuple[str, int], ...]  # health, tensors
    where: tuple[str, ...]  # kinds of tensors
    more: int  # kinds not named
    is_all: bool  # every tensor that has it; `where` is empty then
    advice: str  # of the worst of them


class AccumulatorRow(NamedTuple):
    """One kind of accumulator over all tensors."""

    name: str
    dtype: str
    tensors: int
    counts: tuple[tuple[str, int], ...]  # health, tensors
    efficiency: str
    worst: str


class AlertRow(NamedTuple):
    step: str
    level: str
    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class RunPage:
    """One run."""

    name: str
    health: str
    verdict: str  # the headline up to its colon
    reason: str  # and from there on
    steps: str
    closed: str  # when the last window closed
    tensors: int
    counts: tuple[tuple[str, int, float], ...]  # health, tensors, percent
    facts: tuple[Fact, ...]
    findings: tuple[Finding, ...]
    accumulators: tuple[AccumulatorRow, ...]
    alerts: tuple[AlertRow, ...]
    alerts_total: int
    notes: tuple[str, ...]
    band_note: str  # where the band of BF16 is not that of the weights
    has_headroom: bool
    has_ratios: bool
    efficiency: str
    lost: str


def run_page(history: History) -> RunPage:
    """Everything the template says about a run."""
    frame = history.last
    verdict, colon, reason = frame.headline.partition(": ")
    total = max(1, len(frame.table.name))
    return RunPage(
        name=history.name,
        health=frame.health.value,
        verdict=verdict,
        reason=reason if colon else "",
        steps=f"{history.first_step:,} – {history.last_step:,}",
        closed=_time(frame.time),
        tensors=len(frame.table.name),
        counts=tuple((health, n, 100 * n / total) for health, n in _counts(frame.tensors.health)),
        facts=_facts(frame),
        findings=_findings(frame),
        accumulators=tuple(_accumulator(name, frame.accumulators[name]) for name in accumulator_names(frame)),
        alerts=tuple(AlertRow(f"{a.step:,}", a.level.value.lower(), a.title, a.text) for a in _latest(history)),
        alerts_total=len(history.alerts),
        notes=_notes(history),
        band_note=_band_note(frame),
        has_headroom=frame.headroom is not None,
        has_ratios=not np.isnan(frame.tensors.numbers["update_ratio"]).all(),
        efficiency=_number(_weighted(frame, "efficiency"), ".2f"),
        lost=_percent(lost_share(frame)),
    )


def lost_share(frame: Frame) -> float | None:
    """Lost over wanted elements of all tensors, 0..1."""
    weights = np.array(frame.table.numel) * np.nan_to_num(frame.tensors.numbers["wanted_fraction"])
    return _mean(frame.tensors.numbers["lost_fraction"], weights)


def critical_ratio(frame: Frame) -> float | None:
    """Largest critical over current learning rate; above 1 that tensor loses more than half of its updates."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = frame.tensors.numbers["critical_lr"] / frame.tensors.numbers["lr"]
    known = ratios[np.isfinite(ratios)]
    return float(known.max()) if len(known) else None


def _facts(frame: Frame) -> tuple[Fact, ...]:
    facts = [
        Fact(_number(_weighted(frame, "efficiency"), ".2f"), "", "efficiency: how much of the intended update arrived"),
        Fact(_percent(lost_share(frame)), "", "of the wanted changes were lost to rounding"),
    ]
    bad = sum(int((frame.tensors.health == SEVERITY.index(h)).sum()) for h in UNWELL)
    facts.append(Fact(f"{bad:,}", f"of {len(frame.table.name):,}", "tensors broken, stalled or stalling"))
    ratio = critical_ratio(frame)
    if ratio is not None and ratio > 0:
        factor, side = (ratio, "below the edge") if ratio > 1 else (1 / ratio, "above the edge")
        meaning = "learning rate against the one at which half of the worst tensor's updates are lost"
        facts.append(Fact(f"{_factor(factor)}×", side, meaning))
    if frame.cost_ms is not None:
        facts.append(Fact(f"{frame.cost_ms:.2g}", "ms", "per optimizer step spent on watching"))
    return tuple(facts)


def _factor(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


# --- findings ------------------------------------------------------------------------------------------


def _findings(frame: Frame) -> tuple[Finding, ...]:
    """Per cause: of the tensors first, then of accumulators; worst and most frequent first."""
    found: list[tuple[tuple[int, int, int], Finding]] = []
    for part, columns in (("", frame.tensors), *((n, frame.accumulators[n]) for n in accumulator_names(frame))):
        groups: dict[int, list[int]] = {}
        for i in np.flatnonzero(columns.health != NO_CODE).tolist():
            health = SEVERITY[columns.health[i]]
            if health in UNWELL or (not part and health in (Health.idle, Health.unknown)):
                groups.setdefault(int(columns.cause[i]), []).append(i)
        for cause, members in groups.items():
            worst = int(columns.health[members].min())
            found.append(((int(bool(part)), worst, -len(members)), _finding(frame, part, columns, cause, members)))
    found.sort(key=lambda pair: pair[0])
    return tuple(finding for _, finding in found[:_FINDINGS])


def _finding(frame: Frame, part: str, columns: Columns, cause: int, members: list[int]) -> Finding:
    efficiency = np.nan_to_num(columns.numbers["efficiency"], nan=9.0)
    worst = min(members, key=lambda i: (int(columns.health[i]), float(efficiency[i])))
    is_all = len(members) > 1 and len(members) == int((columns.health != NO_CODE).sum())
    kinds: dict[str, list[int]] = {}
    place_of = {} if is_all else places(frame.table.name)
    for i in [] if is_all else members:
        kinds.setdefault(place_of[frame.table.name[i]].kind, []).append(i)
    kinds = {kind if len(alike) > 1 else frame.table.name[alike[0]]: alike for kind, alike in kinds.items()}
    ranked = sorted(kinds, key=lambda kind: (int(columns.health[kinds[kind]].min()), -len(kinds[kind])))
    short, _ = without_prefix(ranked)
    what = CAUSE_WORDS[CAUSES[cause]] if cause != NO_CODE else "no cause found"
    return Finding(
        what=f"{part}: {what}" if part else what,
        counts=_counts(columns.health[members]),
        where=tuple(
            label if len(kinds[kind]) == 1 else f"{label} ×{len(kinds[kind])}"
            for kind, label in zip(ranked[:_KINDS], short[:_KINDS], strict=True)
        ),
        more=max(0, len(ranked) - _KINDS),
        is_all=is_all,
        advice=columns.advice.get(worst, ""),
    )


def _counts(health: Codes) -> tuple[tuple[str, int], ...]:
    """(health, tensors), worst first."""
    counts = np.bincount(health, minlength=len(SEVERITY)).tolist()
    return tuple((known.value, count) for known, count in zip(SEVERITY, counts, strict=True) if count)


# --- accumulators, alerts, notes -------------------------------------------------------------------------


def _accumulator(name: str, columns: Columns) -> AccumulatorRow:
    present = np.flatnonzero(columns.health != NO_CODE)
    values = efficiency_of(columns)[present]
    known = values[~np.isnan(values)]
    dtypes = sorted({columns.dtype[i] for i in present})
    return AccumulatorRow(
        name=name,
        dtype=", ".join(dtypes),
        tensors=len(present),
        counts=_counts(columns.health[present]),
        efficiency=_number(float(np.median(known)) if len(known) else None, ".2f"),
        worst=_number(float(known.min()) if len(known) else None, ".2f"),
    )


def _latest(history: History) -> Sequence[Any]:
    """The last alerts, newest first; errors are not crowded out by what is milder."""
    alerts = list(history.alerts)
    if len(alerts) > _ALERTS:
        errors = [a for a in alerts if a.level is Level.error][-_ALERTS // 2 :]
        rest = [a for a in alerts if all(a is not e for e in errors)][-(_ALERTS - len(errors)) :]
        alerts = sorted([*errors, *rest], key=lambda a: a.step)
    return alerts[::-1]


def _notes(history: History) -> tuple[str, ...]:
    notes = []
    if history.windows_per_span > 1:
        notes.append(
            f"{history.windows:,} windows. A column of a chart stands for about {history.windows_per_span}, and shows "
            "each tensor's worst one."
        )
    if history.damaged:
        lines = "1 damaged line" if history.damaged == 1 else f"{history.damaged} damaged lines"
        notes.append(f"{lines} of the journal could not be read and are left out.")
    if history.last.skipped_steps:
        notes.append(f"{history.last.skipped_steps:,} steps of the last window were skipped for overflow.")
    return tuple(notes)


def _band_note(frame: Frame) -> str:
    kinds = set(frame.table.dtype) - {""}
    if not kinds or "bfloat16" in kinds:
        return ""
    return f"The weights are stored in {', '.join(sorted(kinds))}: the band shows where they would stand in BF16."


# --- numbers in words ------------------------------------------------------------------------------------


def _weighted(frame: Frame, field: str) -> float | None:
    return _mean(frame.tensors.numbers[field], np.array(frame.table.numel, dtype=np.float64))


def _mean(values: Any, weights: Any) -> float | None:
    known = ~np.isnan(values)
    total = float(weights[known].sum())
    return float((values[known] * weights[known]).sum() / total) if total else None


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value + 0.0, form).replace("-0.00", "0.00")


def _percent(share: float | None) -> str:
    if share is None:
        return "–"
    if 0 < share < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= share < 1 else f"{100 * share:.0f}%"


def _time(seconds: float) -> str:
    if seconds <= 0:
        return ""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, OSError, ValueError):
        return ""
