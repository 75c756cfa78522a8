"""Numbers of a run as a whole, from the tensors of a report."""

from __future__ import annotations

import math
from collections.abc import Iterable

from update_watch.dashboards.known_values import known
from update_watch.report import Health, Report, TensorReport, weighted_mean


def lost_fraction(tensors: Iterable[TensorReport]) -> float | None:
    """Lost over wanted elements of all `tensors` together, 0..1."""
    return weighted_mean((t.lost_fraction, t.numel * (t.wanted_fraction or 0.0)) for t in tensors)


def lr_margin(tensor: TensorReport) -> float | None:
    """Learning rate over the one at which half of the updates are lost; under 1 more than half is."""
    return tensor.lr / tensor.critical_lr if tensor.critical_lr and tensor.lr is not None else None


def stalled_share(report: Report) -> float | None:
    """Share of the trainable elements that lie in stalled or broken tensors, 0..1."""
    trainable = [t for t in report.tensors if t.trainable]
    total = sum(t.numel for t in trainable)
    stalled = sum(t.numel for t in trainable if t.health in (Health.stalled, Health.broken))
    return stalled / total if total else None


def state_efficiencies(report: Report) -> Iterable[float | None]:
    """Of all accumulators but weight decay."""
    return (a.efficiency for t in report.tensors for a in t.accumulators.values() if a.name != "weight_decay")


def decay_efficiency(report: Report) -> float | None:
    """How much of the weight decay alone arrives, weighted by number of elements."""
    decays = ((t.accumulators.get("weight_decay"), t.numel) for t in report.tensors)
    return weighted_mean((a.efficiency, numel) for a, numel in decays if a is not None)


def farthest_state_factor(report: Report) -> float | None:
    """The one that is farthest from 1, in either direction."""
    factors = [f for f in known(t.state_factor for t in report.tensors) if f > 0]
    return max(factors, key=lambda f: abs(math.log(f)), default=None)
