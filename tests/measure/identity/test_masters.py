"""Optimizers that step FP32 masters or flat partitions instead of the model's own tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import update_watch as uw
from tests.support.watch_nets import Net, backward, batches
from update_watch.measure.identity.masters import find
from update_watch.measure.identity.names import names_of
from update_watch.measure.identity.partitions import Piece


def find_in(model: nn.Module, stepped: list[Tensor]) -> Any:
    return find(list(model.named_parameters()), names_of(model), torch.optim.SGD(stepped, lr=0.1))


def clones(model: nn.Module) -> list[Tensor]:
    return [p.detach().float().clone().requires_grad_() for p in model.parameters()]


def step(model: nn.Module, masters: list[Tensor], optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """As a loop with masters makes it: the optimizer steps them, the loop writes the model's weights."""
    model.zero_grad()
    backward(model, x)
    for master, p in zip(masters, model.parameters(), strict=True):
        assert p.grad is not None
        master.grad = p.grad.float()
    optimizer.step()
    with torch.no_grad():
        for master, p in zip(masters, model.parameters(), strict=True):
            p.copy_(master)


def test_masters_are_reported_under_their_parameters_names_and_nothing_else_is() -> None:
    """A loop with FP32 masters: the BF16 copies are written by the loop, the optimizer steps the masters."""
    model = Net(torch.bfloat16)
    masters = clones(model)
    optimizer = torch.optim.AdamW(masters, lr=1e-5)
    with uw.watch(model, optimizer, window=16) as watch:
        for x in batches(16, torch.bfloat16):
            step(model, masters, optimizer, x)
        report = watch.flush()
    assert report is not None
    assert {t.name: t.dtype for t in report.tensors} == {n: "float32" for n, _ in model.named_parameters()}
    assert {str(t.health) for t in report.tensors} == {"healthy"}
    assert all(t.efficiency == pytest.approx(1, abs=0.02) for t in report.tensors)


def test_masters_that_are_taken_from_the_stored_weights_after_each_step_lose_what_they_are_for() -> None:
    model = Net(torch.bfloat16)
    masters = clones(model)
    optimizer = torch.optim.AdamW(masters, lr=1e-5)
    reports: list[Any] = []
    with uw.watch(model, optimizer, window=16, budget=None, sinks=[reports.append]) as watch:
        for x in batches(48, torch.bfloat16):
            step(model, masters, optimizer, x)
            with torch.no_grad():
                for master, p in zip(masters, model.parameters(), strict=True):
                    master.copy_(p)
        watch.flush()
    norm = next(t for t in reports[-1].tensors if "norm" in t.name)
    assert (str(norm.health), str(norm.cause), norm.efficiency) == (
        "stalled",
        "overwritten",
        pytest.approx(1, abs=0.02),
    )
    assert norm.net_efficiency == pytest.approx(0, abs=0.05)


def test_a_master_is_known_by_its_values_where_only_one_parameter_has_them() -> None:
    model = Net(torch.bfloat16)
    masters = clones(model)
    found = find_in(model, masters[:1] + [torch.randn(5, requires_grad=True)])
    assert found.names == {id(masters[0]): ("enter.weight",)}
    # five more elements hold none of the others: a temperature, say
    assert found.instead == {id(model.enter.weight): ""}
    found = find_in(
        model, masters[:1] + [torch.randn(64, 1, requires_grad=True), torch.randn(4096, requires_grad=True)]
    )
    reasons = {name: found.instead[id(p)] for name, p in model.named_parameters()}
    assert reasons.pop("enter.weight") == ""
    assert len(reasons) == 3 and all("not known" in reason for reason in reasons.values())


def test_equal_values_name_nobody() -> None:
    model = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)]).bfloat16()
    found = find_in(model, [torch.ones(4, requires_grad=True)])
    assert found.names == {}
    assert all("not known" in found.instead[id(p)] for p in model.parameters())


def test_megatrons_parameters_name_their_masters() -> None:
    model = nn.Linear(6, 4).bfloat16()
    shards = [torch.randn(12, requires_grad=True), torch.randn(4, requires_grad=True)]
    for p, shard in zip(model.parameters(), shards, strict=True):
        p.main_param = shard  # type: ignore[attr-defined]
    found = find_in(model, shards)
    assert found.names == {id(shards[0]): ("weight",), id(shards[1]): ("bias",)}
    assert found.pieces == {id(shards[0]): [Piece(("weight",), (4, 6), 0, 12)]}
    assert set(found.instead.values()) == {""}


def test_deepspeeds_partition_has_a_piece_of_each_parameter() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)).bfloat16()
    enter: Any = model[0]
    leave: Any = model[1]
    flat = torch.randn(28, requires_grad=True)
    for p, start in ((enter.weight, 0), (enter.bias, 24)):
        p._hp_mapping = SimpleNamespace(hp_fragment=flat.detach()[start : start + p.numel()])
    leave.weight._hp_mapping = leave.bias._hp_mapping = None  # in another rank's partition
    found = find_in(model, [flat])
    assert found.pieces == {id(flat): [Piece(("0.weight",), (4, 6), 0, 24), Piece(("0.bias",), (4,), 24, 4)]}
    assert found.instead == dict.fromkeys(map(id, model.parameters()), "")


def test_parameters_behind_an_unknown_partition_are_unknown_and_not_idle() -> None:
    model = Net(torch.bfloat16)
    flat = torch.randn(100, requires_grad=True)
    optimizer = torch.optim.AdamW([flat], lr=1e-3)
    with uw.watch(model, optimizer, window=8) as watch:
        for _ in range(8):
            flat.grad = torch.randn(100)
            optimizer.step()
        report = watch.flush()
    assert report is not None
    found = {t.name: (str(t.health), str(t.cause), t.advice) for t in report.tensors}
    assert found.pop("group0.param0")[0] == "healthy"
    assert len(found) == 4
    for health, cause, advice in found.values():
        assert (health, cause) == ("unknown", "not_replayable")
        assert "steps other tensors than the model's" in advice


def test_an_ordinary_optimizer_of_some_parameters_has_no_masters() -> None:
    model = Net()
    assert find_in(model, list(model.parameters())[:2]) == ({}, {}, {}, [], [])


def test_ones_alone_do_not_make_an_optimizer_that_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8))
    other = nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8))
    found = find_in(model, list(other.parameters()))
    assert found.names == {}
    assert found.instead and all(found.instead.values())


def _beside_the_models_own(
    is_fed: bool, caplog: pytest.LogCaptureFixture, zeros: bool = False
) -> tuple[uw.Report, list[str]]:
    """Of a matrix the optimizer steps another tensor of the same values, of all others the model's own."""
    model = Net()
    old = model.leave.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.leave.weight = nn.Parameter(old.detach().clone())  # as parametrisations and wrappers do
    with uw.watch(model, optimizer, window=16) as watch:
        for x in batches(32):
            optimizer.zero_grad(set_to_none=not zeros)
            model.zero_grad()
            backward(model, x)
            if zeros:
                old.grad = torch.zeros_like(old)
            if is_fed:
                old.grad = model.leave.weight.grad
            optimizer.step()
            if is_fed:
                model.leave.weight.data.copy_(old.detach())
        report = watch.flush()
    assert report is not None
    return report, [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("zeros", [False, True], ids=["no gradient", "zeros"])
def test_what_a_parameter_once_was_is_no_master_of_it_though_the_optimizer_steps_others_of_the_model(
    zeros: bool, caplog: pytest.LogCaptureFixture
) -> None:
    report, told = _beside_the_models_own(False, caplog, zeros)
    found = {t.name: (t.health, t.cause) for t in report.tensors}
    assert found.pop("leave.weight") == (uw.Health.idle, uw.Cause.not_in_optimizer)
    assert set(found.values()) == {(uw.Health.healthy, None)}
    assert len(told) == 1 and "leave.weight" in told[0] and "another tensor of the same values" in told[0]


def test_a_master_beside_tensors_of_the_model_stays_one_where_it_is_fed(caplog: pytest.LogCaptureFixture) -> None:
    report, told = _beside_the_models_own(True, caplog)
    assert {t.health for t in report.tensors} == {uw.Health.healthy} and not told


@pytest.mark.parametrize("is_fed", [False, True])
def test_a_copy_of_the_model_whose_gradients_are_zeros_is_stepped_by_mistake(is_fed: bool) -> None:
    """`zero_grad(set_to_none=False)` on what the model was before it was copied or wrapped; its twin is fed."""
    model = Net()
    copies = clones(model)
    optimizer = torch.optim.AdamW(copies, lr=1e-3, weight_decay=0.1)
    with uw.watch(model, optimizer, window=16) as watch:
        for x in batches(48):
            for copy in copies:
                copy.grad = torch.zeros_like(copy)
            if is_fed:
                step(model, copies, optimizer, x)
            else:
                model.zero_grad()
                backward(model, x)
                optimizer.step()
        report = watch.flush()
    assert report is not None
    found = {(t.health, t.cause) for t in report.tensors}
    assert found == {(uw.Health.healthy, None) if is_fed else (uw.Health.idle, uw.Cause.not_in_optimizer)}
    assert is_fed or "gradients of 0 alone, though the model's are not" in report.tensors[0].advice


@pytest.mark.parametrize("is_foreign", [True, False])
def test_masters_whose_gradients_are_zeroed_after_the_step_stay_masters_where_a_window_is_closed_then(
    is_foreign: bool,
) -> None:
    """An epoch ends between `zero_grad(set_to_none=False)` of the masters and the next `zero_grad` of the model."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    old = clones(model) if is_foreign else [model.leave.weight]
    if is_foreign:
        optimizer = torch.optim.AdamW(old, lr=1e-3)
    else:
        model.leave.weight = nn.Parameter(model.leave.weight.detach().clone())
    new = list(model.parameters()) if is_foreign else [model.leave.weight]
    with uw.watch(model, optimizer, window=100, budget=None) as watch:
        for i, x in enumerate(batches(40)):
            model.zero_grad()
            backward(model, x)
            for master, p in zip(old, new, strict=True):
                master.grad = None if p.grad is None else p.grad.clone()
            optimizer.step()
            for master, p in zip(old, new, strict=True):
                p.data.copy_(master.detach())
                master.grad = torch.zeros_like(master)
            if i % 20 == 19:
                report = watch.flush()
    assert report is not None
    assert {(t.health, t.cause) for t in report.tensors} == {(uw.Health.healthy, None)}
