from __future__ import annotations

import dataclasses
import math

import pytest

from update_watch.thresholds import Thresholds


def test_defaults_are_the_published_limits() -> None:
    limits = Thresholds()
    assert (limits.stalled, limits.stalling) == (0.1, 0.8)
    assert (limits.stalled_exit, limits.stalling_exit) == (0.15, 0.88)
    assert (limits.state_low, limits.state_high) == (0.67, 1.5)


def test_thresholds_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Thresholds().stalled = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stalled": -0.1}, "Thresholds(stalled=-0.1) must be a number from 0 to 1."),
        ({"stalling": 1.5}, "Thresholds(stalling=1.5) must be a number from 0 to 1."),
        ({"stalling": math.nan}, "Thresholds(stalling=nan) must be a number from 0 to 1."),
        ({"stalling": "0.8"}, "Thresholds(stalling='0.8') must be a number from 0 to 1."),
        ({"stalling": True}, "Thresholds(stalling=True) must be a number from 0 to 1."),
        ({"maximum_error": -1}, "Thresholds(maximum_error=-1) must be a number at least 0."),
        ({"alert_cooldown": math.inf}, "Thresholds(alert_cooldown=inf) must be a number at least 0."),
        ({"minimum_steps": 0}, "Thresholds(minimum_steps=0) must be a whole number of at least 1."),
        ({"minimum_steps": 2.5}, "Thresholds(minimum_steps=2.5) must be a whole number of at least 1."),
        ({"alerts_per_hour": False}, "Thresholds(alerts_per_hour=False) must be a whole number of at least 1."),
        ({"drift_windows": 1}, "Thresholds(drift_windows=1) must be a whole number of at least 2."),
        (
            {"stalled": 0.2},
            "Thresholds(stalled=0.2, stalled_exit=0.15): stalled must not exceed stalled_exit; set both.",
        ),
        (
            {"stalling": 0.9},
            "Thresholds(stalling=0.9, stalling_exit=0.88): stalling must not exceed stalling_exit; set both.",
        ),
        (
            {"state_low": 1.2},
            "Thresholds(state_low=1.2, state_high=1.5): 1 is the healthy state factor and must lie between them.",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_a_wrong_value_is_named_with_its_remedy(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match="Thresholds") as error:
        Thresholds(**fields)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_a_pair_of_limits_can_be_moved_together() -> None:
    assert Thresholds(stalling=0.9, stalling_exit=0.95).stalling == 0.9
