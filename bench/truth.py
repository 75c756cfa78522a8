"""Sampled numbers against the full comparison of all elements in FP64, tensor by tensor, over one window.

    python bench/truth.py [--quick] [--seed N] [--blocks N]

A small byte-level language model on text that Python ships, weights in BF16 or FP16, compute in FP32. The full side clones
every weight, gradient and state before each step and applies the rule to all elements in FP64 by formulas of its own. Exit
status 1 if efficiency or lost fraction differ by more than 0.03 anywhere.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import update_watch as uw

BAR = 0.03
WIDTH, CONTEXT, BATCH = 64, 32, 8
Full = dict[str, list[float]]


class Model(nn.Module):
    """Embedding, blocks of norm and MLP, norm, head; stored low, computed in FP32."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(blocks + 1))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.embedding.weight.float())
        x = x + x.cumsum(1) / torch.arange(1, tokens.shape[1] + 1).view(1, -1, 1)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            h = F.rms_norm(x, (WIDTH,), norm.weight.float())
            h = F.gelu(F.linear(h, up.weight.float(), up.bias.float()))
            x = x + F.linear(h, down.weight.float(), down.bias.float())
        return F.linear(F.rms_norm(x, (WIDTH,), self.norms[-1].weight.float()), self.head.weight.float())


def adamw(p: Tensor, g: Tensor, s: dict[str, Any], h: dict[str, Any]) -> Tensor:
    b1, b2 = h["betas"]
    t = float(s["step"]) + 1 if s else 1.0
    m = (s["exp_avg"].double() if s else 0) * b1 + (1 - b1) * g
    v = (s["exp_avg_sq"].double() if s else 0) * b2 + (1 - b2) * g * g
    update = h["lr"] / (1 - b1**t) * m / ((v / (1 - b2**t)).sqrt() + h["eps"])
    return -h["lr"] * h["weight_decay"] * p - update


def sgd(p: Tensor, g: Tensor, s: dict[str, Any], h: dict[str, Any]) -> Tensor:
    buffer = s.get("momentum_buffer")
    return -h["lr"] * (g if buffer is None else h["momentum"] * buffer.double() + g)


def lion(p: Tensor, g: Tensor, s: dict[str, Any], h: dict[str, Any]) -> Tensor:
    b1, _ = h["betas"]
    m = s["exp_avg"].double() if s else torch.zeros_like(g)
    return -h["lr"] * h["weight_decay"] * p - h["lr"] * (m * b1 + (1 - b1) * g).sign()


def _lion(params: Any, lr: float) -> Any:
    from lion_pytorch import Lion

    return Lion(params, lr=lr, weight_decay=0.0)


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "AdamW foreach": (lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True), adamw),
    "AdamW fused": (lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True), adamw),
    "SGD momentum": (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), sgd),
    "SGD, 100 x lr": (lambda p, lr: torch.optim.SGD(p, lr=100 * lr, momentum=0.9), sgd),
    "Lion": (_lion, lion),
}


def compare(case: str, dtype: torch.dtype, lr: float, given: argparse.Namespace) -> list[tuple[float, str]]:
    """Differences of efficiency and lost fraction, the largest first."""
    make, rule = CASES[case]
    torch.manual_seed(given.seed)
    model = Model(given.blocks).to(dtype)
    optimizer = make(model.parameters(), lr)
    # Adam's eps and small second moments are zero in FP16: as in real FP16 training, the loss is scaled (Adam does not mind)
    is_adam_in_fp16 = dtype is torch.float16 and "betas" in optimizer.defaults and "eps" in optimizer.defaults
    scale = 2.0**12 if is_adam_in_fp16 else 1.0
    if is_adam_in_fp16:
        for group in optimizer.param_groups:
            group["eps"] = 1e-6
    text = torch.tensor(list("\n".join(topics.values()).encode()), dtype=torch.long)
    names = dict(model.named_parameters())
    full: Full = {name: [0.0] * 4 for name in names}

    def train() -> None:
        nonlocal scale
        at = torch.randint(0, len(text) - CONTEXT - 1, (BATCH,))
        batch = torch.stack([text[i : i + CONTEXT + 1] for i in at])
        optimizer.zero_grad()
        (scale * F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())).backward()
        if not all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()):
            scale /= 2  # as a scaler does: the step is skipped
            train()

    for _ in range(20):  # past the first steps, which are all alike
        train()
        optimizer.step()
    watch = uw.watch(model, optimizer, window=10**9, seed=given.seed, samples=given.samples)
    for _ in range(given.steps):
        train()
        before = {n: p.detach().double().clone() for n, p in names.items()}
        intended = {}
        for name, p in names.items():
            assert p.grad is not None
            intended[name] = rule(before[name], p.grad.double(), optimizer.state[p], optimizer.param_groups[0])
        optimizer.step()
        for name, p in names.items():
            applied, d = p.detach().double() - before[name], intended[name]
            # what would not move even in FP32 is not lost by the format
            wanted = (before[name] + d).float() != before[name]
            for i, part in enumerate((applied * d, d * d, wanted.double(), (wanted & (applied == 0)).double())):
                full[name][i] += float(part.sum())
    report = watch.flush()
    watch.close()
    assert report is not None
    worst = []
    for t in report.tensors:
        dot, want, wanted_count, lost = full[t.name]
        if not want:
            continue
        assert t.efficiency is not None and t.lost_fraction is not None, (case, t.name, t.advice)
        worst.append((abs(t.efficiency - dot / want), f"efficiency of {t.name}"))
        worst.append((abs(t.lost_fraction - lost / wanted_count), f"lost fraction of {t.name}"))
    return sorted(worst, reverse=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="BF16, two learning rates")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="of training and of the sample positions")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=2, help="of the model; more than 2 are measured in turns")
    arguments = parser.parse_args()
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)  # the alerts are not the point here
    torch.set_num_threads(1)
    dtypes = [torch.bfloat16] if arguments.quick else [torch.bfloat16, torch.float16]
    rates = [1e-3, 1e-5] if arguments.quick else [1e-3, 1e-4, 1e-5, 1e-6]
    worst = 0.0
    print(f"{'optimizer':14} {'format':9} {'lr':>7} {'largest difference':>19}")
    for case in CASES:
        for dtype in dtypes:
            for lr in rates:
                difference, where = compare(case, dtype, lr, arguments)[0]
                worst = max(worst, difference)
                print(f"{case:14} {str(dtype)[6:]:9} {lr:7.0e} {difference:19.4f}  {where}", flush=True)
    print(f"worst {worst:.4f}, bar {BAR}")
    return int(worst > BAR)


if __name__ == "__main__":
    sys.exit(main())
