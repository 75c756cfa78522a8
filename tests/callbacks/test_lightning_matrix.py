"""Precision x optimization x accumulation x optimizers: each report against the full comparison of its own run."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.support.lightning_models import Module, everything, same, trainer
from update_watch.callbacks import UpdateWatch
from update_watch.report import Report

PRECISIONS = ("32-true", "bf16-true", "bf16-mixed", "16-mixed")
MODES = [
    (manual, accumulate, optimizers)
    for manual, accumulate, optimizers in itertools.product((False, True), (1, 3), (1, 2))
    if manual or optimizers == 1  # Lightning steps several optimizers only manually
]
TOLERANCE = 0.03


def run(precision: str, manual: bool, accumulate: int, optimizers: int, *callbacks: object) -> tuple[Module, list]:  # type: ignore[type-arg]
    torch.manual_seed(0)
    module = Module(optimizers, manual, accumulate, full=bool(callbacks))
    options = {} if manual else {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    fitted = trainer(precision=precision, callbacks=list(callbacks), **options)
    fitted.fit(module)
    return module, everything(module, fitted)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("manual", "accumulate", "optimizers"),
    MODES,
    ids=[f"{'manual' if m else 'automatic'}-accumulate{a}-optimizers{o}" for m, a, o in MODES],
)
@pytest.mark.slow
def test_report_equals_the_full_comparison_and_the_run_is_bit_identical(
    precision: str, manual: bool, accumulate: int, optimizers: int
) -> None:
    reports: list[Report] = []
    watch = UpdateWatch(window=128, sinks=[reports.append], print_audit=False)
    module, watched = run(precision, manual, accumulate, optimizers, watch)
    _, unwatched = run(precision, manual, accumulate, optimizers)
    assert same(watched, unwatched)

    assert [report.window for report in reports] == [12 // accumulate] and watch.last == reports[0]
    assert module.full is not None
    tensors = {t.name: t for t in reports[0].tensors}
    assert set(tensors) == set(module.full.sums) and len(tensors) == 6 * optimizers
    for name, tensor in tensors.items():
        assert tensor.dtype == ("bfloat16" if precision == "bf16-true" else "float32")
        assert tensor.efficiency == pytest.approx(module.full.efficiency(name), abs=TOLERANCE), name
        assert tensor.lost_fraction == pytest.approx(module.full.lost_fraction(name), abs=TOLERANCE), name
    worst = min(t.efficiency for t in tensors.values() if t.efficiency is not None)
    assert (worst < 0.5) == (precision == "bf16-true")
