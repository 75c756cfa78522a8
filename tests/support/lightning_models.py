"""Small Lightning modules for the tests, and the full comparison that a sampled report is held against."""

from __future__ import annotations

import math
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

WIDTH, BATCH = 8, 4


class FullComparison:
    """Every element of every step of AdamW, compared with the same rule in FP64, independent of update_watch."""

    def __init__(self) -> None:
        self._before: dict[int, list[tuple[Any, ...]]] = {}
        self.sums: dict[str, list[float]] = {}  # name -> [<applied, intended>, <intended, intended>, lost, wanted]

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        found = []
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                m, v = (_wide(state[k]) if k in state else 0.0 for k in ("exp_avg", "exp_avg_sq"))
                found.append((p, group, _wide(p), _wide(p.grad), m, v, float(state.get("step", 0)) + 1))
        self._before[id(optimizer)] = found

    def after(self, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> None:
        for p, group, w, g, m, v, t in self._before.pop(id(optimizer), []):
            b1, b2 = group["betas"]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            direction = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"])
            intended = -group["lr"] * (group["weight_decay"] * w + direction)
            applied = _wide(p) - w
            wanted = intended != 0
            new = (applied * intended, intended * intended, wanted & (applied == 0), wanted)
            sums = self.sums.setdefault(names[id(p)], [0.0] * 4)
            for i, values in enumerate(new):
                sums[i] += float(values.sum())

    def efficiency(self, name: str) -> float:
        return self.sums[name][0] / self.sums[name][1]

    def lost_fraction(self, name: str) -> float:
        return self.sums[name][2] / self.sums[name][3]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double().clone()


def network() -> nn.Sequential:
    """Weights around 1 in the norm, around 0.1 elsewhere: in BF16 they lose very different shares of an update."""
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 1))


class Module(lightning.LightningModule):
    """Regression with one or two optimizers, automatic or manual.

    Args:
        optimizers: number of them; each has a network of its own. More than one needs manual optimization.
        manual: optimize manually.
        accumulate: micro-batches per step, in manual optimization.
        lr: of AdamW.
        batches: per epoch.
        full: compare every element with FP64.
    """

    def __init__(
        self,
        optimizers: int = 1,
        manual: bool = False,
        accumulate: int = 1,
        lr: float = 1e-3,
        batches: int = 12,
        full: bool = False,
    ) -> None:
        super().__init__()
        self.nets = nn.ModuleList(network() for _ in range(optimizers))
        self.automatic_optimization = not manual
        self.accumulate, self.lr, self.batches = accumulate, lr, batches
        self.full = FullComparison() if full else None

    def loss(self, i: int, x: Tensor) -> Tensor:
        x = x.to(self.nets[0][0].weight.dtype)  # type: ignore[index, union-attr]
        out: Tensor = self.nets[i](x)
        return (out.float() - x.float().sum(1, keepdim=True)).pow(2).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return self.loss(0, batch)
        found = self.optimizers()
        for i, opt in enumerate(found if isinstance(found, list) else [found]):
            self.manual_backward(self.loss(i, batch) / self.accumulate)
            if (batch_idx + 1) % self.accumulate == 0:
                opt.step()
                if self.full is not None:
                    self.full.after(opt.optimizer, self.names())
                opt.zero_grad()
        return None

    def names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.named_parameters()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.full is not None and not self.automatic_optimization:
            self.full.before(optimizer)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        if self.full is not None and self.automatic_optimization:
            self.full.before(optimizer)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        if self.full is not None and self.automatic_optimization:
            self.full.after(optimizer.optimizer, self.names())

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(net.parameters(), lr=self.lr) for net in self.nets]

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        data = torch.randn(self.batches * BATCH, WIDTH, generator=generator)
        return torch.utils.data.DataLoader(data, batch_size=BATCH)  # type: ignore[arg-type]


def scaler_plugin() -> MixedPrecision:
    """Real FP16 scaling on the CPU, where Lightning's "16-mixed" would become BF16."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))  # type: ignore[attr-defined]


def trainer(**options: Any) -> lightning.Trainer:
    """A quiet one on the CPU."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if options.get("precision") == "16-mixed":
        options["plugins"] = [scaler_plugin()]
        del options["precision"]
    return lightning.Trainer(**{**quiet, **options})


def everything(module: lightning.LightningModule, fitted: lightning.Trainer) -> list[Tensor]:
    """Weights, optimizer state and torch's random state, as bits to compare."""
    found = [t.detach().clone() for t in module.state_dict().values()]
    for optimizer in fitted.optimizers:
        for state in optimizer.state.values():
            found += [v.clone() for v in tree_leaves(state) if isinstance(v, Tensor)]
    return [*found, torch.get_rng_state()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b)) and not any(math.isnan(float(t.sum())) for t in a)
