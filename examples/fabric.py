"""Fabric: `uw.watch` on what `fabric.setup` returns.

python examples/fabric.py
"""

import torch
from lightning.fabric import Fabric
from torch import nn

import update_watch as uw


def main(steps: int = 256) -> None:
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    plain = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 1))
    model, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters(), lr=1e-4))

    # the plain module, so that names are the user's; Fabric's optimizer is looked through
    watch = uw.watch(plain, optimizer, window=64, step=lambda: step)
    for step in range(steps):
        x = torch.randn(32, 64)
        loss = (model(x.bfloat16()).float() - x[:, :4].sum(1, keepdim=True)).pow(2).mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        if watch.last is not None and watch.last.step == step:  # a report came: log it wherever the run logs
            fabric.log("efficiency", watch.last.efficiency or 0.0, step)
    watch.close()

    assert watch.last is not None
    fabric.print(watch.last.headline)


if __name__ == "__main__":
    main()
