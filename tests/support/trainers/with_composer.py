"""Composer's Trainer, watched by a callback; the cures of its table."""

from __future__ import annotations

from typing import Any

import composer.core.precision
import composer.trainer.trainer
import torch
from composer import Callback, Trainer
from composer.models import ComposerModel
from torch import Tensor

import update_watch as uw
from tests.support.trainers.runs import LR, STEPS, Net, batches, paste, same, tell, weights

# Composer lets no CPU have another precision than FP32; under "amp_bf16" it then computes in that of the tensors
composer.trainer.trainer._validate_precision = lambda precision, device: None


class Watched(Callback):
    watch: uw.Watch

    def fit_start(self, state: Any, logger: Any) -> None:
        step = lambda: state.timestamp.batch.value + 1  # noqa: E731
        self.watch = uw.watch(state.model, list(state.optimizers), window=STEPS, step=step)

    def fit_end(self, state: Any, logger: Any) -> None:
        self.watch.close()


class Model(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()

    def forward(self, batch: Tensor) -> Tensor:
        return self.net(batch)  # type: ignore[no-any-return]

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return outputs


def train(name: str, cure: str = "", watched: bool = True) -> dict[str, Tensor]:
    model, callback = Model().bfloat16(), Watched()
    first = weights(model)
    data = torch.utils.data.DataLoader(torch.cat(list(batches())), batch_size=8)

    def make(**settings: Any) -> Trainer:
        optimizer = space.get("optimizer") or torch.optim.AdamW(model.parameters(), lr=LR)
        settings = {"model": model, "optimizers": optimizer, "train_dataloader": data, **settings}
        callbacks = [callback] if watched else []
        return Trainer(max_duration="1ep", device="cpu", callbacks=callbacks, progress_bar=False, seed=1, **settings)

    space: dict[str, Any] = {}
    space = paste(cure, "composer", model=model, Trainer=make)
    trainer = space.get("trainer") or make()
    trainer.fit()
    after = weights(model)
    if watched:
        tell(name, callback.watch.last, callback.watch.trainer, model, first)
    trainer.close()
    return after


if __name__ == "__main__":
    plain, watched = train("plain", watched=False), train("plain")
    print("SAME", same(plain, watched))
    for cure in ("masters", "fp32_states", "kahan", "stochastic_rounding"):
        train(f"plain {cure}", cure)
