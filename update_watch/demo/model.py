"""What the demo trains: a small byte-level GPT and a text that every Python ships.

Weights are stored in one number format and computed with in FP32 (`rounded` below), because a product of BF16 matrices
takes a CPU many times longer than one of FP32 matrices. It is also what makes the two runs of the demo comparable: a
weight kept in FP32 is rounded to the low format before it is used, as mixed precision does, so that forward and
backward see the same values in both runs until their stored weights part.

Legend: B sequences, T bytes, D width, H heads.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT = 64  # bytes
WIDTH = 64
HEADS = 4
BLOCKS = 2
VOCABULARY = 256
_SPREAD = 0.02  # standard deviation of the first matrices


class Rounded(nn.Module):
    """A module whose weight is rounded to `compute` before use, whatever format it is stored in."""

    def __init__(self, *shape: int, compute: torch.dtype, ones: bool = False) -> None:
        super().__init__()
        self.compute = compute
        self.weight = nn.Parameter(torch.ones(shape) if ones else torch.randn(shape) * _SPREAD)

    def rounded(self) -> Tensor:
        """The weight as the forward pass sees it, in FP32."""
        return self.weight.to(self.compute).float()


class Linear(Rounded):
    """A matrix without bias; shape (out, in)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rounded())


class Norm(Rounded):
    """RMSNorm; its weight begins at 1.0."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.rounded(), 1e-6)


class Embedding(Rounded):
    """A table; shape (entries, D)."""

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.rounded())


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, compute: torch.dtype) -> None:
        super().__init__()
        self.qkv = Linear(3 * WIDTH, WIDTH, compute=compute)
        self.out = Linear(WIDTH, WIDTH, compute=compute)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, length, width = x_BTD.shape
        qkv = self.qkv(x_BTD).view(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        y_BHTd = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        y_BTD: Tensor = self.out(y_BHTd.transpose(1, 2).reshape(batch, length, width))
        return y_BTD


class Block(nn.Module):
    """Attention and a two-layer network, each behind a norm."""

    def __init__(self, compute: torch.dtype) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(WIDTH, compute=compute, ones=True), Norm(WIDTH, compute=compute, ones=True)
        self.attention = Attention(compute)
        self.up = Linear(4 * WIDTH, WIDTH, compute=compute)
        self.down = Linear(WIDTH, 4 * WIDTH, compute=compute)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
        y_BTD: Tensor = self.down(F.gelu(self.up(self.norm2(x_BTD))))
        return x_BTD + y_BTD


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, stored: torch.dtype, compute: torch.dtype) -> None:
        super().__init__()
        self.tokens = Embedding(VOCABULARY, WIDTH, compute=compute)
        self.positions = Embedding(CONTEXT, WIDTH, compute=compute)
        self.blocks = nn.ModuleList(Block(compute) for _ in range(BLOCKS))
        self.norm = Norm(WIDTH, compute=compute, ones=True)
        self.head = Linear(VOCABULARY, WIDTH, compute=compute)
        self.to(stored)

    def forward(self, index_BT: Tensor) -> Tensor:
        x_BTD = self.tokens(index_BT) + self.positions(torch.arange(index_BT.shape[1]))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits: Tensor = self.head(self.norm(x_BTD))
        return logits

    def loss(self, text_BT: Tensor) -> Tensor:
        """Cross entropy (nats per byte) of each byte given those before it."""
        logits = self(text_BT[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), text_BT[:, 1:].flatten())


@functools.lru_cache(maxsize=1)
def text() -> tuple[Tensor, Tensor]:
    """Python's own documentation as bytes: what is trained on, and the last twentieth, which is held back."""
    from pydoc_data.topics import topics

    joined = "\n\n".join(topics[name] for name in sorted(topics))
    whole = torch.frombuffer(bytearray(joined.encode()), dtype=torch.uint8)
    cut = len(whole) * 19 // 20
    return whole[:cut], whole[cut:]


def batch(source: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """`size` random pieces of a text, (size, CONTEXT + 1), int64."""
    starts = torch.randint(len(source) - CONTEXT - 1, (size, 1), generator=generator)
    return source[starts + torch.arange(CONTEXT + 1)].long()
