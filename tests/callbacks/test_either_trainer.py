"""One name for Lightning and Hugging Face's Trainer: whichever import a user took, the callback works in the other too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import update_watch as uw

lightning = pytest.importorskip("lightning")
transformers = pytest.importorskip("transformers", minversion="5")

from update_watch.callbacks import UpdateWatch  # noqa: E402  after importorskip
from update_watch.callbacks import lightning as of_lightning  # noqa: E402
from update_watch.callbacks import transformers as of_transformers  # noqa: E402

LR, STEPS = 1e-6, 24
KINDS = [UpdateWatch, of_lightning.UpdateWatch, of_transformers.UpdateWatch]
pytestmark = [pytest.mark.filterwarnings("ignore:.*pin_memory.*")]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 1)).bfloat16()


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.net(batch.bfloat16()).float().square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=LR)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(x.bfloat16()).float().square().mean()}


def data() -> Tensor:
    return torch.randn(4 * STEPS, 8, generator=torch.Generator().manual_seed(0))


def in_lightning(callback: Any, folder: Path) -> None:
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[callback], default_root_dir=folder, logger=False,
        enable_checkpointing=True, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(data(), batch_size=4))


def in_transformers(callback: Any, folder: Path) -> None:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=STEPS, learning_rate=LR, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        save_strategy="steps", save_steps=STEPS, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(Model(), arguments, train_dataset=[{"x": row} for row in data()], callbacks=[callback]).train()


@pytest.mark.parametrize("kind", KINDS, ids=["package", "lightning", "transformers"])
@pytest.mark.parametrize("train", [in_lightning, in_transformers])
def test_the_callback_works_in_either_trainer(kind: type, train: Any, tmp_path: Path) -> None:
    is_old = tuple(map(int, lightning.__version__.split(".")[:2])) < (2, 6)
    if train is in_lightning and kind is of_transformers.UpdateWatch and is_old:
        pytest.skip("Lightning before 2.6 takes callbacks of its own base class only")
    seen: list[uw.Report] = []
    callback = kind(window=8, print_audit=False, sinks=[seen.append])
    train(callback, tmp_path)
    assert len(seen) == 3 and callback.last == seen[-1]
    assert callback._options.window == 8
    health = {t.name: t.health for t in callback.last.tensors}
    assert health["net.1.weight"] is uw.Health.stalled


def test_the_trainer_of_transformers_keeps_its_memory_in_checkpoints_under_either_import(tmp_path: Path) -> None:
    import json

    in_transformers(of_lightning.UpdateWatch(window=8, print_audit=False), tmp_path)
    (path,) = tmp_path.rglob("trainer_state.json")
    assert json.loads(path.read_text())["stateful_callbacks"]["UpdateWatch"]["attributes"]["memory"]


@pytest.mark.slow
def test_without_lightning_the_name_is_that_of_transformers() -> None:
    code = (
        "import sys\nfor name in ('lightning', 'lightning.pytorch', 'pytorch_lightning'): sys.modules[name] = None\n"
        "from update_watch.callbacks import UpdateWatch\nprint(UpdateWatch.__module__)"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["update_watch.callbacks.transformers"], run.stderr


@pytest.mark.parametrize("train", [in_lightning, in_transformers])
def test_what_is_reported_can_be_chosen(train: Any, tmp_path: Path) -> None:
    callback = UpdateWatch(window=8, print_audit=False, journal=None, include="*.weight", exclude="net.2.*")
    train(callback, tmp_path)
    assert [t.name for t in callback.last.tensors] == ["net.0.weight", "net.1.weight"]
    with pytest.raises(TypeError, match=r"UpdateWatch\(include=7\)"):
        UpdateWatch(include=7)
