"""Small nets, their optimizers and a full FP64 comparison, for the tests of the watch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from lion_pytorch import Lion
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.shared.exact_rules import RULES as EXACT
from bench.shared.exact_rules import Rule
from update_watch.report import Report, TensorReport

Make = Callable[[Any, float], Optimizer]


class Net(nn.Module):
    """Two matrices larger than a sample, two vectors smaller than one."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.enter = nn.Linear(48, 64)
            self.norm = nn.RMSNorm(64)
            self.leave = nn.Linear(64, 48, bias=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.leave(self.norm(self.enter(x)))
        return out


def batches(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 48, generator=rng).to(dtype) for _ in range(count)]


def backward(model: nn.Module, x: Tensor) -> Tensor:
    loss = (model(x) - x.roll(1, -1)).pow(2).mean(-1).sum()
    loss.backward()
    return loss


def train(model: nn.Module, optimizers: Optimizer | Iterable[Optimizer], count: int, seed: int = 0) -> None:
    """`count` steps of every optimizer."""
    chosen = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    dtype = next(model.parameters()).dtype
    for x in batches(count, dtype, seed):
        model.zero_grad()
        backward(model, x)
        for optimizer in chosen:
            optimizer.step()


# eps: the usual 1e-8 is nothing in FP16
RULES: dict[str, tuple[Make, Rule]] = {
    "adamw-loop": (lambda p, lr: torch.optim.AdamW(p, lr=lr, eps=1e-4, foreach=False), EXACT["adamw"]),
    "adamw-foreach": (lambda p, lr: torch.optim.AdamW(p, lr=lr, eps=1e-4, foreach=True), EXACT["adamw"]),
    "adamw-fused": (lambda p, lr: torch.optim.AdamW(p, lr=lr, eps=1e-4, fused=True), EXACT["adamw"]),
    "sgd-momentum": (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), EXACT["sgd"]),
    "lion": (lambda p, lr: Lion(p, lr=lr, weight_decay=0.01), EXACT["lion"]),
}


class Full:
    """Efficiency and lost fraction of all elements of every parameter, by a rule of its own in FP64."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, rule: Rule) -> None:
        self._named, self._optimizer, self._rule = dict(model.named_parameters()), optimizer, rule
        self._sums = {name: torch.zeros(4, dtype=torch.float64) for name in self._named}

    def step(self) -> None:
        """Take the optimizer's step and compare."""
        before, intended = {}, {}
        for group in self._optimizer.param_groups:
            for name, p in self._named.items():
                if p.grad is not None and any(p is q for q in group["params"]):
                    before[name] = p.detach().double().clone()
                    intended[name] = self._rule(before[name], p.grad.double(), self._optimizer.state[p], group)
        self._optimizer.step()
        for name, d in intended.items():
            a = self._named[name].detach().double() - before[name]
            lost = (d != 0) & (a == 0)
            self._sums[name] += torch.stack([(a * d).sum(), (d * d).sum(), (d != 0).sum(), lost.sum()])

    def efficiency(self, name: str) -> float:
        dot, want = self._sums[name][:2].tolist()
        return dot / want

    def lost_fraction(self, name: str) -> float:
        wanted, lost = self._sums[name][2:].tolist()
        return lost / wanted


def tensors(report: Report | None) -> dict[str, TensorReport]:
    assert report is not None
    return {t.name: t for t in report.tensors}


def make_adamw(params: Any, lr: float = 1e-3, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=lr, **options)


def all_exact(report: Report | None, *names: str) -> None:
    found = tensors(report)
    for name in names or tuple(found):
        assert found[name].efficiency == pytest.approx(1, abs=0.005), (name, found[name].advice)
