"""What a report becomes in W&B beside single numbers: tensors by kind and single ones, rows of tables, the headroom histogram."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from update_watch.dashboards import metrics
from update_watch.dashboards.headroom import headroom_counts
from update_watch.kinds import places
from update_watch.naming import kind_labels
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, Report, TensorReport

OTHERS = "others"
LISTED_TENSORS = 100  # in the table of tensors that are not well


class KindGroups:
    """Tensors by the label of their kind; what is of a kind is found out anew only when a tensor appears.

    A kind keeps its label for ever. Beyond `limit` kinds those with the fewest tensors are together, as "others".
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._label_of_kind: dict[str, str] = {}
        self._label_of: dict[str, str] = {}  # by tensor

    def of(self, report: Report) -> dict[str, list[TensorReport]]:
        if any(t.name not in self._label_of for t in report.tensors):
            self._look(dict.fromkeys([*self._label_of, *(t.name for t in report.tensors)]))
        groups: dict[str, list[TensorReport]] = {}
        for tensor in report.tensors:
            groups.setdefault(self._label_of[tensor.name], []).append(tensor)
        return groups

    def _look(self, names: Iterable[str]) -> None:
        kind_of = {name: place.kind for name, place in places(names).items()}
        counts = Counter(kind_of.values())
        labels = kind_labels(counts)
        kept = [kind for kind in counts if kind in self._label_of_kind]
        fresh = sorted((kind for kind in counts if kind not in self._label_of_kind), key=lambda kind: -counts[kind])
        room = self._limit - len(kept) - (len(kept) + len(fresh) > self._limit)
        self._label_of_kind.update((kind, labels[kind]) for kind in fresh[: max(0, room)])
        self._label_of = {name: self._label_of_kind.get(kind, OTHERS) for name, kind in kind_of.items()}


class ChosenTensors:
    """The tensors with a series of their own: those asked for, and the worst of those that are not well.

    One that has a series keeps it, also once it is well again.
    """

    def __init__(self, patterns: Sequence[str], most_unwell: int) -> None:
        self._patterns, self._most = tuple(patterns), most_unwell
        self._unwell: dict[str, None] = {}
        self._asked: dict[str, bool] = {}

    def of(self, report: Report) -> list[TensorReport]:
        for tensor in metrics.unwell(report):
            if len(self._unwell) >= self._most:
                break
            self._unwell.setdefault(tensor.name)
        for tensor in report.tensors:
            if tensor.name not in self._asked:
                self._asked[tensor.name] = any(fnmatch.fnmatchcase(tensor.name, p) for p in self._patterns)
        return [t for t in report.tensors if t.name in self._unwell or self._asked[t.name]]


HEATMAP_COLUMN_NAMES = ("kind", "begin", "step", "efficiency")
HEADROOM_COLUMN_NAMES = ("kind", "octave", "share")
TENSOR_COLUMN_NAMES = (
    "tensor",
    "health",
    "cause",
    "since_step",
    "efficiency",
    "net_progress",
    "lost_fraction",
    "update_ratio",
    "gradient_rms",
    "gradient_max",
    "gradient_spread",
    "gradient_zeros",
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
            t.gradient_rms,
            t.gradient_max,
            t.gradient_spread,
            t.gradient_zeros,
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


def headroom_rows(kinds: Mapping[str, Sequence[TensorReport]]) -> list[list[Any]]:
    """`[kind, octave, share]` for every octave in which a kind has elements that should have changed."""
    rows: list[list[Any]] = []
    for kind, tensors in kinds.items():
        counts = headroom_counts(tensors)
        shares = (counts / max(counts.sum(), 1.0)).tolist()
        rows += [[kind, HEADROOM_LOW + i, share] for i, share in enumerate(shares) if share]
    return rows
