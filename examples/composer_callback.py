"""Composer: a callback of five lines.

    python examples/composer_callback.py

`precision="amp_bf16"` over a model in FP32 is the cure; Composer offers it on GPUs only.
"""

from typing import Any

import torch
from composer import Callback, Trainer
from composer.models import ComposerModel
from torch import nn

import update_watch as uw


class UpdateWatch(Callback):  # type: ignore[misc]  # Composer has no types
    def fit_start(self, state: Any, logger: Any) -> None:
        step = lambda: state.timestamp.batch.value + 1  # noqa: E731  Composer counts after the step
        self.watch = uw.watch(state.model, list(state.optimizers), window=64, step=step)

    def fit_end(self, state: Any, logger: Any) -> None:
        self.watch.close()
        print(self.watch.last.headline if self.watch.last else "no step was seen")


class Model(ComposerModel):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 1)).bfloat16()

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.net(batch[0].bfloat16()).float()  # type: ignore[no-any-return]

    def loss(self, outputs: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.mse_loss(outputs, batch[1])


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 64)
    data = torch.utils.data.TensorDataset(x, x[:, :4].sum(1, keepdim=True))
    model = Model()
    trainer = Trainer(
        model=model,
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-4),
        train_dataloader=torch.utils.data.DataLoader(data, batch_size=32, shuffle=True),
        max_duration="2ep",
        device="cpu",
        progress_bar=False,
        callbacks=[UpdateWatch()],
    )
    trainer.fit()
    trainer.close()


if __name__ == "__main__":
    main()
