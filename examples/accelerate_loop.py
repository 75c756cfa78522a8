"""Accelerate: one line after `prepare`. Its wrapped optimizer is looked through.

accelerate launch examples/accelerate_loop.py        (or python)
"""

import torch
from accelerate import Accelerator
from torch import nn

import update_watch as uw


def main() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 1)).bfloat16()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=1e-4))

    watch = uw.watch(plain, optimizer, window=64)  # the plain module: names without a wrapper's prefix
    watch.trainer = "accelerate"  # advice in its words
    for _ in range(256):
        x = torch.randn(32, 64, device=accelerator.device)
        loss = (model(x.bfloat16()).float() - x[:, :4].sum(1, keepdim=True)).pow(2).mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    watch.close()

    if accelerator.is_main_process and watch.last is not None:
        print(watch.last.headline)


if __name__ == "__main__":
    main()
