"""Small language models on text that Python ships: real gradients in milliseconds, on any machine.

Weights are stored low and computed with in FP32, as matrix products in BF16 are slow on CPUs.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXT, BATCH = 32, 8


@functools.cache
def letters() -> Tensor:
    """The text as bytes."""
    return torch.tensor(list("\n".join(topics.values()).encode()), dtype=torch.long)


@functools.cache
def words(most: int, shuffled: bool = False) -> Tensor:
    """The text as numbers of words, the most frequent first, as tokenizers count them; rare ones share the last number."""
    found = re.findall(r"\w+|[^\w\s]", "\n".join(topics.values()))
    number = {word: i for i, (word, _) in enumerate(Counter(found).most_common(most - 1))}
    text = torch.tensor([number.get(word, most - 1) for word in found], dtype=torch.long)
    if shuffled:
        text = torch.randperm(most, generator=torch.Generator().manual_seed(1))[text]
    return text


def batch(text: Tensor) -> tuple[Tensor, Tensor]:
    """[BATCH, CONTEXT] tokens, and those that follow; drawn from the global generator."""
    at = torch.randint(0, len(text) - CONTEXT - 1, (BATCH,))
    rows = torch.stack([text[i : i + CONTEXT + 1] for i in at])
    return rows[:, :-1], rows[:, 1:]


class Block(nn.Module):
    """Norm and MLP: 5 tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, x.shape[-1:], self.norm.weight.float())
        h = F.gelu(F.linear(h, self.up.weight.float(), self.up.bias.float()))
        return x + F.linear(h, self.down.weight.float(), self.down.bias.float())


class Experts(nn.Module):
    """One of several MLPs for each token; the router prefers the first ones, so that the last are hardly used."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.router = nn.Linear(width, count, bias=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(count))
        self.preference: Tensor
        self.register_buffer("preference", torch.linspace(4.0, -4.0, count), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, x.shape[-1:], self.norm.weight.float())
        chances = (F.linear(h, self.router.weight.float()) + self.preference.float()).softmax(-1)
        chosen = torch.multinomial(chances.flatten(0, 1), 1).view(x.shape[:2])
        share = chances.gather(-1, chosen.unsqueeze(-1))
        out = x
        for i, block in enumerate(self.blocks):
            out = out + (chosen == i).unsqueeze(-1) * share * (block(x) - x)
        return out


class LanguageModel(nn.Module):
    """Embedding, the mean of what came before, blocks, norm, heads: 5 tensors a block and 3 more with one head."""

    def __init__(self, vocabulary: int, width: int, blocks: list[nn.Module], heads: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, vocabulary, bias=False) for _ in range(heads))
        nn.init.normal_(self.embedding.weight, std=0.05)

    def forward(self, tokens: Tensor, head: int = 0) -> Tensor:
        x = F.embedding(tokens, self.embedding.weight.float())
        x = x + x.cumsum(1) / torch.arange(1, tokens.shape[1] + 1).view(1, -1, 1)
        for block in self.blocks:
            x = block(x)
        x = F.rms_norm(x, x.shape[-1:], self.norm.weight.float())
        logits: Tensor = F.linear(x, self.heads[head].weight.float())
        return logits

    def loss(self, tokens: Tensor, following: Tensor, head: int = 0) -> Tensor:
        return F.cross_entropy(self(tokens, head).flatten(0, 1), following.flatten())


class SparseClassifier(nn.Module):
    """A large embedding of which a step touches few rows, and a classifier on it: what is learned is a number's class."""

    CLASSES = 16

    def __init__(self, rows: int, width: int, blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.out = nn.Linear(width, self.CLASSES)
        nn.init.normal_(self.embedding.weight, std=0.05)

    def loss(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.embedding.weight.float())
        for block in self.blocks:
            x = block(x)
        logits = F.linear(x, self.out.weight.float(), self.out.bias.float())
        return F.cross_entropy(logits, ids * 2654435761 % 2**32 >> 28)


class AttentionBlock(nn.Module):
    """Norm, causal attention of a single head, MLP: 9 tensors. Nothing bounds its logits; in FP16 they may be infinite."""

    def __init__(self, width: int, has_fp16_logits: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in "qkv")
        self.mlp = Block(width)
        self.logits_dtype = torch.float16 if has_fp16_logits else torch.float32

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, x.shape[-1:], self.norm.weight.float())
        q, k, v = (F.linear(h, linear.weight.float()) for linear in (self.q_proj, self.k_proj, self.v_proj))
        logits = (q @ k.mT / x.shape[-1] ** 0.5).to(self.logits_dtype).float()
        is_later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        found: Tensor = self.mlp(x + logits.masked_fill(is_later, -torch.inf).softmax(-1) @ v)
        return found
