"""Optimizers that keep, lose or randomise what rounding to BF16 takes from an update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.planted.run import BF16


class OneByOne(torch.optim.Optimizer):
    """Steps its parameters one by one, each with its gradient in FP32."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad.float(), group)

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError


class Rule(OneByOne):
    """Plain SGD in FP32; what becomes of the result is up to `write`."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if p.dtype is BF16:
            self.write(p, grad * -group["lr"])
        else:
            p.sub_(grad, alpha=group["lr"])

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


class MasterAdam(OneByOne):
    """AdamW whose FP32 weights live in its state as `master_param`, as in Apex and Transformer Engine; state is FP32."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})

    def update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=torch.float32) for _ in "mv")
            state["master_param"] = p.detach().float().clone()
        state["step"] += 1
        (b1, b2), t = group["betas"], float(state["step"])
        m = state["exp_avg"].lerp_(grad, 1 - b1) / (1 - b1**t)
        v = state["exp_avg_sq"].mul_(b2).addcmul_(grad, grad, value=1 - b2) / (1 - b2**t)
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
