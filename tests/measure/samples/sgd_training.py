"""40 tensors under plain SGD, whose gradients are of any size; what all elements of all steps did is added up."""

from __future__ import annotations

import torch
from torch import nn

TENSORS = 40


class SgdTraining:
    """`weights`: their standard deviation. `sums` [3, 40]: <applied, intended>, |intended|^2 and |before|^2."""

    def __init__(self, weights: float = 1.0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.params = [nn.Parameter((torch.randn(48, 32) * weights).bfloat16()) for _ in range(TENSORS)]
        self.optimizer = torch.optim.SGD(self.params, lr=1.0)
        self.named = [(f"layers.{i}.weight", p) for i, p in enumerate(self.params)]
        self.sums = torch.zeros(3, TENSORS, dtype=torch.float64)

    def step(self, size: float) -> None:
        for p in self.params:
            p.grad = (torch.randn(p.shape) * 2e-4 * size).bfloat16()
        before = [p.detach().double() for p in self.params]
        self.optimizer.step()
        lr = self.optimizer.param_groups[0]["lr"]
        for i, (p, old) in enumerate(zip(self.params, before, strict=True)):
            assert p.grad is not None
            intended = -lr * p.grad.double()
            self.sums[:, i] += torch.stack(
                [((p.detach().double() - old) * intended).sum(), intended.square().sum(), old.square().sum()]
            )
