"""What `bench/forecast.py` counts, worked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import forecast
from bench.shared.full_comparison import Exact
from update_watch.foresight.forecasts import Forecast, TensorForecast
from update_watch.report import Health, Report


def _held(foretold: int | None, happened: list[float], final: float, **fields: Any) -> list[forecast.Held]:
    """Of one tensor over five windows of 20 steps, forecast after the first."""
    one = TensorForecast("w", foretold, None, final, 0.5, **fields)
    made = Forecast(20, 100, (one,), 1.0, 0.5, foretold, None, "")
    truths = [{"w": Exact(dot=e, want=1.0)} for e in happened]
    return forecast._held(0.2, Report(20, 20, Health.healthy, "", (), forecast=made), truths, 20)


def test_a_step_counts_as_foretold_within_a_tenth_of_what_is_left() -> None:
    course = [1.0, 1.0, 0.9, 0.7, 0.2]  # passes 0.8 between the middles of windows 3 and 4: step 60
    (near,) = _held(54, course, 0.25)
    assert (near.happened, near.left, near.passes, near.is_near) == (60, 80, True, True)
    (far,) = _held(51, course, 0.25)
    assert far.passes and not far.is_near
    (missed,) = _held(None, course, 0.9)
    assert missed.passes and not missed.is_near


def test_a_false_forecast_and_the_end_are_counted() -> None:
    (wrong,) = _held(60, [1.0] * 5, 0.5, earliest=50, latest=70, final_high=0.6)
    assert wrong.is_false and wrong.passes and not wrong.is_near and not wrong.is_between
    (right,) = _held(None, [1.02] * 5, 1.3, final_high=1.4)
    assert not right.passes and right.end_off == 0.0 and not right.is_false and right.is_between
    found = forecast.line([wrong, right])
    assert (found["tensors"], found["passing"], found["within"], found["false"]) == (2, 1, 0, 1)
    assert found["end_mean"] == pytest.approx(0.25) and (found["covered"], found["between"]) == (1, 1)
    assert forecast.line([right], warnings=2)["false"] == 2


def test_a_step_lies_between_what_was_said_to_half_a_window_and_a_step_in_doubt_is_counted_apart() -> None:
    course = [1.0, 1.0, 0.9, 0.7, 0.2]  # passes at step 60
    for earliest, latest, is_between in (
        (55, 65, True),
        (70, None, True),
        (71, 90, False),
        (20, 49, False),
        (None, None, False),
    ):
        (held,) = _held(60, course, 0.2, earliest=earliest, latest=latest)
        assert held.is_between is is_between, (earliest, latest)
    (unsure,) = _held(20, course, 0.2, earliest=20, latest=None, doubt="it may")
    assert not unsure.is_sure and not unsure.is_near
    assert {name: forecast.line([unsure])[name] for name in ("passing", "within", "unsure")} == {
        "passing": 0,
        "within": 0,
        "unsure": 1,
    }


def test_a_recording_is_read_back_as_it_was(tmp_path: Path) -> None:
    made = forecast.Recording(
        "sgd", "cosine to a tenth", 20, (Report(1, 1, Health.healthy, "", ()),), ({"w": Exact(1.0, 2.0)},)
    )
    made.save(tmp_path / "run.json")
    assert forecast.Recording.load(tmp_path / "run.json") == made


def test_what_is_stalled_already_is_not_foretold() -> None:
    assert _held(20, [0.5, 0.4, 0.3, 0.2, 0.1], 0.1) == []
