"""Plain torch: one line before the training loop.

    python examples/plain_torch.py

The same model twice: with BF16 weights, where the norm's weights (all 1 at the start) never move, and with FP32 weights.
"""

import torch
from torch import nn

import update_watch as uw


def train(dtype: torch.dtype, steps: int = 256) -> uw.Report:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 1)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    watch = uw.watch(model, optimizer, window=64)
    for _ in range(steps):
        x = torch.randn(32, 64)
        loss = (model(x.to(dtype)).float() - x[:, :4].sum(1, keepdim=True)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    watch.close()

    assert watch.last is not None
    return watch.last


def main() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        report = train(dtype)
        print(f"{dtype}: {report.headline}")
        for tensor in report.tensors:
            print(f"  {tensor.name:10} {tensor.health:9} efficiency {tensor.efficiency:.2f}")


if __name__ == "__main__":
    main()
