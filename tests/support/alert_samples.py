"""Reports of given healths, a clock that stands still, and what alerts make of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from update_watch.judge.alerts import Alerts
from update_watch.report import AccumulatorReport, Alert, Cause, Health, Report, TensorReport

CURE = "BF16 weights round the updates away; keep FP32 master weights; retune the learning rate."


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def tensor(name: str, health: Health, **fields: Any) -> TensorReport:
    defaults: dict[str, Any] = {
        "cause": Cause.weight_rounding if health in (Health.stalled, Health.stalling) else None,
        "advice": "" if health is Health.healthy else CURE,
        "since_step": 129,
        "efficiency": {Health.stalled: 0.0, Health.stalling: 0.5, Health.healthy: 0.99}.get(health),
        "numel": 100,
    }
    return TensorReport(name, health, **{**defaults, **fields})


def accumulator(name: str, health: Health, cause: Cause | None = None) -> dict[str, AccumulatorReport]:
    return {name: AccumulatorReport(name, "bfloat16", health, cause, f"{name} is lost; keep it in FP32.")}


def report(*tensors: TensorReport, step: int = 128) -> Report:
    return Report(step=step, window=128, health=Health.healthy, headline="", tensors=tensors)


def told(alerts: Alerts, *tensors: TensorReport) -> tuple[Alert, ...]:
    return alerts.update(report(*tensors)).alerts


def levels(alerts: Sequence[Alert]) -> list[tuple[str, tuple[str, ...]]]:
    return [(a.level.value, a.tensors) for a in alerts]
