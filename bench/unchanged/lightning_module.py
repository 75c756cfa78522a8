"""A LightningModule with a scheduler, accumulation and clipping, fitted by Lightning's Trainer."""

import sys

import lightning
import torch
from torch import nn
from torch.nn import functional as F

out, *how = sys.argv[1:]


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 96), nn.LayerNorm(96), nn.GELU(), nn.Linear(96, 96), nn.LayerNorm(96), nn.Linear(96, 10)
        )

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x.to(self.dtype)).float(), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-4, weight_decay=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)}


lightning.seed_everything(0)
x = torch.randn(1024, 64)
data = torch.utils.data.TensorDataset(x, (x @ torch.randn(64, 10)).argmax(1))
callbacks = []
if "given" in how:
    from update_watch.callbacks import UpdateWatch

    callbacks = [UpdateWatch(window=16, journal=f"{out}.jsonl")]
trainer = lightning.Trainer(
    max_steps=64,
    precision="bf16-true" if "bf16" in how else "32-true",
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    accelerator="cpu",
    callbacks=callbacks,
    logger=False,
    enable_checkpointing=False,
)
module = Digits()
trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8, shuffle=True))
torch.save({"model": module.state_dict(), "drawn": torch.rand(4)}, out)
