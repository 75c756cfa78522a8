"""From tensors to layers and to the run: its health, and what of it is measured, moves unasked, or trains at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from update_watch.judge.efficiency_grade import known
from update_watch.judge.heard import loud
from update_watch.report import SEVERITY, Cause, Health, LayerReport, TensorReport, weighted_mean
from update_watch.worker import unhurried

BAD = (Health.broken, Health.stalled, Health.stalling)
_REST = frozenset(
    {
        Cause.requires_grad_off,
        Cause.not_in_optimizer,
        Cause.no_gradient,
        Cause.zero_gradient,
        Cause.zero_learning_rate,
        Cause.skipped_steps,
    }
)
RANK = {health: i for i, health in enumerate(SEVERITY)}


def by_layer(tensors: Sequence[TensorReport]) -> tuple[LayerReport, ...]:
    """One `LayerReport` per module path, in order of appearance."""
    layers: dict[str, list[TensorReport]] = {}
    for tensor in unhurried(tensors):
        layers.setdefault(tensor.layer, []).append(tensor)
    return tuple(_layer(name, members) for name, members in unhurried(layers.items()))


def run_health(tensors: Sequence[TensorReport]) -> Health:
    """The worst of broken, stalled and stalling; `healthy` only when next to nobody is worse or unknown.

    What is frozen or idle does not make a run frozen or idle while something else trains. An accumulator somebody
    is alerted about makes a run stalling.
    """
    counts = Counter(tensor.health for tensor in tensors)
    for health in BAD:
        if counts[health]:
            return health
    if any(one.health is not Health.idle for of_one in loud(tensors).values() for one in of_one):
        return Health.stalling
    if counts[Health.healthy] and counts[Health.healthy] >= counts[Health.unknown]:
        return Health.healthy
    return min(counts, key=RANK.__getitem__, default=Health.unknown)


def badness(t: TensorReport) -> tuple[int, float, int]:
    """The worse, the lower: by severity, then by efficiency, then larger tensors."""
    return RANK[t.health], 1.0 if t.efficiency is None else t.efficiency, -t.numel


def is_measurable(tensor: TensorReport) -> bool:
    """Whether its updates should be measured: it requires a gradient, and an optimizer holds it."""
    return tensor.trainable and tensor.cause is not Cause.not_in_optimizer


def unmeasured(tensors: Iterable[TensorReport]) -> list[TensorReport]:
    """Those that should be measured and cannot be: not for want of steps, but for a reason that stays."""
    return [t for t in tensors if t.health is Health.unknown and t.cause is Cause.not_replayable and is_measurable(t)]


def is_moving_unasked(tensor: TensorReport) -> bool:
    """Whether it moves although it should rest, or no signal reaches it."""
    return tensor.cause in _REST and tensor.health in (Health.healthy, Health.unknown)


def is_training_nothing(tensors: Iterable[TensorReport]) -> bool:
    """Whether nothing that requires a gradient is trained: at rest, or moved by decay and momentum alone.

    The end of a schedule that still has a rate is none.
    """
    trained = [t for t in tensors if t.trainable]
    return bool(trained) and all(
        t.cause is Cause.zero_gradient
        or (t.health is Health.idle and t.cause is not None and not (t.cause is Cause.zero_learning_rate and t.lr))
        for t in trained
    )


def _layer(name: str, members: list[TensorReport]) -> LayerReport:
    if len(members) == 1:
        (only,) = members
        return LayerReport(name, only.health, (only.name,), known(only.efficiency))
    worst = min((t.health for t in members), key=RANK.__getitem__)
    names = tuple(t.name for t in members if t.health is worst)
    return LayerReport(name, worst, names, weighted_mean((t.efficiency, t.numel) for t in members))
