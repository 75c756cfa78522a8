"""fastai: a callback of six lines, with a torch optimizer in fastai's `OptimWrapper`.

    python examples/fastai_callback.py

fastai's own optimizers (the default of a Learner) are no torch optimizers and step without torch's hooks: they are not watched.
"""

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn

import update_watch as uw


class UpdateWatch(Callback):  # type: ignore[misc]  # fastai has no types
    def before_fit(self) -> None:
        self.watch = uw.watch(self.learn.model, window=64)  # what steps it is found at its first step

    def after_fit(self) -> None:
        self.watch.close()
        print(self.watch.last.headline)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 1)).bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.bfloat16()).float()


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 64)
    pairs = list(zip(x, x[:, :4].sum(1, keepdim=True), strict=True))
    data = DataLoaders(DataLoader(pairs, bs=32, shuffle=True), DataLoader(pairs[:64], bs=32), device="cpu")

    def adamw(params: object, lr: float, **options: object) -> OptimWrapper:
        return OptimWrapper(params, torch.optim.AdamW, lr=lr)

    learner = Learner(data, Model(), loss_func=nn.functional.mse_loss, opt_func=adamw, lr=1e-4, cbs=[UpdateWatch()])
    with learner.no_logging():
        learner.fit(2)


if __name__ == "__main__":
    main()
