"""Evidence written by hand: one healthy tensor, and what to change in it."""

from __future__ import annotations

from typing import Any

from update_watch.evidence import AccumulatorEvidence, Numbers, TensorEvidence, WindowEvidence
from update_watch.judge.diagnosis import Diagnosis
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, Report, TensorReport
from update_watch.thresholds import Thresholds


def histogram(*headrooms: int) -> tuple[float, ...]:
    """A headroom histogram with equal shares in the octaves that start at the given headrooms."""
    bins = [0.0] * HEADROOM_BINS
    for headroom in headrooms:
        bins[headroom - HEADROOM_LOW] += 1 / len(headrooms)
    return tuple(bins)


def numbers(efficiency: float | None, lost: float | None = None, **more: Any) -> Numbers:
    """Numbers of an accumulator; what is not given follows from the efficiency."""
    lost = (None if efficiency is None else max(0.0, 1 - efficiency)) if lost is None else lost
    fields = {
        "efficiency_error": 0.01,
        "displacement_efficiency": efficiency,
        "wanted_fraction": 1.0,
        "lost_fraction": lost,
    }
    return Numbers(efficiency, **{**fields, **more})


STILL: dict[str, Any] = {"changed_fraction": 0.0, "applied_ratio": 0.0}


def tensor(efficiency: float | None = 0.99, name: str = "blocks.0.attn.weight", **fields: Any) -> TensorEvidence:
    """A BF16 tensor trained by plain rounding; healthy by default. `numbers` fields can be given by their names."""
    of_numbers = {
        key: fields.pop(key)
        for key in ("lost", "efficiency_error", "displacement_efficiency", "wanted_fraction")
        if key in fields
    }
    defaults: dict[str, Any] = {
        "dtype": "bfloat16",
        "numel": 4096,
        "layer": name.rpartition(".")[0],
        "optimizer_group": "0/0",
        "steps": 128,
        "measured_steps": 128,
        "zero_gradient_fraction": 0.0,
        "numbers": numbers(efficiency, **of_numbers),
        "changed_fraction": 0.5 if efficiency else efficiency,
        "update_ratio": None if efficiency is None else 1e-3,
        "applied_ratio": 1e-3 * efficiency if efficiency else efficiency,
        "headroom_histogram": histogram(-1, 0, 1),
        "lr": 1e-3,
        "lr_max": 1e-3,
        "lr_min": 1e-3,
        "weight_decay": 0.01,
        "critical_lr": 2e-4,
        "state_factor": 1.0,
        "state_factor_steps": 128,
        "scheme": "plain",
        "displacement_evidence": 1.0,
    }
    return TensorEvidence(name, **{**defaults, **fields})


def accumulator(
    name: str,
    efficiency: float | None = 1.0,
    *,
    growth: float | None = 1.0,
    decay: float | None = 1.0,
    dtype: str = "bfloat16",
    **fields: Any,
) -> dict[str, AccumulatorEvidence]:
    """`accumulators=` of a tensor with one accumulator."""
    evidence = AccumulatorEvidence(
        name,
        dtype,
        fields.pop("numbers", numbers(efficiency, efficiency_error=None)),
        fields.pop("growth_numbers", numbers(growth, displacement_efficiency=None, wanted_fraction=0.4)),
        fields.pop("decay_numbers", numbers(decay, displacement_efficiency=None, wanted_fraction=0.6)),
        **fields,
    )
    return {name: evidence}


def window(*tensors: TensorEvidence, step: int = 128, steps: int = 128, skipped_steps: int = 0) -> WindowEvidence:
    return WindowEvidence(step, steps, tensors, skipped_steps=skipped_steps)


def reports(*tensors: TensorEvidence, thresholds: Thresholds | None = None) -> list[Report]:
    """Judge the tensors as consecutive windows of 128 steps of one run."""
    diagnosis = Diagnosis(thresholds or Thresholds())
    return [diagnosis.judge(window(t, step=128 * (i + 1))) for i, t in enumerate(tensors)]


def verdicts(*tensors: TensorEvidence, thresholds: Thresholds | None = None) -> list[TensorReport]:
    """The same, the tensor's reports only."""
    return [report.tensors[0] for report in reports(*tensors, thresholds=thresholds)]


def verdict(evidence: TensorEvidence) -> TensorReport:
    """The verdict on a tensor that looks the same for four windows."""
    return verdicts(*[evidence] * 4)[-1]


GONE = {"lost": 1.0, "changed_fraction": 0.0, "headroom_histogram": histogram(-8, -7)}
WELL_ABOVE = {"headroom_histogram": histogram(3, 4, 5)}
STUCK_STATE = accumulator("exp_avg_sq", 0.9, decay=0.0, rate=0.001)
