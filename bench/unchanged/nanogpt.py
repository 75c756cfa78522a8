"""A loop like nanoGPT's: own GPT, torch.compile, weight decay for matrices alone, cosine by hand, clipping."""

import math
import sys

import torch
from torch import nn
from torch.nn import functional as F

out, *how = sys.argv[1:]
STEPS, LR, WIDTH, CONTEXT, BATCH = 64, 1e-4, 64, 32, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.c_fc, self.c_out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (a.unflatten(-1, (4, -1)).transpose(1, 2) for a in self.c_attn(self.ln_1(x)).chunk(3, -1))
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(2))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, 256, bias=False)
        self.lm_head.weight = self.wte.weight  # tied

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.lm_head(self.ln_f(x)).float().flatten(0, 1), targets.flatten())


torch.manual_seed(1337)
data = torch.tensor(list(open(torch.__file__, "rb").read()[:50_000]), dtype=torch.long)
model = GPT()
if "bf16" in how:
    model.bfloat16()
decayed = [p for p in model.parameters() if p.dim() >= 2]
others = [p for p in model.parameters() if p.dim() < 2]
optimizer = torch.optim.AdamW(
    [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
    lr=LR,
    betas=(0.9, 0.95),
    fused=True,
)
if "given" in how:
    import update_watch as uw

    uw.watch(model, optimizer, window=16, journal=f"{out}.jsonl")
compiled = torch.compile(model)
for step in range(STEPS):
    lr = LR * min(1, (step + 1) / 8) * (0.55 + 0.45 * math.cos(math.pi * step / STEPS))
    for group in optimizer.param_groups:
        group["lr"] = lr
    at = torch.randint(len(data) - CONTEXT - 1, (BATCH,))
    rows = torch.stack([data[i : i + CONTEXT + 1] for i in at])
    loss = compiled(rows[:, :-1], rows[:, 1:])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
torch.save({"model": model.state_dict(), "drawn": torch.rand(4)}, out)
