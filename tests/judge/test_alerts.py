from __future__ import annotations

import dataclasses
import json
import logging
import random
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
def test_other_healths_are_never_told_while_something_trains(alerts: Alerts, health: Health) -> None:
    cause = None if health is Health.healthy else Cause.no_gradient
    for _ in range(5):
        assert told(alerts, tensor("a.w", health, cause=cause), tensor("b.w", Health.healthy)) == ()


# --- one story per cause -----------------------------------------------------------------------------


def events(alerts: Alerts, course: Sequence[Sequence[TensorReport]]) -> list[list[str]]:
    """First words of the titles, window by window."""
    return [[a.title.split(":")[0] for a in told(alerts, *tensors)] for tensors in course]


def test_an_end_is_told_once_and_only_after_a_beginning(alerts: Alerts) -> None:
    assert told(alerts, tensor("a.w", Health.healthy)) == ()
    told(alerts, tensor("a.w", Health.stalled))
    (info,) = told(alerts, tensor("a.w", Health.healthy))
    assert (info.level, info.title) == (Level.info, "Over: weight rounding")
    assert info.text == "1 tensor that had it is well again."
    assert told(alerts, tensor("a.w", Health.healthy)) == ()


def test_getting_worse_is_told_and_getting_better_is_not_until_it_is_over(alerts: Alerts) -> None:
    course = [Health.stalling, Health.stalled, Health.stalling, Health.stalled, Health.healthy]
    assert events(alerts, [[tensor("a.w", h)] for h in course]) == [["STALLING"], ["STALLED"], [], [], ["Over"]]


@pytest.mark.parametrize("rest", [Health.idle, Health.frozen, Health.unknown])
def test_a_stall_interrupted_by_rest_is_not_told_again(alerts: Alerts, rest: Health) -> None:
    others = tensor("b.w", Health.stalled), tensor("c.w", Health.healthy)
    told(alerts, tensor("a.w", Health.stalled), *others)
    assert told(alerts, tensor("a.w", rest), *others) == ()
    assert told(alerts, tensor("a.w", Health.stalled), *others) == ()


def test_what_becomes_unknown_is_not_over(alerts: Alerts) -> None:
    told(alerts, tensor("a.w", Health.stalled))
    assert told(alerts, tensor("a.w", Health.unknown)) == ()
    assert [a.title for a in told(alerts, tensor("a.w", Health.healthy))] == ["Over: weight rounding"]


def test_a_stall_that_spreads_is_told_at_1_10_50_percent_and_all(alerts: Alerts) -> None:
    names = [f"l{i}.w" for i in range(1000)]
    counts = [5, 9, 10, 50, 99, 100, 300, 499, 500, 999, 1000]
    course = [[tensor(n, Health.stalled if i < k else Health.healthy) for i, n in enumerate(names)] for k in counts]
    told_at = [k for k, found in zip(counts, events(alerts, course), strict=True) if found]
    assert told_at == [5, 10, 100, 500, 1000]


def test_one_more_tensor_is_told_again_only_where_it_is_half_of_the_model(alerts: Alerts) -> None:
    norms = [tensor(f"l{i}.norm", Health.stalled, numel=10) for i in range(5)]
    parts = [tensor("head", Health.stalled, numel=2000), tensor("emb", Health.stalled, numel=6000)]
    rest = tensor("g.w", Health.healthy, numel=2000)
    well = [dataclasses.replace(t, health=Health.healthy, cause=None) for t in parts]
    course = [[*norms, *well, rest], [*norms, parts[0], well[1], rest], [*norms, *parts, rest]]
    assert events(alerts, course) == [["STALLED"], [], ["STALLED"]]


def test_lost_decay_beside_lost_updates_is_one_story(alerts: Alerts) -> None:
    decaying = tensor(
        "b.w", Health.healthy, accumulators=accumulator("weight_decay", Health.stalled, Cause.decay_rounding)
    )
    (alert,) = told(alerts, tensor("a.w", Health.stalled), decaying)
    assert "Weight decay is lost in 1 other tensor as well." in alert.text
    found = told(alerts, tensor("a.w", Health.healthy), decaying)
    assert [a.cause for a in found] == [Cause.decay_rounding, Cause.weight_rounding]


def test_what_comes_and_goes_below_the_next_share_is_not_told(alerts: Alerts) -> None:
    rest = [tensor(f"g{i}.w", Health.healthy) for i in range(97)]
    bad, good = Health.stalled, Health.healthy
    course = [
        [tensor("a.w", a), tensor("b.w", b), *rest] for a, b in [(bad, good), (good, bad), (bad, bad), (bad, good)]
    ]
    assert events(alerts, course) == [["STALLED"], [], [], []]


def test_a_run_of_2000_tensors_whose_stall_creeps_in_tells_at_most_six(alerts: Alerts, clock: Clock) -> None:
    rng = random.Random(0)
    onset = {f"layers.{i // 10}.m{i % 10}.weight": rng.uniform(0, 50) for i in range(2000)}
    sizes = {name: rng.choice([64, 4096, 65536]) for name in onset}
    found: list[Alert] = []
    for window in range(50):
        clock.now += 600
        healths = {
            n: Health.healthy if window < o else Health.stalling if window < o + 5 else Health.stalled
            for n, o in onset.items()
        }
        # at the edge the verdict flaps
        healths |= {n: rng.choice([Health.healthy, Health.stalling]) for n, o in onset.items() if o <= window < o + 1}
        found += told(alerts, *[tensor(n, h, numel=sizes[n], shape=(sizes[n],)) for n, h in healths.items()])
    assert 4 <= len(found) <= 6
    assert all(alert.cause is Cause.weight_rounding for alert in found)


def test_an_episode_that_begins_again_waits_for_the_cooldown(alerts: Alerts, clock: Clock) -> None:
    bad, good = tensor("a.w", Health.stalling), tensor("a.w", Health.healthy)
    assert events(alerts, [[bad], [good]]) == [["STALLING"], ["Over"]]
    for _ in range(4):
        clock.now += 100
        assert told(alerts, bad) == told(alerts, good) == ()
    clock.now += 500
    assert [a.level for a in told(alerts, bad)] == [Level.warn]


def test_causes_are_stories_of_their_own_and_errors_come_first(alerts: Alerts) -> None:
    broken = tensor("b.w", Health.broken, cause=Cause.non_finite, advice="NaN; go back.")
    found = told(alerts, tensor("a.w", Health.stalling), broken, tensor("c.w", Health.healthy))
    assert levels(found) == [("ERROR", ("b.w",)), ("WARN", ("a.w",))]


# --- what it says ------------------------------------------------------------------------------------


def test_an_alert_says_who_since_when_what_was_seen_and_what_to_change(alerts: Alerts) -> None:
    norms = [
        tensor(f"blocks.{i}.norm.weight", Health.stalled, shape=(64,), numel=64, dtype="bfloat16", lost_fraction=0.98)
        for i in range(5)
    ]
    head = tensor("head.weight", Health.stalled, since_step=551, shape=(256, 64), numel=16384, dtype="bfloat16")
    rest = [tensor(f"blocks.{i}.up.weight", Health.healthy, shape=(64, 256), numel=16384) for i in range(10)]
    (alert,) = told(alerts, *norms, head, *rest)
    assert alert.title == "STALLED: 6 of 16 tensors"
    assert alert.text.splitlines() == [
        "All 5 norms since step 129, head.weight since step 551: BF16 weights without an FP32 master round the updates away"
        " (efficiency 0.00, 98% lost).",
        "Fix: keep FP32 master weights: model.float() and torch.autocast (+361 kB), or use stochastic rounding (torchao, +0 B)"
        " or Kahan summation (optimi, +361 kB); then retune the learning rate.",
        "- head.weight: stalled, efficiency 0.00",
        *[f"- blocks.{i}.norm.weight: stalled, efficiency 0.00, 98% lost" for i in range(4)],
        "and 1 more",
    ]
    assert alert.tensors == ("head.weight", *[f"blocks.{i}.norm.weight" for i in range(5)])


def test_a_few_norms_are_to_be_kept_in_fp32_alone(alerts: Alerts) -> None:
    norms = [
        tensor(f"blocks.{i}.norm.weight", Health.stalled, shape=(64,), numel=64, dtype="bfloat16") for i in range(5)
    ]
    rest = [tensor(f"blocks.{i}.up.weight", Health.healthy, shape=(64, 1024), numel=65536) for i in range(10)]
    (alert,) = told(alerts, *norms, *rest)
    assert "Fix: keep all 5 norms in FP32 (+640 B), or store norm weights zero-centred (w - 1), or keep" in alert.text


def test_the_trainer_at_hand_gives_the_words(alerts: Alerts) -> None:
    (alert,) = alerts.update(report(tensor("a.w", Health.stalled, dtype="bfloat16")), "lightning").alerts
    assert "Trainer(precision='bf16-mixed')" in alert.text


def test_a_title_stays_under_64_characters_and_what_is_above_the_list_under_600(alerts: Alerts) -> None:
    name = "a_very_long_name_of_a_module_that_nobody_would_choose_" * 5
    state = accumulator(f"{name}_state", Health.stalled, Cause.state_rounding)
    found = told(
        alerts,
        *[tensor(f"{name}.{i}.{name}{i}", Health.stalled, since_step=i) for i in range(40)],
        tensor("z.w", Health.healthy, accumulators=state),
    )
    assert len(found) == 2
    for alert in found:
        assert len(alert.title) < 64
        assert len(alert.text.split("\n- ")[0]) < 600


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
    assert alert.title == f"{str(health).upper()}: {name} of 1 of 2 tensors"
    assert f"{name} is lost" in alert.text
    assert told(alerts, lost) == ()
    (info,) = told(alerts, tensor("a.w", Health.healthy, accumulators=accumulator(name, Health.healthy)))
    assert info.title.startswith("Over: ")


def test_partial_loss_in_a_state_is_not_told(alerts: Alerts) -> None:
    part = accumulator("exp_avg_sq", Health.stalling, Cause.state_rounding)
    assert told(alerts, tensor("a.w", Health.healthy, accumulators=part)) == ()


def test_a_stalled_weight_drowns_its_state_and_decay_but_not_its_average(alerts: Alerts) -> None:
    parts = {
        **accumulator("exp_avg_sq", Health.stalled, Cause.state_rounding),
        **accumulator("weight_decay", Health.stalled, Cause.decay_rounding),
        **accumulator("average:ema", Health.stalled, Cause.average_rounding),
    }
    found = told(alerts, tensor("a.w", Health.stalled, accumulators=parts))
    assert {a.cause for a in found} == {Cause.weight_rounding, Cause.average_rounding}
    found = told(alerts, tensor("a.w", Health.healthy, accumulators=parts))
    assert {(a.level.value, a.cause) for a in found} == {
        ("WARN", Cause.state_rounding),
        ("WARN", Cause.decay_rounding),
        ("INFO", Cause.weight_rounding),
    }


# --- the run as a whole ------------------------------------------------------------------------------


def idle(name: str, cause: Cause, **fields: Any) -> TensorReport:
    return tensor(name, Health.idle, cause=cause, efficiency=None, advice="No gradient; look.", since_step=33, **fields)


@pytest.mark.parametrize(
    ("cause", "windows", "words"),
    [
        (Cause.zero_gradient, 1, "clipping norm of 0"),
        (Cause.no_gradient, 1, "detached"),
        (Cause.not_in_optimizer, 1, "after the model was wrapped"),
        (Cause.skipped_steps, 1, "overflow"),
        (Cause.zero_learning_rate, 3, "warm-up"),
    ],
)
def test_a_run_that_trains_nothing_is_one_error_with_its_reason(
    alerts: Alerts, cause: Cause, windows: int, words: str
) -> None:
    dead = [idle("a.w", cause, lr=0.0), idle("b.w", cause, lr=0.0), tensor("c.w", Health.frozen, trainable=False)]
    found = [told(alerts, *dead) for _ in range(6)]
    assert [len(alerts_) for alerts_ in found] == [int(i == windows - 1) for i in range(6)]
    (alert,) = found[windows - 1]
    assert (alert.level, alert.title, alert.cause) == (Level.error, "NOTHING TRAINS", cause)
    assert alert.text.startswith("Nothing is being trained since step 33: ") and words in alert.text


def test_the_end_of_a_schedule_that_still_has_a_rate_is_no_error(alerts: Alerts) -> None:
    for _ in range(6):
        assert told(alerts, idle("a.w", Cause.zero_learning_rate, lr=1e-9)) == ()


def test_a_layer_that_goes_idle_after_it_was_well_is_information_and_one_that_never_trained_is_none(
    alerts: Alerts,
) -> None:
    others = [tensor(f"g{i}.w", Health.healthy) for i in range(20)]
    never = idle("never.w", Cause.no_gradient)
    assert told(alerts, tensor("a.w", Health.healthy), never, *others) == ()
    assert told(alerts, idle("a.w", Cause.no_gradient), never, *others) == ()  # one window may be a chance
    (info,) = told(alerts, idle("a.w", Cause.no_gradient), never, *others)
    assert (info.level, info.tensors) == (Level.info, ("a.w",))


@pytest.mark.parametrize(("unknown", "is_told"), [(1, False), (2, False), (3, True), (20, True)])
def test_what_cannot_be_measured_is_told_where_it_is_more_than_a_tenth(
    alerts: Alerts, unknown: int, is_told: bool
) -> None:
    reason = "Unknown, because its rule draws random numbers."
    lacking = [
        tensor(f"u{i}", Health.unknown, cause=Cause.not_replayable, advice=reason, efficiency=None)
        for i in range(unknown)
    ]
    found = told(alerts, *lacking, *[tensor(f"g{i}", Health.healthy) for i in range(20 - unknown)])
    assert [a.level for a in found] == ([Level.warn] if is_told else [])
    if is_told:
        assert found[0].title == f"NOT MEASURED: {unknown} of 20 tensors"
        assert found[0].text == f"{unknown} of 20 tensors cannot be measured: its rule draws random numbers."


def test_what_is_frozen_and_moves_by_its_optimizer_is_a_warning(alerts: Alerts) -> None:
    text = "It is frozen (requires_grad is False) and yet it moves, by 0.001 of its size per step; take it out."
    moving = tensor("a.w", Health.healthy, cause=Cause.requires_grad_off, advice=text, trainable=False)
    (alert,) = told(alerts, moving, tensor("b.w", Health.healthy))
    assert (alert.level, alert.title) == (Level.warn, "STILL MOVING: 1 of 2 tensors")


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
def test_an_alert_is_one_record_with_our_name_in_front(
    alerts: Alerts, caplog: pytest.LogCaptureFixture, health: Health, level: int
) -> None:
    if health is Health.healthy:
        told(alerts, tensor("a.w", Health.stalling))
    caplog.clear()
    caplog.set_level(logging.INFO, "update_watch")
    (alert,) = told(alerts, tensor("a.w", health))
    assert caplog.record_tuples == [("update_watch", level, f"update-watch, step 128: {alert.title}\n{alert.text}")]


def test_two_watches_do_not_share_what_they_told(clock: Clock) -> None:
    first, second = Alerts(Thresholds(), clock), Alerts(Thresholds(), clock)
    assert len(told(first, tensor("a.w", Health.stalled))) == len(told(second, tensor("a.w", Health.stalled))) == 1
