"""Trainings as people run them, small: optimizers, schedules, spikes, vocabularies, sparse rows, experts, heads in turn.

A regime is a function of a seed that makes a `Training`; `REGIMES` holds all of them by name. Seeds differ in the data and in the
learning rate, so that tensors lie on both sides of the edge and on it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.shared.text_models import Block, Experts, LanguageModel, SparseClassifier, batch, letters, words

BF16 = torch.bfloat16
SPREAD = (1.0, 0.3, 3.0, 0.1, 10.0)  # of the learning rate, over seeds
_TAME = {
    "sgd": (1.0, 0.3, 2.0, 0.1, 0.03)
}  # the same where a rule that does not normalise would leave nothing to train
WARMED_UP = 8  # steps before the watch begins: the first are all alike


@dataclasses.dataclass
class Training:
    """`gradients(t)` leaves the gradients of step t; `optimizers` then step. `rate(t)` scales the learning rate."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    rules: list[str]
    loss: Callable[[int], Tensor]
    rate: Callable[[int], float] = lambda t: 1.0
    clip: float | None = None
    scale: float = 1.0  # of the loss, for gradients in FP16

    def gradients(self, t: int) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * self.rate(t)
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        torch.autograd.backward(self.loss(t) * self.scale)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


@dataclasses.dataclass(frozen=True)
class Regime:
    name: str
    make: Callable[[int, int], Training]  # (seed, steps that will be taken)
    window: int = 128
    windows: int = 4
    samples: int = 256

    @property
    def steps(self) -> int:
        return self.window * self.windows


REGIMES: dict[str, Regime] = {}


def _enter(name: str, make: Callable[[int, int], Training], **options: int) -> None:
    REGIMES[name] = Regime(name, make, **options)


# --- optimizers -------------------------------------------------------------------------------------------


class FullMoments(torch.optim.Optimizer):
    """AdamW with moments in FP32 whatever the format of the weights, to which the new weight is rounded."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad, state = p.grad.float(), self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=torch.float32) for _ in "mv")
                state["step"] += 1
                t = float(state["step"])
                m = state["exp_avg"].lerp_(grad, 1 - b1) / (1 - b1**t)
                v = state["exp_avg_sq"].mul_(b2).addcmul_(grad, grad, value=1 - b2) / (1 - b2**t)
                p.copy_(p.float() - group["lr"] * m / (v.sqrt() + group["eps"]))


# learning rates at which about half of the tensors of these models are on the edge in BF16
_RATES = {"sgd": 0.3, "momentum": 0.03, "adamw": 3e-4, "fused": 3e-4, "lion": 1.5e-4, "adafactor": 3e-3, "muon": 1e-3}


def _optimizers(kind: str, model: nn.Module, lr: float) -> tuple[list[torch.optim.Optimizer], list[str]]:
    params = list(model.parameters())
    adam: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.0}
    if kind == "sgd":
        return [torch.optim.SGD(params, lr=lr)], ["sgd"]
    if kind == "momentum":
        return [torch.optim.SGD(params, lr=lr, momentum=0.9)], ["sgd"]
    if kind in ("adamw", "fused"):
        return [torch.optim.AdamW(params, lr=lr, fused=kind == "fused", **adam)], ["adamw"]
    if kind == FULL_MOMENTS:
        return [FullMoments(params, lr, adam["betas"])], ["adamw"]
    if kind == "lion":
        from lion_pytorch import Lion

        return [Lion(params, lr=lr, weight_decay=0.0)], ["lion"]
    if kind == "adafactor":
        return [torch.optim.Adafactor(params, lr=lr, eps=(1e-10, 1e-3))], ["adafactor"]
    if kind == "muon":  # matrices within the model; the rest by AdamW
        inner = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks")]
        known = {id(p) for p in inner}
        outer = [p for p in params if id(p) not in known]
        second = torch.optim.AdamW(outer, lr=0.1 * lr, **adam)
        return [torch.optim.Muon(inner, lr=lr, weight_decay=0.0), second], ["muon", "adamw"]
    raise ValueError(f"no optimizer is called {kind!r}; there are {', '.join(_RATES)}")


FULL_MOMENTS = "adamw, FP32 moments"


def _rate(kind: str, seed: int) -> float:
    spread = _TAME.get(kind, SPREAD)
    return _RATES[kind.partition(",")[0]] * spread[seed % len(spread)]


# --- trainings --------------------------------------------------------------------------------------------


def text_training(
    kind: str,
    blocks: int,
    *,
    dtype: torch.dtype = BF16,
    rate: Callable[[int, int], float] = lambda t, steps: 1.0,
    spikes: Callable[[int], float] = lambda t: 1.0,
    clip: float | None = None,
    base: float = 1.0,
) -> Callable[[int, int], Training]:
    """A byte-level language model of `blocks` blocks; `rate(t, steps)` and `spikes(t)` scale learning rate and loss."""

    def make(seed: int, steps: int) -> Training:
        model = LanguageModel(256, 32, [Block(32) for _ in range(blocks)]).to(dtype)
        lr = base * _rate(kind, seed)
        optimizers, rules = _optimizers(kind, model, lr)
        if (
            dtype is torch.float16
        ):  # Adam's eps and small second moments are zero in FP16; the scale of the loss cancels
            for group in optimizers[0].param_groups:
                group["eps"] = 1e-6
        return Training(
            *(model, optimizers, rules, lambda t: spikes(t) * model.loss(*batch(letters()))),
            rate=lambda t: rate(t, steps),
            clip=clip,
            scale=2.0**10 if dtype is torch.float16 else 1.0,
        )

    return make


def _vocabulary(kind: str, blocks: int, shuffled: bool = False) -> Callable[[int, int], Training]:
    """A word-level model: numbers of words follow their frequency, unless shuffled."""

    def make(seed: int, steps: int) -> Training:
        text = words(6000, shuffled)
        model = LanguageModel(6000, 32, [Block(32) for _ in range(blocks)]).to(BF16)
        optimizers, rules = _optimizers(kind, model, _rate(kind, seed))
        return Training(model, optimizers, rules, lambda t: model.loss(*batch(text)))

    return make


def _sparse(kind: str, share: float) -> Callable[[int, int], Training]:
    """An embedding of which each step touches this share of the rows; more than 16 tensors, so in turns."""
    rows = 16384
    spread = (30.0, 0.01, 10.0, 0.03, 1.0) if kind == "adamw" else (3.0, 0.01, 1.0, 0.03, 0.1)

    def make(seed: int, steps: int) -> Training:
        model = SparseClassifier(rows, 16, blocks=4).to(BF16)
        lr = _RATES[kind] * spread[seed % len(spread)]
        optimizers, rules = _optimizers(kind, model, lr)
        return Training(model, optimizers, rules, lambda t: model.loss(torch.randint(0, rows, (int(share * rows),))))

    return make


def _experts(kind: str) -> Callable[[int, int], Training]:
    def make(seed: int, steps: int) -> Training:
        model = LanguageModel(256, 32, [Experts(32, 8), Experts(32, 8)]).to(BF16)
        optimizers, rules = _optimizers(kind, model, _rate(kind, seed))
        return Training(model, optimizers, rules, lambda t: model.loss(*batch(letters())))

    return make


def _heads(kind: str, blocks: int, heads: int) -> Callable[[int, int], Training]:
    """Heads trained in turn; in the steps of the others the gradient of a head is zero, not None."""
    # at ten times its rate SGD with momentum blows up: heads hear of it too late
    spread = (*SPREAD[:-1], 0.03) if kind == "momentum" else SPREAD

    def make(seed: int, steps: int) -> Training:
        model = LanguageModel(256, 32, [Block(32) for _ in range(blocks)], heads).to(BF16)
        optimizers, rules = _optimizers(kind, model, _RATES[kind] * spread[seed % len(spread)])
        return Training(model, optimizers, rules, lambda t: model.loss(*batch(letters()), head=t % heads))

    return make


# --- what there is ----------------------------------------------------------------------------------------

_BLOCKS = {13: 2, 68: 13, 298: 59}  # tensors of a text model -> its blocks

for _kind in _RATES:
    for _tensors, _blocks in _BLOCKS.items():
        if _kind != "fused" or _tensors == 68:
            _enter(f"{_kind}, {_tensors} tensors", text_training(_kind, _blocks))
for _kind in ("adamw", "momentum"):
    _enter(
        f"{_kind}, 68 tensors, fp16",
        text_training(_kind, 13, dtype=torch.float16, base=0.1 if _kind == "adamw" else 1e-3),
    )
    for _window, _windows in ((8, 48), (32, 12)):
        _enter(f"{_kind}, 68 tensors, window {_window}", text_training(_kind, 13), window=_window, windows=_windows)


def _warm_up(t: int, steps: int) -> float:
    return min(1.0, (t + 1) / 64)


def _cosine(t: int, steps: int) -> float:
    return 10 * 0.5 * (1 + math.cos(math.pi * t / steps))


def _plunge(t: int, steps: int) -> float:
    """By a factor of 1,000 within the second window."""
    return 10.0 * float(10 ** (-3 * min(max((t - 128) / 128, 0.0), 1.0)))


for _kind in ("adamw", "sgd"):
    _enter(f"{_kind}, 68 tensors, warm-up", text_training(_kind, 13, rate=_warm_up), windows=2)
    _base = 0.1 if _kind == "sgd" else 1.0  # both begin at ten times the rate
    _enter(f"{_kind}, 68 tensors, cosine", text_training(_kind, 13, rate=_cosine, base=_base))
    _enter(f"{_kind}, 68 tensors, lr / 1000 in a window", text_training(_kind, 13, rate=_plunge, base=_base))
for _often in (1, 4):
    for _kind in ("sgd", "adamw"):
        _enter(
            f"{_kind}, 33 tensors, {_often} spikes of 30 in 128 steps",
            text_training(
                _kind,
                6,
                spikes=lambda t, often=_often: 30.0 if t % (128 // often) == 17 else 1.0,  # type: ignore[misc]
                base=0.1 if _kind == "sgd" else 1.0,
            ),
        )
_enter(
    "momentum, 68 tensors, spikes, clipped",
    text_training("momentum", 13, spikes=lambda t: 30.0 if t % 64 == 17 else 1.0, clip=1.0),
)
for _kind in ("momentum", "adamw"):
    for _blocks in (1, 13):
        for _shuffled in (False, True):
            _order = "shuffled" if _shuffled else "by frequency"
            _enter(f"{_kind}, {5 * _blocks + 3} tensors, words {_order}", _vocabulary(_kind, _blocks, _shuffled))
    for _share in (0.001, 0.004, 0.01):
        _enter(f"{_kind}, 23 tensors, {100 * _share:g}% of the rows in a step", _sparse(_kind, _share))
    _enter(f"{_kind}, experts that starve", _experts(_kind))
    for _heads_count, _blocks in ((2, 2), (4, 4)):
        _enter(f"{_kind}, {_heads_count} heads in turn", _heads(_kind, _blocks, _heads_count))

for _share in (0.001, 0.01):
    _enter(f"sgd, 23 tensors, {100 * _share:g}% of the rows in a step", _sparse("sgd", _share))

QUICK = (
    "adamw, 68 tensors",
    "sgd, 13 tensors",
    "momentum, 8 tensors, words by frequency",
    "adamw, 23 tensors, 0.4% of the rows in a step",
    "momentum, 2 heads in turn",
)
