"""What UpdateWatch tells in Lightning's Trainer, and what happens on a stall."""

from __future__ import annotations

import io
import itertools
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    TQDMProgressBar,
)

from tests.support.lightning_fits import FAST, LOW, STALLS, Watched, fit, hook_count, stalled_names
from tests.support.lightning_models import Module, trainer
from update_watch.callbacks import StalledError, UpdateWatch
from update_watch.report import Cause, Health, Report

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")

# --- what it tells ----------------------------------------------------------------------------------------


def test_progress_bar_shows_the_last_report_in_every_epoch() -> None:
    shown: list[dict[str, Any]] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            shown.append(dict(trainer.progress_bar_metrics))
            time.sleep(0.02)  # a batch of this model takes less than judging its first window beside other processes

    watch = Watched(thresholds=FAST)
    fit(Module(lr=LOW), watch, Look(), max_epochs=2, **STALLS)
    assert watch.last is not None
    # the first report is judged on another thread; how soon depends on the machine
    known = [s for s in shown if s]
    assert (
        shown[-len(known) :] == known and len(known) > len(shown) / 2
    )  # once there, it stays, in the second epoch too
    assert set(known[0]) == {"efficiency", "stalled"}
    assert known[-1]["efficiency"] < 0.3 and known[-1]["stalled"] == len(stalled_names(watch.reports[-2]))


def lines_on_a_terminal(written: str) -> list[str]:
    """What is to be read in the end, where a carriage return goes back to the line's begin."""
    lines = []
    for raw in written.split("\n"):
        line = ""
        for part in raw.split("\r"):
            line = part + line[len(part) :]
        lines.append(line.rstrip())
    return lines


def test_a_bar_shows_whole_counts_and_is_not_broken_by_an_alert(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()  # a terminal shows both
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("update_watch").addHandler(handler)
    try:
        bar = TQDMProgressBar()
        watch = Watched(thresholds=FAST)
        fit(Module(lr=LOW, batches=24), watch, bar, max_epochs=2, enable_progress_bar=True, **STALLS)
    finally:
        logging.getLogger("update_watch").removeHandler(handler)
    written = terminal.getvalue()
    stalled = len(stalled_names(watch.last))
    assert stalled and re.search(rf"stalled={stalled}[],]", written) and "stalled=0.0" not in written
    assert not re.search(r"stalled=\d+\.", written)
    told = [line for line in lines_on_a_terminal(written) if "update-watch, step" in line]
    assert told and all(line.startswith("update-watch, step") and "it/s" not in line for line in told)
    assert "get_metrics" not in vars(bar)  # it is the user's again


def test_progress_bar_entry_can_be_turned_off() -> None:
    watch = Watched(progress_bar=False)
    fitted = fit(Module(), watch, max_epochs=2)
    assert len(watch.reports) == 6 and fitted.progress_bar_metrics == {}


def test_efficiency_can_be_monitored() -> None:
    stopping = EarlyStopping(
        "efficiency", mode="max", stopping_threshold=0.5, check_on_train_epoch_end=True, strict=False
    )
    fitted = fit(Module(), Watched(), stopping, max_epochs=4)
    assert fitted.current_epoch < 4 and float(fitted.callback_metrics["efficiency"]) > 0.5


def test_audit_is_one_line_when_nothing_will_stall(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Module(), UpdateWatch(window=4))
    lines = [line for line in capsys.readouterr().out.splitlines() if "update-watch" in line]
    assert lines == ["update-watch: 6 tensors watched; nothing in their formats will stall."]


def test_audit_is_printed_once_when_something_will_stall(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Module(lr=LOW), UpdateWatch(window=4), max_epochs=2, **STALLS)
    out = capsys.readouterr().out
    assert out.count("update-watch:") == 1 and "BF16" in out and "precision='bf16-mixed'" in out
    assert "nothing in their formats will stall" not in out
    said = out[out.index("update-watch:") :].splitlines()
    assert said[1].startswith("Fix: ") and len("\n".join(said[:3])) < 700


def test_the_whole_audit_is_printed_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Module(lr=LOW), UpdateWatch(window=4, print_audit="full"), **STALLS)
    assert "what accumulates" in capsys.readouterr().out


def test_audit_can_be_turned_off(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Module(lr=LOW), UpdateWatch(window=4, print_audit=False), **STALLS)
    assert "update-watch" not in capsys.readouterr().out


# --- on_stall --------------------------------------------------------------------------------------------


def test_warn_logs_and_trains_on(caplog: pytest.LogCaptureFixture) -> None:
    fitted = fit(Module(lr=LOW, batches=24), Watched(thresholds=FAST), **STALLS)
    assert fitted.global_step == 24
    assert any(r.name == "update_watch" and r.levelname == "ERROR" and "STALLED" in r.message for r in caplog.records)


def test_stop_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    watch = Watched(thresholds=FAST, on_stall="stop")
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=0)
    fitted = fit(Module(lr=LOW, batches=400), watch, checkpoint, enable_checkpointing=True, **STALLS)
    assert 4 <= fitted.global_step < 400
    assert fitted.state.finished
    (path,) = tmp_path.glob("stalled-step=*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == fitted.global_step


def test_stop_without_checkpointing_ends_the_run_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    fitted = fit(Module(lr=LOW, batches=400), Watched(thresholds=FAST, on_stall="stop"), **STALLS)
    assert fitted.global_step < 400 and "checkpointing is off" in caplog.text


def test_raise_raises_with_the_report() -> None:
    watch = Watched(thresholds=FAST, on_stall="raise")
    with pytest.raises(StalledError, match="stalled") as caught:
        fit(Module(lr=LOW, batches=400), watch, **STALLS)
    assert caught.value.report is not None and stalled_names(caught.value.report)
    assert str(caught.value) == f"update-watch: {caught.value.report.headline}"


@pytest.mark.parametrize("answer", [True, None])
def test_a_function_is_called_once_per_stall_and_stops_when_it_says_so(answer: bool | None) -> None:
    heard: list[Report] = []

    def on_stall(report: Report) -> bool | None:
        heard.append(report)
        return answer

    fitted = fit(Module(lr=LOW, batches=60), Watched(thresholds=FAST, on_stall=on_stall), **STALLS)
    assert (fitted.global_step < 60) == (answer is True)
    names = [stalled_names(report) for report in heard]
    assert names and all(b - a for a, b in itertools.pairwise(names))


def test_what_the_users_function_raises_comes_through() -> None:
    def on_stall(report: Report) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        fit(Module(lr=LOW, batches=400), Watched(thresholds=FAST, on_stall=on_stall), **STALLS)


def test_a_healthy_twin_is_neither_stopped_nor_raised() -> None:
    for on_stall in ("stop", "raise"):
        fitted = fit(Module(batches=24), Watched(thresholds=FAST, on_stall=on_stall))
        assert fitted.global_step == 24


# --- processes -----------------------------------------------------------------------------------------


class TellAtEnd(Callback):
    """Writes what a rank saw to a file: spawned processes keep their callbacks to themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        watch = next(c for c in trainer.callbacks if isinstance(c, UpdateWatch))
        last = watch.last.step if watch.last is not None else None
        (self.folder / str(trainer.global_rank)).write_text(f"{trainer.global_step} {last} {hook_count(trainer)}")


@pytest.mark.slow
def test_ranks_stop_together_with_a_checkpoint_and_one_of_them_prints(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    watch = UpdateWatch(window=4, on_stall="stop", thresholds=FAST)
    fitted = trainer(
        callbacks=[watch, TellAtEnd(tmp_path), ModelCheckpoint(tmp_path / "checkpoints", save_top_k=0)],
        enable_checkpointing=True,
        devices=2,
        strategy="ddp_spawn",
        max_epochs=100,
        precision="bf16-true",
    )
    torch.manual_seed(0)
    fitted.fit(Module(lr=LOW))
    first, second = ((tmp_path / str(rank)).read_text().split() for rank in (0, 1))
    assert first[0] == second[0] and int(first[0]) < 600
    assert first[2] == second[2] == "0"
    (path,) = (tmp_path / "checkpoints").glob("stalled-step=*.ckpt")
    stored = torch.load(path, weights_only=True)
    assert stored["global_step"] == int(first[0]) and stored["callbacks"]["UpdateWatch"]
    assert capfd.readouterr().out.count("update-watch:") == 1


@pytest.mark.parametrize("overflows", [0, 3, 10**9])
def test_a_scaler_that_skips_every_step_is_told_and_a_few_skips_are_not(overflows: int) -> None:
    """Under 16-mixed the optimizer of this module is stepped by the scaler, which calls no `step` where gradients overflow."""

    class Overflowing(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * 1e38 * 1e38 if batch_idx < overflows else loss

    watch = Watched()
    fit(Overflowing(batches=40), watch, precision="16-mixed", max_epochs=1)
    titles = [alert.title for report in watch.reports for alert in report.alerts]
    last = watch.last
    assert last is not None
    if overflows > 3:
        assert titles == ["NOTHING TRAINS"] and {t.cause for t in last.tensors} == {Cause.skipped_steps}
    else:
        assert titles == [] and last.health is Health.healthy
