"""The rules in FP64 say what torch's own optimizers do in FP64, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bench.shared.exact_rules import RULES, adafactor, muon


def _lion(params: Any) -> Any:
    return pytest.importorskip("lion_pytorch").Lion(params, lr=1e-2, weight_decay=0.1)


MADE: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "adamw": ("adamw", lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
    "adam": ("adamw", lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.0)),
    "sgd": ("sgd", lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1)),
    "sgd_momentum": ("sgd", lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)),
    "lion": ("lion", _lion),
    "adafactor": ("adafactor", lambda p: torch.optim.Adafactor(p, lr=1e-2, eps=(1e-6, 1e-3), weight_decay=0.1)),
    "muon": ("muon", lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.1)),
}


@pytest.mark.parametrize("name", MADE)
def test_a_rule_in_fp64_is_what_the_optimizer_does_in_fp64(name: str) -> None:
    rule, make = MADE[name]
    torch.manual_seed(0)
    shapes = [(6, 4), (3, 8)] if name == "muon" else [(6, 4), (7,)]
    params = [nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in shapes]
    optimizer = make(params)
    for _ in range(5):
        for p in params:
            p.grad = torch.randn_like(p)
        meant = [
            RULES[rule](
                p.detach().clone(), p.grad.clone(), copy.deepcopy(optimizer.state.get(p, {})), optimizer.param_groups[0]
            )
            for p in params
            if p.grad is not None
        ]
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for p, w, d in zip(params, before, meant, strict=True):
            # Newton-Schulz in BF16 may round otherwise where sums are taken in another order
            tolerance = 2e-2 * d.abs().max().item() if name == "muon" else 1e-14
            torch.testing.assert_close(p.detach() - w, d, rtol=1e-9, atol=tolerance)
            assert d.abs().max() > 1e-4


def test_what_would_be_another_rule_is_refused() -> None:
    w = torch.ones(2, 2, dtype=torch.float64)
    group = torch.optim.Adafactor([nn.Parameter(w)]).param_groups[0]
    with pytest.raises(ValueError, match="give `eps`"):
        adafactor(w, w, {}, group)
    group = torch.optim.Muon([nn.Parameter(w)], adjust_lr_fn="match_rms_adamw").param_groups[0]
    with pytest.raises(ValueError, match="match_rms_adamw"):
        muon(w, w, {}, group)
