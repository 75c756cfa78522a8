"""What the scripts of this folder share: two small nets, a cure pasted, and one line of JSON for each training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import update_watch as uw
from update_watch.cures import Cure, code

LR, STEPS = 1e-4, 48  # so many steps add up to more than half of BF16's gap beside 1
DECAY = {"lr": 1e-2, "weight_decay": 0.1}  # lr * decay = 0.001: below BF16's half gap at any weight


class Norm(nn.Module):
    """A norm whose weight begins at 1, where BF16 loses every update of LR. Computes in FP32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (64,)) * self.weight.float()


class Net(nn.Module):
    """Its loss for a batch [B, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = Norm(), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.out.weight.float(), self.out.bias.float()).square().mean()


def net() -> Net:
    torch.manual_seed(0)
    return Net().bfloat16()


def batches() -> Iterator[Tensor]:
    rng = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        yield torch.randn(8, 64, generator=rng)


def paste(cure: str, trainer: str, **names: Any) -> dict[str, Any]:
    """The names of a script after the cure's code has run in it."""
    space = {"torch": torch, "lr": LR, **names}
    if cure:
        exec(code(Cure(cure), trainer), space)  # noqa: S102  a table of our own
    return space


def tell(name: str, report: uw.Report | None, trainer: str, model: nn.Module, first: dict[str, Tensor]) -> None:
    """Print what the test asks about a training that began with the weights `first`."""
    assert report is not None, f"{name}: no window was closed"
    now = weights(model)
    said = {
        "run": name,
        "trainer": trainer,
        "step": report.step,
        "headline": report.headline,
        "health": {t.name: t.health.value for t in report.tensors},
        "efficiency": {t.name: t.efficiency for t in report.tensors},
        "decay": [
            t.accumulators["weight_decay"].health.value for t in report.tensors if "weight_decay" in t.accumulators
        ],
        "moved": [key for key, tensor in first.items() if not torch.equal(now[key], tensor.to(now[key].dtype))],
    }
    print("RUN " + json.dumps(said), flush=True)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies, of a shard those of this process."""
    local: Callable[[Any], Tensor] = lambda t: t.to_local() if hasattr(t, "to_local") else t  # noqa: E731
    found = ((name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in model.named_parameters())
    return {name: local(p.detach()).clone() for name, p in found}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)
