"""Alerts are episodes: begun, spread, worse, over."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest

from tests.support.alert_samples import Clock, accumulator, levels, tensor, told
from update_watch.judge.alerts import Alerts
from update_watch.report import Alert, Cause, Health, Level, TensorReport


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


@pytest.mark.parametrize("count", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_run_of_many_tensors_whose_stall_creeps_in_tells_at_most_six(
    count: int, alerts: Alerts, clock: Clock
) -> None:
    rng = random.Random(0)
    onset = {f"layers.{i // 10}.m{i % 10}.weight": rng.uniform(0, 50) for i in range(count)}
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


def test_a_tensor_of_no_elements_lacks_no_measurement(alerts: Alerts) -> None:
    empty = tensor(
        "e", Health.unknown, cause=Cause.not_replayable, advice="Unknown, because it has no elements.", numel=0
    )
    assert not told(alerts, empty, tensor("g", Health.healthy))


def test_what_is_frozen_and_moves_by_its_optimizer_is_a_warning(alerts: Alerts) -> None:
    text = "It is frozen (requires_grad is False) and yet it moves, by 0.001 of its size per step; take it out."
    moving = tensor("a.w", Health.healthy, cause=Cause.requires_grad_off, advice=text, trainable=False)
    (alert,) = told(alerts, moving, tensor("b.w", Health.healthy))
    assert (alert.level, alert.title) == (Level.warn, "STILL MOVING: 1 of 2 tensors")
