"""What scenarios are made of: a small net and ways to train it.

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
    model: nn.Module,
    optimizer: Any,
    before: Callable[[int], None] | None = None,
    scale: float = 1.0,
    after: Callable[[int], None] | None = None,
) -> Callable[[int], None]:
    """One backward pass and one optimizer step; `before(t)` first, `after(t)` last; the loss times `scale`."""

    def step(t: int) -> None:
        if before is not None:
            before(t)
        model.zero_grad()
        (loss_of(model) * scale).backward()
        optimizer.step()
        if after is not None:
            after(t)

    return step


def scaled_trainer(model: nn.Module, optimizer: Any, skips: Callable[[int], bool]) -> Callable[[int], None]:
    """As a GradScaler has a fused optimizer step: the scale and whether something overflowed are handed to it."""

    def step(t: int) -> None:
        model.zero_grad()
        loss_of(model).backward()
        vars(optimizer).update(grad_scale=torch.tensor(1.0), found_inf=torch.tensor(float(skips(t))))
        optimizer.step()
        del vars(optimizer)["grad_scale"], vars(optimizer)["found_inf"]

    return step


def averaging(
    model: nn.Module, average: nn.Module, optimizer: Any, update: Callable[[Tensor, Tensor, int], object]
) -> Callable[[int], None]:
    """A step of training, then `update(averaged, weight, t)` for each weight."""
    train = trainer(model, optimizer)

    def step(t: int) -> None:
        train(t)
        with torch.no_grad():
            for averaged, weight in zip(average.parameters(), model.parameters(), strict=True):
                update(averaged, weight, t)

    return step


def set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def adamw(params: Any, lr: float = 1e-3, **options: Any) -> torch.optim.AdamW:
    options = {"weight_decay": 0.0, "betas": (0.9, 0.95), **options}
    return torch.optim.AdamW(params, lr=lr, **options)
