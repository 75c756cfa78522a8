"""The two runs of the demo: settings, schedule, steps."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from update_watch.demo.model import GPT, batch, text
from update_watch.foresight.schedules import Schedule

FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MASTERS = "fp32-masters"
_BATCH = 8  # pieces of text per step
_WINDOWS = 20
_FLOOR = 0.1  # of the peak learning rate, where the cosine ends
_FP16_SCALE = 1024.0  # of the loss: squares of small gradients are below what FP16 holds
_RECENT = 50  # steps the training loss is averaged over


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the demo. Raises ValueError when one cannot be used."""

    steps: int = 1000
    lr: float = 1e-3  # the peak
    precision: str = "bf16"  # of the stored weights; "fp32" leaves out the twin, which would be the same
    out: Path = Path("update-watch-demo")
    seed: int = 0
    wandb: str = "offline"  # or "online", "disabled"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps}: at least 1 is needed")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr {self.lr:g}: a positive learning rate is needed")
        if self.precision not in FORMATS:
            raise ValueError(f"--precision {self.precision}: one of {', '.join(FORMATS)} is needed")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed}: a number from 0 to 2**63 - 1 is needed")
        if self.wandb not in ("offline", "online", "disabled"):
            raise ValueError(f"--wandb {self.wandb}: one of offline, online, disabled is needed")

    @property
    def window(self) -> int:
        """Steps per report: about a twentieth of all, so that the last window is as full as possible."""
        fitting = range(max(self.steps // _WINDOWS, 8), max(self.steps // 12, 16) + 1)
        return max(fitting, key=lambda window: ((self.steps - 1) % window + 1) / window)


class Training:
    """One of the two runs."""

    def __init__(self, name: str, title: str, model: GPT, settings: Settings) -> None:
        self.name, self.title, self.model, self.settings = name, title, model, settings
        self._scale = _FP16_SCALE if settings.precision == "fp16" else 1.0
        matrices = [p for p in model.parameters() if p.dim() > 1]
        norms = [p for p in model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
            lr=settings.lr,
            betas=(0.9, 0.95),  # 1 - 0.95 is far above half an ulp: BF16 moments are no fault here
            eps=1e-8 * self._scale,
        )
        share = _schedule(settings.steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)
        self.rates = Schedule(lambda step: settings.lr * share(step), settings.steps)
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self, piece_BT: Tensor) -> None:
        """One optimizer step."""
        started = time.perf_counter()
        loss = self.model.loss(piece_BT)
        (loss * self._scale).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))
        self.seconds += time.perf_counter() - started

    @property
    def recent_loss(self) -> float:
        """Mean training loss of the last steps (nats per byte)."""
        recent = self.losses[-_RECENT:]
        return sum(recent) / len(recent)

    @torch.no_grad()
    def held_back_loss(self) -> float:
        """Loss on text it was not trained on (nats per byte)."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        return float(self.model.loss(batch(text()[1], 128, generator)))


def trainings(settings: Settings) -> list[Training]:
    """The run with weights stored in `settings.precision`, and its twin with FP32 masters, alike at the start."""
    stored = FORMATS[settings.precision]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = GPT(stored, compute=stored)
        twin = GPT(torch.float32, compute=stored)
    found = [Training(settings.precision, f"{settings.precision.upper()} weights", model, settings)]
    if stored is not torch.float32:
        twin.load_state_dict(model.state_dict())
        found.append(Training(MASTERS, "FP32 masters", twin, settings))
    return found


def pieces(settings: Settings) -> Callable[[], Tensor]:
    """Gives the text of one step after the other, (B, T + 1)."""
    generator = torch.Generator().manual_seed(settings.seed)
    return lambda: batch(text()[0], _BATCH, generator)


def _schedule(steps: int) -> Callable[[int], float]:
    """Warm-up over a twentieth of the steps, then a cosine down to `_FLOOR`; as a share of the peak."""
    warm = max(steps // 20, 1)

    def share(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(steps - warm, 1)
        return _FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * done)) / 2

    return share
