"""The learning rates that a Lightning Trainer will use, as it is configured: held against those it then uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.support.lightning_models import Module, trainer
from update_watch.callbacks.lightning import UpdateWatch
from update_watch.callbacks.options import Options
from update_watch.callbacks.schedules import of_lightning
from update_watch.foresight.schedules import Schedule
from update_watch.report import Report

torch_schedulers = torch.optim.lr_scheduler


class Scheduled(Module):
    def __init__(self, scheduler: Any, **config: Any) -> None:
        super().__init__(batches=8)
        self.make, self.config = scheduler, config

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make(optimizer), **self.config}}


class Look(Callback):
    schedule: Schedule | None = None

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.schedule = of_lightning(trainer)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def lambda_rate(optimizer: Any) -> Any:
    return torch_schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"interval": "step"}, {}),
        ({"interval": "step", "frequency": 2}, {}),
        ({"interval": "step"}, {"accumulate_grad_batches": 2}),
        ({"interval": "epoch"}, {}),
        ({"interval": "epoch"}, {"accumulate_grad_batches": 3}),
    ],
)
def test_the_rates_foretold_are_those_that_are_used(config: dict[str, Any], options: dict[str, Any]) -> None:
    look = Look()
    trainer(callbacks=[look], max_epochs=3, **options).fit(Scheduled(lambda_rate, **config))
    assert look.schedule is not None and look.schedule.steps == len(look.rates)
    assert [look.schedule.rate(step) for step in range(len(look.rates))] == pytest.approx(look.rates)


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau")
def test_what_depends_on_more_than_the_step_or_has_no_end_is_not_foretold() -> None:
    plateau = Scheduled(torch_schedulers.ReduceLROnPlateau, monitor="loss", strict=False)
    for module, options in (
        (plateau, {}),
        (Module(), {}),
        (Scheduled(lambda_rate), {"max_epochs": -1, "max_time": "00:00:00:00"}),
    ):
        look = Look()
        trainer(callbacks=[look], **options).fit(module)
        assert look.schedule is None


def test_a_schedule_that_is_given_goes_before_the_trainers_and_none_forecasts_nothing() -> None:
    own = Schedule(lambda step: 1e-3 * 0.5 ** (step / 4), steps=1000)
    reports: list[Report] = []
    watch = UpdateWatch(window=4, schedule=own, sinks=[reports.append], journal=None, print_audit=False)
    trainer(callbacks=[watch], max_epochs=1).fit(Scheduled(lambda_rate, interval="step"))
    assert reports[0].forecast is not None and reports[0].forecast.until == 1000
    options: dict[str, Any] = {
        "averages": None,
        "thresholds": None,
        "seed": 0,
        "on_stall": "warn",
        "progress_bar": True,
    }
    rest: dict[str, Any] = {"window": 8, "samples": 16, "sinks": [], "print_audit": True, "check_replicas": False}
    chosen = {name: Options(**options, **rest, schedule=name).schedule_or(lambda: own) for name in ("auto", None)}
    assert chosen == {"auto": own, None: None}
    with pytest.raises(TypeError, match=r"schedule=0\.1.* must be update_watch\.Schedule"):
        UpdateWatch(schedule=0.1)  # type: ignore[arg-type]
