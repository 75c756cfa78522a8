"""Forecasts need the learning rate to come: read from a trainer's schedulers, or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.lightning_fits import Watched, fit
from tests.support.lightning_models import Module
from update_watch.callbacks.schedules import coming_rates

Schedulers = torch.optim.lr_scheduler


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)


@pytest.mark.parametrize(
    "make",
    [lambda o: Schedulers.LambdaLR(o, lambda at: 0.9**at), lambda o: Schedulers.CosineAnnealingLR(o, 40)],
    ids=["lambda", "cosine"],
)
@pytest.mark.parametrize("every", [1, 4])
def test_the_rates_to_come_are_those_that_come(make: Any, every: int) -> None:
    rule = optimizer()
    scheduler = make(rule)
    foreseen = coming_rates(scheduler, 40, every)
    assert foreseen is not None and foreseen.steps == 40
    for step in range(40):
        assert foreseen.rate(step) == pytest.approx(rule.param_groups[0]["lr"], rel=1e-6, abs=1e-9)
        rule.step()
        if (step + 1) % every == 0:
            scheduler.step()


def test_what_is_not_known_beforehand_is_none() -> None:
    rule = optimizer()
    assert coming_rates(Schedulers.ReduceLROnPlateau(rule), 40) is None
    assert coming_rates(Schedulers.CosineAnnealingLR(rule, 40), float("inf")) is None
    assert coming_rates(None, 40) is None

    def broken(at: int) -> float:
        if at:
            raise RuntimeError("boom")
        return 1.0

    broken_one = coming_rates(Schedulers.LambdaLR(rule, broken), 40)
    assert broken_one is not None  # it answers for now; the watch drops it, with a warning, when it does not


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_lightnings_scheduler_gives_a_forecast(interval: str) -> None:
    class Decaying(Module):
        def configure_optimizers(self) -> Any:
            rule = torch.optim.AdamW(self.parameters(), lr=1e-3)
            count = 2 if interval == "epoch" else 24
            return {
                "optimizer": rule,
                "lr_scheduler": {"scheduler": Schedulers.LinearLR(rule, 1.0, 0.1, count), "interval": interval},
            }

    watch = Watched()
    fit(Decaying(), watch, max_epochs=2, precision="bf16-true")
    made = [report.forecast for report in watch.reports if report.forecast is not None]
    assert made and {forecast.until for forecast in made} == {24}
