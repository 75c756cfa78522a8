"""Lightning: one line, `callbacks=[UpdateWatch()]`.

    python examples/lightning_one_line.py
    python examples/lightning_one_line.py bf16-mixed

With precision "bf16-true" the weights themselves are BF16 and small updates are rounded away; with "bf16-mixed" they
are FP32 and nothing is lost.
"""

import sys

import lightning
import torch
from torch import Tensor, nn

from update_watch.callbacks import UpdateWatch


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch.to(next(self.parameters()).dtype)
        return (self.net(x).float() - batch[:, :4].sum(1, keepdim=True)).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def train_dataloader(self) -> torch.utils.data.DataLoader[Tensor]:
        return torch.utils.data.DataLoader(torch.randn(256 * 32, 64), batch_size=32)  # type: ignore[arg-type]


def main(precision: str = "bf16-true") -> None:
    lightning.seed_everything(0, verbose=False)
    watch = UpdateWatch(window=64)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        precision=precision,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Regression())
    assert watch.last is not None
    print(watch.last.headline)


if __name__ == "__main__":
    main(*sys.argv[1:])
