"""What a BF16 copy of FP32 weights shows of their training, and FP32 weights that hold BF16 values: against all elements."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import update_watch as uw

STEPS = 32


def trained(model: nn.Module, lr: float = 3e-4, begun: int = 0) -> tuple[uw.Report, dict[str, tuple[float, float]]]:
    """The report, and of all elements the share whose BF16 value changes in a step and in the window."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    found = {name: 0.0 for name, _ in model.named_parameters()}
    begin = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    done = begun
    with uw.watch(model, optimizer, window=STEPS, step=lambda: done) as watch:
        for _ in range(STEPS):
            done += 1
            before = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
            x = torch.randn(32, 48)
            (model(x) - x.roll(1, -1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, p in model.named_parameters():
                found[name] += float(p.detach().bfloat16().ne(before[name]).float().mean()) / STEPS
        report = watch.flush()
    assert report is not None
    whole = {name: float(p.detach().bfloat16().ne(begin[name]).float().mean()) for name, p in model.named_parameters()}
    return report, {name: (found[name], whole[name]) for name in found}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 48), nn.RMSNorm(48))


@pytest.mark.parametrize("lr", [1e-5, 1e-3])
def test_shares_of_a_bf16_copy_that_change_are_those_of_all_elements(lr: float) -> None:
    report, truth = trained(model(), lr)
    for t in report.tensors:
        per_step, per_window = truth[t.name]
        assert t.copy_changed == pytest.approx(per_step, abs=0.08), t.name
        assert t.copy_changed_window == pytest.approx(per_window, abs=0.3), t.name  # of 16 elements
    assert all(a.level is not uw.Level.warn for a in report.alerts)


def test_weights_that_are_stored_in_bf16_have_no_copy() -> None:
    low = model().bfloat16()
    optimizer = torch.optim.SGD(low.parameters(), lr=0.1)
    with uw.watch(low, optimizer, window=4) as watch:
        for _ in range(4):
            for p in low.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        report = watch.flush()
    assert report is not None
    assert {(t.copy_changed, t.copy_changed_window, t.was_rounded) for t in report.tensors} == {(None, None, False)}


def test_fp32_weights_that_went_through_bf16_are_named_once_and_then_train_as_ever() -> None:
    rounded = copy.deepcopy(model()).bfloat16().float()
    report, _ = trained(rounded, begun=1000)
    # the norm's weights are all 1, which says nothing
    assert {t.name for t in report.tensors if t.was_rounded} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert {t.health for t in report.tensors} == {uw.Health.healthy}
    named = next(t for t in report.tensors if t.was_rounded)
    assert named.advice.startswith("Before step 1001 all FP32 values were values of BF16")
    assert [(a.level, a.title) for a in report.alerts] == [(uw.Level.info, "WAS ROUNDED: 4 FP32 tensors")]
    again, _ = trained(rounded, begun=2000)
    assert not any(t.was_rounded for t in again.tensors) and again.alerts == ()
    # so are weights loaded to be trained: it is said of them, and wakes nobody
    loaded, _ = trained(copy.deepcopy(model()).bfloat16().float())
    assert sum(t.was_rounded for t in loaded.tensors) == 4 and loaded.alerts == ()


def test_fp32_weights_that_never_did_are_not() -> None:
    report, _ = trained(model())
    assert not any(t.was_rounded for t in report.tensors) and report.alerts == ()
