"""Optimizers as people use them: several, in groups, loaded, tied, scheduled, stepped by closures."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import update_watch as uw
from tests.support.watch_nets import Net, all_exact, backward, batches, make_adamw, tensors, train
from update_watch.report import Cause, Health

BF16, FP16 = torch.bfloat16, torch.float16


# --- optimizers as people use them; in FP32 a replay that mistakes a setting has an efficiency off 1 ----


def test_several_optimizers_are_watched_in_one_report() -> None:
    model = Net()
    one = make_adamw(model.enter.parameters())
    two = torch.optim.SGD([*model.norm.parameters(), *model.leave.parameters()], lr=1e-2, momentum=0.9)
    with uw.watch(model, [one, two], window=16) as watch:
        train(model, [one, two], 16)
        report = watch.flush()
    all_exact(report)
    groups = {n: t.optimizer_group for n, t in tensors(report).items()}
    assert groups == {"enter.weight": "0/0", "enter.bias": "0/0", "norm.weight": "1/0", "leave.weight": "1/0"}
    assert [t.lr for t in tensors(report).values()] == [1e-3, 1e-3, 1e-2, 1e-2]


def test_groups_have_their_own_learning_rate() -> None:
    model = Net(BF16)
    slow, fast = [model.enter.weight], [model.leave.weight]
    optimizer = make_adamw([{"params": slow, "lr": 1e-7}, {"params": fast, "lr": 3e-2}])
    with uw.watch(model, optimizer, window=16) as watch:
        train(model, optimizer, 16)
        found = tensors(watch.flush())
    assert found["enter.weight"].health is Health.stalled and found["leave.weight"].health is Health.healthy
    assert (found["enter.weight"].lr, found["leave.weight"].lr) == (1e-7, 3e-2)
    assert found["leave.weight"].optimizer_group == "0/1"
    assert found["norm.weight"].cause is Cause.not_in_optimizer


def test_a_group_added_in_mid_run_is_measured_from_then_on() -> None:
    model = Net()
    optimizer = make_adamw(model.enter.parameters())
    with uw.watch(model, optimizer, window=16) as watch:
        train(model, optimizer, 10)
        optimizer.add_param_group({"params": [model.leave.weight], "lr": 1e-2, "weight_decay": 0.3})
        train(model, optimizer, 22)
        report = watch.flush()
    assert report is not None and report.step == 32
    all_exact(report, "enter.weight", "enter.bias", "leave.weight")
    assert tensors(report)["leave.weight"].lr == 1e-2
    assert tensors(report)["norm.weight"].cause is Cause.not_in_optimizer


def test_a_layer_that_comes_with_its_group_in_mid_run_has_its_name_at_once() -> None:
    model = Net()
    optimizer = make_adamw(model.parameters())
    with uw.watch(model, optimizer, window=16) as watch:
        train(model, optimizer, 10)
        model.more = nn.Linear(4, 4)
        optimizer.add_param_group({"params": model.more.parameters()})
        train(model, optimizer, 6)
        found = tensors(watch.flush())
    assert {"more.weight", "more.bias"} < found.keys() and not [name for name in found if name.startswith("group")]


def test_a_state_loaded_in_mid_run_is_the_one_replayed() -> None:
    model = Net()
    optimizer = make_adamw(model.parameters())
    other = Net(seed=1)
    old = make_adamw(other.parameters(), lr=3e-3, betas=(0.8, 0.9))
    train(other, old, 40, seed=2)
    with uw.watch(model, optimizer, window=10_000) as watch:
        train(model, optimizer, 5)
        optimizer.load_state_dict(old.state_dict())
        train(model, optimizer, 20)
        report = watch.flush()
    all_exact(report)
    assert {t.lr for t in tensors(report).values()} == {3e-3}


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_parameters_without_gradient_in_some_steps_are_replayed_at_their_own_step(implementation: str) -> None:
    model = Net()
    optimizer = make_adamw(model.parameters(), **{implementation: True})
    with uw.watch(model, optimizer, window=10_000) as watch:
        for i, x in enumerate(batches(24)):
            model.zero_grad()
            backward(model, x)
            if i % 3:
                model.enter.weight.grad = None
            if i < 4:
                model.leave.weight.grad = None
            optimizer.step()
        report = watch.flush()
    all_exact(report)
    assert {t.wanted_fraction for t in tensors(report).values()} == {1.0}  # of what was sampled


def test_a_tied_parameter_is_reported_once_under_all_its_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(48, 48), "b": nn.Linear(48, 48)})
    model["b"].weight = model["a"].weight
    optimizer = make_adamw(model.parameters())
    with uw.watch(model, optimizer, window=10_000) as watch:
        for x in batches(10):
            optimizer.zero_grad()
            model["b"](model["a"](x)).pow(2).sum().backward()
            optimizer.step()
        report = watch.flush()
    found = tensors(report)
    assert list(found) == ["a.weight", "a.bias", "b.bias"]
    assert found["a.weight"].names == ("a.weight", "b.weight")
    all_exact(report)


def test_a_schedule_is_followed_step_by_step() -> None:
    model = Net()
    optimizer = make_adamw(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=30)
    with uw.watch(model, optimizer, window=10_000) as watch:
        for x in batches(24):
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
            lr = optimizer.param_groups[0]["lr"]
            schedule.step()
        report = watch.flush()
    all_exact(report)
    assert tensors(report)["enter.weight"].lr == lr


def test_a_learning_rate_below_0_is_one_as_any_other() -> None:
    """Gradient ascent in half of the steps: its sign turns within a window."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.5)
    with uw.watch(model, optimizer, window=8, budget=None) as watch:
        for i in range(32):
            optimizer.param_groups[0]["lr"] = -1e-4 if i % 5 else 1e-4
            train(model, optimizer, 1, seed=i)
        report = watch.flush()
    assert report is not None and report.step == 32
    all_exact(report)


def test_gradients_made_in_a_closure_are_those_replayed() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with uw.watch(model, optimizer, window=10_000) as watch:
        for x in batches(12):

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                return backward(model, x)

            optimizer.step(closure)  # type: ignore[arg-type]  # torch wants a float
        all_exact(watch.flush())


OPTIONS: list[dict[str, Any]] = [
    {"amsgrad": True},
    {"maximize": True},
    {"weight_decay": 0.5, "betas": (0.5, 0.6)},
    {"lr": torch.tensor(3e-3), "fused": True},
    {"lr": torch.tensor(3e-3), "foreach": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_options_of_the_rule_are_followed(options: dict[str, Any]) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 1e-3, **options})
    with uw.watch(model, optimizer, window=10_000) as watch:
        train(model, optimizer, 12)
        all_exact(watch.flush())


def test_name_and_tensor_pairs_do_for_a_model() -> None:
    model = Net()
    optimizer = make_adamw(model.parameters())
    pairs = ((f"my.{name}", p) for name, p in model.named_parameters())
    with uw.watch(pairs, optimizer, window=10_000) as watch:
        train(model, optimizer, 10)
        report = watch.flush()
    assert list(tensors(report)) == [f"my.{name}" for name, _ in model.named_parameters()]
    all_exact(report)


def test_an_optimizers_parameter_that_the_model_does_not_name_is_reported_by_its_place() -> None:
    model = Net()
    optimizer = make_adamw(model.parameters())
    with uw.watch(model.leave, optimizer, window=10_000) as watch:
        train(model, optimizer, 10)
        report = watch.flush()
    assert set(tensors(report)) == {"weight", "group0.param0", "group0.param1", "group0.param2"}
    all_exact(report)


def test_parameters_that_are_grouped_anew_are_replayed_with_the_settings_of_their_group() -> None:
    torch.manual_seed(0)
    model = Net(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with uw.watch(model, optimizer, window=10**6) as watch:
        train(model, optimizer, 10)
        (group,), parameters = optimizer.param_groups, list(model.parameters())
        halves = {**group, "params": parameters[:2], "lr": 1e-2}, {**group, "params": parameters[2:], "maximize": True}
        optimizer.param_groups = list(halves)
        train(model, optimizer, 10)
        report = watch.flush()
    assert report is not None
    # measured in FP64, FP32 arithmetic is seen to round in the fifth digit
    assert [t.efficiency for t in report.tensors] == pytest.approx([1.0] * len(report.tensors), abs=1e-4)


def test_numbers_of_the_steps_since_parameters_were_grouped_anew_are_not_said_to_be_those_of_the_whole_window() -> None:
    torch.manual_seed(0)
    model = Net(torch.bfloat16)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=1e-3)
    with uw.watch(model, optimizer, window=10**6) as watch:
        train(model, optimizer, 24)
        moved = optimizer.param_groups[0]["params"].pop()
        optimizer.param_groups[1]["params"].append(moved)
        train(model, optimizer, 8)
        report = watch.flush()
    assert report is not None
    assert report.window == 32
    assert all(t.efficiency_error is None or t.efficiency_error > 0.01 for t in report.tensors)
    assert all(t.displacement_efficiency is None for t in report.tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_that_is_converted_within_a_window_is_measured_in_its_new_format(dtype: torch.dtype) -> None:
    """Half of the window was in the other one, and its numbers are none of that."""
    other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    model = Net(other)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    with uw.watch(model, optimizer, window=32, budget=None) as watch:
        train(model, optimizer, 16)
        optimizer.zero_grad()
        model.to(dtype)
        train(model, optimizer, 16)
        weight = tensors(watch.flush())["norm.weight"]
    assert weight.dtype == str(dtype).removeprefix("torch.")
    if dtype is torch.bfloat16:
        assert (weight.health, weight.cause) == (Health.stalled, Cause.weight_rounding)
    else:
        assert weight.health is Health.healthy and weight.efficiency == pytest.approx(1, abs=0.05)


def test_sparse_gradients_are_unknown_with_the_reason_and_the_other_tensors_are_measured() -> None:
    net = torch.nn.Sequential(torch.nn.Embedding(32, 48, sparse=True), torch.nn.Linear(48, 64))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    with uw.watch(net, optimizer) as watch:
        for _ in range(8):
            optimizer.zero_grad()
            net(torch.tensor([1, 2, 3])).square().sum().backward()
            optimizer.step()
        report = watch.flush()
    assert report is not None and watch._tap.error is None
    embedding, *others = report.tensors
    assert (embedding.health, embedding.cause) == (Health.unknown, Cause.not_replayable)
    assert "its gradients are sparse (torch.sparse_coo)" in embedding.advice
    assert [str(t.health) for t in others] == ["healthy", "healthy"]


class Wrapping(torch.optim.Optimizer):
    """An optimizer around another that never called `Optimizer.__init__`: Magma of pytorch_optimizer."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._patch_step_function()
        self.inner, self.defaults = inner, inner.defaults

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class Around(torch.optim.Optimizer):
    """The same without hooks, and the inner one under a name of its own, as older Lookaheads have it."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.param_groups, self.state, self.defaults = base, base.param_groups, base.state, base.defaults

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)


def test_an_optimizer_without_hooks_is_looked_through_whatever_it_calls_the_inner_one() -> None:
    model = Net()
    around = Around(make_adamw(model.parameters()))
    with uw.watch(model, around, window=16, budget=None) as watch:
        train(model, around, 16)
        report = watch.flush()
    all_exact(report)
    assert len(uw.audit(model, around).rows) == len(uw.audit(model, around.base).rows)


def test_an_optimizer_that_was_not_made_as_one_is_watched_by_what_it_steps_with() -> None:
    model = nn.Linear(6, 5)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapping = Wrapping(inner)
    with uw.watch(model, wrapping, window=16, budget=None) as watch:
        for _ in range(32):
            for p in model.parameters():
                p.grad = torch.randn(p.shape)
            wrapping.step()
        report = watch.flush()
    all_exact(report)
