"""What the report says below its first screen, run by run: findings, optimizer state, alerts, notes. Plain values."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from update_watch.dashboards.frame import NO_CODE, Codes, Columns, Frame
from update_watch.dashboards.report.cases import CaseRow, case_rows
from update_watch.dashboards.report.first_screen import part_words
from update_watch.dashboards.report.history import History, accumulator_names, efficiency_of
from update_watch.dashboards.verdict import UNWELL, cause_words, groups_of
from update_watch.report import SEVERITY, Alert, Health, Level

_ALERTS = 40  # listed; the others are counted
_FINDINGS = 8


class Finding(NamedTuple):
    """Tensors of one health and cause, and what to do."""

    health: str
    words: str  # which tensors
    why: str
    advice: str  # of the worst of them


class PartRow(NamedTuple):
    """One kind of accumulator over all tensors."""

    name: str
    label: str
    dtype: str
    tensors: str
    counts: tuple[tuple[str, str], ...]  # health, tensors
    middle: str
    worst: str


class AlertRow(NamedTuple):
    step: str
    level: str
    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class Details:
    findings: tuple[Finding, ...]
    counts: tuple[tuple[str, str], ...]  # health, tensors
    parts: tuple[PartRow, ...]
    alerts: tuple[AlertRow, ...]
    alerts_left: int  # not listed
    notes: tuple[str, ...]
    has_headroom: bool
    has_ratios: bool
    has_sizes: bool
    signs: tuple[str, ...]  # of what leaves its range
    cases: tuple[CaseRow, ...]  # what each cure would give
    band_note: str  # where the band of BF16 is not that of the weights
    cost: str


def details(history: History) -> Details:
    frame = history.last
    alerts = _latest(history)
    return Details(
        findings=_findings(frame),
        counts=_counts(frame.tensors.health),
        parts=tuple(_part(name, frame.accumulators[name]) for name in accumulator_names(frame)),
        alerts=tuple(AlertRow(f"{a.step:,}", a.level.value.lower(), a.title, a.text) for a in alerts),
        alerts_left=len(history.alerts) - len(alerts),
        notes=_notes(history),
        has_headroom=frame.headroom is not None,
        has_ratios=not np.isnan(history.series_PH["update_ratio"]).all(),
        has_sizes=bool((history.of_run("weight") > 0).any()),
        signs=() if frame.divergence is None else tuple(sign.text for sign in frame.divergence.signs),
        cases=case_rows(frame),
        band_note=_band_note(frame),
        cost="" if frame.cost_ms is None else f"Watching costs {frame.cost_ms:.2g} ms a step.",
    )


def _findings(frame: Frame) -> tuple[Finding, ...]:
    groups = groups_of(frame, (*UNWELL, Health.unknown, Health.idle))
    return tuple(
        Finding(
            group.health.value, group.words, cause_words(group.cause, frame.table.dtype[group.members[0]]), group.advice
        )
        for group in groups[:_FINDINGS]
    )


def _counts(health: Codes) -> tuple[tuple[str, str], ...]:
    """(health, tensors), worst first."""
    counts = np.bincount(health, minlength=len(SEVERITY)).tolist()
    return tuple((known.value, f"{count:,}") for known, count in zip(SEVERITY, counts, strict=True) if count)


def _part(name: str, columns: Columns) -> PartRow:
    is_there = columns.health != NO_CODE
    values = efficiency_of(columns)[is_there]
    known = values[~np.isnan(values)]
    return PartRow(
        name=name,
        label=part_words(name),
        dtype=", ".join(sorted(set(itertools.compress(columns.dtype, is_there.tolist())))),
        tensors=f"{int(is_there.sum()):,}",
        counts=_counts(columns.health[is_there]),
        middle=_percent(float(np.median(known))) if len(known) else "–",
        worst=_percent(float(known.min())) if len(known) else "–",
    )


def _latest(history: History) -> Sequence[Alert]:
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
            f"{history.windows:,} windows. A point over the run stands for about {history.windows_per_span:,}: numbers of the "
            "run are their mean, a tensor is shown as in its worst one."
        )
    if history.damaged:
        lines = "1 damaged line" if history.damaged == 1 else f"{history.damaged:,} damaged lines"
        notes.append(f"{lines} of the journal could not be read and are left out.")
    if history.missing:
        windows = "1 window" if history.missing == 1 else f"{history.missing:,} windows"
        notes.append(
            f"{windows} could not be written to the journal (a full disk?); what happened in them is not shown."
        )
    if history.ends_at is not None:
        notes.append(
            f"The journal could not be written after step {history.ends_at:,}; of what came then only the last window is shown."
        )
    if history.last.skipped_steps:
        notes.append(f"{history.last.skipped_steps:,} steps of the last window were skipped for overflow.")
    return tuple(notes)


def _band_note(frame: Frame) -> str:
    kinds = set(frame.table.dtype) - {""}
    if not kinds or "bfloat16" in kinds:
        return ""
    return f"The weights are stored in {', '.join(sorted(kinds))}: the band shows where they would stand in BF16."


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if not 0 < share < 0.005 else "<1%"
