"""UpdateWatch in Lightning's Trainer lets go when it should, is silent where nothing trains, and remembers."""

from __future__ import annotations

import gc
import pickle
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.tuner.tuning import Tuner

from tests.support.lightning_fits import FAST, LOW, STALLS, Watched, fit, hook_count, stalled_names
from tests.support.lightning_models import Module, trainer
from update_watch.callbacks import UpdateWatch
from update_watch.thresholds import Thresholds

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")

# --- letting go ----------------------------------------------------------------------------------------


def test_nothing_stays_attached_after_fit() -> None:
    watch = Watched()
    fitted = fit(Module(), watch)
    assert hook_count(fitted) == 0
    assert watch.last == watch.reports[-1]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_nothing_stays_attached_after_an_exception_and_the_last_window_is_kept(error: BaseException) -> None:
    class Fails(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 6:
                raise error
            return super().training_step(batch, batch_idx)

    watch = Watched()
    fitted = trainer(callbacks=[watch])
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else RuntimeError):
        fitted.fit(Fails())
    assert hook_count(fitted) == 0
    assert watch.windows == [(3, 4), (6, 2)]


@pytest.mark.parametrize("where", ["training_step", "on_train_start"])
def test_of_a_fit_that_fails_before_its_first_step_nothing_is_reported(where: str) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("boom")

    class Fails(Callback):
        pass

    watch, module, other = Watched(), Module(), Fails()
    setattr(module if where == "training_step" else other, where, fail)
    with pytest.raises(RuntimeError, match="boom"):
        trainer(callbacks=[watch, other]).fit(module)
    assert watch.reports == [] and watch.last is None  # and no alert of tensors that are not measured


def test_a_callback_that_is_kept_after_fit_keeps_neither_module_nor_trainer() -> None:
    watch, module = Watched(), Module()
    fitted = fit(module, watch)
    gone = weakref.ref(module), weakref.ref(fitted), weakref.ref(fitted.optimizers[0])
    del module, fitted
    deadline = time.monotonic() + 10
    while any(ref() is not None for ref in gone) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert [ref() for ref in gone] == [None, None, None]
    assert watch.last is not None


def test_an_error_of_ours_does_not_reach_training(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Watched):
        def __init__(self) -> None:
            super().__init__()

    watch, module = Broken(), Module()
    watch._options = None  # type: ignore[assignment]
    fitted = fit(module, watch)
    assert fitted.global_step == 12 and hook_count(fitted) == 0
    assert "stopped watching, training goes on" in caplog.text


def test_every_fit_is_watched_and_a_continued_one_remembers() -> None:
    watch, module = Watched(on_stall="warn", thresholds=FAST), Module(lr=LOW)
    fit(module, watch, **STALLS)
    first = {t.name: t.since_step for t in watch.reports[-1].tensors if t.health == "stalled"}
    assert first
    fitted = fit(module, watch, **STALLS)
    assert len(watch.reports) == 6 and hook_count(fitted) == 0
    alerts = [alert for report in watch.reports[3:] for alert in report.alerts if alert.level == "ERROR"]
    assert not [a for a in alerts if set(a.tensors) <= set(first)]  # told in the first fit
    other = Module(lr=LOW)
    fit(other, watch, **STALLS)
    assert [a for report in watch.reports[6:] for a in report.alerts]  # another model: news


# --- silence -------------------------------------------------------------------------------------------


def test_fast_dev_run_is_silent(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    watch = UpdateWatch(window=1, on_stall="raise", thresholds=Thresholds(minimum_steps=1))
    fit(Module(lr=LOW), watch, fast_dev_run=8, **STALLS)
    assert watch.last is None
    assert "update-watch" not in capsys.readouterr().out + caplog.text


@pytest.mark.parametrize("what", ["lr_find", "scale_batch_size"])
def test_tuners_are_silent(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watched(window=1, print_audit=True, on_stall="raise")
    module = Module(batches=60)
    module.batch_size = 2  # type: ignore[assignment]
    tuner = Tuner(trainer(callbacks=[watch], default_root_dir=tmp_path))
    if what == "lr_find":
        found = tuner.lr_find(module, num_training=20)
        assert found is not None and len(found.results["lr"]) >= 10
    else:
        tuner.scale_batch_size(module, max_trials=2)
    assert watch.reports == [] and "update-watch" not in capsys.readouterr().out


def test_learning_rate_finder_inside_a_fit_is_not_seen(tmp_path: Path) -> None:
    class Finder(LearningRateFinder):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

        def on_fit_start(self, *args: Any) -> None:
            return

    watch = Watched(window=12)
    fit(Module(), Finder(num_training_steps=5), watch, max_epochs=3, default_root_dir=tmp_path)
    assert [window for _, window in watch.windows] == [12, 12, 12]


# --- state ---------------------------------------------------------------------------------------------


def test_state_goes_through_a_checkpoint_that_loads_weights_only(tmp_path: Path) -> None:
    watch = Watched(thresholds=FAST)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    fit(Module(lr=LOW), watch, checkpoint, enable_checkpointing=True, **STALLS)
    alerted = [a for report in watch.reports for a in report.alerts]
    assert alerted
    path = tmp_path / "last.ckpt"
    stored = torch.load(path, weights_only=True)["callbacks"]["UpdateWatch"]
    assert stored and isinstance(stored, dict)

    resumed = Watched(thresholds=FAST)
    again = ModelCheckpoint(tmp_path, save_last=True)
    fitted = trainer(callbacks=[resumed, again], max_epochs=2, enable_checkpointing=True, **STALLS)
    fitted.fit(Module(lr=LOW), ckpt_path=path)
    assert resumed.windows == [(15, 4), (19, 4), (23, 4)]
    assert stalled_names(resumed.last)
    told = {name for a in alerted for name in a.tensors}
    twice = [a for report in resumed.reports for a in report.alerts if a.level == "ERROR" and set(a.tensors) <= told]
    assert not twice  # told before the checkpoint


def test_state_of_a_later_version_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = Watched()
    fit(Module(), watch, ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    content["callbacks"]["UpdateWatch"] = {"version": 99}
    torch.save(content, tmp_path / "changed.ckpt")
    resumed = Watched()
    again = ModelCheckpoint(tmp_path, save_last=True)
    fitted = trainer(callbacks=[resumed, again], max_epochs=2, enable_checkpointing=True)
    fitted.fit(Module(), ckpt_path=tmp_path / "changed.ckpt")
    assert len(resumed.reports) == 3
    assert "memory of earlier windows is not used" in caplog.text


def test_pickles_in_the_middle_of_a_fit() -> None:
    copies: list[Any] = []

    class Pickle(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            copies.append(pickle.loads(pickle.dumps(trainer.callbacks[0])))

    watch = UpdateWatch(window=4, print_audit=False)
    fit(Module(), watch, Pickle(), max_steps=5)
    assert len(copies) == 5 and copies[-1].last is not None and copies[-1].last.step == 3
    fit(Module(), copies[-1])
    assert copies[-1].last.step == 11
