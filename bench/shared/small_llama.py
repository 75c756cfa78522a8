"""A Llama with the depth, the kinds and the names of the 8B model (32 layers, 291 tensors), and little else: every
width is tiny, so that a real training run takes a minute on a CPU. Weights in BF16, arithmetic in FP32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS, WIDTH, HEADS, WORDS, HIDDEN = 32, 32, 2, 64, 80


class Linear(nn.Linear):
    """A matrix without bias, computed in FP32 whatever it is stored in."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(inside, outside, bias=False)
        nn.init.normal_(self.weight, std=0.06)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float())


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (WIDTH,), self.weight.float(), 1e-6)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = Linear(WIDTH, WIDTH), Linear(WIDTH, WIDTH // 2)
        self.v_proj, self.o_proj = Linear(WIDTH, WIDTH // 2), Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, HEADS, -1).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, 1, -1).transpose(1, 2).expand_as(q)
        v = self.v_proj(x).view(batch, length, 1, -1).transpose(1, 2).expand_as(q)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, WIDTH))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Linear(WIDTH, HIDDEN), Linear(WIDTH, HIDDEN)
        self.down_proj = Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, WIDTH)
        nn.init.normal_(self.embed_tokens.weight, std=0.06)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = Norm()


class SmallLlama(nn.Module):
    def __init__(self, layers: int = LAYERS, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.model = Decoder(layers)
        self.lm_head = Linear(WIDTH, WORDS)
        self.to(dtype)

    def loss(self, tokens: Tensor) -> Tensor:
        """Cross entropy of each token given those before it; tokens are (batch, length)."""
        x = F.embedding(tokens[:, :-1], self.model.embed_tokens.weight.float())
        for layer in self.model.layers:
            x = layer(x)
        logits = self.lm_head(self.model.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def tokens(step: int, batch: int = 2, length: int = 17) -> Tensor:
    """Sequences with something to learn: each follows a rule of its own with a little noise."""
    rng = torch.Generator().manual_seed(step)
    start, stride = (torch.randint(0, WORDS, (batch, 1), generator=rng) for _ in range(2))
    noise = (torch.rand(batch, length, generator=rng) < 0.05) * torch.randint(0, WORDS, (batch, length), generator=rng)
    return (start + (stride % 5 + 1) * torch.arange(length) + noise) % WORDS
