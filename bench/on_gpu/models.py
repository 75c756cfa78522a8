"""Models and bare parameters that the sections train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.on_gpu.given import given, is_cuda

Shapes = list[tuple[int, ...]]


def shapes_68() -> Shapes:
    """The GPT of 20.5M parameters of bench/overhead.py."""
    w, shapes = 512, [(3072, 512), (64, 512)]
    for _ in range(6):
        shapes += [(w,), (w,), (w, w), (2 * w, w), (w,), (w, w), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)]
    return shapes


def shapes_300() -> Shapes:
    """A Llama of 300 tensors and 1.03B parameters (quick: the same in small)."""
    w = 96 if given.quick else 1536
    v = 500 if given.quick else 32000
    shapes: Shapes = [(v, w)]
    for _ in range(33):
        shapes += [(w,), (w, w), (w, w), (w, w), (w, w), (w,), (8 * w // 3, w), (8 * w // 3, w), (w, 8 * w // 3)]
    return [*shapes, (w,), (v, w)]


def shapes_3000() -> Shapes:
    """Many small tensors, as experts and adapters have them."""
    count = 300 if given.quick else 3000
    kinds = [(128, 256), (256, 128), (256,), (128, 128), (512,), (64, 512)]
    return [kinds[i % len(kinds)] for i in range(count)]


CONFIGS: dict[str, Callable[[], Shapes]] = {
    "68 tensors, 20M": shapes_68,
    "300 tensors, 1B": shapes_300,
    "3000 small tensors": shapes_3000,
}


class Bare:
    """Parameters, gradients and an optimizer without a model."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
        generator = torch.Generator(device=given.device).manual_seed(0)
        self.params = []
        for shape in shapes:
            start = torch.randn(shape, device=given.device, generator=generator) * 0.02
            self.params.append(nn.Parameter(start.to(dtype)))
        for p in self.params:
            p.grad = (torch.randn(p.shape, device=given.device, generator=generator) * 1e-3).to(dtype)
        groups = [
            {"params": [p for p in self.params if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in self.params if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-4, **(options or {"fused": True}))
        self.named = [(f"p{i}", p) for i, p in enumerate(self.params)]

    def step(self) -> None:
        self.optimizer.step()


class SignDescent(torch.optim.Optimizer):
    """Stands for optimizers that are not torch's own: replayed at once and under guards."""

    def __init__(self, params: Any, lr: float = 1e-4, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["beta"]).add_(p.grad, alpha=1 - group["beta"])
                p.add_(state["momentum"].sign(), alpha=-group["lr"])


MAKE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": lambda p: torch.optim.AdamW(p, lr=3e-4, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=3e-4, foreach=True),
    "capturable": lambda p: torch.optim.AdamW(p, lr=3e-4, foreach=True, capturable=is_cuda()),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=True),
    "own rule": lambda p: SignDescent(p),
}


def net(dtype: torch.dtype, width: int = 128, blocks: int = 6) -> nn.Sequential:
    """4 tensors a block; dropout, so that the random generators matter."""
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Dropout(0.1), nn.GELU()) for _ in range(blocks)
    ]
    return nn.Sequential(*layers).to(given.device, dtype)


class Recurrent(nn.Module):
    """An LSTM with dropout: cuDNN keeps a state of its own for it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, num_layers=2, dropout=0.3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lstm(x.unsqueeze(1))[0].squeeze(1)
        return y


def recurrent(dtype: torch.dtype, width: int = 128) -> nn.Module:
    torch.manual_seed(0)
    return Recurrent(width).to(given.device, dtype)


def backward(model: nn.Module, width: int = 128, scale: float = 1.0) -> None:
    dtype = next(model.parameters()).dtype
    x = torch.randn(32, width, device=given.device, dtype=dtype)
    model.zero_grad(set_to_none=True)
    ((model(x) - x).float().pow(2).mean() * scale).backward()


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, w))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """GPT-2 124M (148 tensors; the head is tied)."""

    def __init__(
        self, width: int = 768, layers: int = 12, heads: int = 12, vocabulary: int = 50304, length: int = 1024
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
