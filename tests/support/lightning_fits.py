"""Fits of Lightning's Trainer under a callback that keeps its reports."""

from __future__ import annotations

from typing import Any

import lightning
import torch

from tests.support.lightning_models import Module, trainer
from update_watch.callbacks import UpdateWatch
from update_watch.report import Report
from update_watch.thresholds import Thresholds

STALLS = {"precision": "bf16-true"}  # with LOW, most tensors of the module stall
LOW = 1e-6
FAST = Thresholds(minimum_steps=2)


class Watched(UpdateWatch):
    """Keeps every report, and prints nothing."""

    def __init__(self, **options: Any) -> None:
        self.reports: list[Report] = []
        super().__init__(**{"window": 4, "sinks": [self.reports.append], "print_audit": False, **options})

    @property
    def windows(self) -> list[tuple[int, int]]:
        return [(report.step, report.window) for report in self.reports]


def hook_count(fitted: lightning.Trainer) -> int:
    return sum(len(opt._optimizer_step_pre_hooks) + len(opt._optimizer_step_post_hooks) for opt in fitted.optimizers)


def fit(module: Module, *callbacks: Any, **options: Any) -> lightning.Trainer:
    torch.manual_seed(0)
    fitted = trainer(callbacks=list(callbacks), **options)
    fitted.fit(module)
    return fitted


def stalled_names(report: Report | None) -> set[str]:
    assert report is not None
    return {t.name for t in report.tensors if t.health == "stalled"}
