"""A run that leaves its range is told before its loss knows; one that only looks so is not."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from bench.planted.divergence import RUNS, blown_up, record, told
from tests.support.alert_samples import Clock
from update_watch.judge.alerts import Alerts
from update_watch.judge.forecast.divergences import Divergences
from update_watch.report import Health, Level, Report, TensorReport
from update_watch.thresholds import Thresholds

WINDOW, WINDOWS = 128, 40


def window(i: int, *tensors: TensorReport, skipped: int = 0) -> Report:
    return Report((i + 1) * WINDOW, WINDOW, Health.healthy, "All is well.", tensors, skipped_steps=skipped)


def tensor(name: str = "w", weight: float = 1.0, **fields: Any) -> TensorReport:
    usual = {"weight_rms": weight, "gradient_rms": 0.01, "update_ratio": 1e-3, "lr": 1e-3, "dtype": "float32"}
    return TensorReport(name, Health.healthy, optimizer_group="0/0", numel=64, **(usual | fields))


def run(size: Callable[[float], float], **others: Callable[[int], Any]) -> list[Report]:
    """Windows of a run whose weights are of a size that is a function of the step."""
    reports = []
    for i in range(WINDOWS):
        weight = size((i + 0.5) * WINDOW)
        fields = {name: value(i) for name, value in others.items()}
        reports.append(window(i, tensor(weight=weight, **fields)))
    return reports


def signs(reports: Sequence[Report]) -> dict[str, int]:
    """Name of each sign -> the first window that shows it."""
    watcher, found = Divergences(), {}
    for i, report in enumerate(reports):
        divergence = watcher.add(report).divergence
        for sign in divergence.signs if divergence is not None else ():
            found.setdefault(sign.name, i)
    return found


HEALTHY: dict[str, Callable[[float], float]] = {
    "at rest": lambda t: 1.0,
    "a constant rate, all updates one way": lambda t: 0.02 + 1e-4 * t,
    "a linear warm-up, all updates one way": lambda t: 0.02 + 1e-8 * t**2,
    "noise": lambda t: 1.0 + 0.05 * math.sin(t * t),
    "loaded anew": lambda t: 1.0 if t < 2000 else 4.0,
    "a rate that jumps": lambda t: (1.0 + max(t - 2000, 0.0) / 2000) ** 0.5,
    "decay": lambda t: math.exp(-t / 3000),
}


def test_windows_that_differ_by_their_samples_are_no_sign_in_a_long_run() -> None:
    rng = random.Random(0)
    watcher = Divergences()
    for i in range(800):
        divergence = watcher.add(window(i, tensor(weight=math.exp(rng.gauss(0.0, 0.06))))).divergence
        assert divergence is not None and not divergence.is_warning


@pytest.mark.parametrize("name", HEALTHY)
def test_weights_that_grow_as_healthy_ones_may_are_no_sign(name: str) -> None:
    assert signs(run(HEALTHY[name])) == {}


def test_weights_that_grow_ever_faster_are_warned_of() -> None:
    found = signs(run(lambda t: 1.0 + 2 ** ((t - 3000) / 300)))
    assert 3000 / WINDOW - 4 <= found["weights"] <= 3000 / WINDOW + 1


def test_a_rate_that_goes_on_climbing_needs_less_growth() -> None:
    def grows(t: float) -> float:
        return math.exp(t / 1500)  # as the steps to the power of t / 1500

    steady, climbing = run(grows)[:20], run(grows, lr=lambda i: 1e-3 * 2 ** (i / 4))[:20]
    jump = run(grows, lr=lambda i: 1e-3 if i < 14 else 1e-2)[:20]
    assert signs(steady) == signs(jump) == {}
    assert "weights" in signs(climbing)


def test_what_begins_at_zero_grows_and_is_no_sign() -> None:
    reports = []
    for i in range(WINDOWS):
        t = (i + 0.5) * WINDOW
        adapter = tensor("b", 1e-6 * math.exp(t / 600), update_ratio=0.02)  # 2.6 times its size in the first window
        reports.append(window(i, tensor("a"), adapter))
    assert signs(reports) == {}
    assert signs([window(i, report.tensors[1]) for i, report in enumerate(reports)]) == {}


def test_tensors_that_are_measured_in_turns_do_not_look_as_if_they_grew() -> None:
    large, small = tensor("large", 10.0), tensor("small", 0.1)
    unseen = {"weight_rms": None, "gradient_rms": None}
    reports = [
        window(i, *(dataclasses.replace(t, **unseen) if i % 2 == k else t for k, t in enumerate((large, small))))
        for i in range(WINDOWS)
    ]
    watcher = Divergences()
    sizes = {watcher.add(report).divergence.weight_rms for report in reports}  # type: ignore[union-attr]
    assert len(sizes) <= 2  # the first window knows one of them
    assert signs(reports) == {}


def test_what_leaves_its_range_is_told_once_and_no_warning(clock: Clock) -> None:
    late = WINDOWS - 3
    found = {
        "updates": {"update_ratio": lambda i: 1e-3 * (4.0 if i >= late else 1.0)},
        "gradients": {"gradient_rms": lambda i: 0.01 * 4.0 ** max(i - late + 1, 0)},
        "state": {"state_factor": lambda i: 1.0 - 0.3 * (i >= late)},
        "fp16_range": {
            "dtype": lambda i: "float16",
            "gradient_max": lambda i: 2.0 ** min(13, 13.5 - late * 0.5 + i * 0.5),
        },
        "skipped": {},
    }
    for name, fields in found.items():
        reports = run(lambda t: 1.0, **fields)
        if name == "skipped":
            reports = [
                dataclasses.replace(report, skipped_steps=3 if i >= late else 0) for i, report in enumerate(reports)
            ]
        reports += reports[:4]  # it comes back from an earlier checkpoint
        assert set(signs(reports)) == {name}
        assert late - 6 <= signs(reports)[name] < WINDOWS
        watcher, alerts, told = Divergences(), Alerts(Thresholds(), clock), []
        for report in reports:
            clock.now += 3600
            told += alerts.update(watcher.add(report)).alerts
        (alert,) = told  # once in a run, and nothing of its end
        assert alert.level is Level.info and alert.title.startswith("OUT OF RANGE: ") and "Fix: " in alert.text
        assert len(alert.title) <= 63


def test_a_schedule_that_ends_at_zero_within_a_window_does_not_make_updates_look_large() -> None:
    """In the last window the rate falls from 1e-4 to next to nothing, and updates with it."""
    last = WINDOWS - 1
    rates: dict[str, Callable[[int], Any]] = {
        "movement_lr": lambda i: 1e-3 if i < last else 1e-4,
        "lr": lambda i: 1e-3 if i < last else 1e-8,
        "update_ratio": lambda i: 1e-3 if i < last else 1e-4 / 3**0.5,
    }
    assert signs(run(lambda t: 1.0, **rates)) == {}
    rates["movement_lr"] = lambda i: 1e-3 if i < last else 1e-5  # updates are ten times what they should be
    assert set(signs(run(lambda t: 1.0, **rates))) == {"updates"}


def test_gradients_of_a_scale_that_rises_while_the_rate_makes_up_for_it_are_no_sign() -> None:
    scale = {
        "gradient_rms": lambda i: 0.01 * 4.0**i,
        "lr": lambda i: 1e-3 * 4.0**-i,
        "update_ratio": lambda i: 1e-3 * 4.0**-i,
    }
    assert signs(run(lambda t: 1.0, **scale)) == {}
    assert "gradients" in signs(run(lambda t: 1.0, gradient_rms=scale["gradient_rms"]))


def test_steps_that_are_skipped_more_often_are_a_sign_and_those_of_the_start_are_none() -> None:
    def skips(counts: dict[int, int]) -> dict[str, int]:
        return signs([window(i, tensor(), skipped=counts.get(i, 0)) for i in range(WINDOWS)])

    assert skips({0: 12, 16: 1, 32: 1}) == {}
    assert skips({0: 12, 16: 1, 30: 3, 31: 4}) == {"skipped": 31}


def test_a_divergence_is_one_story_with_an_end(clock: Clock) -> None:
    def size(t: float) -> float:
        return 1.0 + 2 ** (min(t - 3000, 600.0) / 300)

    watcher, alerts, found = Divergences(), Alerts(Thresholds(), clock), []
    for report in run(size):
        clock.now += 60
        found += alerts.update(watcher.add(report)).alerts
    assert [(a.level, a.title) for a in found] == [
        (Level.warn, "DIVERGES: the weights run away"),
        (Level.info, "Over: diverges"),
    ]
    assert "lower the learning rate" in found[0].text
    assert found[0].tensors == ()


def test_the_headline_says_it() -> None:
    watcher = Divergences()
    said = [watcher.add(report).headline for report in run(lambda t: 1.0 + 2 ** ((t - 3000) / 300))]
    assert said[0] == "All is well."
    assert "The weights run away: they are" in said[-1]


def test_a_run_that_goes_back_to_a_checkpoint_goes_on_from_there() -> None:
    reports = run(lambda t: 1.0 + 2 ** ((t - 3000) / 300))
    watcher = Divergences()
    for report in reports[:26]:
        divergence = watcher.add(report).divergence
    assert divergence is not None and divergence.is_warning
    again = watcher.add(window(10, tensor())).divergence
    assert again is not None and not again.signs


def test_nothing_known_is_nothing_said() -> None:
    bare = TensorReport("w", Health.unknown, optimizer_group="0/0", numel=64)
    assert Divergences().add(window(0, bare)).divergence is None
    broken = tensor(weight=math.inf)
    broken = dataclasses.replace(broken, health=Health.broken)
    divergence = Divergences().add(window(0, broken)).divergence
    assert divergence is not None
    assert [sign.name for sign in divergence.signs] == ["non_finite"]


@pytest.mark.slow
def test_a_real_run_that_blows_up_is_told_and_its_twin_is_not() -> None:
    planted, twin = (next(run for run in RUNS if run.name == name) for name in ("rate climbs quickly", "warm-up"))
    lost = record(planted, "adamw", 0, window=16)
    at = blown_up(lost.losses)
    assert at is not None
    warnings, *_ = told(lost)
    assert warnings and at - warnings[0] >= 20
    well = record(dataclasses.replace(twin, steps=300), "adamw", 0, window=16)
    assert blown_up(well.losses) is None
    assert told(well) == ([], {}, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "twin"),
    [("FP16, its scale rises", "FP16"), ("a scaler, ever more", "a scaler, now and then")],
)
def test_a_real_run_planted_for_one_sign_is_told_and_its_twin_is_not(name: str, twin: str) -> None:
    planted, well = (next(run for run in RUNS if run.name == one) for one in (name, twin))
    warnings, _, infos = told(record(planted, planted.kinds[0], 0, window=16))
    assert planted.sign in infos and warnings == []
    assert told(record(well, well.kinds[0], 0, window=16)) == ([], {}, {})


def test_windows_without_a_step_say_nothing_of_where_a_run_is_heading() -> None:
    divergences = Divergences()
    silent = dataclasses.replace(window(0, tensor()), window=0)
    for i in range(8):
        assert divergences.add(window(i, tensor(), skipped=1)).divergence is not None
        assert divergences.add(silent) is silent
