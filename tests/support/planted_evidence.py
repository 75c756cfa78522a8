"""Evidence of every fault, the verdict it deserves, and a healthy twin that differs in one thing."""

from __future__ import annotations

from tests.support.evidence_samples import (
    GONE,
    STILL,
    STUCK_STATE,
    WELL_ABOVE,
    accumulator,
    histogram,
    tensor,
)
from update_watch.report import Cause, Health

# what was seen, the verdict, its cause, and a healthy twin that differs in one thing
CAUSES = {
    "requires_grad_off": (tensor(trainable=False, **STILL), Health.frozen, Cause.requires_grad_off, tensor()),
    "non_finite": (tensor(None, finite=False), Health.broken, Cause.non_finite, tensor()),
    "replicas_differ": (tensor(replicas_differ=True), Health.broken, Cause.replicas_differ, tensor()),
    "overwritten": (
        tensor(net_efficiency=0.02, undone_fraction=0.97, written_between=1e-3, written_steps=30, written_step=127),
        Health.stalled,
        Cause.overwritten,
        tensor(net_efficiency=0.8, undone_fraction=0.2, written_between=1e-3, written_steps=12),  # an outer step
    ),
    "overwritten-and-not-normalised": (
        tensor(net_efficiency=0.02, undone_fraction=0.97, written_between=1e-3, written_steps=127, travelled=0.3),
        Health.stalled,
        Cause.overwritten,
        tensor(net_efficiency=0.02, undone_fraction=0.97, written_between=1e-3, written_steps=127, travelled=4.0),
    ),
    "overwritten-by-a-grid": (
        tensor(
            **{"net_efficiency": 0.4, "undone_fraction": 0.6, "written_between": 1e-3, "written_steps": 127},
            travelled=4.0,
            is_put_back=True,
        ),
        Health.stalling,
        Cause.overwritten,
        tensor(net_efficiency=0.4, undone_fraction=0.6, written_between=1e-3, written_steps=127),  # as Lookahead does
    ),
    "not_copied_back": (
        tensor(net_efficiency=0.0, is_master=True, moved=0.0, displacement_evidence=1.0),
        Health.stalled,
        Cause.not_copied_back,
        tensor(net_efficiency=None, is_master=True, moved=0.0),  # too small to show yet
    ),
    "not_in_optimizer": (tensor(optimizer_group="", **STILL), Health.idle, Cause.not_in_optimizer, tensor()),
    "no_gradient": (tensor(None, gradless_steps=128), Health.idle, Cause.no_gradient, tensor(gradless_steps=127)),
    "zero_gradient": (
        tensor(0.0, zero_gradient_fraction=1.0, **GONE),
        Health.idle,
        Cause.zero_gradient,
        tensor(zero_gradient_fraction=0.999),
    ),
    "zero_learning_rate": (
        tensor(None, lr=0.0, lr_max=0.0),
        Health.idle,
        Cause.zero_learning_rate,
        tensor(lr=0.0, lr_max=1e-9),
    ),
    "skipped_steps": (
        tensor(None, skipped_steps=128, measured_steps=0),
        Health.idle,
        Cause.skipped_steps,
        tensor(skipped_steps=60),
    ),
    "not_replayable": (
        tensor(None, reason="its rule draws random numbers"),
        Health.unknown,
        Cause.not_replayable,
        tensor(),
    ),
    "weight_rounding-stalled": (tensor(0.0, **GONE), Health.stalled, Cause.weight_rounding, tensor(0.96)),
    "weight_rounding-stalling": (tensor(0.5, lost=0.6), Health.stalling, Cause.weight_rounding, tensor(0.82)),
    "weight_rounding-fp32": (
        tensor(0.0, dtype="float32", **GONE),
        Health.stalled,
        Cause.weight_rounding,
        tensor(1.0, dtype="float32"),
    ),
    "weight_rounding-joined": (
        tensor(0.0, scheme="carried:kahan_comp", displacement_evidence=0.0, **GONE),
        Health.stalled,
        Cause.weight_rounding,
        tensor(1.0, scheme="carried:kahan_comp", displacement_evidence=0.0, **GONE),
    ),
    "weight_rounding-unknown-scheme": (
        tensor(0.0, scheme="unknown", **{**GONE, "headroom_histogram": histogram(-4)}),
        Health.stalled,
        Cause.weight_rounding,
        tensor(0.0, scheme="unknown", displacement_efficiency=0.97, lost=1.0),
    ),
    "weight_rounding-stochastic": (
        tensor(0.3, scheme="stochastic", lost=0.8, headroom_histogram=histogram(-3)),
        Health.stalling,
        Cause.weight_rounding,
        tensor(0.93, scheme="stochastic", lost=0.9, headroom_histogram=histogram(-3)),
    ),
    "weight_rounding-drift": (
        tensor(0.87, displacement_efficiency=0.41, lost=0.3),
        Health.stalling,
        Cause.weight_rounding,
        tensor(0.87, displacement_efficiency=0.9, lost=0.3),
    ),
    "not_written": (tensor(0.0, lost=1.0, **WELL_ABOVE), Health.stalled, Cause.not_written, tensor(1.0, **WELL_ABOVE)),
    "not_written-but-the-tail": (
        tensor(0.2, lost=0.8, **WELL_ABOVE),
        Health.stalling,
        Cause.not_written,
        tensor(0.95, lost=0.2, **WELL_ABOVE),
    ),
    "not_written-in-part": (
        tensor(0.6, lost=0.5, headroom_histogram=histogram(-2, 3, 4)),
        Health.stalling,
        Cause.not_written,
        tensor(0.9, lost=0.5, headroom_histogram=histogram(-2, 3, 4)),
    ),
    "state_rounding-small": (
        tensor(state_factor=0.45, accumulators=STUCK_STATE),
        Health.stalling,
        Cause.state_rounding,
        tensor(state_factor=0.7, accumulators=accumulator("exp_avg_sq", rate=0.05)),
    ),
    "state_rounding-large": (
        tensor(state_factor=2.1, accumulators=STUCK_STATE),
        Health.stalling,
        Cause.state_rounding,
        tensor(state_factor=2.1, accumulators=accumulator("exp_avg_sq", dtype="float32", rate=0.001)),
    ),
}
