"""Weight decay that never happens, beside decay that does."""

from __future__ import annotations

import pytest
import torch

import update_watch as uw


def _decay(
    dtype: torch.dtype, lr: float, steps: int = 64, bias: torch.dtype | None = None, **options: object
) -> list[uw.AccumulatorReport | None]:
    torch.manual_seed(0)
    model = torch.nn.Linear(32, 32).to(dtype)
    if bias is not None:
        model.bias = torch.nn.Parameter(model.bias.detach().to(bias))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, **options)  # type: ignore[arg-type]
    with uw.watch(model, optimizer, window=32) as watch:
        for _ in range(steps):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        report = watch.flush()
    assert report is not None
    return [t.accumulators.get("weight_decay") for t in report.tensors]


def test_decay_rounded_on_its_own_is_stalled_although_the_gradient_part_arrives() -> None:
    for decay in _decay(torch.bfloat16, 1e-3, foreach=False):
        assert decay is not None
        assert decay.cause is uw.Cause.decay_rounding
        assert decay.efficiency == 0.0 and decay.lost_fraction == 1.0


def test_decay_is_seen_beside_tensors_of_fp32() -> None:
    """Where some weights are FP32, all samples are read in FP64: a rule in one call takes moments of one format only."""
    weight, bias = _decay(torch.bfloat16, 1e-3, bias=torch.float32, foreach=False)
    assert weight is not None and weight.cause is uw.Cause.decay_rounding
    assert bias is None or bias.cause is None


def test_decay_large_enough_to_arrive_is_healthy() -> None:
    for decay in _decay(torch.bfloat16, 0.1, foreach=False):
        assert decay is None or decay.health is uw.Health.healthy


@pytest.mark.parametrize("options", [{"fused": True}], ids=["fused"])
def test_decay_joined_with_the_gradient_part_is_not_accused(options: dict[str, object]) -> None:
    assert all(d is None or d.cause is None for d in _decay(torch.bfloat16, 1e-3, **options))


def test_decay_in_fp32_is_not_accused() -> None:
    assert all(d is None or d.cause is None for d in _decay(torch.float32, 1e-3, foreach=False))
