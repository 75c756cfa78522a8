"""skorch: a callback of six lines.

python examples/skorch_callback.py
"""

from typing import Any

import numpy as np
import torch
from skorch import NeuralNetRegressor
from skorch.callbacks import Callback
from torch import nn

import update_watch as uw


class UpdateWatch(Callback):  # type: ignore[misc]  # skorch has no types
    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        self.watch = uw.watch(net.module_, net.optimizer_, window=64, journal="update_watch.jsonl")

    def on_train_end(self, net: Any, **kwargs: Any) -> None:
        self.watch.close()
        print(self.watch.last.headline)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 1)).bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.bfloat16()).float()


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(4096, 64).numpy()
    y = x[:, :4].sum(1, keepdims=True).astype(np.float32)
    net = NeuralNetRegressor(
        Model,
        optimizer=torch.optim.AdamW,
        lr=1e-4,
        batch_size=32,
        max_epochs=2,
        train_split=None,
        callbacks=[UpdateWatch()],
        verbose=0,
    )
    net.fit(x, y)
