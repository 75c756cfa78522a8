"""Composer: a callback of six lines.

python examples/composer_callback.py
"""

from typing import Any

import torch
from composer import Callback, Logger, State, Trainer
from composer.models import ComposerModel
from torch import nn
from torch.utils.data import DataLoader

import update_watch as uw


class UpdateWatch(Callback):
    def fit_start(self, state: State, logger: Logger) -> None:
        step = lambda: state.timestamp.batch.value + 1  # noqa: E731
        self.watch = uw.watch(state.model, list(state.optimizers), window=64, step=step)

    def fit_end(self, state: State, logger: Logger) -> None:
        self.watch.close()
        print(self.watch.last.headline)


class Model(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 1)).bfloat16()

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.net(batch.bfloat16()).float()

    def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return (outputs - batch[:, :4].sum(1, keepdim=True)).pow(2).mean()


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    rows: Any = torch.randn(4096, 64)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(rows, batch_size=32),
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-4),
        max_duration="2ep",
        precision="fp32",
        device="cpu",
        callbacks=[UpdateWatch()],
        progress_bar=False,
    )
    trainer.fit()


if __name__ == "__main__":
    main()
