"""How many alerts an hour sees, and what a resume remembers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.alert_samples import Clock, accumulator, levels, tensor, told
from update_watch.judge.alerts import Alerts
from update_watch.report import Cause, Health, Level, TensorReport
from update_watch.thresholds import Thresholds

# --- budget ----------------------------------------------------------------------------------------


def story(i: int, health: Health = Health.stalling) -> TensorReport:
    """A tensor with a cause of its own."""
    causes = [
        Cause.weight_rounding,
        Cause.not_written,
        Cause.state_rounding,
        Cause.overwritten,
        Cause.not_copied_back,
        Cause.accumulation_rounding,
    ]
    return tensor(f"l{i}.w", health, cause=causes[i])


def test_the_budget_of_an_hour_holds_back_and_the_next_alert_says_so(clock: Clock) -> None:
    alerts = Alerts(Thresholds(alerts_per_hour=4), clock)
    bad: list[TensorReport] = []
    counts = []
    for i in range(5):
        clock.now += 60
        bad.append(story(i))
        counts.append(len(told(alerts, *bad)))
    assert counts == [1, 1, 1, 0, 0]  # the last quarter is kept for errors
    (error,) = told(alerts, *bad, story(5, Health.stalled))
    assert error.level is Level.error
    assert error.text.splitlines()[-1] == "2 other changes held back: 4 alerts an hour at most."
    clock.now += 3600
    found = told(alerts, *bad, story(5, Health.stalled))
    assert levels(found) == [("WARN", ("l3.w",)), ("WARN", ("l4.w",))]
    assert not any("held back" in alert.text for alert in found)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 700),
            st.lists(
                st.sampled_from([Health.healthy, Health.stalling, Health.stalled, Health.idle]), min_size=4, max_size=4
            ),
        ),
        min_size=5,
        max_size=60,
    ),
    st.integers(1, 6),
)
def test_no_hour_ever_sees_more_than_its_budget(course: list[tuple[int, list[Health]]], budget: int) -> None:
    clock = Clock()
    alerts = Alerts(Thresholds(alerts_per_hour=budget), clock)
    sent: list[float] = []
    for seconds, healths in course:
        clock.now += seconds
        found = told(alerts, *[tensor(f"t{i}", h) for i, h in enumerate(healths)])
        assert len({(a.cause, a.title) for a in found}) == len(found)
        sent += [clock.now] * len(found)
        assert len([t for t in sent if clock.now - 3600 < t]) <= budget


# --- resume ----------------------------------------------------------------------------------------


def resumed(alerts: Alerts, clock: Clock) -> Alerts:
    later = Alerts(Thresholds(), clock)
    later.load_state_dict(json.loads(json.dumps(alerts.state_dict())))
    return later


def test_a_resume_does_not_repeat_what_was_told(alerts: Alerts, clock: Clock) -> None:
    lost = accumulator("exp_avg_sq", Health.stalled, Cause.state_rounding)
    tensors = (tensor("a.w", Health.stalled), tensor("b.w", Health.healthy, accumulators=lost))
    assert len(told(alerts, *tensors)) == 2
    clock.now += 1e6
    later = resumed(alerts, clock)
    assert later.state_dict() == alerts.state_dict()
    assert told(later, *tensors) == ()
    assert [a.level for a in told(later, tensor("a.w", Health.healthy))] == [Level.info]  # of b.w nothing is known


def test_a_clock_that_was_set_back_does_not_silence_the_alerts(alerts: Alerts, clock: Clock) -> None:
    told(alerts, tensor("a.w", Health.stalled))
    told(alerts, tensor("a.w", Health.healthy))
    clock.now -= 1e5
    assert levels(told(alerts, tensor("a.w", Health.stalled))) == [("ERROR", ("a.w",))]


def empty(**parts: Any) -> dict[str, Any]:
    return {"version": 2, "episodes": {}, "was_well": [], "resting": [], "sent": [], "held": [], **parts}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (None, TypeError, "Alerts.load_state_dict(NoneType) needs a dict"),
        ({}, ValueError, "Alerts.load_state_dict: version=None, 2 expected"),
        (empty(episodes=[]), TypeError, "episodes=[] is not a Mapping"),
        (empty(sent=3), TypeError, "sent=3 is not a list"),
    ],
)
def test_a_state_that_is_none_is_refused_and_changes_nothing(
    alerts: Alerts, state: Any, error: type[Exception], message: str
) -> None:
    told(alerts, tensor("a.w", Health.stalled))
    before = alerts.state_dict()
    with pytest.raises(error) as caught:
        alerts.load_state_dict(state)
    assert message in str(caught.value)
    assert alerts.state_dict() == before


def test_entries_that_cannot_be_read_are_lost_alone(
    alerts: Alerts, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    told(alerts, tensor("a.w", Health.stalled), story(1, Health.stalled))
    state = alerts.state_dict()
    state["episodes"]["not_written"]["told_level"] = "LOUD"
    state["sent"].append(None)
    state["held"].append(3)
    caplog.clear()
    later = Alerts(Thresholds(), clock)
    later.load_state_dict(state)
    assert caplog.messages == ["Alerts.load_state_dict: 1 episode cannot be read and may be told again."]
    assert levels(told(later, tensor("a.w", Health.stalled), story(1, Health.stalled))) == [("ERROR", ("l1.w",))]
