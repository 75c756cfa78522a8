"""What an alert says, and where."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from tests.support.alert_samples import Clock, accumulator, report, tensor, told
from update_watch.judge.alerts import Alerts
from update_watch.report import Cause, Health
from update_watch.thresholds import Thresholds


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
        "Fix: keep FP32 master weights: model.float() and torch.autocast (+66.8 kB), or use stochastic rounding (torchao, +0 B)"
        " or Kahan summation (optimi, +33.4 kB); then retune the learning rate.",
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
    assert "Fix: keep all 5 norms in FP32 (+1.28 kB), or store norm weights zero-centred (w - 1), or keep" in alert.text


def test_no_cost_is_told_of_formats_whose_cost_is_not_known(alerts: Alerts) -> None:
    (alert,) = told(alerts, tensor("a.w", Health.stalled, shape=(64, 8), dtype="float8_e4m3fn"))
    assert "model.float() and torch.autocast, or use" in alert.text and "Kahan summation (optimi);" in alert.text


def test_a_number_that_is_none_is_written_as_it_is(alerts: Alerts) -> None:
    said = "NaN or infinity among its weights; go back."
    (alert,) = told(alerts, tensor("b.w", Health.broken, cause=Cause.non_finite, advice=said))
    assert alert.text.startswith("b.w since step 129: NaN or infinity among its weights.")


def test_the_trainer_at_hand_gives_the_words(alerts: Alerts) -> None:
    (alert,) = alerts.update(report(tensor("a.w", Health.stalled, dtype="bfloat16")), "lightning").alerts
    assert "Trainer(precision='bf16-mixed')" in alert.text


def test_a_title_counts_what_is_as_bad_as_it_says_and_the_rest_apart(alerts: Alerts) -> None:
    bad = [tensor(f"{i}.w", Health.stalled) for i in range(2)] + [tensor("2.w", Health.stalling)]
    well = [tensor(f"{i}.w", Health.healthy) for i in range(3, 6)]
    (first,) = told(alerts, *bad, *well)
    assert first.title == "STALLED: 2 of 6 tensors, 1 more stalling"
    (grown,) = told(alerts, *bad, *[dataclasses.replace(t, health=Health.stalling, cause=bad[0].cause) for t in well])
    assert grown.title == "STALLED: 2 of 6 tensors, 4 more stalling, was 3"


def test_those_that_the_title_is_about_come_by_name_before_larger_groups(alerts: Alerts) -> None:
    mild = [tensor(name, Health.stalling) for name in ("up.weight", "up.bias", "down.weight", "down.bias")]
    (alert,) = told(alerts, *mild, tensor("norm.weight", Health.stalled), tensor("head.weight", Health.healthy))
    assert alert.title == "STALLED: 1 of 6 tensors, 4 more stalling"
    assert alert.text.startswith("norm.weight, 4 more since step 129: ")


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


def test_a_record_has_at_most_four_lines_and_leaves_the_list_to_the_report(
    alerts: Alerts, caplog: pytest.LogCaptureFixture
) -> None:
    decay = accumulator("weight_decay", Health.stalled, Cause.decay_rounding)
    stalled = [tensor(f"h.{i}.w", Health.stalled) for i in range(40)]
    (alert,) = told(alerts, *stalled, tensor("z.w", Health.healthy, accumulators=decay))
    (record,) = caplog.messages
    assert "\n- h.0.w: stalled" in alert.text and alert.text.endswith("and 35 more")
    assert len(record.splitlines()) == 4 and "- h." not in record
    assert record.splitlines()[2].startswith("Fix: ")
    repr_of = repr(report(*stalled, step=512))
    assert repr_of.startswith("<update_watch.Report, step 512: ") and len(repr_of) < 600


def test_two_watches_do_not_share_what_they_told(clock: Clock) -> None:
    first, second = Alerts(Thresholds(), clock), Alerts(Thresholds(), clock)
    assert len(told(first, tensor("a.w", Health.stalled))) == len(told(second, tensor("a.w", Health.stalled))) == 1
