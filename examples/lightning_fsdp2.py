"""Lightning with FSDP2 (ModelParallelStrategy), here on two CPU processes.

    python examples/lightning_fsdp2.py

Parameters are DTensors: each process looks at its own shard. The line to add is the same as everywhere.
"""

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from update_watch.callbacks import UpdateWatch


class Sharded(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 1))

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for module in (self.net[0], self.net[3], self.net):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch.to(next(self.parameters()).dtype)
        return (self.net(x).float() - batch[:, :4].sum(1, keepdim=True)).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def train_dataloader(self) -> torch.utils.data.DataLoader[Tensor]:
        return torch.utils.data.DataLoader(torch.randn(128 * 32, 64), batch_size=16)  # type: ignore[arg-type]


def main() -> None:
    torch.set_num_threads(1)
    lightning.seed_everything(0, verbose=False)
    watch = UpdateWatch(window=64)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
        precision="bf16-true",
        max_epochs=1,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Sharded())
    if trainer.is_global_zero:
        assert watch.last is not None
        print(watch.last.headline)
        for tensor in watch.last.tensors:
            print(f"  {tensor.name:14} {tensor.shape} {tensor.health} efficiency {tensor.efficiency:.2f}")


if __name__ == "__main__":
    main()
