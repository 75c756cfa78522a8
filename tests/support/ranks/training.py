"""One training in two gloo processes, under Lightning or Transformers; each rank writes the last report of its callback.

python training.py ddp|fsdp2|zero1|transformers FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

BATCH, STEPS = 4, 32


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 65), nn.LayerNorm(65), nn.ReLU(), nn.Linear(65, 3))


def rows() -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return list(torch.randn(2 * BATCH * STEPS, 40, generator=rng).to(torch.bfloat16))


def tell(folder: Path, rank: int, report: Any, **more: Any) -> None:
    found = {"report": None if report is None else report.to_dict(), **more}
    (folder / f"{rank}.json").write_text(json.dumps(found))


def with_lightning(kind: str, folder: Path) -> None:
    import lightning
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    from update_watch.callbacks import UpdateWatch

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def configure_model(self) -> None:
            if kind == "fsdp2":
                assert self.device_mesh is not None
                for module in (self.net[0], self.net[3], self.net):
                    fully_shard(module, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            out: Tensor = self.net(batch).float().pow(2).mean()
            return out

        def configure_optimizers(self) -> Any:
            if kind == "zero1":
                return ZeroRedundancyOptimizer(self.parameters(), torch.optim.AdamW, lr=1e-3)
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(rows(), batch_size=BATCH)  # type: ignore[arg-type]

    class Tell(Callback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            tell(folder, trainer.global_rank, watch.last, told=len(told))

    told: list[Any] = []
    watch = UpdateWatch(window=16, sinks=[told.append], print_audit=False)
    parallel = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=parallel if kind == "fsdp2" else DDPStrategy(process_group_backend="gloo"),
        precision="bf16-true",
        max_epochs=1,
        callbacks=[watch, Tell()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module())


def with_transformers(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29577"
    )
    from transformers import Trainer, TrainingArguments

    from update_watch.callbacks.transformers import UpdateWatch

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network().to(torch.bfloat16)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.net(x).float().pow(2).mean()}

    told: list[Any] = []
    watch = UpdateWatch(window=16, sinks=[told.append], print_audit=False)
    arguments = TrainingArguments(
        output_dir=f"{folder}/out",
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        use_cpu=True,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        ddp_backend="gloo",
    )
    trainer = Trainer(Model(), arguments, train_dataset=[{"x": row} for row in rows()], callbacks=[watch])
    trainer.train()
    tell(Path(folder), rank, watch.last, told=len(told))


def main() -> None:
    kind, folder = sys.argv[1:]
    torch.set_num_threads(1)
    if kind == "transformers":
        mp.start_processes(with_transformers, (folder,), nprocs=2, start_method="spawn")
    else:
        with_lightning(kind, Path(folder))


if __name__ == "__main__":
    main()
