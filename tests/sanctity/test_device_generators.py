"""Trials run on the CPU, before the first step; the generators of other devices are none of their business.

`torch.manual_seed` seeds every device, which no test on a CPU can see by its effect: so it is seen by the call.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import update_watch as uw

ROOT = Path(__file__).resolve().parents[2]
CODE = [
    *(path for path in (ROOT / "update_watch").rglob("*.py") if "demo" not in path.parts),
    *(ROOT / "callbacks").rglob("*.py"),
    *(ROOT / "dashboards").rglob("*.py"),
]


class SignDescent(torch.optim.Optimizer):
    def __init__(self, params: Any, noise: float = 0.0) -> None:
        super().__init__(params, {"lr": 1e-4, "noise": noise})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    kick: Tensor = group["noise"] * torch.randn_like(p) if group["noise"] else torch.zeros_like(p)
                    p.add_(p.grad.sign() + kick, alpha=-group["lr"])


@pytest.mark.parametrize("noise", [0.0, 0.1], ids=["own-rule", "draws"])
def test_watching_and_auditing_seed_no_device(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for module in (torch.cuda, torch.xpu, torch.mps):
        for name in ("manual_seed", "manual_seed_all"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda seed: calls.append(seed))
    torch.manual_seed(0)
    if not calls:
        pytest.skip("this torch seeds no device on a machine without one")
    calls.clear()
    model = nn.Linear(8, 8).bfloat16()
    optimizer = SignDescent(model.parameters(), noise)
    uw.audit(model, optimizer)
    with uw.watch(model, optimizer, window=2) as watch:
        for _ in range(4):
            model(torch.randn(2, 8).bfloat16()).sum().backward()
            optimizer.step()
        watch.flush()
    assert calls == []


def test_no_code_of_ours_seeds_all_devices() -> None:
    assert len(CODE) > 100
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("torch.manual_seed", "torch.seed", "torch.random.manual_seed")
    ]
    assert found == []
