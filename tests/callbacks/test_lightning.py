"""UpdateWatch in Lightning's Trainer: when it looks, what it tells, and that it lets go.

`test_lightning_matrix.py` holds its numbers against full comparisons.
"""

from __future__ import annotations

import csv
import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner.tuning import Tuner

from tests.support.lightning_models import Module, everything, same, trainer
from update_watch.callbacks import StalledError, UpdateWatch
from update_watch.report import Report
from update_watch.thresholds import Thresholds

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")

STALLS = {"precision": "bf16-true"}  # with LOW, most tensors of the module stall
LOW = 1e-6
FAST = Thresholds(minimum_steps=2)


class Watched(UpdateWatch):
    """Keeps every report, and prints nothing."""

    def __init__(self, **options: Any) -> None:
        self.reports: list[Report] = []
        super().__init__(**{"window": 4, "sinks": [self.reports.append], "print_audit": False, **options})

    @property
    def windows(self) -> list[tuple[int, int]]:
        return [(report.step, report.window) for report in self.reports]


def hook_count(fitted: lightning.Trainer) -> int:
    return sum(len(opt._optimizer_step_pre_hooks) + len(opt._optimizer_step_post_hooks) for opt in fitted.optimizers)


def fit(module: Module, *callbacks: Any, **options: Any) -> lightning.Trainer:
    torch.manual_seed(0)
    fitted = trainer(callbacks=list(callbacks), **options)
    fitted.fit(module)
    return fitted


def stalled_names(report: Report | None) -> set[str]:
    assert report is not None
    return {t.name for t in report.tensors if t.health == "stalled"}


# --- numbering -----------------------------------------------------------------------------------------


def test_reports_are_numbered_like_the_loggers_x_axis(tmp_path: Path) -> None:
    class Logging(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("batch", float(batch_idx))
            return loss

    watch = Watched()
    fit(Logging(), watch, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert watch.windows == [(3, 4), (7, 4), (11, 4)]
    rows = read_csv(tmp_path)
    assert {row["step"]: float(row["batch"]) for row in rows if row["batch"]} == {str(i): float(i) for i in range(12)}
    ours = [row for row in rows if row["update_watch/efficiency"]]
    assert [row["step"] for row in ours] == ["3", "7", "11"]
    for row, report in zip(ours, watch.reports, strict=True):
        assert float(row["update_watch/efficiency"]) == pytest.approx(report.efficiency)
        assert float(row["update_watch/tensors_healthy"]) == report.counts["healthy"]


def read_csv(folder: Path) -> list[dict[str, str]]:
    with next(folder.rglob("metrics.csv")).open() as file:
        return list(csv.DictReader(file))


def test_two_optimizers_share_one_axis() -> None:
    watch = Watched()
    fit(Module(optimizers=2, manual=True), watch)
    assert watch.reports[-1].step == 11  # global_step is 24 by then
    groups = {t.optimizer_group for t in watch.reports[-1].tensors}
    assert groups == {"0/0", "1/0"}


def test_accumulation_counts_updates_not_batches() -> None:
    watch = Watched()
    fit(Module(), watch, accumulate_grad_batches=3)
    assert watch.windows == [(3, 4)]


def test_logged_keys_and_values_are_those_of_the_dashboards() -> None:
    from update_watch.callbacks._shared import run_numbers
    from update_watch.dashboards.metrics import run_values

    watch = Watched()
    fit(Module(), watch, **STALLS)
    numbers = run_numbers(watch.reports[-1])
    documented = run_values(watch.reports[-1])
    assert len(numbers) >= 8
    assert numbers == {key: pytest.approx(documented[key]) for key in numbers}


# --- what it looks at ----------------------------------------------------------------------------------


def test_lbfgs_is_one_step_per_step() -> None:
    class WithLBFGS(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    watch = Watched()
    found = []
    for callbacks in ([watch], []):
        torch.manual_seed(0)
        module = WithLBFGS()
        found.append(everything(module, fit(module, *callbacks)))
    assert same(*found)
    assert watch.windows == [(3, 4), (7, 4), (11, 4)]


def test_compiled_module_keeps_its_plain_names() -> None:
    class Compiled(Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets[0] = torch.compile(self.nets[0], backend="eager")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.nets[0](batch) - batch.sum(1, keepdim=True)).pow(2).mean()

    watch = Watched()
    fit(Compiled(), watch)
    assert [t.name for t in watch.reports[-1].tensors][:3] == ["nets.0.0.weight", "nets.0.0.bias", "nets.0.1.weight"]


def test_finetuning_adds_groups_that_are_watched_from_their_first_step() -> None:
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.nets[0][0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.nets[0][0], optimizer, lr=1e-3)

    class Head(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    watch = Watched(window=12)
    fit(Head(), Unfreeze(), watch, max_epochs=2)
    first, second = ({t.name: t for t in report.tensors} for report in watch.reports)
    assert first["nets.0.0.weight"].health == "frozen"
    assert second["nets.0.0.weight"].optimizer_group == "0/1"
    assert second["nets.0.0.weight"].efficiency == pytest.approx(1.0, abs=0.02)


def test_replaced_optimizers_are_watched_and_the_old_ones_let_go() -> None:
    class Replace(Callback):
        old: Any = None

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                self.old = trainer.optimizers[0]
                trainer.strategy.setup_optimizers(trainer)

    replace, watch = Replace(), Watched(window=12)
    fitted = fit(Module(), replace, watch, max_epochs=3)
    assert replace.old is not fitted.optimizers[0]
    assert len(replace.old._optimizer_step_pre_hooks) == 0
    assert watch.windows == [(11, 12), (23, 12), (35, 12)]
    assert all(t.efficiency == pytest.approx(1.0, abs=0.02) for t in watch.reports[-1].tensors)


def test_an_optimizer_that_cannot_be_watched_is_said_once_and_training_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class NoOptimizer(Module):
        def configure_optimizers(self) -> Any:
            return None

    watch = Watched()
    module = NoOptimizer(manual=True)
    module.training_step = lambda batch, batch_idx: None  # type: ignore[method-assign, assignment]
    with pytest.warns(UserWarning, match="optimizer"):
        fit(module, watch)
    assert watch.last is None
    assert "no torch optimizer with step hooks among the trainer's optimizers (_MockOptimizer)" in caplog.text


def test_validation_between_steps_changes_nothing_that_is_seen() -> None:
    class Validated(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(0, batch)

        def val_dataloader(self) -> Any:
            return self.train_dataloader()

    watch, plain = Watched(), Watched()
    torch.manual_seed(0)
    fit(Validated(), watch, val_check_interval=2, num_sanity_val_steps=2)
    torch.manual_seed(0)
    fit(Module(), plain)
    assert [r.efficiency for r in watch.reports] == [r.efficiency for r in plain.reports]
    assert len(watch.reports) == 3


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
    from update_watch.callbacks._shared import average_models

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


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no.such", r"UpdateWatch(averages={'ema': 'no.such'}): Module has no attribute 'no.such'; give the path"),
        ("nets.0.2", "averaged models are not watched: watch(averages={'ema': ...})"),
    ],
)
def test_an_average_that_is_not_there_is_said_and_the_weights_are_watched(
    path: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watched(averages={"ema": path})
    fit(Module(), watch)
    assert message in caplog.text and len(watch.reports) == 3


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


# --- what it tells ----------------------------------------------------------------------------------------


def test_progress_bar_shows_the_last_report_in_every_epoch() -> None:
    shown: list[dict[str, Any]] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            shown.append(dict(trainer.progress_bar_metrics))

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
    assert out.count("update-watch:") == 1 and "bfloat16" in out.lower().replace("bf16", "bfloat16")
    assert "nothing in their formats will stall" not in out


def test_audit_can_be_turned_off(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Module(lr=LOW), UpdateWatch(window=4, print_audit=False), **STALLS)
    assert "update-watch" not in capsys.readouterr().out


# --- on_stall --------------------------------------------------------------------------------------------


def test_warn_logs_and_trains_on(caplog: pytest.LogCaptureFixture) -> None:
    fitted = fit(Module(lr=LOW, batches=24), Watched(thresholds=FAST), **STALLS)
    assert fitted.global_step == 24
    assert any(r.name == "update_watch" and r.levelname == "ERROR" and "stalled" in r.message for r in caplog.records)


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


# --- options and namespaces --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, r"UpdateWatch\(window=0\) must be a whole number of at least 1"),
        ({"samples": 2.5}, ValueError, r"UpdateWatch\(samples=2.5\)"),
        ({"on_stall": "explode"}, ValueError, r"UpdateWatch\(on_stall='explode'\) must be 'warn', 'stop', 'raise'"),
        ({"sinks": [3]}, TypeError, r"UpdateWatch\(sinks=\[3\]\)"),
        ({"thresholds": 0.1}, TypeError, r"UpdateWatch\(thresholds=0.1\) must be update_watch.Thresholds"),
        ({"averages": [1]}, TypeError, r"UpdateWatch\(averages=\[1\]\) must map names to models"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_wrong_options_are_refused_where_they_are_written(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        UpdateWatch(**options)


def test_importing_the_package_imports_no_trainer() -> None:
    code = (
        "import sys, update_watch.callbacks as c; assert 'UpdateWatch' in dir(c);"
        "print([m for m in ('lightning', 'pytorch_lightning', 'transformers', 'wandb') if m in sys.modules]);"
        "c.UpdateWatch; print('lightning.pytorch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "True"]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["ours-first", "theirs-first", "both"])
def test_works_in_the_trainer_of_pytorch_lightning(order: str) -> None:
    imports = {
        "ours-first": "from update_watch.callbacks import UpdateWatch; import pytorch_lightning as pl",
        "theirs-first": "import pytorch_lightning as pl; from update_watch.callbacks import UpdateWatch",
        "both": "import lightning, pytorch_lightning as pl; from update_watch.callbacks import UpdateWatch",
    }[order]
    callbacks = "[watch]" if order == "ours-first" else "watch"  # a bare one must be of their class
    code = f"""
{imports}
import torch
class Module(pl.LightningModule):
    def __init__(self):
        super().__init__(); self.net = torch.nn.Linear(4, 1)
    def training_step(self, x, i): return self.net(x).pow(2).mean()
    def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), lr=1e-3)
watch = UpdateWatch(window=4)
trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, callbacks={callbacks},
                     enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=4))
print(watch.last.step, [t.name for t in watch.last.tensors], round(watch.last.efficiency, 2))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "7 ['net.weight', 'net.bias'] 1.0"


def test_two_watches_in_one_trainer_are_refused_by_lightning() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `UpdateWatch`"):
        trainer(callbacks=[UpdateWatch(), UpdateWatch()])


# --- the environment's switch --------------------------------------------------------------------------


def test_environment_adds_nothing_unless_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from update_watch.callbacks.automatic import callbacks

    for value in (None, "0", "", "true"):
        monkeypatch.delenv("UPDATE_WATCH", raising=False)
        if value is not None:
            monkeypatch.setenv("UPDATE_WATCH", value)
        assert callbacks() == []
    monkeypatch.setenv("UPDATE_WATCH", "1")
    (added,) = callbacks()
    assert isinstance(added, UpdateWatch)


def test_the_environments_watch_stands_back_for_the_users(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def watches(fitted: lightning.Trainer) -> list[UpdateWatch]:
        return [c for c in fitted.callbacks if isinstance(c, UpdateWatch)]

    assert watches(fit(Module())) == []  # installed, but not asked for
    monkeypatch.setenv("UPDATE_WATCH", "1")
    (alone,) = watches(fit(Module()))
    assert alone.last is not None and alone.last.window == 12
    assert capsys.readouterr().out.count("update-watch:") == 1

    mine = UpdateWatch(window=4)
    first, second = watches(fit(Module(), mine))
    assert first is mine and mine.last is not None and second.last is None
    assert capsys.readouterr().out.count("update-watch:") == 1


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
