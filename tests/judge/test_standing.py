"""A window that did not look at a tensor says nothing new of its signal."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.evidence_samples import GONE, STILL, tensor, verdicts
from update_watch.evidence import Numbers, TensorEvidence, changed
from update_watch.report import Cause, Health

_LOOKED: dict[str, Any] = {"zero_gradient_fraction": 1.0, "gradient_looks": 128}
FOUND = {
    "frozen, and moves": (tensor(requires_grad=False, **_LOOKED), Health.healthy, Cause.requires_grad_off),
    "what is left of momentum": (tensor(**_LOOKED), Health.healthy, Cause.zero_gradient),
    "and gets lost": (tensor(0.1, **_LOOKED), Health.unknown, Cause.zero_gradient),
    "idle": (tensor(None, **_LOOKED, **STILL, moved=0.0), Health.idle, Cause.zero_gradient),
}


def unseen(of: TensorEvidence, **more: Any) -> TensorEvidence:
    """A short window of the same tensor, which it was not looked at in."""
    nothing = dict.fromkeys(
        (
            "zero_gradient_fraction",
            "changed_fraction",
            "update_ratio",
            "applied_ratio",
            "moved",
            "critical_lr",
            "state_factor",
        )
    )
    short = {"steps": 4, "measured_steps": 0, "gradient_looks": 0, "numbers": Numbers(), "headroom_histogram": ()}
    return changed(of, **nothing, **short, trainable=of.requires_grad, **more)


@pytest.mark.parametrize("kind", FOUND)
def test_what_was_found_of_a_signal_stands_while_nobody_looks(kind: str) -> None:
    evidence, health, cause = FOUND[kind]
    found = verdicts(evidence, *[unseen(evidence)] * 8, evidence, unseen(evidence))
    assert {(t.health, t.cause, t.advice) for t in found} == {(health, cause, found[0].advice)}
    assert "128 steps" in found[0].advice or "by 0.00099 of its size per step" in found[0].advice


@pytest.mark.parametrize("kind", FOUND)
def test_it_does_not_stand_for_ever(kind: str) -> None:
    evidence, health, cause = FOUND[kind]
    found = verdicts(evidence, *[unseen(evidence)] * 9)
    assert (found[-2].health, found[-2].cause) == (health, cause) != (found[-1].health, found[-1].cause)


def test_what_was_found_gives_way_to_what_is_seen() -> None:
    decays, good = tensor(**_LOOKED), tensor()
    found = verdicts(decays, good, unseen(good), tensor(0.0, **GONE))
    assert [t.cause for t in found] == [Cause.zero_gradient, None, None, Cause.weight_rounding]


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ({"gradless_steps": 4}, Cause.no_gradient),
        ({"lr": 0.0, "lr_max": 0.0, "lr_min": 0.0}, Cause.zero_learning_rate),
        ({"finite": False}, Cause.non_finite),
    ],
)
def test_what_is_known_without_a_look_is_said(more: dict[str, Any], cause: Cause) -> None:
    decays = tensor(**_LOOKED)
    assert [t.cause for t in verdicts(decays, unseen(decays, **more))] == [Cause.zero_gradient, cause]


def test_a_tensor_that_was_unfrozen_is_not_called_frozen() -> None:
    frozen = FOUND["frozen, and moves"][0]
    thawed = changed(unseen(frozen), requires_grad=True, trainable=True)
    assert [t.cause for t in verdicts(frozen, thawed)] == [Cause.requires_grad_off, None]
