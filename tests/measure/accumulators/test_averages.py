"""Averaged models: the low-precision one that never moves, its FP32 twin, and averages that cannot be judged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import update_watch as uw


def _train(dtype: torch.dtype, average_of: Any, update: Any, steps: int = 64) -> uw.Report:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.RMSNorm(32)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    average, given = average_of(model)
    with uw.watch(model, optimizer, window=32, averages={"ema": given}) as watch:
        for step in range(steps):
            model(torch.randn(16, 32, dtype=dtype)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                update(average, model, step)
        report = watch.flush()
    assert report is not None
    return report


def _averaged(model: Any) -> Any:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    return average, average


def _lerp(average: Any, model: Any, step: int) -> None:
    for a, w in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(w.to(a.dtype), 0.001)


def _of(report: uw.Report) -> list[uw.AccumulatorReport]:
    return [t.accumulators["average:ema"] for t in report.tensors]


def test_a_bf16_average_at_decay_0999_is_stalled_with_its_cause() -> None:
    report = _train(torch.bfloat16, _averaged, lambda a, m, _: a.update_parameters(m))
    assert {a.cause for a in _of(report)} == {uw.Cause.average_rounding}
    assert all(a.efficiency is not None and a.efficiency < 0.02 for a in _of(report))
    assert all(a.lost_fraction is not None and a.lost_fraction > 0.98 for a in _of(report))


def test_its_fp32_twin_is_healthy_and_arrives_whole() -> None:
    report = _train(torch.float32, _averaged, lambda a, m, _: a.update_parameters(m))
    assert all(a.health is uw.Health.healthy and a.cause is None for a in _of(report))
    assert all(a.efficiency == pytest.approx(1.0, abs=0.002) for a in _of(report))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_copy_that_the_first_update_makes_does_not_count(dtype: torch.dtype) -> None:
    """The first window holds it: 1 / (1 - decay) times what an average would have moved by."""
    report = _train(dtype, _averaged, lambda a, m, _: a.update_parameters(m), steps=32)
    assert report.step == 32
    for accumulator in _of(report):
        assert accumulator.efficiency == pytest.approx(1.0 if dtype is torch.float32 else 0.0, abs=0.02)


def test_a_plain_copy_is_judged_with_the_decay_given() -> None:
    def given(model: Any) -> Any:
        average = copy.deepcopy(model)
        return average, (average, 0.999)

    report = _train(torch.bfloat16, given, _lerp)
    assert {a.health for a in _of(report)} == {uw.Health.stalled}


def test_a_plain_copy_without_a_decay_is_unknown_and_says_what_to_give() -> None:
    def given(model: Any) -> Any:
        average = copy.deepcopy(model)
        return average, average

    for accumulator in _of(_train(torch.bfloat16, given, _lerp)):
        assert accumulator.health is uw.Health.unknown
        assert "averages={'ema': (model, decay)}" in accumulator.advice


def test_an_average_that_is_not_updated_is_not_accused() -> None:
    report = _train(torch.bfloat16, _averaged, lambda *_: None)
    assert {a.health for a in _of(report)} == {uw.Health.unknown}


def test_an_fp32_average_rounded_by_a_validation_swap_is_named() -> None:
    def fp32_copy(model: Any) -> Any:
        average = AveragedModel(copy.deepcopy(model).float(), multi_avg_fn=get_ema_multi_avg_fn(0.999))
        return average, average

    def update(average: Any, model: Any, step: int) -> None:
        _lerp(average.module, model, step)
        if step % 10 == 9:  # validation: the FP32 average goes through the BF16 weights and back
            for a in average.module.parameters():
                a.data.copy_(a.data.bfloat16())

    accumulators = _of(_train(torch.bfloat16, fp32_copy, update))
    assert {a.cause for a in accumulators} == {uw.Cause.average_rounding}
    assert all("swap for validation" in a.advice for a in accumulators)


def test_an_average_of_another_model_is_refused() -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none of its tensors has a name and shape of the model's"):
        uw.watch(model, optimizer, averages={"ema": torch.nn.Linear(7, 7)})
    with pytest.raises(TypeError, match="expected a module or"):
        uw.watch(model, optimizer, averages={"ema": 3})
    with pytest.raises(ValueError, match="decay must be in"):
        uw.watch(model, optimizer, averages={"ema": (copy.deepcopy(model), 1.5)})
