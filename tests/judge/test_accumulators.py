from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.evidence_samples import STILL, accumulator, numbers, reports, tensor, verdict, verdicts, window
from update_watch.evidence import AccumulatorEvidence, Numbers
from update_watch.judge.accumulators import alert_level
from update_watch.judge.diagnosis import Diagnosis
from update_watch.judge.reasons import unknown
from update_watch.report import AccumulatorReport, Cause, Health, Level
from update_watch.thresholds import Thresholds

Accumulators = dict[str, AccumulatorEvidence]


def judged(accumulators: Accumulators, windows: int = 2, **fields: Any) -> AccumulatorReport:
    """The verdict on the one accumulator in the last of the windows."""
    (name,) = accumulators
    return verdicts(*[tensor(accumulators=accumulators, **fields)] * windows)[-1].accumulators[name]


STUCK = {
    "decay-of-a-state": (accumulator("exp_avg_sq", 0.9, decay=0.0, rate=0.001), Cause.state_rounding),
    "decay-of-a-momentum": (accumulator("momentum_buffer", 0.9, decay=0.03, rate=0.0005), Cause.state_rounding),
    "growth-of-a-state": (accumulator("exp_avg_sq", 0.0, growth=0.02, decay=None, rate=0.001), Cause.state_rounding),
    "decay-at-an-unknown-rate": (accumulator("exp_avg_sq", 0.9, decay=0.0), Cause.state_rounding),
    "counter": (accumulator("step", None, value=256.0), Cause.state_rounding),
    "counter-fp16": (accumulator("step", None, dtype="float16", value=2048.0), Cause.state_rounding),
    "weight-decay": (accumulator("weight_decay", 0.0), Cause.decay_rounding),
    "average": (accumulator("average:ema", 0.0, rate=0.001), Cause.average_rounding),
    "average-at-an-unknown-rate": (accumulator("average:swa", 0.02), Cause.average_rounding),
    "gradient": (accumulator("grad", 0.05), Cause.accumulation_rounding),
}
HEALTHY = {
    "state": accumulator("exp_avg_sq", rate=0.05),
    "state-that-tracks-within-3-percent": accumulator("exp_avg", 0.0, growth=0.0, decay=0.0, rate=0.1),
    "state-at-the-edge-of-bf16": accumulator("exp_avg_sq", 0.3, growth=0.9, decay=0.05, rate=2.0**-8),
    "beta2-0.995": accumulator("exp_avg_sq", 0.5, decay=0.05, rate=1 - 0.995),
    "state-fp32": accumulator("exp_avg_sq", 0.9, decay=0.0, dtype="float32", rate=0.001),
    "state-fp32-at-an-unknown-rate": accumulator("exp_avg_sq", 0.9, decay=0.0, dtype="float32"),
    "state-fp16-at-0.999": accumulator("exp_avg_sq", 0.9, decay=0.05, dtype="float16", rate=0.001),
    "hardly-any-decay-wanted": accumulator(
        "exp_avg_sq", 0.9, decay_numbers=Numbers(0.0, wanted_fraction=0.04), rate=0.001
    ),
    "tracking-at-an-unknown-rate": accumulator("exp_avg", 0.2, growth=0.1, decay=0.05),
    "partial-loss-at-an-unknown-rate": accumulator("exp_avg", 0.6, decay=0.3),
    "unknown-format": accumulator("mantissa", 0.0, growth=0.9, decay=0.0, dtype="uint16"),
    "counter-fp32": accumulator("step", None, dtype="float32", value=256.0),
    "weight-decay": accumulator("weight_decay", 0.97),
    "weight-decay-in-one-rounding": accumulator(
        "weight_decay", 0.05, numbers=numbers(0.05, displacement_efficiency=0.99)
    ),
    "weight-decay-fp32": accumulator("weight_decay", 0.0, dtype="float32"),
    "average": accumulator("average:ema", 0.93, rate=0.01),
    "average-in-steps-of-an-ulp": accumulator("average:ema", 0.1, numbers=numbers(0.1, displacement_efficiency=0.95)),
    "average-that-tracks-within-4-percent": accumulator("average:ema", 0.0, rate=0.1),
    "average-fp32": accumulator("average:ema", 0.0, dtype="float32", rate=1e-4),
    "gradient": accumulator("grad", 0.95),
    "gradient-fp32": accumulator("grad", 0.5, dtype="float32"),
}


@pytest.mark.parametrize("name", STUCK)
def test_an_accumulator_that_stands_still_is_named_within_two_windows(name: str) -> None:
    accumulators, cause = STUCK[name]
    found = judged(accumulators)
    assert (found.health, found.cause) == (Health.stalled, cause)
    assert found.advice


@pytest.mark.parametrize("name", HEALTHY)
def test_its_healthy_twin_stays_healthy(name: str) -> None:
    for windows in (1, 2, 5):
        found = judged(HEALTHY[name], windows)
        assert (found.health, found.cause, found.advice) == (Health.healthy, None, "")


@pytest.mark.parametrize("name", STUCK)
def test_the_health_of_the_tensor_stays_with_its_weight(name: str) -> None:
    found = verdict(tensor(accumulators=STUCK[name][0]))
    assert (found.health, found.cause) == (Health.healthy, None)


def test_a_second_moment_at_beta2_0999_is_named_in_the_first_window() -> None:
    found = judged(accumulator("exp_avg_sq", 0.9, decay=0.0, rate=0.001), windows=1)
    assert found.health is Health.stalled
    assert found.advice == (
        "Optimizer state exp_avg_sq in BF16 rounds its decay away at 1 - beta = 0.001 (efficiency of the decay"
        " 0.00), so"
        " it can grow but not shrink; keep the optimizer state in FP32 or use a beta of at most 0.9961."
    )


@pytest.mark.parametrize("scheme", ["carried", "carried:exp_avg_sq_accounted"])
def test_where_a_compensation_may_hold_the_rest_one_window_is_not_enough(scheme: str) -> None:
    stuck = accumulator("exp_avg_sq", 0.9, decay=0.0, rate=0.001)
    assert judged(stuck, 1, scheme=scheme).health is Health.unknown
    assert judged(stuck, 2, scheme=scheme).health is Health.stalled


def test_at_an_unknown_rate_one_window_is_not_enough() -> None:
    found = judged(accumulator("exp_avg_sq", 0.9, decay=0.0), windows=1)
    assert (found.health, found.advice) == (
        Health.unknown,
        unknown("one window alone may mislead about it; the next one decides"),
    )


def test_at_an_unknown_rate_a_convicted_state_stays_so_when_it_no_longer_grows() -> None:
    one_way = tensor(accumulators=accumulator("exp_avg_sq", 0.9, decay=0.0))
    stuck = tensor(accumulators=accumulator("exp_avg_sq", 0.0, growth=None, decay=0.0))
    healths = [t.accumulators["exp_avg_sq"].health for t in verdicts(one_way, one_way, stuck, stuck)]
    assert healths == [Health.unknown, *[Health.stalled] * 3]


def test_the_buffer_that_carries_the_remainder_is_not_judged_as_a_state() -> None:
    buffer = accumulator("kahan_comp", 0.1, growth=0.9, decay=0.0)
    assert judged(buffer, scheme="carried:kahan_comp").health is Health.healthy
    assert judged(buffer, scheme="plain").health is Health.stalled


def test_a_counter_has_stopped_only_when_it_stands_there_twice() -> None:
    counting = [tensor(accumulators=accumulator("step", None, value=v)) for v in (128.0, 256.0, 256.0, 256.0)]
    healths = [t.accumulators["step"].health for t in verdicts(*counting)]
    assert healths == [Health.healthy, Health.healthy, Health.stalled, Health.stalled]


def test_a_counter_that_rests_with_its_optimizer_has_not_stopped() -> None:
    resting = tensor(None, steps=0, measured_steps=0, accumulators=accumulator("step", None, value=256.0))
    assert verdict(resting).accumulators["step"].health is Health.healthy


def test_a_decay_too_small_to_matter_is_not_missed() -> None:
    lost = accumulator("weight_decay", 0.0)
    assert judged(lost, lr_max=1e-5, weight_decay=0.01).health is Health.stalled
    assert judged(lost, lr_max=9e-6, weight_decay=0.01).health is Health.healthy
    assert judged(lost, lr_max=None, weight_decay=0.01).health is Health.stalled


def test_a_decay_says_how_much_it_is() -> None:
    found = judged(accumulator("weight_decay", 0.0), lr_max=1e-3, weight_decay=0.01)
    assert found.advice.startswith("Weight decay (lr * weight_decay = 1e-05 per step) is lost in BF16 weights")


def test_an_average_with_a_finding_of_its_own_is_at_least_stalling() -> None:
    swapped = accumulator("average:ema", 0.97, dtype="float32", note="rounded to BF16 by the validation swap")
    found = judged(swapped)
    assert (found.health, found.cause) == (Health.stalling, Cause.average_rounding)
    assert found.advice.startswith(
        "The average 'ema' is rounded to BF16 by the validation swap (efficiency 0.97, 3% lost)"
    )


NOT_SEEN = accumulator("average:ema", None, rate=1e-4, reason="it moved in this window, and no update of it was seen")


def averages(*found: dict[str, Any]) -> list[AccumulatorReport]:
    return [t.accumulators["average:ema"] for t in verdicts(*(tensor(accumulators=one) for one in found))]


def test_a_lost_average_stays_lost_in_windows_that_see_no_update_of_it() -> None:
    lost, well = accumulator("average:ema", 0.02, rate=1e-4), accumulator("average:ema", 0.98, rate=1e-4)
    first, *later = averages(lost, *[NOT_SEEN] * 9)
    assert [a.health for a in later] == [*[Health.stalled] * 8, Health.unknown]
    assert {a.cause for a in later[:8]} == {Cause.average_rounding} and later[0].efficiency is None
    assert later[1].advice == first.advice.rstrip(".") + "; measured 2 windows ago."
    faster = accumulator("average:ema", 9.0, rate=1e-4)
    assert averages(lost, faster, NOT_SEEN)[-1].health is Health.unknown  # nothing to keep
    assert averages(lost, well, NOT_SEEN)[-1].health is Health.healthy


def test_an_average_that_follows_does_so_in_windows_without_an_update_of_it() -> None:
    well = accumulator("average:ema", 0.98, rate=1e-4)
    for unseen in (NOT_SEEN, accumulator("average:ema", None, rate=1e-4, is_updated=False)):
        later = averages(well, *[unseen] * 5)[1:]
        assert [a.health for a in later] == [*[Health.healthy] * 4, Health.unknown]
        assert later[1].advice == "Measured 2 windows ago." and later[1].efficiency is None
    assert averages(NOT_SEEN)[-1].health is Health.unknown


def _quiet(updated: bool, **more: Any) -> Any:
    return tensor(
        steps=32, accumulators=accumulator("average:ema", 1.0 if updated else None, is_updated=updated, **more)
    )


@pytest.mark.parametrize("period", [1, 3, 10])
def test_an_average_that_is_updated_no_more_is_told_after_eight_times_as_long_as_it_ever_waited(period: int) -> None:
    updates = [_quiet(updated=i % period == 0) for i in range(2 * period + 1)]
    windows = 8 * max(period - 1, 1)
    found = [t.accumulators["average:ema"] for t in verdicts(*updates, *[_quiet(False)] * windows, _quiet(True))]
    assert all(a.cause is None for a in found[:-2])
    assert (found[-2].health, found[-2].cause) == (Health.idle, Cause.average_not_updated)
    assert found[-2].advice == (
        f"The average 'ema' was not updated in {32 * windows} steps in which its weights moved, and it was before; look for"
        " what ended it: a condition, or an error that is caught (if it was to end, nothing is wrong)."
    )
    assert (found[-1].health, found[-1].cause) == (Health.healthy, None)


def test_how_long_an_average_waited_goes_through_a_checkpoint_old_ones_too() -> None:
    diagnosis = Diagnosis(Thresholds())
    for i, of in enumerate([_quiet(True), _quiet(True), *[_quiet(False)] * 7]):
        diagnosis.judge(window(of, step=32 * (i + 1), steps=32))
    state = json.loads(json.dumps(diagnosis.state_dict()))
    (tensor_state,) = state["tensors"].values()
    assert tensor_state["accumulators"]["average:ema"][6] == 0
    for kept, cause in (
        (0, Cause.average_not_updated),
        (True, None),
        (-1, None),
    ):  # once it was whether it ever was updated
        tensor_state["accumulators"]["average:ema"][6] = kept
        resumed = Diagnosis(Thresholds())
        resumed.load_state_dict(state)
        (told,) = resumed.judge(window(_quiet(False), step=320, steps=32)).tensors
        assert told.accumulators["average:ema"].cause is cause


def test_of_an_average_that_was_updated_once_it_is_not_known_when_it_will_be_again() -> None:
    found = verdicts(_quiet(True), *[_quiet(False)] * 40)
    assert {t.accumulators["average:ema"].cause for t in found} == {None}
    assert found[-1].accumulators["average:ema"].health is Health.unknown


def test_an_update_of_which_the_decay_is_not_known_is_one() -> None:
    """Lightning's StochasticWeightAveraging averages once an epoch, and a tensor that hardly moves tells no decay."""
    written = _quiet(True, reason="its decay is not known", numbers=Numbers())
    found = verdicts(*[written, *[_quiet(False)] * 3] * 3)
    assert {t.accumulators["average:ema"].cause for t in found} == {None}


def test_what_is_remembered_of_a_lost_average_goes_through_a_checkpoint() -> None:
    diagnosis = Diagnosis(Thresholds())
    diagnosis.judge(window(tensor(accumulators=accumulator("average:ema", 0.02, rate=1e-4))))
    resumed = Diagnosis(Thresholds())
    resumed.load_state_dict(json.loads(json.dumps(diagnosis.state_dict())))
    found = [d.judge(window(tensor(accumulators=NOT_SEEN), step=256)) for d in (diagnosis, resumed)]
    assert found[0].tensors == found[1].tensors
    assert found[1].tensors[0].accumulators["average:ema"].health is Health.stalled


def test_a_calm_headline_counts_averages_that_are_not_known() -> None:
    both = [tensor(0.98, name=name, accumulators=NOT_SEEN) for name in ("a.w", "b.w")]
    assert Diagnosis(Thresholds()).judge(window(*both)).headline == (
        "All 2 tensors are healthy (efficiency 0.98); average:ema of 2 not known."
    )


@pytest.mark.parametrize("name", ["weight_decay", "average:ema", "grad"])
def test_verdicts_do_not_flap_around_a_limit(name: str) -> None:
    windows = [tensor(accumulators=accumulator(name, x)) for x in (0.79, 0.84, 0.79, 0.87, 0.88, 0.82, 0.05, 0.14, 0.2)]
    healths = [str(t.accumulators[name].health) for t in verdicts(*windows)]
    assert healths == ["stalling"] * 4 + ["healthy"] * 2 + ["stalled"] * 2 + ["stalling"]


def test_few_steps_are_pooled_before_a_verdict() -> None:
    few = tensor(steps=16, measured_steps=4, accumulators=accumulator("average:ema", 0.0))
    first, second = (t.accumulators["average:ema"] for t in verdicts(few, few))
    assert first.advice == unknown("only 4 of the 6 measured steps a verdict needs were seen so far")
    assert (first.health, second.health) == (Health.unknown, Health.stalled)


def test_good_windows_in_between_start_the_count_anew() -> None:
    few = {"steps": 16, "measured_steps": 4}
    bad, good = (tensor(accumulators=accumulator("grad", x), **few) for x in (0.0, 1.0))
    healths = [str(t.accumulators["grad"].health) for t in verdicts(bad, good, bad, bad)]
    assert healths == ["unknown", "healthy", "unknown", "stalled"]


@pytest.mark.parametrize(
    ("fields", "health"),
    [({"trainable": False, **STILL}, Health.frozen), ({"zero_gradient_fraction": 1.0, **STILL}, Health.idle)],
)
@pytest.mark.parametrize("name", STUCK)
def test_what_rests_with_its_tensor_is_not_accused(name: str, fields: dict[str, Any], health: Health) -> None:
    found = judged(STUCK[name][0], 4, **fields)
    assert (found.health, found.cause, alert_level(found.health, found.cause)) == (health, None, None)


def test_what_could_not_be_measured_is_unknown_with_the_reason() -> None:
    found = judged(accumulator("average:ema", 0.0, reason="the averaged model has other shapes"))
    assert (found.health, found.advice) == (Health.unknown, "Unknown, because the averaged model has other shapes.")


def test_an_accumulator_that_was_to_change_nowhere_is_idle() -> None:
    for name in ("average:ema", "exp_avg"):
        assert judged(accumulator(name, None, growth=None, decay=None)).health is Health.idle


@pytest.mark.parametrize(
    ("name", "early", "half"),
    [
        ("exp_avg_sq", Level.warn, None),
        ("weight_decay", Level.warn, None),
        ("average:ema", Level.error, Level.warn),
        ("grad", Level.error, Level.warn),
    ],
)
def test_a_lost_decay_warns_and_a_lost_average_or_gradient_is_an_error(
    name: str, early: Level, half: Level | None
) -> None:
    whole = judged(accumulator(name, 0.0, decay=0.0, rate=0.001))
    part = judged(accumulator(name, 0.5, decay=0.5, rate=0.001))
    assert (whole.health, alert_level(whole.health, whole.cause)) == (Health.stalled, early)
    assert (part.health, alert_level(part.health, part.cause)) == (Health.stalling, half)


def test_an_accumulator_somebody_must_hear_of_makes_the_run_stalling() -> None:
    stuck, partly = (tensor(accumulators=accumulator("exp_avg_sq", 0.9, decay=x, rate=0.001)) for x in (0.0, 0.5))
    assert reports(stuck)[0].health is Health.stalling
    assert reports(partly)[0].health is Health.healthy


def test_of_a_sum_of_gradients_the_whole_counts_and_not_how_single_contributions_fared() -> None:
    evidence = accumulator("grad", numbers=numbers(0.95, displacement_efficiency=0.5))
    found = verdict(tensor(accumulators=evidence)).accumulators["grad"]
    assert (found.health, found.cause) == (Health.stalling, Cause.accumulation_rounding)
    assert "(efficiency 0.50, " in found.advice
