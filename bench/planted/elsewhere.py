"""Faults that lie elsewhere than in a step's rounding: between the steps, in averages, in the signal; with their twins."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.planted.run import BF16, Net, Run, adamw, averaging, loss_of, scenario, trainer
from update_watch.report import Cause


@scenario
def masters_that_are_never_copied_back() -> Run:
    return _hand_written_masters(copies=False)


@scenario
def healthy_masters_copied_back_by_hand() -> Run:
    return _hand_written_masters(copies=True)


def _hand_written_masters(copies: bool) -> Run:
    model = Net(norm=False).to(BF16)
    masters = [p.detach().float().clone().requires_grad_(True) for p in model.parameters()]
    optimizer = adamw(masters)

    def step(_: int) -> None:
        model.zero_grad()
        loss_of(model).backward()
        for master, p in zip(masters, model.parameters(), strict=True):
            assert p.grad is not None
            master.grad = p.grad.float()
        optimizer.step()
        if copies:
            with torch.no_grad():
                for master, p in zip(masters, model.parameters(), strict=True):
                    p.copy_(master)

    planted = {} if copies else dict.fromkeys([n for n, _ in model.named_parameters()], Cause.not_copied_back)
    return Run(model, optimizer, step, planted=planted, rule="")


@scenario
def weights_put_back_after_every_step() -> Run:
    model = Net(norm=False)
    optimizer = adamw(model.parameters())
    train = trainer(model, optimizer)
    saved = [p.detach().clone() for p in model.parameters()]

    def step(t: int) -> None:
        train(t)
        with torch.no_grad():
            for p, old in zip(model.parameters(), saved, strict=True):
                p.copy_(old)

    planted = dict.fromkeys([n for n, _ in model.named_parameters()], Cause.overwritten)
    return Run(model, optimizer, step, planted=planted, rule="")


@scenario
def average_that_runs_away() -> Run:
    model, average = _pair()
    optimizer = adamw(model.parameters(), lr=5e-3)
    step = averaging(model, average, optimizer, lambda a, p, t: a.lerp_(p, -1e-3))
    planted = {f"{name}/average:ema": Cause.average_diverges for name, _ in model.named_parameters()}
    return Run(model, optimizer, step, planted=planted, averages={"ema": (average, 0.999)}, rule="")


@scenario
def average_that_is_never_updated() -> Run:
    model, average = _pair()
    optimizer = adamw(model.parameters(), lr=5e-3)
    planted = {f"{name}/average:ema": Cause.average_not_updated for name, _ in model.named_parameters()}
    step = trainer(model, optimizer)
    return Run(model, optimizer, step, planted=planted, onset=2, averages={"ema": (average, 0.999)}, rule="")


@scenario
def healthy_average_updated_after_every_tenth_step() -> Run:
    model, average = _pair()
    optimizer = adamw(model.parameters(), lr=5e-3)

    def update(a: Tensor, p: Tensor, t: int) -> None:
        if t % 10 == 9:
            a.lerp_(p, 1e-3)

    step = averaging(model, average, optimizer, update)
    # the full comparison means an update after every step
    noisy = tuple(f"{name}/average:ema" for name, _ in model.named_parameters())
    return Run(model, optimizer, step, averages={"ema": (average, 0.999)}, rule="", noisy=noisy)


def _pair() -> tuple[Net, Net]:
    model, average = Net(0.3, norm=False), Net(0.3, norm=False)
    average.load_state_dict(model.state_dict())
    return model, average


class _Routed(nn.Module):
    """One of four experts, or two; the weight of the chosen ones is made to add up to 1."""

    def __init__(self, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(40, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(40, 40, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, at = F.linear(x, self.router.weight.to(x.dtype)).softmax(-1).topk(self.chosen, -1)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            share = (weights * (at == i)).sum(-1, keepdim=True)
            out = out + share * F.linear(x, expert.weight.to(x.dtype))  # type: ignore[arg-type, operator]  # a Linear
        return out


@scenario
def router_of_a_single_expert() -> Run:
    """x / x is 1: what comes back to it is what rounding left."""
    model = _Routed(1)
    optimizer = adamw(model.parameters(), lr=2e-3)
    return Run(
        model, optimizer, trainer(model, optimizer), planted={"router.weight": Cause.negligible_gradient}, rule=""
    )


@scenario
def healthy_router_of_two_experts() -> Run:
    model = _Routed(2)
    optimizer = adamw(model.parameters(), lr=2e-3)
    return Run(model, optimizer, trainer(model, optimizer), rule="")
