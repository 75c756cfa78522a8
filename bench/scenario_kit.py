"""What scenarios are made of: a small net, a training step, optimizers that keep, lose or randomise what rounding takes.

A scenario is a function that returns a `Run`; `@scenario` enters it in `SCENARIOS` under its name in words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from update_watch.report import Cause

WINDOW = 32  # optimizer steps
BF16 = torch.bfloat16


@dataclasses.dataclass
class Run:
    """What a scenario trains, and what is to be said of it. `step(t)` takes the optimizer step number t, from 0.

    Windows are counted from 1. Faults and exceptions are of "tensor" or "tensor/accumulator".
    """

    model: Any  # for `uw.watch`
    optimizer: Any
    step: Callable[[int], None]
    windows: int = 4
    planted: dict[str, Cause] = dataclasses.field(default_factory=dict)
    onset: int = 1  # window in which the planted fault begins; 0: where the full comparison sees it begin
    ends: int = 0  # window from which on all is well again; 0: it does not end
    averages: dict[str, Any] = dataclasses.field(default_factory=dict)
    may_alert: bool = False  # a planted fault of which nobody need be woken
    unknown: tuple[str, ...] = ()  # what stays unknown, rightly, in a healthy twin
    # for the full comparison
    rule: str = (
        "adamw"  # the rule by which updates are meant: "adamw", "sgd", "adafactor", or "" where it is not compared
    )
    masters: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # what the optimizer steps instead, by name
    whole: Callable[[str, Tensor], Tensor] | None = None  # (name, stored) -> stored with what is carried elsewhere
    noisy: tuple[str, ...] = ()  # tensors so small that random rounding drowns what arrives
    skips: Callable[[int], bool] = lambda t: False  # steps that the gradient scaler skips
    sums_gradients: bool = False  # more than one backward pass per step

    @property
    def named(self) -> list[tuple[str, Tensor]]:
        return list(self.model.named_parameters()) if isinstance(self.model, nn.Module) else list(self.model)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.named]


SCENARIOS: dict[str, Callable[[], Run]] = {}


def scenario(build: Callable[[], Run]) -> Callable[[], Run]:
    """Enter `build` in `SCENARIOS`."""
    SCENARIOS[build.__name__.replace("_", " ")] = build
    return build


# --- models and training ----------------------------------------------------------------------------------


class Net(nn.Module):
    """Two matrices whose weights are near 0.01, so that updates of 1e-3 are kept, and a norm at 1."""

    def __init__(self, scale: float = 0.01, norm: bool = True) -> None:
        super().__init__()
        self.enter = nn.Linear(40, 48, bias=False)
        self.norm = nn.RMSNorm(48) if norm else nn.Identity()
        self.leave = nn.Linear(48, 40, bias=False)
        for layer in (self.enter, self.leave):
            nn.init.normal_(layer.weight, std=scale)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.enter.weight.to(x.dtype))
        x = F.rms_norm(x, (48,), self.norm.weight.to(x.dtype)) if isinstance(self.norm, nn.RMSNorm) else x.tanh()
        return F.linear(x, self.leave.weight.to(x.dtype))


def loss_of(model: nn.Module, rows: int = 16) -> Any:
    """Of a batch of random rows. A tensor; `Any`, as torch's `backward` has no types."""
    x = torch.randn(rows, 40)
    return (model(x) - x.roll(1, -1)).pow(2).mean()


def trainer(
    model: nn.Module, optimizer: Any, before: Callable[[int], None] | None = None, scale: float = 1.0
) -> Callable[[int], None]:
    """One backward pass and one optimizer step; `before(t)` first; the loss times `scale`."""

    def step(t: int) -> None:
        if before is not None:
            before(t)
        model.zero_grad()
        (loss_of(model) * scale).backward()
        optimizer.step()

    return step


def set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def adamw(params: Any, lr: float = 1e-3, **options: Any) -> torch.optim.AdamW:
    options = {"weight_decay": 0.0, "betas": (0.9, 0.95), **options}
    return torch.optim.AdamW(params, lr=lr, **options)


# --- optimizers -------------------------------------------------------------------------------------------


class Rule(torch.optim.Optimizer):
    """Plain SGD in FP32; what becomes of the result is up to `write`."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.dtype is BF16:
                    self.write(p, p.grad.float() * -group["lr"])
                else:
                    p.sub_(p.grad.float(), alpha=group["lr"])

    def write(self, p: Tensor, update: Tensor) -> None:
        """Add an FP32 update to a BF16 weight."""
        raise NotImplementedError


class StochasticSGD(Rule):
    """Rounds to BF16 at random."""

    def write(self, p: Tensor, update: Tensor) -> None:
        bits = (p.float() + update).view(torch.int32)
        bits = bits + torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32)
        p.copy_((bits & ~0xFFFF).view(torch.float32))


class SplitSGD(Rule):
    """Weights split in two: the parameter holds the upper 16 bits of the FP32 value, a buffer the lower ones."""

    def write(self, p: Tensor, update: Tensor) -> None:
        state = self.state[p]
        if "mantissa" not in state:
            state["mantissa"] = torch.zeros_like(p, dtype=torch.uint16)
        bits = (self.whole(p) + update).view(torch.int32)
        state["mantissa"].copy_((bits & 0xFFFF).to(torch.uint16))
        p.copy_((bits & ~0xFFFF).view(torch.float32))

    def whole(self, p: Tensor) -> Tensor:
        bits = p.detach().view(torch.int16).to(torch.int32) << 16
        if "mantissa" in self.state[p]:
            bits = bits | self.state[p]["mantissa"].to(torch.int32)
        return bits.view(torch.float32)


class KahanSGD(Rule):
    """Kahan summation with a BF16 buffer of its own, in the optimizer's state."""

    def write(self, p: Tensor, update: Tensor) -> None:
        rest = self.rest(p)
        rest.add_(update.to(BF16))
        before = p.detach().clone()
        p.add_(rest)
        rest.add_(before.sub_(p))

    def rest(self, p: Tensor) -> Tensor:
        rest: Tensor = self.state[p].setdefault("too_small_yet", torch.zeros_like(p))
        return rest


class HiddenKahanSGD(KahanSGD):
    """The same with a buffer that is not among the optimizer's states: only what arrives in the end can tell."""

    def rest(self, p: Tensor) -> Tensor:
        rest: Tensor | None = getattr(p, "rest", None)
        if rest is None:
            rest = torch.zeros_like(p)
            p.rest = rest  # type: ignore[attr-defined]
        return rest


class HiddenMasterSGD(Rule):
    """FP32 masters that are not among the optimizer's states."""

    def write(self, p: Tensor, update: Tensor) -> None:
        p.copy_(self.whole(p).add_(update))

    def whole(self, p: Tensor) -> Tensor:
        master: Tensor | None = getattr(p, "master", None)
        if master is None:
            master = p.detach().float().clone()
            p.master = master  # type: ignore[attr-defined]
        return master


class MasterAdam(torch.optim.Optimizer):
    """AdamW whose FP32 weights live in its state as `master_param`, as in Apex and Transformer Engine; state is FP32."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=torch.float32) for _ in "mv")
                    state["master_param"] = p.detach().float().clone()
                state["step"] += 1
                (b1, b2), t, g = group["betas"], float(state["step"]), p.grad.float()
                m = state["exp_avg"].lerp_(g, 1 - b1) / (1 - b1**t)
                v = state["exp_avg_sq"].mul_(b2).addcmul_(g, g, value=1 - b2) / (1 - b2**t)
                state["master_param"].sub_(m / (v.sqrt() + group["eps"]), alpha=group["lr"])
                p.copy_(state["master_param"])


class Forgetful(torch.optim.SGD):
    """Forgets to write one of its parameters: an optimizer bug."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        held = self.param_groups[0]["params"][0]
        kept = held.clone() if held.dtype is BF16 else None
        result = super().step(closure)
        if kept is not None:
            held.copy_(kept)
        return result


class Noisy(torch.optim.SGD):
    """Draws random numbers in its rule: cannot be replayed."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn_like(p), alpha=1e-4)
        return super().step(closure)
