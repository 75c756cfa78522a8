"""What an optimizer means to add to a weight: its rule in FP64, by formulas of its own, for all elements.

`rule(w, g, state, group)` is the intended update of one step: weight, gradient and states as they were stored before the step,
all widened to FP64, the group's hyperparameters as they are in this step. The rules of ELEMENTWISE treat every element alone,
so several tensors laid end to end can be given at once; WHOLE_TENSOR rules look at a tensor's rows, columns or norm.

Sources: Loshchilov and Hutter 2019, algorithm 2 (AdamW); Sutskever et al. 2013 as torch writes it (SGD with momentum); Chen et
al. 2023, algorithm 2 (Lion); Shazeer and Stern 2018, algorithms 4 and 5 as torch writes them (Adafactor); Jordan et al. 2024
(Muon). None of them uses code of torch's optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Any]
Rule = Callable[[Tensor, Tensor, State, Mapping[str, Any]], Tensor]


def _of(state: State, name: str, like: Tensor) -> Tensor:
    """A state in FP64; zero before the first step."""
    value = state.get(name)
    return value.double() if isinstance(value, Tensor) else torch.zeros_like(like)


def betas(group: Mapping[str, Any]) -> tuple[float, float]:
    """As most optimizers keep them, or as two entries."""
    b1, b2 = group["betas"] if "betas" in group else (group["beta1"], group["beta2"])
    return float(b1), float(b2)


def adamw(w: Tensor, g: Tensor, state: State, group: Mapping[str, Any]) -> Tensor:
    (b1, b2), t, lr = betas(group), float(state.get("step", 0)) + 1, float(group["lr"])
    m = b1 * _of(state, "exp_avg", g) + (1 - b1) * g
    v = b2 * _of(state, "exp_avg_sq", g) + (1 - b2) * g * g
    update = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + float(group["eps"]))
    return -lr * (float(group.get("weight_decay", 0.0)) * w + update)


def sgd(w: Tensor, g: Tensor, state: State, group: Mapping[str, Any]) -> Tensor:
    g = g + float(group.get("weight_decay", 0.0)) * w
    buffer = state.get("momentum_buffer")
    if isinstance(buffer, Tensor):  # the first step's buffer is the gradient
        g = float(group["momentum"]) * buffer.double() + g
    return -float(group["lr"]) * g


def lion(w: Tensor, g: Tensor, state: State, group: Mapping[str, Any]) -> Tensor:
    (b1, _), lr = betas(group), float(group["lr"])
    return -lr * (float(group["weight_decay"]) * w + (b1 * _of(state, "exp_avg", g) + (1 - b1) * g).sign())


def adafactor(w: Tensor, g: Tensor, state: State, group: Mapping[str, Any]) -> Tensor:
    t, lr, (eps, least) = float(state.get("step", 0)) + 1, float(group["lr"]), group["eps"]
    if eps is None:
        raise ValueError("adafactor: give `eps`; its default depends on the format of the weights")
    new = t ** float(group["beta2_decay"])
    kept = w * (1 - lr * float(group["weight_decay"]))
    if g.dim() > 1:
        rows, columns = (
            old + new * (g.square().mean(dim, keepdim=True) - old)
            for dim, old in (
                (-1, _of(state, "row_var", g[..., :1])),
                (-2, _of(state, "col_var", g[..., :1, :])),
            )
        )
        variance = rows @ columns / rows.mean(-2, keepdim=True).clamp_min(eps)
    else:
        old = _of(state, "variance", g)
        variance = old + new * (g.square() - old)
    update = g / variance.clamp_min(eps * eps).sqrt()
    size = max(least, _rms(w)) * min(lr, t**-0.5)
    return kept - w - update * (size / max(1.0, _rms(update) / float(group["d"])))


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def muon(w: Tensor, g: Tensor, state: State, group: Mapping[str, Any]) -> Tensor:
    lr, momentum = float(group["lr"]), float(group["momentum"])
    buffer = momentum * _of(state, "momentum_buffer", g) + (1 - momentum) * g
    direction = momentum * buffer + (1 - momentum) * g if group["nesterov"] else buffer
    if group.get("adjust_lr_fn") not in (None, "original"):
        raise ValueError(f"muon: adjust_lr_fn={group['adjust_lr_fn']!r} is not written here")
    size = lr * math.sqrt(max(1.0, w.shape[0] / w.shape[1]))
    turned = _orthogonalised(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
    return -lr * float(group["weight_decay"]) * w - size * turned


def _orthogonalised(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz; that it rounds to BF16 on the way is part of the rule, so it is done here too."""

    def rounded(y: Tensor) -> Tensor:
        return y.to(torch.bfloat16).float()

    a, b, c = coefficients
    is_tall = x.shape[0] > x.shape[1]
    y = rounded(x.T if is_tall else x)
    y = rounded(y / rounded(y.norm()).clamp_min(eps))
    for _ in range(steps):
        gram = rounded(y @ y.T)
        y = rounded(a * y + rounded(b * gram + c * (gram @ gram)) @ y)
    return (y.T if is_tall else y).double()


ELEMENTWISE: dict[str, Rule] = {"adamw": adamw, "sgd": sgd, "lion": lion}
WHOLE_TENSOR: dict[str, Rule] = {"adafactor": adafactor, "muon": muon}
RULES: dict[str, Rule] = {**ELEMENTWISE, **WHOLE_TENSOR}
