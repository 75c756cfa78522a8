"""What a report becomes in W&B beside single numbers: groups of tensors, rows of tables, the headroom histogram."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from update_watch.dashboards import metrics
from update_watch.dashboards.headroom import headroom_counts
from update_watch.dashboards.wandb.names import group_names
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


HEATMAP_COLUMN_NAMES = ("layer", "begin", "step", "efficiency")
HEADROOM_COLUMN_NAMES = ("layer", "octave", "share")
TENSOR_COLUMN_NAMES = (
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
    """One row of TENSOR_COLUMN_NAMES for each tensor that is not well, worst first."""
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


def headroom(report: Report) -> dict[str, Any]:
    """The histogram of the whole run, where there is one."""
    import wandb

    counts = headroom_counts(report.tensors).astype(int)
    edges = np.arange(HEADROOM_LOW, HEADROOM_LOW + HEADROOM_BINS + 1)
    return {metrics.HEADROOM: wandb.Histogram(np_histogram=(counts, edges))} if counts.any() else {}


def headroom_rows(layers: Mapping[str, Sequence[TensorReport]]) -> list[list[Any]]:
    """`[layer, octave, share]` for every octave in which a layer has wanted elements."""
    rows: list[list[Any]] = []
    for layer, tensors in layers.items():
        counts = headroom_counts(tensors)
        shares = (counts / max(counts.sum(), 1.0)).tolist()
        rows += [[layer, HEADROOM_LOW + i, share] for i, share in enumerate(shares) if share]
    return rows
