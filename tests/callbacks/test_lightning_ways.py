"""Further ways people train with Lightning; none of them may surprise the watch, or be surprised by it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, Logger

from tests.support.lightning_models import Module, everything, same, scaler_plugin, trainer
from update_watch.callbacks import UpdateWatch
from update_watch.dashboards import Journal, read_journal
from update_watch.report import Report

LOW = 1e-6


def keep(**options: Any) -> tuple[UpdateWatch, list[Report]]:
    """A quiet callback, and the reports it makes."""
    reports: list[Report] = []
    return UpdateWatch(**{"window": 4, "sinks": [reports.append], "print_audit": False, **options}), reports


def windows(reports: list[Report]) -> list[tuple[int, int]]:
    return [(report.step, report.window) for report in reports]


# --- modules and optimizers ------------------------------------------------------------------------------------


def test_a_compiled_lightning_module_is_watched_under_its_plain_names() -> None:
    watch, reports = keep()
    torch.manual_seed(0)
    module = Module()
    fitted = trainer(callbacks=[watch])
    fitted.fit(torch.compile(module, backend="eager"))  # type: ignore[arg-type]
    assert windows(reports) == [(3, 4), (7, 4), (11, 4)]
    assert [t.name for t in reports[-1].tensors] == [name for name, _ in module.named_parameters()]
    assert all(t.efficiency == pytest.approx(1.0, abs=0.02) for t in reports[-1].tensors)


def test_an_optimizer_replaced_in_the_middle_of_a_batch_is_watched_from_its_second_step() -> None:
    class Replace(Callback):
        backwards = 0

        def on_before_backward(self, trainer: Any, *_: Any) -> None:
            self.backwards += 1
            if self.backwards == 9:  # the first of the fifth batch
                trainer.strategy.setup_optimizers(trainer)

    class Manual(Module):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for _ in range(2):
                self.manual_backward(self.loss(0, batch))
                optimizer = self.optimizers()
                optimizer.step()  # type: ignore[union-attr]
                optimizer.zero_grad()  # type: ignore[union-attr]

    watch, reports = keep(window=128)
    trainer(callbacks=[Replace(), watch]).fit(Manual(manual=True))
    # the eight steps of the old one belong to a window that never ended
    assert windows(reports) == [(11, 15)]


def test_a_step_that_the_scaler_skips_is_no_stall_and_changes_nothing() -> None:
    class Overflow(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * 1e38 if batch_idx % 4 == 2 else loss  # times the scale: infinite

    watch, reports = keep(window=128)
    found = []
    for callbacks in ([watch], []):
        torch.manual_seed(0)
        module = Overflow()
        fitted = trainer(callbacks=callbacks, plugins=[scaler_plugin()])
        fitted.fit(module)
        found.append(everything(module, fitted))
    assert same(*found)
    assert [report.window for report in reports] == [9]
    assert {str(t.health) for t in reports[0].tensors} == {"healthy"}


def test_overfitting_a_batch_counts_every_step() -> None:
    watch, reports = keep()
    trainer(callbacks=[watch], overfit_batches=1, max_epochs=8).fit(Module())
    assert windows(reports) == [(3, 4), (7, 4)]


@pytest.mark.filterwarnings("ignore:.*barebones.*")
def test_a_barebones_trainer_is_watched() -> None:
    watch, reports = keep()
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"))
    trainer(callbacks=[watch], barebones=True, **options).fit(Module())
    assert windows(reports) == [(3, 4), (7, 4), (11, 4)]


# --- several calls -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_validation_and_testing_leave_the_next_fit_watched() -> None:
    class Full(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(0, batch)

        test_step = validation_step

    watch, reports = keep()
    module = Full()
    fitted = trainer(callbacks=[watch])
    fitted.fit(module)
    fitted.validate(module, module.train_dataloader(), verbose=False)
    fitted.test(module, module.train_dataloader(), verbose=False)
    assert len(reports) == 3
    trainer(callbacks=[watch]).fit(module)
    assert windows(reports[3:]) == [(3, 4), (7, 4), (11, 4)]


def test_a_fit_after_one_that_failed_is_watched() -> None:
    class Fails(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 6:
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    watch, reports = keep()
    with pytest.raises(RuntimeError, match="boom"):
        trainer(callbacks=[watch]).fit(Fails())
    del reports[:]
    trainer(callbacks=[watch]).fit(Module())
    assert windows(reports) == [(3, 4), (7, 4), (11, 4)]


@pytest.mark.parametrize("finder", ["learning rate", "batch size"])
def test_finders_that_run_as_callbacks_are_not_seen(finder: str, tmp_path: Path) -> None:
    class Sized(Module):
        batch_size = 4

        def train_dataloader(self) -> Any:
            data = torch.randn(96, 8, generator=torch.Generator().manual_seed(1))
            return torch.utils.data.DataLoader(data, batch_size=self.batch_size)  # type: ignore[arg-type]

    seeker = (
        LearningRateFinder(num_training_steps=5)
        if finder == "learning rate"
        else BatchSizeFinder(init_val=4, max_trials=2)
    )
    watch, reports = keep(window=128)
    fitted = trainer(callbacks=[seeker, watch], default_root_dir=tmp_path)
    fitted.fit(Sized())
    assert fitted.global_step > 0
    assert windows(reports) == [(fitted.global_step - 1, fitted.global_step)]


# --- averages -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_stochastic_weight_averaging_is_found_and_raises_no_alarm() -> None:
    watch, reports = keep(window=12)
    torch.manual_seed(0)
    average = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    trainer(callbacks=[average, watch], max_epochs=4).fit(Module())
    seen = [t.accumulators.get("average:swa") for report in reports for t in report.tensors]
    assert len(reports) == 4 and all(one is not None for one in seen)
    assert not {str(one.health) for one in seen if one is not None} & {"stalled", "stalling", "broken"}
    assert not [alert for report in reports for alert in report.alerts]


# --- loggers ---------------------------------------------------------------------------------------------------


class Rows(Logger):
    """A logger of the user's own."""

    name, version, experiment = "rows", 0, None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_every_logger_gets_every_window(tmp_path: Path) -> None:
    first, second = Rows(), Rows()
    watch, reports = keep()
    trainer(
        callbacks=[watch], logger=[first, CSVLogger(tmp_path), second], accumulate_grad_batches=2, log_every_n_steps=1
    ).fit(Module())
    assert windows(reports) == [(3, 4), (5, 2)]
    for logger in (first, second):
        ours = {step: row["update_watch/efficiency"] for step, row in logger.rows if "update_watch/efficiency" in row}
        assert ours == {report.step: report.efficiency for report in reports}
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        assert sum("update_watch/" in line for line in file) == 1


@pytest.mark.slow
def test_a_wandb_run_gets_everything_on_the_trainers_axis(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    run = wandb.init(mode="offline", dir=tmp_path, project="p", settings=wandb.Settings(silent=True, console="off"))
    watch, reports = keep()
    torch.manual_seed(0)
    trainer(callbacks=[watch], logger=WandbLogger(experiment=run), log_every_n_steps=1).fit(Module(batches=16))
    summary = dict(run.summary)
    run.finish()
    assert reports[-1].step == 15 and summary["trainer/global_step"] == 15
    assert summary["update_watch/efficiency"] == pytest.approx(reports[-1].efficiency)
    assert summary["update_watch/tensors_stalled"] == reports[-1].counts.get("stalled", 0)
    # more than the numbers that other loggers get
    assert {f"update_watch/{name}" for name in ("heatmap", "headroom", "worst", "audit")} <= set(summary)


# --- copies ----------------------------------------------------------------------------------------------------


def test_copies_made_for_other_processes_keep_the_options_and_the_journal(tmp_path: Path) -> None:
    watch = UpdateWatch(window=4, sinks=[Journal(tmp_path / "journal")], on_stall="stop", print_audit=False)
    copied, deep = pickle.loads(pickle.dumps(watch)), copy.deepcopy(watch)
    assert copied._options.window == deep._options.window == 4 and copied._options.on_stall == "stop"
    trainer(callbacks=[copied]).fit(Module())
    assert [report.step for report in read_journal(tmp_path / "journal")] == [3, 7, 11]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint", "ignore:Checkpoint directory")
@pytest.mark.slow
def test_stopping_writes_a_checkpoint_that_resumes(tmp_path: Path) -> None:
    from update_watch.thresholds import Thresholds

    def run(watch: UpdateWatch, path: Any = None) -> Any:
        torch.manual_seed(0)
        checkpoint = ModelCheckpoint(tmp_path, save_top_k=0)
        fitted = trainer(
            callbacks=[watch, checkpoint], enable_checkpointing=True, precision="bf16-true", limit_train_batches=200
        )
        fitted.fit(Module(lr=LOW, batches=400), ckpt_path=path)
        return fitted

    first, _ = keep(on_stall="stop", thresholds=Thresholds(minimum_steps=2))
    stopped = run(first).global_step
    (path,) = tmp_path.glob("stalled-step=*.ckpt")
    second, reports = keep(thresholds=Thresholds(minimum_steps=2))
    fitted = run(second, path)
    assert stopped < fitted.global_step == 200
    assert reports[0].step == stopped - 1 + 4
