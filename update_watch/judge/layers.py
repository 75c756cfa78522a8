"""From tensors to layers: the worst health of each module, and which of its tensors have it."""

from __future__ import annotations

from collections.abc import Sequence

from update_watch.judge.efficiency_grade import known
from update_watch.report import SEVERITY, LayerReport, TensorReport, weighted_mean
from update_watch.worker import unhurried

_RANK = {health: i for i, health in enumerate(SEVERITY)}


def by_layer(tensors: Sequence[TensorReport]) -> tuple[LayerReport, ...]:
    """One `LayerReport` per module path, in order of appearance."""
    layers: dict[str, list[TensorReport]] = {}
    for tensor in unhurried(tensors):
        layers.setdefault(tensor.layer, []).append(tensor)
    return tuple(_layer(name, members) for name, members in unhurried(layers.items()))


def _layer(name: str, members: list[TensorReport]) -> LayerReport:
    if len(members) == 1:
        (only,) = members
        return LayerReport(name, only.health, (only.name,), known(only.efficiency))
    worst = min((t.health for t in members), key=_RANK.__getitem__)
    names = tuple(t.name for t in members if t.health is worst)
    return LayerReport(name, worst, names, weighted_mean((t.efficiency, t.numel) for t in members))
