"""Averages of the weights in Lightning's Trainer are found, and measured against full comparisons."""

from __future__ import annotations

from typing import Any

import lightning.pytorch.callbacks as lightning_callbacks
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.support.lightning_fits import STALLS, Watched, fit
from tests.support.lightning_models import Module
from update_watch.report import Health

if not hasattr(lightning_callbacks, "EMAWeightAveraging"):
    pytest.skip("this Lightning has no EMAWeightAveraging", allow_module_level=True)
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")

# --- averages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_lightnings_ema_is_found_and_its_efficiency_is_that_of_a_full_comparison(decay: float) -> None:
    """A BF16 average at decay 0.9999 does not move; at 0.9 it does."""

    class Full(Callback):
        """Between two updates of the average, element by element."""

        sums = (0.0, 0.0)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            average = ema._average_model.module.nets[0][0].weight.detach().double()
            if trainer.global_step > 1:
                intended = (1 - decay) * (pl_module.nets[0][0].weight.detach().double() - self.before)
                applied = average - self.before
                self.sums = (
                    self.sums[0] + float((applied * intended).sum()),
                    self.sums[1] + float(intended.pow(2).sum()),
                )
            self.before = average

    ema, full, watch = EMAWeightAveraging(decay=decay), Full(), Watched(window=128)
    module = Module(lr=1e-2, batches=40).to(torch.bfloat16)  # before the average is made, as from_pretrained does
    fit(module, ema, full, watch, **STALLS)
    (report,) = watch.reports
    seen = next(t for t in report.tensors if t.name == "nets.0.0.weight").accumulators["average:ema"]
    truth = full.sums[0] / full.sums[1]
    assert seen.efficiency == pytest.approx(truth, abs=0.05)
    assert (truth < 0.1) == (decay == 0.9999)


def test_a_plain_average_and_a_named_one_are_found() -> None:
    from update_watch.callbacks.averages import average_models

    average = WeightAveraging()
    seen: dict[str, Any] = {}

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            chosen = {"average": "nets.0", "with decay": ["nets.0", 0.5]}
            seen.update(average_models(trainer.callbacks, chosen, pl_module))
            seen["net"] = pl_module.nets[0]

    fit(Module(), average, Look())
    assert seen == {
        "average": seen["net"],
        "with decay": (seen["net"], 0.5),
        "average2": seen["average2"],
        "net": seen["net"],
    }
    assert isinstance(seen["average2"], torch.optim.swa_utils.AveragedModel)


def test_stochastic_weight_averaging_is_waited_for() -> None:
    watch = Watched(window=4)
    fit(Module(lr=1e-2, batches=60), StochasticWeightAveraging(1e-2, swa_epoch_start=3), watch, max_epochs=5)
    averages = [[a for t in report.tensors for a in t.accumulators.values()] for report in watch.reports]
    found = [{(a.health, a.cause) for a in each if a.name == "average:swa"} for each in averages]
    assert len(found) >= 60 and found[28] == {(Health.unknown, None)}
    assert (Health.healthy, None) in set().union(*found)
    assert not [alert for report in watch.reports for alert in report.alerts if "average" in alert.title]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no.such", r"UpdateWatch(averages={'ema': 'no.such'}): Module has no attribute 'no.such'; give the path"),
        ("nets.0.2", "the average 'ema' is not watched"),
    ],
)
def test_an_average_that_is_not_there_is_said_and_the_weights_are_watched(
    path: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watched(averages={"ema": path})
    fit(Module(), watch)
    assert message in caplog.text and len(watch.reports) == 3
