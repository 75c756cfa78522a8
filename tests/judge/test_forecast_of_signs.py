"""A forecast of updates that are all of one size, held against BF16 weights that really walk under them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import update_watch as uw
from update_watch.formats import BF16
from update_watch.judge.forecast import Forecaster
from update_watch.judge.forecast.drift import Drift, wander
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, Health, Report, TensorReport
from update_watch.thresholds import Thresholds

SIZE, STEPS, WINDOW, PEAK = 4096, 1000, 50, 4e-4
FALLING = uw.Schedule(lambda step: 1 - 0.99 * step / STEPS, steps=STEPS)


def trained(keeps: float) -> list[tuple[TensorReport, float]]:
    """Each window as a watch sees it, and its efficiency. `keeps`: how probable it is that a sign stays as it was."""
    torch.manual_seed(0)
    weights = ((torch.rand(SIZE) - 0.5) / 4).bfloat16().float()
    sign = torch.where(torch.rand(SIZE) < 0.5, 1.0, -1.0)
    found = []
    for begin in range(0, STEPS, WINDOW):
        lr = PEAK * FALLING.rate(begin + WINDOW - 1)
        movement, arrived, intended, stored = torch.zeros(HEADROOM_BINS), 0.0, 0.0, 0.0
        for step in range(begin, begin + WINDOW):
            sign = torch.where(torch.rand(SIZE) < keeps, sign, -sign)
            update = PEAK * FALLING.rate(step) * sign
            octaves = (lr / BF16.half_gap(weights, update)).log2().floor().clamp(HEADROOM_LOW, -HEADROOM_LOW - 1)
            movement += torch.bincount((octaves - HEADROOM_LOW).long(), minlength=HEADROOM_BINS)
            after = (weights + update).bfloat16().float()
            arrived += float(((after - weights) * update).sum())
            intended, stored = intended + float(update.square().sum()), stored + float(weights.square().sum())
            weights = after
        places = [0.0] * 4
        places[int(math.log2(lr) % 1.0 * 4)] = 1.0  # gaps are powers of two
        seen = TensorReport(
            *("w", Health.healthy),
            numel=SIZE,
            efficiency=arrived / intended,
            movement_histogram=tuple((movement / movement.sum()).tolist()),
            movement_places=tuple(places),
            movement_lr=lr,
            lr=lr,
            update_ratio=math.sqrt(intended / stored),
            weight_rms=math.sqrt(stored / SIZE / WINDOW),
            wanted_fraction=1.0,
        )
        found.append((seen, arrived / intended))
    return found


@pytest.mark.parametrize("keeps", [0.97, 0.99])
def test_weights_walk_until_they_are_too_large_to_move(keeps: float) -> None:
    """As many as now would do for 0.8 up to a later octave of the rate; they have become fewer by then."""
    windows = trained(keeps)
    course = [efficiency for _, efficiency in windows]
    last = max(i for i, efficiency in enumerate(course) if efficiency >= 0.8)
    forecaster = Forecaster(FALLING, Thresholds())
    for i, (seen, _) in enumerate(windows[:4]):
        made = forecaster.add(Report((i + 1) * WINDOW, WINDOW, Health.healthy, "", (seen,))).forecast
    assert made is not None
    (one,) = made.tensors
    assert one.stalling_step is not None and not one.doubt
    assert abs(one.stalling_step - (last + 1) * WINDOW) <= 0.1 * (STEPS - made.step)
    assert one.earliest is not None and one.earliest - WINDOW <= (last + 1) * WINDOW
    assert one.final_efficiency == pytest.approx(course[-1], abs=0.1)


def test_how_much_a_run_wanders_is_told_by_the_trends_that_were_measured() -> None:
    """Where weights walk is no trend of sizes: sizes that stay as they are have not strayed."""
    none, walks = np.zeros(4), np.ones(4, bool)

    def drifts(walks_n: np.ndarray | None, levels: list[float]) -> list[Drift]:
        return [
            Drift(100.0 * 2**i, none + level, none, none, none, none, walks_n=walks_n) for i, level in enumerate(levels)
        ]

    for levels in ([0.0, 0.0, 0.0], [0.0, 0.3, 0.6]):
        of_walking, usual = (drifts(walks_n, levels) for walks_n in (walks, None))
        assert wander(of_walking[:-1], of_walking[-1]) == wander(usual[:-1], usual[-1])
    still, moving = (drifts(walks, levels) for levels in ([0.0, 0.0, 0.0], [0.0, 0.3, 0.6]))
    assert wander(still[:-1], still[-1]) < wander(moving[:-1], moving[-1])
