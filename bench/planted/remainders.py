"""AdamW for BF16 weights that keeps what rounding would take, in every way that is in use; and the same having lost it.

All of them reckon in FP32 and differ in how the new weight is written alone, so one FP64 formula is the truth of all. They are
bound to BF16, as the kernels are that they stand for: on FP32 copies they do not run.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

BF16 = torch.bfloat16


class LowAdamW(torch.optim.Optimizer):
    """AdamW in FP32 arithmetic; `write` stores the new weight. `moments`: their format."""

    moments: ClassVar[torch.dtype] = torch.float32
    square: ClassVar[torch.dtype] = torch.float32

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.1, betas: Any = (0.9, 0.95)) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.dtype is not BF16:
                    raise TypeError(f"{type(self).__name__} is for BF16 weights, not {p.dtype}")
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p, dtype=self.moments)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=self.square)
                    self.begin(p, state)
                state["step"] += 1
                b1, b2 = group["betas"]
                g = p.grad.float()
                m = state["exp_avg"].float().lerp(g, 1 - b1)
                v = state["exp_avg_sq"].float().lerp(g * g, 1 - b2)
                state["exp_avg"].copy_(m)
                state["exp_avg_sq"].copy_(v)
                t = state["step"]
                w = self.whole(p, state)
                size = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"])
                self.write(p, state, w, -group["lr"] * (size + group["weight_decay"] * w))

    def begin(self, p: Tensor, state: dict[str, Any]) -> None:
        """States that are kept for the weight."""

    def whole(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        """The weight as the rule knows it, FP32."""
        return p.float()

    def write(self, p: Tensor, state: dict[str, Any], w: Tensor, update: Tensor) -> None:
        p.copy_(w + update)


class Split(LowAdamW):
    """The upper 16 bits in the parameter, the lower ones in the state: modded-nanogpt."""

    def begin(self, p: Tensor, state: dict[str, Any]) -> None:
        state["mantissa"] = torch.zeros_like(p, dtype=torch.uint16)

    def whole(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        return (_raw(p) | state["mantissa"].to(torch.int32)).view(torch.float32)

    def write(self, p: Tensor, state: dict[str, Any], w: Tensor, update: Tensor) -> None:
        raw = (w + update).view(torch.int32)
        state["mantissa"].copy_((raw & 0xFFFF).to(torch.uint16))
        p.copy_((raw & ~0xFFFF).view(torch.float32))


class FusedSplit(Split):
    """bf16-fused-adam: moments in BF16 as well, the lower bits under the same name."""

    moments = square = BF16


class Remainders(LowAdamW):
    """Transformer Engine's store_param_remainders: the weight to nearest, an int16 of either sign in "master_param"."""

    def begin(self, p: Tensor, state: dict[str, Any]) -> None:
        state["master_param"] = torch.zeros_like(p, dtype=torch.int16)

    def whole(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        return (_raw(p) + state["master_param"].to(torch.int32)).view(torch.float32)

    def write(self, p: Tensor, state: dict[str, Any], w: Tensor, update: Tensor) -> None:
        raw = (w + update).view(torch.int32)
        rounded = (raw + 0x8000) & ~0xFFFF
        state["master_param"].copy_((raw - rounded).to(torch.int16))
        p.copy_(rounded.view(torch.float32))


class Masters(LowAdamW):
    """FP32 weights inside the state: Apex, Transformer Engine."""

    def begin(self, p: Tensor, state: dict[str, Any]) -> None:
        state["master_param"] = p.detach().float().clone()

    def whole(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        master: Tensor = state["master_param"].clone()
        return master

    def write(self, p: Tensor, state: dict[str, Any], w: Tensor, update: Tensor) -> None:
        p.copy_(state["master_param"].copy_(w + update))


class Kahan(LowAdamW):
    """A BF16 compensation in the state: AnyPrecisionAdamW of torchdistx."""

    moments = BF16

    def begin(self, p: Tensor, state: dict[str, Any]) -> None:
        state["compensation"] = torch.zeros_like(p)

    def whole(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        return p.float() + state["compensation"].float()

    def write(self, p: Tensor, state: dict[str, Any], w: Tensor, update: Tensor) -> None:
        before, rest = p.clone(), state["compensation"]
        rest.add_(update.to(BF16))
        p.add_(rest)
        rest.add_(before.sub_(p))


class Dice(LowAdamW):
    """Stochastic rounding with torch's generator."""

    def generator(self, p: Tensor) -> torch.Generator | None:
        return None

    def write(self, p: Tensor, state: dict[str, Any], w: Tensor, update: Tensor) -> None:
        noise = torch.randint(0, 1 << 16, p.shape, dtype=torch.int32, generator=self.generator(p))
        p.copy_((((w + update).view(torch.int32) + noise) & ~0xFFFF).view(torch.float32))


class OwnDice(Dice):
    """The same with a generator of its own, made on first use."""

    _generator: torch.Generator | None = None

    def generator(self, p: Tensor) -> torch.Generator | None:
        if self._generator is None:
            self._generator = torch.Generator(p.device).manual_seed(7)
        return self._generator


class OutsideMasters:
    """FP32 weights that the training loop keeps: torch's AdamW steps them, the loop copies gradients there and weights back."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        self.params = list(params)
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.params]
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)

    @torch.no_grad()
    def step(self) -> None:
        for p, master in zip(self.params, self.masters, strict=True):
            master.grad = None if p.grad is None else p.grad.float()
        self.optimizer.step()
        self.copy_back()

    def copy_back(self) -> None:
        for p, master in zip(self.params, self.masters, strict=True):
            p.copy_(master)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None


class WrapperMasters(OutsideMasters):
    """The same inside a wrapper that is handed to the watch: FP16_Optimizer of Apex and DeepSpeed."""


# --- what is made for the remainder, and not used -----------------------------------------------


class LostRemainders(Remainders):
    """The remainder is cleared after every step."""

    def write(self, p: Tensor, state: dict[str, Any], w: Tensor, update: Tensor) -> None:
        super().write(p, state, w, update)
        state["master_param"].zero_()


class LostSplit(Split):
    """The weight is rounded to nearest, and the lower bits are forgotten."""

    def write(self, p: Tensor, state: dict[str, Any], w: Tensor, update: Tensor) -> None:
        p.copy_(p.float() + update)


class LostMasters(Masters):
    """The masters are made anew from the weights at every step, as after a faulty resume."""

    def write(self, p: Tensor, state: dict[str, Any], w: Tensor, update: Tensor) -> None:
        p.copy_(state["master_param"].copy_(p.float()).add_(update))
        state["master_param"].copy_(p.float())

    def whole(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        return p.float()


class LostOutsideMasters(OutsideMasters):
    """The loop takes its FP32 weights from the stored ones after every step."""

    def copy_back(self) -> None:
        super().copy_back()
        for p, master in zip(self.params, self.masters, strict=True):
            master.copy_(p)


class LostKahan(Kahan):
    """The compensation is cleared after every step."""

    def write(self, p: Tensor, state: dict[str, Any], w: Tensor, update: Tensor) -> None:
        super().write(p, state, w, update)
        state["compensation"].zero_()


class LostDice(OwnDice):
    """Dice that always fall to the nearest neighbour."""

    def write(self, p: Tensor, state: dict[str, Any], w: Tensor, update: Tensor) -> None:
        self.generator(p)
        p.copy_(w + update)


def _raw(p: Tensor) -> Tensor:
    return p.view(torch.int16).to(torch.int32) << 16


KEEPING: tuple[type[LowAdamW], ...] = (Split, FusedSplit, Remainders, Masters, Kahan, Dice, OwnDice)
LOOPS: tuple[type[OutsideMasters], ...] = (OutsideMasters, WrapperMasters)
LOSING: tuple[type[LowAdamW], ...] = (LostRemainders, LostSplit, LostMasters, LostKahan, LostDice)
