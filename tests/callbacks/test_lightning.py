"""UpdateWatch in Lightning's Trainer: how it numbers, what it looks at, and its options.

`test_lightning_matrix.py` holds its numbers against full comparisons.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
)
from lightning.pytorch.loggers import CSVLogger

from tests.support.lightning_fits import STALLS, Watched, fit
from tests.support.lightning_models import Module, everything, same, trainer
from update_watch.callbacks import UpdateWatch

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")

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
    from update_watch.callbacks.session import run_numbers
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


def test_a_layer_that_is_replaced_and_that_no_optimizer_holds_is_told() -> None:
    class Replace(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 16:
                first = pl_module.nets[0][0]
                pl_module.nets[0][0] = torch.nn.Linear(first.in_features, first.out_features)

    watch = Watched(window=12)
    fit(Module(), Replace(), watch, max_epochs=4)
    replaced = [t for t in watch.reports[-1].tensors if t.name.startswith("nets.0.0.")]
    assert {(str(t.health), str(t.cause)) for t in replaced} == {("idle", "not_in_optimizer")}
    assert all("it was replaced after step" in t.advice for t in replaced) and len(replaced) == 2


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


class NoOptimizer(Module):
    """Manual; the Trainer knows of no optimizer."""

    def __init__(self) -> None:
        super().__init__(manual=True)

    def configure_optimizers(self) -> Any:
        return None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_a_trainer_without_an_optimizer_is_said_to_have_none(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watched(print_audit=True)
    with pytest.warns(UserWarning, match="optimizer"):
        fit(NoOptimizer(), watch)
    assert watch.last is None and "the trainer has no optimizer" in caplog.text
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


def test_an_optimizer_of_the_modules_own_is_found() -> None:
    class Own(NoOptimizer):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.__dict__["own"] = torch.optim.AdamW(self.parameters(), lr=1e-3)
            optimizer = self.__dict__["own"]
            optimizer.zero_grad()
            self.loss(0, batch).backward()
            optimizer.step()

    watch = Watched()
    with pytest.warns(UserWarning, match="optimizer"):
        fit(Own(), watch)
    assert [report.window for report in watch.reports] == [4, 4, 4]
    assert watch.last is not None and {str(t.health) for t in watch.last.tensors} == {"healthy"}


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


@pytest.mark.slow
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


@pytest.mark.skipif(
    "update-watch" not in entry_points(group="lightning.pytorch.callbacks_factory").names,
    reason="Lightning finds it where the package is installed, here it is on the path alone",
)
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
