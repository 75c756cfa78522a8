"""Schemes that keep what rounding takes from a BF16 weight, against the full comparison of all elements in FP64.

    python bench/bf16/remainders.py [--seeds N] [--low] [--only TEXT] [--steps N]

Every scheme trains a small net of BF16 weights; `efficiency` of each tensor is compared with <applied, intended> /
<intended, intended> of all its elements, the intended update by the formula of AdamW in FP64, the applied one of the weight with
what completes it. Kept: no verdict but healthy, at any seed. Lost (the same scheme robbed of its remainder): norm weights stall.
Exit status 1 where efficiency is off by more than 0.03 or a verdict is wrong.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import update_watch as uw
from bench.planted import remainders
from update_watch.report import Report

BAR = 0.03
BF16 = torch.bfloat16
WIDTH, WINDOW = 48, 32
RARE = 4e-4  # for stochastic rounding: much less, and too few changes of 64 norm weights are expected in a window
TOGETHER = 4  # nets in one training: 16 tensors, of which each is seen in every step
Whole = Callable[[Tensor, dict[str, Any]], Tensor]


class Net(nn.Module):
    """Two matrices, a norm and a bias; stored in BF16, computed in FP32."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, 64)
        self.norm = nn.RMSNorm(64)
        self.leave = nn.Linear(64, WIDTH, bias=False)
        self.to(BF16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.enter.weight.float(), self.enter.bias.float())
        return F.linear(F.rms_norm(x, (64,), self.norm.weight.float()), self.leave.weight.float())


def _sum(name: str) -> Whole:
    def whole(p: Tensor, state: dict[str, Any]) -> Tensor:
        rest = state.get(name)
        return p.double() if rest is None else p.double() + rest.double()

    return whole


def _optimi(params: Any, lr: float) -> Any:
    import optimi

    return optimi.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, kahan_sum=True)


def _torchao(params: Any, lr: float) -> Any:
    import torchao.optim

    return torchao.optim._AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, bf16_stochastic_round=True)


def _loop(cls: type[remainders.OutsideMasters]) -> tuple[Callable[..., Any], Whole]:
    return lambda params, lr: cls(params, lr=lr), lambda p, _: p.double()


def _of(cls: type[remainders.LowAdamW]) -> tuple[Callable[..., Any], Whole]:
    def make(params: Any, lr: float) -> Any:
        return cls(params, lr=lr)

    def whole(p: Tensor, state: dict[str, Any]) -> Tensor:
        return p.double() if not state else cls.whole(cls.__new__(cls), p, state).double()

    return make, whole


KEPT = {cls.__name__: _of(cls) for cls in remainders.KEEPING} | {
    **{cls.__name__: _loop(cls) for cls in remainders.LOOPS},
    "optimi, Kahan": (_optimi, _sum("kahan_comp")),
    "torchao, stochastic": (_torchao, _sum("")),
}
LOST = {cls.__name__: _of(cls) for cls in remainders.LOSING} | {
    "LostOutsideMasters": _loop(remainders.LostOutsideMasters)
}


def adamw(w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """The intended update in FP64."""
    b1, b2 = group["betas"] if "betas" in group else (group["beta1"], group["beta2"])
    counter = state.get("step", group.get("step", 0.0))
    t = float(counter) + 1
    m = (state["exp_avg"].double() if state else 0) * b1 + (1 - b1) * g
    v = (state["exp_avg_sq"].double() if state else 0) * b2 + (1 - b2) * g * g
    return -group["lr"] * (m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group["eps"]) + group["weight_decay"] * w)


def train(
    make: Callable[..., Any], whole: Whole, lr: float, seed: int, nets: int, steps: int
) -> tuple[list[Report], dict[str, float]]:
    """The reports, and the true efficiencies of the last window, of some nets side by side in one training."""
    torch.manual_seed(seed)
    model = nn.ModuleList(Net() for _ in range(nets))
    optimizer = make(model.parameters(), lr)
    named = dict(model.named_parameters())
    inner = getattr(optimizer, "optimizer", optimizer)
    stepped = dict(zip(named, getattr(optimizer, "masters", named.values()), strict=True))
    reports: list[Report] = []
    sums: dict[str, list[float]] = {}
    with uw.watch(
        model,
        optimizer if isinstance(optimizer, remainders.WrapperMasters) else inner,
        window=WINDOW,
        seed=seed,
        samples=512,
        budget=None,
        sinks=[reports.append],
    ) as watch:
        for step in range(steps):
            if step % WINDOW == 0:
                sums = {name: [0.0, 0.0] for name in named}
            optimizer.zero_grad()
            for net in model:
                x = torch.randn(16, WIDTH)
                (net(x) - x.roll(1, -1)).square().mean().backward()
            before = {n: whole(p.detach(), inner.state[p]).clone() for n, p in stepped.items()}
            intended = {
                n: adamw(before[n], p.grad.double(), inner.state[stepped[n]], inner.param_groups[0])
                for n, p in named.items()
                if p.grad is not None
            }
            optimizer.step()
            for n, p in stepped.items():
                applied = whole(p.detach(), inner.state[p]) - before[n]
                sums[n][0] += float((applied * intended[n]).sum())
                sums[n][1] += float(intended[n].square().sum())
        watch.flush()
    return reports, {n: dot / want for n, (dot, want) in sums.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3 * WINDOW)
    parser.add_argument("--low", action="store_true", help="the lower of the two learning rates alone")
    parser.add_argument("--only", default="", help="schemes whose name holds this")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    is_missed = False
    print(f"{'scheme':22} {'lr':>6} {'largest difference':>19} {'bias':>8}  verdicts")
    for name, (make, whole) in (KEPT | LOST).items():
        if arguments.only.lower() not in name.lower():
            continue
        low = RARE if "ice" in name or "stoch" in name else 1e-5
        for lr in (low,) if arguments.low else (1e-3, low):
            differences: list[float] = []
            verdicts: dict[str, int] = {}
            norms: set[str] = set()
            for seed in range(0, arguments.seeds, TOGETHER):
                nets = min(TOGETHER, arguments.seeds - seed)
                reports, truth = train(make, whole, lr, seed, nets, arguments.steps)
                for t in reports[-1].tensors:
                    # steps of a loop's masters arrive; what the loop makes of them is told by the verdict
                    if t.efficiency is not None and name != "LostOutsideMasters":
                        differences.append(t.efficiency - truth[t.name])
                for t in (t for report in reports for t in report.tensors):
                    verdicts[str(t.health)] = verdicts.get(str(t.health), 0) + 1
                norms |= {str(t.health) for t in reports[-1].tensors if t.name.endswith("norm.weight")}
            worst = max(map(abs, differences), default=0.0 if name == "LostOutsideMasters" else float("nan"))
            is_wrong = not worst <= BAR or (verdicts.keys() != {"healthy"} if name in KEPT else norms != {"stalled"})
            is_missed |= is_wrong
            said = ", ".join(f"{count} {health}" for health, count in sorted(verdicts.items()))
            bias = sum(differences) / max(len(differences), 1)
            print(f"{name:22} {lr:6.0e} {worst:19.4f} {bias:8.4f}  {said}{'  WRONG' if is_wrong else ''}", flush=True)
    print("bar missed" if is_missed else "bar met")
    return int(is_missed)


if __name__ == "__main__":
    sys.exit(main())
