"""Where evidence is thin the verdict waits, or says why it is unknown."""

from __future__ import annotations

import dataclasses

import pytest

from tests.support.evidence_samples import (
    GONE,
    histogram,
    tensor,
    verdict,
    verdicts,
)
from update_watch.evidence import TensorEvidence
from update_watch.judge.reasons import unknown
from update_watch.report import Health

# --- not enough to know ----------------------------------------------------------------------------


def test_few_measured_steps_are_pooled_over_windows_before_a_verdict() -> None:
    first, second = verdicts(*[tensor(0.0, steps=16, measured_steps=4, **GONE)] * 2)
    assert first.health is Health.unknown
    assert first.advice == unknown("only 4 of the 6 measured steps a verdict needs were seen so far")
    assert second.health is Health.stalled


def test_a_wide_interval_is_pooled_until_it_is_narrow() -> None:
    noisy = tensor(0.6, lost=0.9, efficiency_error=0.19, displacement_evidence=0.0)
    assert [t.health for t in verdicts(*[noisy] * 4)] == [*[Health.unknown] * 3, Health.stalling]


def test_an_interval_that_holds_no_doubt_needs_not_be_narrow() -> None:
    assert verdicts(tensor(0.3, lost=0.7, efficiency_error=0.15))[0].health is Health.stalling
    assert verdicts(tensor(0.08, lost=0.92, efficiency_error=0.05))[0].health is Health.stalling  # or it is stalled
    assert (
        verdicts(tensor(0.0, lost=1.0, efficiency_error=0.06))[0].health is Health.stalled
    )  # nothing that was seen arrived
    assert verdicts(tensor(1.5, lost=0.1, efficiency_error=0.2))[0].health is Health.healthy


def test_an_efficiency_within_its_error_of_the_limit_does_not_accuse() -> None:
    assert verdicts(tensor(0.75, efficiency_error=0.04))[0].health is Health.unknown
    assert verdicts(tensor(0.75, efficiency_error=0.02))[0].health is Health.stalling
    assert verdicts(tensor(0.79, efficiency_error=0.02))[0].health is Health.stalling  # narrow: its point is taken


def test_healthy_needs_evidence_as_a_stall_does() -> None:
    assert verdicts(tensor(0.82, lost=0.2, efficiency_error=0.05))[0].health is Health.unknown
    assert verdicts(tensor(0.95, lost=0.1, efficiency_error=0.05))[0].health is Health.healthy


def test_windows_are_pooled_till_the_interval_is_on_one_side_of_the_limit() -> None:
    found = verdicts(*[tensor(0.72, lost=0.3, efficiency_error=0.08)] * 6)
    healths = [str(t.health) for t in found]
    assert healths == ["unknown"] * 3 + ["stalling"] * 3  # two of 0.08 / sqrt(4) reach 0.8 no more


def test_what_is_never_measured_does_not_average_out() -> None:
    """A loss spike in each window that this tensor's turns missed: each window errs to the same side."""
    noisy = [tensor(0.07, lost=0.9, efficiency_error=0.4, displacement_evidence=0.0)] * 8
    missed = [dataclasses.replace(e, numbers=e.numbers._replace(unseen_error=0.4)) for e in noisy]
    assert verdicts(*noisy)[-1].health is Health.stalling
    assert all(found.health is Health.unknown for found in verdicts(*missed))


def test_an_earlier_verdict_stands_till_the_pooled_windows_say_otherwise() -> None:
    doubtful = tensor(0.78, lost=0.3, efficiency_error=0.09)
    found = verdicts(tensor(0.97), doubtful, doubtful)
    assert [t.health for t in found] == [Health.healthy] * 3


def test_an_error_that_is_not_known_is_no_error_of_nought() -> None:
    alone = tensor(0.97, measured_steps=1, efficiency_error=None)
    assert [str(t.health) for t in verdicts(*[alone] * 10)][:8] == ["unknown"] * 8


def test_of_single_steps_those_weigh_most_that_met_what_moves() -> None:
    """Few elements carry a tensor of which most arrives; most windows have met none of them."""

    def met(share: float, weight: float) -> TensorEvidence:
        e = tensor(share, measured_steps=1, efficiency_error=None, lost=1 - share)
        return dataclasses.replace(e, numbers=e.numbers._replace(weight=weight))

    windows = [met(0.97, 100.0) if i % 4 == 0 else met(0.3, 1.0) for i in range(24)]
    assert {str(t.health) for t in verdicts(*windows)} <= {"unknown", "healthy"}
    alike = [met(0.97 if i % 4 == 0 else 0.3, 1.0) for i in range(24)]
    assert verdicts(*alike)[-1].health is Health.stalling


def test_next_to_nothing_is_a_stall_only_where_no_more_may_have_arrived() -> None:
    said = {error: verdicts(tensor(0.02, lost=0.98, efficiency_error=error))[0].health for error in (0.03, 0.05, 0.07)}
    assert said == {0.03: Health.stalled, 0.05: Health.stalled, 0.07: Health.stalling}
    assert verdicts(tensor(0.0, lost=1.0, efficiency_error=0.08))[0].health is Health.stalled


def test_under_stochastic_rounding_the_error_counts_more() -> None:
    rare = {"scheme": "stochastic", "lost": 0.8, "headroom_histogram": histogram(-3), "displacement_evidence": 0.0}
    assert verdicts(tensor(0.75, efficiency_error=0.02, **rare))[0].health is Health.unknown
    assert verdicts(tensor(0.75, efficiency_error=0.01, **rare))[0].health is Health.stalling


def test_the_error_is_no_way_out_of_a_verdict() -> None:
    first, second = verdicts(tensor(0.5, lost=0.5), tensor(0.85, efficiency_error=0.05))
    assert (first.health, second.health) == (Health.stalling, Health.stalling)


def test_a_window_in_which_a_tensor_was_not_measured_keeps_the_verdict() -> None:
    found = verdicts(tensor(0.0, **GONE), *[tensor(None, measured_steps=0)] * 17)
    assert [t.health for t in found[:17]] == [Health.stalled] * 17
    assert found[17].health is Health.unknown
    assert {t.since_step for t in found[:17]} == {1}


def test_never_measured_is_unknown_with_the_reason() -> None:
    found = verdict(tensor(None, measured_steps=0))
    assert (found.health, found.cause) == (Health.unknown, None)
    assert found.advice == "Unknown, because it was measured in none of the optimizer steps of this window."


def test_an_optimizer_that_took_no_step_leaves_its_tensors_unknown() -> None:
    found = verdict(tensor(None, steps=0, measured_steps=0))
    assert (found.health, found.cause) == (Health.unknown, None)
    assert found.advice == "Unknown, because its optimizer took no step in this window."


def test_nothing_intended_is_idle() -> None:
    found = verdict(tensor(None, wanted_fraction=0.0))
    assert (found.health, found.cause) == (Health.idle, None)
    assert found.advice == "The optimizer intended no change in 128 measured steps."


@pytest.mark.parametrize(
    "evidence",
    [
        tensor(0.3, lost=0.002),
        tensor(-0.5, lost=0.4),
        tensor(3.1, lost=0.0),
        tensor(0.3, dtype="float32", lost=0.0),
    ],
    ids=["unlost", "backwards", "too-far", "fp32"],
)
def test_what_rounding_cannot_explain_is_unknown_not_stalled(evidence: TensorEvidence) -> None:
    found = verdict(evidence)
    assert (found.health, found.cause) == (Health.unknown, None)
    assert "which rounding does not explain" in found.advice


@pytest.mark.parametrize("scheme", ["unknown", "carried", "carried:mantissa"])
def test_weights_that_move_further_than_intended_are_not_healthy(scheme: str) -> None:
    """Cut off instead of rounded, they take a whole step of the format for any update towards zero."""
    found = verdict(tensor(1.8, scheme=scheme, efficiency_error=0.05, lost=0.4))
    assert (found.health, found.cause) == (Health.unknown, None)
    assert found.advice.startswith("Unknown, because it moved by 1.80 of the intended update")
    assert verdict(tensor(1.3, scheme=scheme, efficiency_error=0.05, lost=0.4)).health is Health.healthy
    noisy = tensor(1.8, scheme=scheme, efficiency_error=0.5, lost=0.4, displacement_efficiency=1.0)
    assert verdict(noisy).health is Health.healthy


@pytest.mark.parametrize("scheme", ["unknown", "stochastic", "carried"])
def test_a_remainder_carried_elsewhere_is_never_a_stall(scheme: str) -> None:
    carried = tensor(0.0, scheme=scheme, displacement_efficiency=0.98, lost=1.0)
    assert {t.health for t in verdicts(*[carried] * 6)} == {Health.healthy}


def test_where_something_may_carry_the_rest_too_short_a_window_leaves_it_unknown() -> None:
    unclear = tensor(0.0, scheme="unknown", displacement_evidence=0.1, **GONE)
    assert {t.health for t in verdicts(*[unclear] * 6)} == {Health.unknown}
    known_to = dataclasses.replace(unclear, scheme="carried")
    assert {t.health for t in verdicts(*[known_to] * 6)} == {Health.healthy}


def test_what_was_seen_to_arrive_once_is_trusted_where_a_window_is_too_short_to_tell() -> None:
    proof = tensor(0.0, scheme="unknown", displacement_efficiency=0.97, lost=1.0)
    unclear = tensor(0.0, scheme="unknown", displacement_evidence=0.1, **GONE)
    assert verdicts(proof, unclear)[1].health is Health.healthy


def test_half_a_displacement_must_be_seen_twice_because_a_first_window_misleads() -> None:
    half = tensor(0.4, scheme="unknown", displacement_efficiency=0.4, lost=0.6, headroom_histogram=histogram(-2))
    assert [t.health for t in verdicts(half, half)] == [Health.unknown, Health.stalling]


def test_no_change_under_stochastic_rounding_means_nothing_until_some_was_to_be_expected() -> None:
    tiny = tensor(
        0.0,
        numel=64,
        scheme="stochastic",
        lost=1.0,
        efficiency_error=0.0,
        displacement_evidence=0.0,
        headroom_histogram=histogram(-9),
    )
    # 128 steps * 64 elements * 2^-9.5 = 11 changes expected per window, 100 wanted
    assert [t.health for t in verdicts(*[tiny] * 10)] == [*[Health.unknown] * 8, *[Health.stalled] * 2]


def test_one_element_without_a_change_says_nothing_where_something_might_carry_the_rest() -> None:
    single = tensor(0.0, numel=1, scheme="unknown", lost=1.0, headroom_histogram=histogram(-4))
    # 128 steps * 1 element * 2^-4.5 = 6 changes expected per window, 100 wanted: more than 16 windows have
    assert {t.health for t in verdicts(*[single] * 20)} == {Health.unknown}


def test_half_a_displacement_after_a_good_one_must_be_seen_twice_too() -> None:
    good, half = (
        tensor(0.4, scheme="unknown", displacement_efficiency=x, lost=0.6, headroom_histogram=histogram(-2))
        for x in (0.9, 0.5)
    )
    assert [str(t.health) for t in verdicts(good, half, half)] == ["healthy", "healthy", "stalling"]


def test_evidence_from_before_a_rest_is_not_pooled() -> None:
    few = tensor(0.0, steps=16, measured_steps=4, **GONE)
    found = verdicts(few, tensor(0.0, zero_gradient_fraction=1.0), few, few)
    assert [str(t.health) for t in found] == ["unknown", "idle", "unknown", "stalled"]


def test_a_low_displacement_overrules_a_good_efficiency_only_after_four_windows() -> None:
    drifting = tensor(0.87, displacement_efficiency=0.41, lost=0.3)
    found = verdicts(*[drifting] * 4)
    assert [t.health for t in found] == [*[Health.healthy] * 3, Health.stalling]
    assert found[3].advice.startswith("BF16 weights round the drift away: 0.41 of the summed update arrived")


def test_a_displacement_that_scatters_does_not_overrule() -> None:
    scattered = [tensor(0.95, displacement_efficiency=x) for x in (1.2, 0.2, 0.9, 0.3, 1.1, 0.1, 0.8, 0.4)]
    assert {t.health for t in verdicts(*scattered)} == {Health.healthy}


def test_a_displacement_without_evidence_counts_for_nothing() -> None:
    low = tensor(0.95, displacement_efficiency=0.1, displacement_evidence=0.3)
    assert {t.health for t in verdicts(*[low] * 6)} == {Health.healthy}
    high = tensor(0.0, displacement_efficiency=1.0, displacement_evidence=0.3, lost=1.0)
    assert verdicts(high)[0].health is Health.stalled


def test_a_tensor_that_moved_in_steps_that_were_not_looked_at_had_a_gradient_there() -> None:
    seldom = {"steps": 11, "measured_steps": 0, "gradless_steps": 11, "applied_ratio": None, "changed_fraction": None}
    one = tensor(None, zero_gradient_fraction=None, moved=0.009, **seldom)
    assert verdicts(one)[0].advice == (
        "Unknown, because it had no gradient in the 11 of 128 steps that were looked at, and moved in the others."
    )
