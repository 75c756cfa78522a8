"""torchtune: `uw.watch(model)` before the loop of a recipe; the optimizer need not be named.

    python examples/torchtune_in_backward.py

Here as in its single-device recipes with `optimizer_in_bwd: True`: one optimizer per parameter, stepped within the backward
pass. In a recipe of your own the line goes to the begin of `train()`: `self.watch = update_watch.watch(self._model)`.
"""

import torch
from torch import nn
from torchtune import training

import update_watch as uw


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 1)).bfloat16()
    rules = {p: torch.optim.AdamW([p], lr=1e-4) for p in model.parameters()}
    training.register_optim_in_bwd_hooks(model=model, optim_dict=rules)

    watch = uw.watch(model, window=64)
    watch.trainer = "torchtune"  # advice in its words
    for _ in range(256):
        x = torch.randn(32, 64)
        (model(x.bfloat16()).float() - x[:, :4].sum(1, keepdim=True)).pow(2).mean().backward()
    watch.close()

    assert watch.last is not None
    print(watch.last.headline)


if __name__ == "__main__":
    main()
