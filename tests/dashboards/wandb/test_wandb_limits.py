"""W&B's documented limits hold for runs of any length, speed and window."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from tests.support.wandb.samples import START, large_model, sample_alert, sample_report
from update_watch.dashboards.metrics import RUN_METRICS, SERIES
from update_watch.dashboards.wandb import limits as wandb_limits
from update_watch.dashboards.wandb.limits import DOCUMENTED, Pace
from update_watch.dashboards.wandb.sink import WandbSink

STEPS = 1_000_000
MAX_SERIES = 200 * len(SERIES)
TABLES = 3


class CountingRun:
    """Stands in for a run: keeps every row."""

    offline, disabled, name, id, url = True, False, "counting", "counting", None

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []  # of numbers
        self.pictures: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.alerts: list[dict[str, Any]] = []

    def log(self, row: dict[str, Any], commit: bool | None = None) -> None:
        (self.pictures if "update_watch/efficiency" not in row else self.rows).append(row)

    def define_metric(self, name: str, **options: Any) -> None:
        pass

    def alert(self, **fields: Any) -> None:
        self.alerts.append(fields)


def taken(pace: Pace, window: int, steps: int, pause: float, amount: float = 1.0, urgent: bool = False) -> list[float]:
    """Times (seconds) of the rows a run of `steps` steps logs, `pause` seconds a step."""
    times = ((step, START + step * pause) for step in range(window, steps + 1, window))
    return [time for step, time in times if pace.take(step, time, amount, urgent=urgent)]


@pytest.mark.parametrize("window", [pytest.param(1, marks=pytest.mark.slow), 8, 128])
def test_a_million_steps_stay_within_every_documented_total(window: int) -> None:
    rows = taken(wandb_limits.row_pace(), window, STEPS, 1.0)
    series = taken(wandb_limits.series_pace(), window, STEPS, 1.0, MAX_SERIES)
    pictures = taken(wandb_limits.picture_pace(), window, STEPS, 1.0)
    alert_tables = taken(wandb_limits.alert_table_pace(), window, STEPS, 1.0, urgent=True)  # an alert in every window

    assert len(rows) <= DOCUMENTED.points_per_scalar
    assert len(rows) <= DOCUMENTED.rows_per_run / 2  # the other half is the training's own
    assert len(series) <= DOCUMENTED.points_per_histogram
    assert TABLES * len(pictures) + len(alert_tables) <= DOCUMENTED.files_per_run * 2 / 3
    # and the run is not thinned to nothing either
    assert min(len(rows), len(series)) > 1_000
    assert len(pictures) > 50


def test_the_fastest_training_stays_within_every_documented_rate() -> None:
    window, steps, pause = 1, 180_000, 0.001  # three minutes, a window a millisecond
    rows = taken(wandb_limits.row_pace(), window, steps, pause)
    series = taken(wandb_limits.series_pace(), window, steps, pause, MAX_SERIES)

    def busiest_minute(times: list[float]) -> int:
        return max(sum(start <= t < start + 60 for t in times) for start in times[:: len(times) // 50])

    assert busiest_minute(rows) <= DOCUMENTED.calls_per_minute
    values = busiest_minute(rows) * (len(RUN_METRICS) + 1) + busiest_minute(series) * MAX_SERIES
    assert values <= DOCUMENTED.values_per_minute


def test_a_short_run_logs_every_window() -> None:
    pace = wandb_limits.row_pace()
    assert all(pace.take(128 * i, START + 0.01 * i) for i in range(1, 250))


def test_rows_of_a_long_run_are_spaced_in_proportion_to_its_length() -> None:
    pace = Pace(points=100, per_minute=1e9, burst=1e9)
    rows = [step for step in range(1, 10_001) if pace.take(step, START)]
    assert rows[:100] == list(range(1, 101))
    gaps = [b - a for a, b in itertools.pairwise(rows)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == 100  # 10,000 / 100


def test_a_resumed_run_keeps_the_spacing_of_its_length() -> None:
    pace = Pace(points=100, per_minute=1e9, burst=1e9)
    assert [step for step in range(10_000, 10_500) if pace.take(step, START)][:3] == [10_000, 10_102, 10_205]


def test_training_that_begins_anew_is_logged() -> None:
    pace = Pace(points=100, per_minute=1e9, burst=1e9)
    pace.take(10_000, START)
    assert [pace.take(step, START) for step in (5, 6)] == [True, True]


def test_an_urgent_row_does_not_wait_for_the_spacing_but_for_the_rate() -> None:
    pace = Pace(points=1, per_minute=60, burst=2)
    assert pace.take(1000, START)
    assert not pace.take(1001, START)
    assert pace.take(1002, START, urgent=True)
    assert not pace.take(1003, START, urgent=True)  # the burst is used up
    assert pace.take(1004, START + 1.0, urgent=True)  # one a second comes back


def test_a_clock_set_back_neither_stops_nor_floods() -> None:
    pace = Pace(points=1_000_000, per_minute=60, burst=1)
    assert pace.take(1, START)
    assert not pace.take(2, START - 3600)
    assert not pace.take(3, START + 0.5)
    assert pace.take(4, START + 1.0)


def test_a_row_wider_than_the_burst_still_goes_out() -> None:
    pace = Pace(points=1_000_000, per_minute=60, burst=10)
    assert [t for t in range(100) if pace.take(t, START + t, amount=30)] == [0, 30, 60, 90]


def test_keys_table_rows_and_bytes_of_2000_tensors_stay_within_the_documented_limits() -> None:
    run = CountingRun()
    sink = WandbSink(run)  # type: ignore[arg-type]
    tensors = large_model(2_000)
    for i in range(1, 41):
        # ten seconds a window: long enough for every kind of row
        sink(sample_report(128 * i, tensors, time=START + 10 * i))

    assert len(run.rows) == 40
    keys = {key for row in run.rows + run.pictures for key in row}
    assert len({key.lower() for key in keys}) == len(keys)
    # far below, so that a hundred models with different names still fit in a project of 10,000 keys
    assert len(keys) <= 60 < DOCUMENTED.keys_per_run

    tables = [row["update_watch/heatmap"] for row in run.pictures if "update_watch/heatmap" in row]
    assert len(tables[-1].data) <= DOCUMENTED.rows_per_table
    assert 2 <= len({kind for kind, _, _, _ in tables[-1].data}) <= 64
    assert min(begin for _, begin, _, _ in tables[-1].data) == 0  # early windows are still in the last picture
    layers = [row["update_watch/headroom_by_kind"] for row in run.pictures if "update_watch/headroom_by_kind" in row]
    assert len(layers[-1].data) <= DOCUMENTED.rows_per_table
    size = sum(len(json.dumps(t.data)) for t in (tables[-1], layers[-1]))
    assert size < DOCUMENTED.bytes_per_value
    widest = max(run.rows, key=len)
    assert len(json.dumps({k: v for k, v in widest.items() if isinstance(v, float)})) < DOCUMENTED.bytes_per_value


def test_alerts_are_sent_at_a_bounded_rate_and_all_are_counted() -> None:
    run = CountingRun()
    sink = WandbSink(run)  # type: ignore[arg-type]
    for i in range(1, 121):  # an alert every ten seconds for twenty minutes
        alert = sample_alert(i, title=f"alert {i}")
        sink(sample_report(i, time=START + 10 * i, alerts=(alert,)))
    assert [a["title"] for a in run.alerts] == [f"alert {i}" for i in (1, 2, 3, 4, 5, 61)]
    assert "55 earlier alert(s) were held back" in run.alerts[-1]["text"]
    assert run.summary["update_watch/last_alert"]["count"] == 120
    assert run.summary["update_watch/last_alert"]["title"] == "alert 120"
    assert [row["update_watch/alert"] for row in run.rows] == [1.0] * 120


def test_an_alert_between_two_rows_shows_in_the_next_row() -> None:
    run = CountingRun()
    sink = WandbSink(run)  # type: ignore[arg-type]
    for step in range(1, 301):  # at one moment: uses up the burst
        sink(sample_report(step, time=START))
    sink(sample_report(301, alerts=(sample_alert(301),), time=START))
    assert len(run.rows) == 300
    assert [a["title"] for a in run.alerts] == ["1 tensor stalled"]
    sink(sample_report(302, time=START + 1))
    assert run.rows[-1]["trainer/global_step"] == 302
    assert run.rows[-1]["update_watch/alert"] == 1.0
    sink(sample_report(303, time=START + 2))
    assert run.rows[-1]["update_watch/alert"] == 0.0
