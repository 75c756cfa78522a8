"""Public training code, unchanged but for one added line, on small models with random weights.

What the watch says is held against a full comparison of the same run, and nothing is called stalled that moved.
The packages are not needed otherwise: `pip install --no-deps litgpt==0.5.13 timm`.
"""

from __future__ import annotations

import inspect
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import lightning
import pytest
import torch
from torch import Tensor, nn

from tests.support.lightning_models import FullComparison
from update_watch.callbacks import UpdateWatch
from update_watch.report import Report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # other people's code
    pytest.mark.timeout(300),
]

STEPS, WINDOW = 64, 32


def text() -> Tensor:
    """Bytes that can be learned: the source of the standard library."""
    source = "".join(inspect.getsource(module) for module in (inspect, types, sys.modules["typing"]))
    return torch.tensor(list(source.encode()[: 2**17]), dtype=torch.long).clamp_max_(255)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {plain(name): p.detach().clone() for name, p in model.named_parameters()}


def plain(name: str) -> str:
    """Without what Fabric and torch.compile put in front."""
    return name.replace("_forward_module.", "").replace("_orig_mod.", "")


def healths(report: Report | None) -> dict[str, str]:
    assert report is not None
    return {plain(t.name): str(t.health) for t in report.tensors}


class Truth:
    """The full comparison of the last window: every element of every tensor, in FP64."""

    def __init__(self, model: nn.Module) -> None:
        self.full, self._model, self._steps = FullComparison(), model, 0

    def before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._steps >= STEPS - WINDOW:
            self.full.before(optimizer)

    def after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._steps += 1
        self.full.after(optimizer, {id(p): plain(name) for name, p in self._model.named_parameters()})

    def hook(self, optimizer: torch.optim.Optimizer) -> None:
        """For loops whose gradients are ready when the optimizer is called."""
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    def confirm(self, report: Report | None) -> list[str]:
        """Hold a report of the same window against it; the stalled tensors by name.

        Each efficiency is within 0.1 or five standard errors, the mean of the differences within 0.01, and the verdicts
        are those of the full numbers.
        """
        assert report is not None and self._steps == STEPS and report.window == WINDOW
        assert len(report.tensors) == len(self.full.sums)
        differences = []
        for t in report.tensors:
            truth, lost = self.full.efficiency(plain(t.name)), self.full.lost_fraction(plain(t.name))
            assert t.efficiency is not None and t.efficiency_error is not None
            differences.append(t.efficiency - truth)
            # matrices are measured at some five steps of the 32, so the standard error is itself uncertain
            slack = max(0.1, 5 * t.efficiency_error)
            assert abs(differences[-1]) < slack, (t.name, t.efficiency, truth)
            assert t.lost_fraction == pytest.approx(lost, abs=0.05), t.name
            ranges = {"stalled": (-0.1, 0.15), "stalling": (0.03, 0.88), "healthy": (0.8, 1.1)}
            low, high = ranges[str(t.health)]
            assert low < truth < high, (t.name, t.health, truth)
        assert abs(sum(differences) / len(differences)) < 0.01
        return [plain(t.name) for t in report.tensors if t.health == "stalled"]


# --- litgpt: its pretraining script -----------------------------------------------------------------------


def pretrain(precision: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Truth, Any]:
    """Run `litgpt.pretrain.setup` from its source with one line added; the watch, the truth, the model."""
    script = pytest.importorskip("litgpt.pretrain")
    from litgpt.args import EvalArgs, LogArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.data import DataModule

    monkeypatch.setattr("sys.argv", ["pretrain", "tiny-llama-1.1b"])  # it writes them beside the checkpoint

    source = inspect.getsource(script)
    before = "    optimizer = fabric.setup_optimizers(optimizer)\n"
    assert source.count(before) == 1
    module = types.ModuleType("pretrain_watched")
    module.__file__ = script.__file__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    seen: dict[str, Any] = {}

    def watch(model: nn.Module, optimizer: Any) -> Any:
        import update_watch as uw

        seen["model"] = model
        seen["truth"] = Truth(model)
        seen["truth"].hook(optimizer.optimizer)
        seen["watch"] = uw.watch(model, optimizer, window=WINDOW)
        return seen["watch"]

    module.__dict__["watch"] = watch
    exec(compile(source.replace(before, before + "    watch(model, optimizer)\n"), "pretrain", "exec"), module.__dict__)

    class Text(DataModule):  # type: ignore[misc]
        def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
            self.batch_size, self.length = batch_size, (max_seq_length or 64) + 1

        def train_dataloader(self) -> Any:
            tokens = text()
            rows = tokens[: len(tokens) // self.length * self.length].reshape(-1, self.length)
            return torch.utils.data.DataLoader(rows, self.batch_size, shuffle=True)  # type: ignore[arg-type]

        def val_dataloader(self) -> Any:
            return self.train_dataloader()

    torch.compiler.set_stance("force_eager")  # its torch.compile(model) takes a minute to compile
    module.setup(
        "tiny-llama-1.1b",
        model_config=Config.from_name(
            "tiny-llama-1.1b",
            n_layer=2,
            n_embd=64,
            n_head=4,
            n_query_groups=2,
            intermediate_size=128,
            block_size=64,
            padded_vocab_size=256,
        ),
        out_dir=folder,
        precision=precision,
        data=Text(),
        train=TrainArgs(
            save_interval=None,
            log_interval=32,
            global_batch_size=8,
            micro_batch_size=4,
            max_tokens=STEPS * 8 * 64,
            max_norm=1.0,
            min_lr=4e-5,
            lr_warmup_steps=8,
        ),
        eval=EvalArgs(interval=1000, max_iters=2, final_validation=False),
        log=LogArgs(),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 4e-4, "betas": [0.9, 0.95]}},
        devices=1,
        logger_name="csv",
    )
    torch.compiler.set_stance("default")
    return seen["watch"], seen["truth"], seen["model"]


def test_litgpts_pretraining_in_bf16_true_never_trains_its_norms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, truth, model = pretrain("bf16-true", tmp_path, monkeypatch)
    report = watch.flush()
    end = weights(model)
    assert report.window == WINDOW and report.step == STEPS
    stalled = truth.confirm(report)
    norms = [name for name in end if ".norm_" in name or ".ln_f" in name]
    assert sorted(stalled) == sorted(norms) and len(norms) == 5
    assert all(bool((end[name] == 1).all()) for name in norms)


def test_litgpts_pretraining_in_fp32_is_healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, truth, _ = pretrain("32-true", tmp_path, monkeypatch)
    report = watch.flush()
    assert set(healths(report).values()) == {"healthy"} and truth.confirm(report) == []


# --- timm: an image model in Lightning -----------------------------------------------------------------------


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """timm, also where torchvision is missing: its models take one class from it, its datasets are not needed here."""
    pytest.importorskip("PIL")
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    if find_spec("torchvision") is None:
        for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets"):
            stub = MagicMock(__spec__=ModuleSpec(f"torchvision{name}", None), __path__=[])
            stub.FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})
            monkeypatch.setitem(sys.modules, f"torchvision{name}", stub)
    import timm as found

    return found


class Images(lightning.LightningModule):
    """Which quadrant of a noisy image is bright."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr
        self.truth = Truth(self)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        self.truth.before(optimizer)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        self.truth.after(optimizer.optimizer)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        scores = self.model(images.to(next(self.parameters()).dtype)).float()
        return nn.functional.cross_entropy(scores, labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05)

    def train_dataloader(self) -> Any:
        images, labels = torch.randn(STEPS * 8, 3, 32, 32), torch.randint(4, (STEPS * 8,))
        for i, label in enumerate(labels.tolist()):
            images[i, :, 16 * (label // 2) :, 16 * (label % 2) :][:, :16, :16] += 1
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)


@pytest.mark.parametrize(
    ("name", "precision"),
    [("vit_tiny_patch16_224", "bf16-true"), ("test_resnet", "bf16-true"), ("test_resnet", "bf16-mixed")],
)
def test_timms_models_in_lightning(timm: Any, name: str, precision: Any) -> None:
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 2, "embed_dim": 96} if name.startswith("vit") else {}
    module = Images(timm.create_model(name, pretrained=False, num_classes=4, **options), lr=1e-4)
    start = {key: w.to(torch.bfloat16) if precision == "bf16-true" else w for key, w in weights(module).items()}
    watch = UpdateWatch(window=WINDOW, print_audit=False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        precision=precision,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    stalled = module.truth.confirm(watch.last)
    if precision == "bf16-mixed":
        assert set(healths(watch.last).values()) == {"healthy"}
        return
    ones = [key for key, w in start.items() if w.dim() == 1 and bool((w == 1).all())]
    assert len(ones) >= 5 and set(ones) <= set(stalled)


# --- transformers: a Llama, loaded as Transformers 5 loads it ---------------------------------------------------


def test_a_llama_loaded_by_transformers_5_keeps_the_files_bf16_and_stalls(tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5")
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from update_watch.callbacks.transformers import UpdateWatch as TrainerWatch

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=256, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")  # no dtype asked for
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    rows = text()[: 64 * STEPS].reshape(-1, 64).tolist()
    watch = TrainerWatch(window=WINDOW, print_audit=False)
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=STEPS,
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    truth = Truth(model)

    class Compare(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
            truth.hook(optimizer.optimizer)

    Trainer(model, arguments, train_dataset=data, callbacks=[Compare(), watch]).train()
    stalled = truth.confirm(watch.last)
    norms = {name for name in weights(model) if "norm" in name}
    assert len(norms) == 5 and norms <= set(stalled)
    assert watch.last is not None and watch.last.efficiency is not None and watch.last.efficiency < 0.5
