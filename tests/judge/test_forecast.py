"""Forecasts along a schedule: worked by hand, held against training, and silent where nothing will stall."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import update_watch as uw
from update_watch.foresight.schedules import schedule_of
from update_watch.judge.alerts.alerts import Alerts
from update_watch.judge.columns.judged import judged_of
from update_watch.judge.forecast import Forecaster, forecast
from update_watch.judge.forecast.clock import Clock
from update_watch.judge.forecast.drift import fit
from update_watch.judge.forecast.history import Sizes
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, Health, Report, TensorReport
from update_watch.thresholds import Thresholds

LIMITS = Thresholds()


def tensor(name: str, octave: int, numel: int = 100, **fields: object) -> TensorReport:
    """All its updates are 2^octave to 2^(octave + 1) half gaps at the rate 1."""
    histogram = tuple(float(i == octave - HEADROOM_LOW) for i in range(HEADROOM_BINS))
    base = TensorReport(
        name, Health.healthy, numel=numel, efficiency=1.0, movement_histogram=histogram, movement_lr=1.0, lr=1.0
    )
    return dataclasses.replace(base, **fields)  # type: ignore[arg-type]


def report(*tensors: TensorReport, step: int = 0) -> Report:
    return Report(step, 10, Health.healthy, "", tensors)


HALVING = uw.Schedule(lambda step: 2.0 ** (-step / 100), steps=1000)  # one octave in 100 steps


def test_the_step_of_a_stall_is_where_the_rate_has_fallen_to_half_a_gap() -> None:
    made = forecast(report(tensor("near", 3), tensor("far", 9, numel=300)), HALVING, LIMITS)
    assert made is not None and (made.step, made.until) == (0, 1000)
    near, far = made.tensors
    # headroom 3 to 4 passes 0 within steps 300 to 400; then nothing arrives
    assert near.stalling_step is not None and 300 <= near.stalling_step <= 400
    assert near.stalled_step is not None and near.stalling_step <= near.stalled_step <= 420
    assert near.final_efficiency == 0.0 and 0.85 < near.efficiency < 1.0  # most of the movement comes early
    assert far.stalling_step is not None and 900 <= far.stalling_step <= 1000
    assert made.stalling_share == 1.0 and made.from_step == near.stalling_step
    at = {step: (arrived, rate) for step, arrived, rate in made.course}
    assert min(at) == 0 and 960 < max(at) <= 1000 and all(a <= 1.0 for a, _ in at.values())
    middle = min(at, key=lambda step: abs(step - 600))  # the quarter that is near is lost by then, the rest moves
    assert abs(at[middle][0] - 0.75) < 0.02 and abs(at[middle][1] - HALVING.rate(middle)) < 1e-9
    assert made.headline.startswith(
        f"At this schedule 100% of the parameters stall, from step {made.from_step:,} of 1,000"
    )


def test_a_schedule_that_ends_high_enough_forecasts_no_stall() -> None:
    made = forecast(report(tensor("w", 6)), uw.Schedule(lambda step: 1.0 - 0.9 * step / 1000, steps=1000), LIMITS)
    assert made is not None
    assert (made.stalling_share, made.from_step, made.floor) == (0.0, None, None)
    assert made.tensors[0].stalling_step is None and made.lost_share < 0.02
    assert made.headline == "At this schedule all tensors go on receiving their updates."


def test_the_floor_keeps_what_moves_now() -> None:
    now = report(tensor("w", 3))
    made = forecast(now, HALVING, LIMITS)
    assert made is not None and made.floor is not None
    floor = made.floor
    kept = forecast(now, uw.Schedule(lambda step: max(floor, HALVING.rate(step)), steps=1000), LIMITS)
    assert kept is not None and kept.stalling_share == 0.0
    lower = forecast(now, uw.Schedule(lambda step: max(floor / 1.5, HALVING.rate(step)), steps=1000), LIMITS)
    assert lower is not None and lower.stalling_share == 1.0


def test_what_is_carried_never_stalls_and_what_is_not_measured_is_left_out() -> None:
    made = forecast(
        report(tensor("w", 3, scheme="carried:kahan_comp"), TensorReport("u", Health.unknown)), HALVING, LIMITS
    )
    assert made is not None and [t.name for t in made.tensors] == ["w"]
    assert made.stalling_share == 0.0 and made.lost_share == 0.0
    assert forecast(report(TensorReport("u", Health.unknown)), HALVING, LIMITS) is None
    assert forecast(report(tensor("w", 3), step=1000), HALVING, LIMITS) is None


def test_the_end_of_a_decay_to_nothing_is_no_stall() -> None:
    made = forecast(report(tensor("w", 12)), uw.Schedule(lambda step: 1.0 if step < 900 else 0.0, steps=1000), LIMITS)
    assert made is not None and made.stalling_share == 0.0


def test_the_error_is_how_far_an_earlier_forecast_was_off() -> None:
    forecaster = Forecaster(HALVING, LIMITS)
    first = forecaster.add(report(tensor("w", 3), step=100)).forecast
    assert first is not None and first.error is None
    # a quarter of the rate: headroom 1 to 2 was foretold, of which about all arrives
    later = tensor("w", 1, movement_lr=0.25, lr=0.25, efficiency=0.7)
    second = forecaster.add(report(later, step=300)).forecast
    assert second is not None and second.error == pytest.approx(0.3, abs=0.03)


def test_a_schedule_that_raises_ends_forecasts_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    def broken(step: int) -> float:
        raise RuntimeError("boom")

    forecaster = Forecaster(uw.Schedule(broken, steps=10), LIMITS)
    given = report(tensor("w", 3))
    assert forecaster.add(given) is given and forecaster.add(given) is given
    assert caplog.text.count("no more forecasts") == 1


def test_a_forecast_goes_through_plain_data() -> None:
    made = Forecaster(HALVING, LIMITS).add(report(tensor("w", 3)))
    assert Report.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize("place", [0.52, 0.73])
def test_updates_of_one_size_stall_where_that_size_falls_under_half_a_gap(place: float) -> None:
    size: dict[str, object] = {"update_ratio": 2.0 ** (place - 10), "weight_rms": 1.0, "wanted_fraction": 1.0}
    alike = tensor("alike", 5, movement_places=(0.0, 0.0, 1.0, 0.0), **size)
    made = forecast(report(alike), HALVING, LIMITS)
    assert made is not None
    (one,) = made.tensors
    assert one.stalling_step == pytest.approx(100 * (5 + place), abs=8)


# --- what drifts beside the rate ---------------------------------------------------------------------------


def run_of(sizes: Callable[[float], float], until: int, every: int = 50, octave: int = 6) -> list[Report]:
    """Windows along HALVING of a tensor whose updates are 2^sizes(step) as large beside the rate."""
    made, forecaster = [], Forecaster(HALVING, LIMITS)
    for step in range(every, until + 1, every):
        rate = HALVING.rate(step - 1)
        drift = sizes(step - every / 2)
        now = tensor(
            "w",
            octave,
            lr=rate,
            movement_lr=2.0**-drift,
            update_ratio=0.01 * HALVING.rate(step - every // 2) * 2**drift,
        )
        made.append(forecaster.add(dataclasses.replace(report(now, step=step), window=every)))
    return made


def passing(made: Report) -> tuple[int, int, int]:
    assert made.forecast is not None
    (one,) = made.forecast.tensors
    assert one.earliest is not None and one.stalling_step is not None and one.latest is not None
    return one.earliest, one.stalling_step, one.latest


def test_a_trend_tells_the_level_of_now_and_dies_away() -> None:
    times = np.arange(5.0, 400.0, 10.0)
    shrinking = fit(times, 3.0 - 0.25 * np.log2(times / 400.0)[:, None], 400.0)
    assert (shrinking.level_n[0], shrinking.slope_n[0]) == pytest.approx((3.0, -0.25), abs=0.02)
    soon, late, end = shrinking.change(np.array([440.0, 800.0, 1e9]))[0]
    assert soon == pytest.approx(-0.25 * math.log2(1.1), rel=0.2)
    assert end < late < soon and end == pytest.approx(-0.25 * 0.35 / math.log(2), abs=0.02)
    # what is of the weights, by which sizes are divided, goes on for longer
    growing = dataclasses.replace(shrinking, weight_slope_n=np.array([0.25]))
    assert growing.change(np.array([400.0, 1e9]))[0] == pytest.approx([0.0, -0.25 / math.log(2)], abs=0.03)
    strayed = passing(run_of(lambda step: 3.0 if 200 < step < 250 else 0.0, 400)[-1])
    assert abs(strayed[1] - passing(run_of(lambda step: 0.0, 400)[-1])[1]) <= 15  # a single window


def test_time_is_the_sum_of_the_rates() -> None:
    octave = 100 / math.log(2)  # all that HALVING has to come at any step, over its rate
    assert Clock(HALVING)([200, 1000, 2000]) == pytest.approx([0.75 * octave, octave, octave], rel=2e-3)
    warm = Clock(uw.Schedule(lambda step: 4.0 * min(step / 100, 1.0), steps=300))
    assert warm(100) == pytest.approx(50, rel=0.02) and warm(300) == pytest.approx(250, rel=0.02) and warm(0) > 0
    assert Clock(uw.Schedule(lambda step: math.nan if step < 5 else 1.0, steps=10))(10) == pytest.approx(5, abs=1)


def test_the_range_is_as_wide_as_the_run_has_wandered_and_a_step_that_is_not_known_is_said_to_be_so() -> None:
    calm = run_of(lambda step: 0.0, 400)[-1].forecast
    assert calm is not None and calm.tensors[0].doubt == ""
    wild = run_of(lambda step: 3 * math.sin(step / 80), 400)[-1].forecast
    assert wild is not None
    (one,) = wild.tensors
    (other,) = calm.tensors
    assert other.earliest is not None and other.latest is not None and one.earliest is not None
    assert one.earliest < other.earliest - 50 and (one.latest is None or one.latest > other.latest + 50)
    assert "may fall below as early as step" in one.doubt and "windows so far do not tell" in one.doubt


@pytest.mark.parametrize(("falls_to", "is_sure"), [(0.25, True), (0.3, False)])
def test_a_step_is_sure_where_most_of_what_may_come_is_near_to_it(falls_to: float, is_sure: bool) -> None:
    """Its range goes to the end in both: larger updates would still do at this rate."""
    falling = uw.Schedule(lambda step: 1.0 if step < 100 else falls_to, steps=1000)
    made = forecast(report(tensor("w", 1)), falling, LIMITS)
    assert made is not None
    (one,) = made.tensors
    assert one.stalling_step == pytest.approx(100, abs=5) and one.latest is None and (not one.doubt) is is_sure


def test_of_few_elements_it_is_known_less_well() -> None:
    """What arrives of 32 elements scatters from window to window, whatever their size."""
    ends_on_the_edge = uw.Schedule(lambda step: 1 - 0.7 * step / 1000, steps=1000)
    made = forecast(report(tensor("few", 1, numel=32), tensor("many", 1, numel=10**6)), ends_on_the_edge, LIMITS)
    assert made is not None
    few, many = made.tensors
    assert (few.stalling_step, few.final_efficiency) == (many.stalling_step, many.final_efficiency)
    assert few.final_high > many.final_high + 0.01 and few.earliest is not None and many.earliest is not None
    assert few.earliest < many.earliest


def test_a_stall_is_told_only_where_it_comes_for_certain() -> None:
    barely = uw.Schedule(lambda step: 1.0 - 0.93 * step / 1000, steps=1000)  # ends 3.8 octaves lower: at the edge
    forecaster, alerts = Forecaster(barely, LIMITS), Alerts(LIMITS, lambda: 0.0)
    for step in range(50, 500, 50):
        now = dataclasses.replace(tensor("w", 3, dtype="bfloat16"), lr=barely.rate(step))
        made = forecaster.add(report(now, step=step))
        assert made.forecast is not None
        (one,) = made.forecast.tensors
        assert one.stalling_step is not None and one.latest is None  # likely, and perhaps not
        assert alerts.update(made).alerts == ()


def test_a_run_that_goes_back_or_has_other_tensors_begins_anew() -> None:
    forecaster = Forecaster(HALVING, LIMITS)
    first = forecaster.add(report(tensor("a", 3), step=100)).forecast
    forecaster.add(report(tensor("a", 9), step=200))
    back = forecaster.add(report(tensor("b", 9), tensor("a", 3), step=100)).forecast
    assert first is not None and back is not None
    assert back.tensors[1].stalling_step == first.tensors[0].stalling_step
    assert [t.name for t in back.tensors] == ["b", "a"]


def test_weights_that_grow_are_foretold_to_grow_for_longer_than_gradients_shrink() -> None:
    def ends(weight: Callable[[float], float]) -> float:
        forecaster = Forecaster(uw.Schedule(lambda step: 1.0, steps=10_000), LIMITS)
        for step in range(50, 1001, 50):
            size = -0.25 * math.log2((step - 25) / 975)
            now = tensor("w", 0, movement_lr=2.0**-size, update_ratio=0.01 * 2.0**size, weight_rms=weight(step - 25.0))
            made = forecaster.add(dataclasses.replace(report(now, step=step), window=50)).forecast
        assert made is not None
        return made.tensors[0].final_efficiency

    assert ends(lambda step: step**0.25) < ends(lambda step: 1.0) - 0.1


def test_what_is_kept_of_a_long_run_does_not_grow() -> None:
    sizes = Sizes(Clock(HALVING))
    for step in range(1, 400):
        of_step = report(tensor("w", 3), step=step)
        sizes.add(of_step, judged_of(of_step), HALVING)
    assert len(sizes._windows) <= 32


# --- schedules --------------------------------------------------------------------------------------------


def test_a_torch_scheduler_is_run_ahead_on_a_copy() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p], lr=1e-3)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90)
    chained = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[10])
    ahead = schedule_of(chained, steps=100)
    assert chained.last_epoch == 0
    for step in range(100):
        assert ahead.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        p.grad = torch.ones(2)
        optimizer.step()
        chained.step()
    assert schedule_of(torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=77)).steps == 77


def test_schedules_that_nobody_knows_are_refused_with_a_remedy() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    with pytest.raises(ValueError, match="how long is the run"):
        schedule_of(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    for wrong in (lambda step: 1.0, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), 3):
        with pytest.raises(TypeError, match="expected update_watch.Schedule"):
            schedule_of(wrong)
    with pytest.raises(ValueError, match="1 or more"):
        uw.Schedule(lambda step: 1.0, steps=0)
    with pytest.raises(TypeError, match="function of the step"):
        uw.Schedule(1.0, steps=10)  # type: ignore[arg-type]


def test_schedulers_with_a_formula_are_asked_and_others_are_run_ahead_whatever_their_period() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    make = torch.optim.lr_scheduler
    kinds = {
        "lambda": lambda o: make.LambdaLR(o, lambda step: 1 / (1 + step)),
        "cosine": lambda o: make.CosineAnnealingLR(o, T_max=60),
        "one cycle": lambda o: make.OneCycleLR(o, max_lr=0.5, total_steps=80),
        "chained": lambda o: make.ChainedScheduler([make.ExponentialLR(o, 0.95), make.StepLR(o, 10)]),
        "sequential": lambda o: make.SequentialLR(o, [make.LinearLR(o), make.ExponentialLR(o, 0.9)], [5]),
    }
    for name, kind in kinds.items():
        for period in (1, 3):
            optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
            scheduler = kind(optimizer)
            rates = []
            schedule = None
            for step in range(60):
                if step == 15:  # in the middle of the run
                    before = optimizer.param_groups[0]["lr"]
                    schedule = schedule_of(scheduler, steps=60, period=period, now=step)
                    assert optimizer.param_groups[0]["lr"] == before
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                if step % period == period - 1:
                    scheduler.step()
            assert schedule is not None
            assert [schedule.rate(step) for step in range(15, 60)] == pytest.approx(rates[15:]), (name, period)
    endless = make.SequentialLR(optimizer, [make.LinearLR(optimizer), make.ExponentialLR(optimizer, 0.9)], [5])
    with pytest.raises(ValueError, match=r"60,000 steps are too many .*Schedule\(rate, steps\)"):
        schedule_of(endless, steps=60_000)


# --- alerts ------------------------------------------------------------------------------------------------


def course(schedule: uw.Schedule, octave: int = 6, until: int = 1000) -> list[uw.Alert]:
    """Alerts of a run in which nothing has stalled yet."""
    forecaster, alerts = Forecaster(schedule, LIMITS), Alerts(LIMITS, lambda: 0.0)
    told: list[uw.Alert] = []
    for step in range(0, until, 50):
        now = dataclasses.replace(tensor("w", octave, dtype="bfloat16"), lr=schedule.rate(step))
        told += alerts.update(forecaster.add(report(now, step=step))).alerts
    return told


def test_a_stall_to_come_is_one_warning_with_its_step_and_its_cure() -> None:
    (told,) = course(HALVING, until=400)
    assert (told.level, told.step, told.title) == (uw.Level.warn, 50, "AHEAD: 1 of 1 tensor will stall")
    assert (
        told.text.startswith("At this schedule 100% of the parameters stall, from step ") and "of 1,000 on" in told.text
    )
    assert "Fix: end the schedule at 0.0" in told.text and "keep FP32 master weights" in told.text
    assert len(told.text) < 600


@pytest.mark.parametrize("is_foretold", [True, False])
def test_what_was_foretold_is_told_as_it_begins_and_when_it_has_everything(is_foretold: bool) -> None:
    forecaster, alerts = Forecaster(HALVING if is_foretold else None, LIMITS), Alerts(LIMITS, lambda: 0.0)
    told: list[str] = []
    for i, stalled in enumerate(["", "", "c", "cb", "cba"]):
        tensors = [tensor(name, 5, numel) for name, numel in (("a", 30), ("b", 60), ("c", 10))]
        lost = {"health": Health.stalled, "cause": uw.Cause.weight_rounding, "efficiency": 0.0}
        window = [dataclasses.replace(t, **lost) if t.name in stalled else t for t in tensors]  # type: ignore[arg-type]
        told += [alert.title for alert in alerts.update(forecaster.add(report(*window, step=100 * i + 100))).alerts]
    stages = ["STALLED: 1 of 3 tensors", "STALLED: 2 of 3 tensors, was 1", "STALLED: 3 of 3 tensors, was 2"]
    if is_foretold:
        stages = ["AHEAD: 3 of 3 tensors will stall", stages[0], "STALLED: 3 of 3 tensors, was 1"]
    assert told == stages


def test_schedules_that_end_well_or_stall_only_at_their_very_end_raise_no_alarm() -> None:
    assert course(uw.Schedule(lambda step: 1.0 - 0.9 * step / 1000, steps=1000)) == []
    assert course(uw.Schedule(lambda step: 1.0 - step / 1000, steps=1000)) == []
    assert course(HALVING, octave=12) == []


def test_what_is_ahead_is_said_in_the_headline_while_all_is_well() -> None:
    found = Forecaster(HALVING, LIMITS).add(dataclasses.replace(report(tensor("w", 6)), headline="All is well."))
    assert found.headline.startswith("All is well. At this schedule 100% of the parameters stall, from step ")


# --- in training ------------------------------------------------------------------------------------------


def test_a_stall_late_in_a_schedule_is_told_while_it_can_be_changed() -> None:
    torch.manual_seed(0)
    p = nn.Parameter((torch.randn(4000) * 0.02).bfloat16())
    optimizer = torch.optim.SGD([p], lr=0.1)
    steps = 512
    schedule = uw.Schedule(lambda step: 0.1 * 0.01 ** (step / steps), steps=steps)
    reports: list[Report] = []
    with uw.watch([("p", p)], optimizer, window=32, schedule=schedule, sinks=[reports.append]) as watch:
        for t in range(steps):
            optimizer.param_groups[0]["lr"] = schedule.rate(t)
            p.grad = (torch.randn(4000) * 0.02).bfloat16()
            optimizer.step()
        watch.flush()
    early = reports[3].forecast  # a quarter of the run
    assert reports[3].tensors[0].efficiency is not None and reports[3].tensors[0].efficiency > 0.95
    assert early is not None and early.tensors[0].stalling_step is not None
    really = next(r.step - 16 for r in reports if (r.tensors[0].efficiency or 1.0) < 0.8)
    assert abs(early.tensors[0].stalling_step - really) <= 0.1 * (steps - early.step)
    for later in reports[4:]:
        said = reports[3].tensors[0].efficiency_at(schedule.rate(later.step - 16))
        assert later.tensors[0].efficiency == pytest.approx(said, abs=0.1), later.step
    assert math.isclose(early.stalling_share, 1.0) and "stall, from step" in early.headline
