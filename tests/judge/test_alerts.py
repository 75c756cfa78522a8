from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from update_watch.judge.alerts import Alerts
from update_watch.report import AccumulatorReport, Alert, Cause, Health, Level, Report, TensorReport
from update_watch.thresholds import Thresholds

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


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def alerts(clock: Clock) -> Alerts:
    return Alerts(Thresholds(), clock)


def test_a_stall_is_told_once(alerts: Alerts) -> None:
    stalled = tensor("a.w", Health.stalled)
    assert levels(told(alerts, stalled)) == [("ERROR", ("a.w",))]
    for _ in range(5):
        assert told(alerts, stalled) == ()


@pytest.mark.parametrize(
    ("health", "level"),
    [(Health.stalling, Level.warn), (Health.stalled, Level.error), (Health.broken, Level.error)],
)
def test_the_level_follows_the_health(alerts: Alerts, health: Health, level: Level) -> None:
    assert [a.level for a in told(alerts, tensor("a.w", health))] == [level]


@pytest.mark.parametrize("health", [Health.healthy, Health.idle, Health.frozen, Health.unknown])
def test_other_healths_are_never_told(alerts: Alerts, health: Health) -> None:
    cause = None if health is Health.healthy else Cause.no_gradient
    assert told(alerts, tensor("a.w", health, cause=cause)) == ()


def test_a_recovery_is_told_once_and_only_after_an_alert(alerts: Alerts) -> None:
    assert told(alerts, tensor("a.w", Health.healthy)) == ()
    told(alerts, tensor("a.w", Health.stalled))
    (info,) = told(alerts, tensor("a.w", Health.healthy))
    assert (info.level, info.title, info.text) == (Level.info, "1 of 1 tensor recovered", "- a.w: healthy again.")
    assert told(alerts, tensor("a.w", Health.healthy)) == ()


def test_getting_worse_is_told_and_getting_better_is_not_until_well(alerts: Alerts) -> None:
    course = [Health.stalling, Health.stalled, Health.stalling, Health.stalling, Health.healthy]
    assert [[a.level.value for a in told(alerts, tensor("a.w", h))] for h in course] == [
        ["WARN"],
        ["ERROR"],
        [],
        [],
        ["INFO"],
    ]


def test_what_was_an_error_is_not_told_again_before_it_was_well(alerts: Alerts, clock: Clock) -> None:
    course = [Health.stalled, Health.stalling, Health.stalled, Health.stalling, Health.stalled]
    counts = []
    for health in course:
        clock.now += 1000
        counts.append(len(told(alerts, tensor("a.w", health))))
    assert counts == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("rest", [Health.idle, Health.frozen, Health.unknown])
def test_a_stall_interrupted_by_rest_is_not_told_again(alerts: Alerts, rest: Health) -> None:
    told(alerts, tensor("a.w", Health.stalled))
    assert told(alerts, tensor("a.w", rest)) == ()
    assert told(alerts, tensor("a.w", Health.stalled)) == ()


def test_a_flapping_tensor_is_told_again_only_after_the_cooldown(alerts: Alerts, clock: Clock) -> None:
    bad, good = tensor("a.w", Health.stalling), tensor("a.w", Health.healthy)
    assert len(told(alerts, bad)) == 1
    assert len(told(alerts, good)) == 1
    for _ in range(4):
        clock.now += 100
        assert told(alerts, bad) == ()
        assert told(alerts, good) == ()
    clock.now += 500
    assert [a.level for a in told(alerts, bad)] == [Level.warn]


def test_what_the_cooldown_held_back_is_told_when_it_is_still_true(alerts: Alerts, clock: Clock) -> None:
    told(alerts, tensor("a.w", Health.stalled))
    told(alerts, tensor("a.w", Health.healthy))
    assert told(alerts, tensor("a.w", Health.stalled)) == ()
    clock.now += 900
    assert levels(told(alerts, tensor("a.w", Health.stalled))) == [("ERROR", ("a.w",))]


def test_the_cooldown_does_not_hold_back_what_gets_worse_or_others(alerts: Alerts) -> None:
    told(alerts, tensor("a.w", Health.stalling))
    found = told(alerts, tensor("a.w", Health.stalled), tensor("b.w", Health.stalling))
    assert levels(found) == [("ERROR", ("a.w",)), ("WARN", ("b.w",))]


def test_one_message_per_level_lists_the_worst_and_counts_the_rest(alerts: Alerts) -> None:
    stalled = [tensor(f"l{i}.w", Health.stalled, efficiency=i / 100, numel=7) for i in range(13)]
    found = told(alerts, *[tensor(f"g{i}.w", Health.healthy) for i in range(27)], *reversed(stalled))
    (alert,) = found
    assert alert.title == "13 of 40 tensors stalled (weight_rounding)"
    assert alert.text == "\n".join(
        [
            f"- l0.w: stalled since step 129. {CURE}",
            "- l1.w: stalled since step 129. BF16 weights round the updates away.",
            "- l2.w: stalled since step 129. BF16 weights round the updates away.",
            "- l3.w: stalled since step 129. BF16 weights round the updates away.",
            "- l4.w: stalled since step 129. BF16 weights round the updates away.",
            "and 8 more: l5.w, l6.w, l7.w, l8.w, l9.w, ...",
        ]
    )
    assert alert.tensors == tuple(f"l{i}.w" for i in range(13))
    assert (alert.step, alert.cause) == (128, Cause.weight_rounding)


def test_every_cause_is_listed_with_its_cure_before_any_repeats(alerts: Alerts) -> None:
    tensors = [tensor(f"l{i}.w", Health.stalled) for i in range(6)]
    tensors.append(
        tensor("x.w", Health.stalled, cause=Cause.not_written, advice="Not written; use another.", efficiency=0.05)
    )
    (alert,) = told(alerts, *tensors)
    assert alert.text.splitlines()[:3] == [
        f"- l0.w: stalled since step 129. {CURE}",
        "- x.w: stalled since step 129. Not written; use another.",
        "- l1.w: stalled since step 129. BF16 weights round the updates away.",
    ]
    assert alert.title == "7 of 7 tensors stalled"
    assert alert.cause is Cause.weight_rounding


def test_errors_come_first(alerts: Alerts) -> None:
    told(alerts, tensor("c.w", Health.stalling))
    found = told(
        alerts,
        tensor("a.w", Health.stalling),
        tensor("b.w", Health.broken, cause=Cause.non_finite),
        tensor("c.w", Health.healthy),
    )
    assert levels(found) == [("ERROR", ("b.w",)), ("WARN", ("a.w",)), ("INFO", ("c.w",))]


def test_a_title_counts_weights_and_never_calls_an_accumulator_one(alerts: Alerts, clock: Clock) -> None:
    one, other = (accumulator(name, Health.stalled, Cause.state_rounding) for name in ("exp_avg", "exp_avg_sq"))
    tensors = [tensor("a", Health.healthy, accumulators=one), tensor("b", Health.healthy, accumulators=other)]
    (alert,) = told(alerts, *tensors, tensor("c", Health.healthy))
    assert alert.title == "accumulators of 2 of 3 tensors stalled (state_rounding)"
    (alert,) = told(Alerts(Thresholds(), clock), *tensors, tensor("c", Health.stalling))
    assert alert.title == "1 of 3 tensors stalling (weight_rounding)" and len(alert.text.splitlines()) == 3


def test_a_title_stays_under_64_characters(alerts: Alerts) -> None:
    causes = {"cause": Cause.accumulation_rounding}
    name = "a_very_long_name_of_an_optimizer_state_that_nobody_would_choose"
    found = told(
        alerts,
        *[tensor(f"l{i}.w", Health.stalling, **causes) for i in range(2000)],
        *[tensor(f"m{i}.w", Health.stalled if i % 2 else Health.broken, **causes) for i in range(2000)],
    )
    late = told(
        alerts, tensor("z.w", Health.healthy, accumulators=accumulator(name, Health.stalled, Cause.state_rounding))
    )
    titles = [a.title for a in (*found, *late)]
    assert titles == [
        "2000 of 4000 tensors broken or stalled (accumulation_rounding)",
        "2000 of 4000 tensors stalling (accumulation_rounding)",
        "a_very_long_name_of_an_optimizer_state_that_nobody_would_cho...",
    ]
    assert max(map(len, titles)) < 64


# --- accumulators ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "health", "cause", "level"),
    [
        ("exp_avg_sq", Health.stalled, Cause.state_rounding, Level.warn),
        ("weight_decay", Health.stalled, Cause.decay_rounding, Level.warn),
        ("average:ema", Health.stalled, Cause.average_rounding, Level.error),
        ("grad", Health.stalling, Cause.accumulation_rounding, Level.warn),
    ],
)
def test_an_accumulator_is_told_once_under_its_own_name(
    alerts: Alerts, name: str, health: Health, cause: Cause, level: Level
) -> None:
    lost = tensor("a.w", Health.healthy, accumulators=accumulator(name, health, cause))
    (alert,) = told(alerts, lost, tensor("b.w", Health.healthy))
    assert (alert.level, alert.tensors, alert.cause) == (level, ("a.w",), cause)
    assert alert.title == f"{name} of 1 of 2 tensors {health} ({cause})"
    assert alert.text == f"- a.w [{name}]: {name} is lost; keep it in FP32."
    assert told(alerts, lost) == ()
    (info,) = told(alerts, tensor("a.w", Health.healthy, accumulators=accumulator(name, Health.healthy)))
    assert (info.level, info.text) == (Level.info, f"- a.w [{name}]: healthy again.")


def test_partial_loss_in_a_state_is_not_told(alerts: Alerts) -> None:
    part = accumulator("exp_avg_sq", Health.stalling, Cause.state_rounding)
    assert told(alerts, tensor("a.w", Health.healthy, accumulators=part)) == ()


def test_a_stalled_weight_drowns_its_state_and_decay_but_not_its_average(alerts: Alerts) -> None:
    parts = {
        **accumulator("exp_avg_sq", Health.stalled, Cause.state_rounding),
        **accumulator("weight_decay", Health.stalled, Cause.decay_rounding),
        **accumulator("average:ema", Health.stalled, Cause.average_rounding),
    }
    (alert,) = told(alerts, tensor("a.w", Health.stalled, accumulators=parts))
    assert alert.text.splitlines() == [
        f"- a.w: stalled since step 129. {CURE}",
        "- a.w [average:ema]: average:ema is lost; keep it in FP32.",
    ]
    assert alert.title == "1 of 1 tensor stalled (weight_rounding)"  # the weight's, which says more
    found = told(alerts, tensor("a.w", Health.healthy, accumulators=parts))
    assert [(a.level.value, a.title) for a in found] == [
        ("WARN", "accumulators of 1 of 1 tensor stalled"),
        ("INFO", "1 of 1 tensor recovered"),
    ]


@pytest.mark.parametrize("health", [Health.idle, Health.frozen, Health.unknown, Health.broken])
def test_a_resting_accumulator_is_no_news(alerts: Alerts, health: Health) -> None:
    told(
        alerts,
        tensor("a.w", Health.healthy, accumulators=accumulator("grad", Health.stalled, Cause.accumulation_rounding)),
    )
    assert told(alerts, tensor("a.w", Health.healthy, accumulators=accumulator("grad", health))) == ()


# --- budget ----------------------------------------------------------------------------------------


def test_the_budget_of_an_hour_holds_back_and_the_next_alert_says_so(clock: Clock) -> None:
    alerts = Alerts(Thresholds(alerts_per_hour=4), clock)
    bad: list[TensorReport] = []
    counts = []
    for i in range(5):
        clock.now += 60
        bad.append(tensor(f"l{i}.w", Health.stalling))
        counts.append(len(told(alerts, *bad)))
    assert counts == [1, 1, 1, 0, 0]  # the last quarter is kept for errors
    (error,) = told(alerts, *bad, tensor("e.w", Health.stalled))
    assert error.level is Level.error
    assert error.text.splitlines()[-1] == (
        "2 other changes of state were held back by the budget of 4 alerts per hour."
    )
    assert told(alerts, *bad, tensor("e.w", Health.stalled), tensor("f.w", Health.stalled)) == ()
    clock.now += 3600
    found = told(alerts, *bad, tensor("e.w", Health.stalled), tensor("f.w", Health.stalled))
    assert levels(found) == [("ERROR", ("f.w",)), ("WARN", ("l3.w", "l4.w"))]
    assert not any("held back" in alert.text for alert in found)


def test_what_was_held_back_and_passed_is_counted_but_not_told(clock: Clock) -> None:
    alerts = Alerts(Thresholds(alerts_per_hour=1), clock)
    assert len(told(alerts, tensor("a.w", Health.stalling))) == 1
    assert told(alerts, tensor("a.w", Health.stalling), tensor("b.w", Health.stalling)) == ()
    clock.now += 3601
    assert told(alerts, tensor("a.w", Health.stalling), tensor("b.w", Health.healthy)) == ()
    (alert,) = told(alerts, tensor("c.w", Health.stalling))
    assert alert.text.splitlines()[-1] == "1 other change of state was held back by the budget of 1 alert per hour."
    clock.now += 3601
    (alert,) = told(alerts, tensor("d.w", Health.stalling))
    assert "held back" not in alert.text


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
        assert len({a.level for a in found}) == len(found)
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
    assert told(later, *tensors) == ()
    assert [a.level for a in told(later, tensor("a.w", Health.healthy))] == [Level.info]


def test_a_resume_keeps_budget_cooldown_and_what_was_held_back(clock: Clock) -> None:
    alerts = Alerts(Thresholds(alerts_per_hour=1), clock)
    told(alerts, tensor("a.w", Health.stalled))
    told(alerts, tensor("b.w", Health.stalled))
    later = Alerts(Thresholds(alerts_per_hour=1), clock)
    later.load_state_dict(alerts.state_dict())
    assert later.state_dict() == alerts.state_dict()
    assert told(later, tensor("c.w", Health.stalled)) == ()
    clock.now += 3601
    (alert,) = told(later, tensor("d.w", Health.stalled))
    assert alert.text.splitlines()[-1].startswith("2 other changes of state were held back")


def test_a_clock_that_was_set_back_does_not_silence_the_alerts(clock: Clock) -> None:
    alerts = Alerts(Thresholds(alerts_per_hour=2), clock)
    told(alerts, tensor("a.w", Health.stalled))
    told(alerts, tensor("a.w", Health.healthy))
    told(alerts, tensor("b.w", Health.stalled))
    clock.now -= 1e5
    both = (tensor("a.w", Health.stalled), tensor("c.w", Health.stalled))
    assert levels(told(alerts, *both)) == [("ERROR", ("a.w", "c.w"))]


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (None, TypeError, "Alerts.load_state_dict(NoneType) needs a dict"),
        ({}, ValueError, "Alerts.load_state_dict: version=None, 1 expected"),
        ({"version": 1, "told": [], "told_at": {}, "sent": [], "held": []}, TypeError, "told=[] is not a Mapping"),
        ({"version": 1, "told": {}, "told_at": {}, "sent": 3, "held": []}, TypeError, "sent=3 is not a list"),
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
    told(alerts, tensor("a.w", Health.stalled), tensor("b.w", Health.stalled))
    state = alerts.state_dict()
    state["told"]["b.w"] = "LOUD"
    state["told_at"]["b.w"] = "yesterday"
    state["sent"].append(None)
    state["held"].append(3)
    caplog.clear()
    later = Alerts(Thresholds(), clock)
    later.load_state_dict(state)
    assert caplog.messages == ["Alerts.load_state_dict: 2 values cannot be read and may be told again."]
    assert levels(told(later, tensor("a.w", Health.stalled), tensor("b.w", Health.stalled))) == [("ERROR", ("b.w",))]


# --- the report and the log ------------------------------------------------------------------------


def test_only_the_alerts_of_the_report_change(alerts: Alerts) -> None:
    before = report(tensor("a.w", Health.stalled), step=512)
    after = alerts.update(before)
    assert before.alerts == ()
    assert [a.step for a in after.alerts] == [512]
    assert dataclasses.replace(after, alerts=()) == before


@pytest.mark.parametrize(
    ("health", "level"),
    [(Health.stalling, logging.WARNING), (Health.stalled, logging.ERROR), (Health.healthy, logging.INFO)],
)
def test_alerts_are_logged(alerts: Alerts, caplog: pytest.LogCaptureFixture, health: Health, level: int) -> None:
    if health is Health.healthy:
        told(alerts, tensor("a.w", Health.stalling))
    caplog.clear()
    caplog.set_level(logging.INFO, "update_watch")
    (alert,) = told(alerts, tensor("a.w", health))
    assert alert.text.startswith("- ") and "\n" not in alert.text  # one tensor: one line
    assert caplog.record_tuples == [("update_watch", level, f"{alert.title}: {alert.text[2:]}")]


def test_a_logged_list_begins_on_a_line_of_its_own(alerts: Alerts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "update_watch")
    (alert,) = alerts.update(report(tensor("a", Health.stalled), tensor("b", Health.stalled))).alerts
    assert caplog.messages == [f"{alert.title}:\n{alert.text}"] and caplog.messages[0].count("\n- ") == 2


def test_two_watches_do_not_share_what_they_told(clock: Clock) -> None:
    first, second = Alerts(Thresholds(), clock), Alerts(Thresholds(), clock)
    assert len(told(first, tensor("a.w", Health.stalled))) == len(told(second, tensor("a.w", Health.stalled))) == 1
