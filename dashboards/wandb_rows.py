"""What a report becomes in W&B beside single numbers: groups of tensors, tables, the headroom histogram."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from update_watch.dashboards import metrics
from update_watch.dashboards.wandb_names import group_names
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, Report, TensorReport

LISTED_TENSORS = 100  # in the table of tensors that are not well


class TensorGroups:
    """Tensors by series name; the grouping is made anew only when a tensor appears."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._layer_of: dict[str, str] = {}
        self._group_of: dict[str, str] = {}

    def of(self, report: Report, *, by_layer: bool = False) -> dict[str, list[TensorReport]]:
        fresh = {t.name: t.layer or t.name for t in report.tensors if t.name not in self._layer_of}
        if fresh:
            self._layer_of.update(fresh)
            names = {layer: layer for layer in self._layer_of.values()} if by_layer else self._layer_of
            group_of = group_names(names, self._limit)
            self._group_of = {n: group_of[layer if by_layer else n] for n, layer in self._layer_of.items()}
        groups: dict[str, list[TensorReport]] = {}
        for tensor in report.tensors:
            groups.setdefault(self._group_of[tensor.name], []).append(tensor)
        return groups


TENSOR_COLUMNS = (
    "tensor",
    "health",
    "cause",
    "since_step",
    "efficiency",
    "net_progress",
    "lost_fraction",
    "update_ratio",
    "lr",
    "critical_lr",
    "advice",
)


def tensor_rows(report: Report) -> list[list[Any]]:
    return [
        [
            t.name,
            t.health.value,
            t.cause.value if t.cause else None,
            t.since_step,
            t.efficiency,
            t.displacement_efficiency,
            t.lost_fraction,
            t.update_ratio,
            t.lr,
            t.critical_lr,
            t.advice,
        ]
        for t in metrics.unwell(report)[:LISTED_TENSORS]
    ]


def _headroom_counts(tensors: Sequence[TensorReport]) -> list[int]:
    """Wanted elements per octave of headroom, over `tensors`."""
    counts = [0.0] * HEADROOM_BINS
    for tensor in tensors:
        wanted = tensor.numel * (1.0 if tensor.wanted_fraction is None else tensor.wanted_fraction)
        for i, share in enumerate(tensor.headroom_histogram or ()):
            counts[i] += share * wanted
    return [round(count) for count in counts]


def headroom(report: Report) -> dict[str, Any]:
    import wandb

    counts = np.array(_headroom_counts(report.tensors))
    edges = np.arange(HEADROOM_LOW, HEADROOM_LOW + HEADROOM_BINS + 1)
    return {metrics.HEADROOM: wandb.Histogram(np_histogram=(counts, edges))} if counts.any() else {}


def headroom_rows(layers: Mapping[str, Sequence[TensorReport]]) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for layer, tensors in layers.items():
        counts = _headroom_counts(tensors)
        total = sum(counts)
        rows += [[layer, HEADROOM_LOW + i, count / total] for i, count in enumerate(counts) if count]
    return rows


def table(key: str, columns: Sequence[str], rows: list[list[Any]], *, even_if_empty: bool = False) -> dict[str, Any]:
    import wandb

    # Mixed types: W&B otherwise infers and checks a type per cell, which takes most of the time.
    return {key: wandb.Table(list(columns), rows, allow_mixed_types=True)} if rows or even_if_empty else {}
