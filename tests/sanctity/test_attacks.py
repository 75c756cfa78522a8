"""Trainings meant to break the watch: what is changed under its feet, at the worst moment.

In FP32 a replay that mistakes anything has an efficiency off 1, and a watch that fails gives no later report.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import update_watch as uw
from tests.support.watch_nets import Net, backward, batches, train
from update_watch.report import Cause, Report


def adamw(params: Any, lr: float = 1e-3, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=lr, **options)


def assert_exact(report: Report | None, window: int, *names: str) -> None:
    """All steps of the window were seen, and replayed to the last digit."""
    assert report is not None and report.window == window
    found = {t.name: t for t in report.tensors}
    for name in names or tuple(found):
        assert found[name].efficiency == pytest.approx(1, abs=0.003), (name, found[name].advice)


@contextmanager
def _low_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND = [
    pytest.param(torch.inference_mode, id="inference"),
    pytest.param(_low_default, id="low-default-dtype"),
    pytest.param(lambda: torch.device("meta"), id="other-default-device"),
]


@pytest.mark.parametrize("around", AROUND)
def test_a_window_closed_where_a_trainer_validates_is_not_the_last_one(around: Any) -> None:
    model = Net()
    optimizer, average = adamw(model.parameters()), Net(seed=1)
    with around():
        watch = uw.watch(model, optimizer, window=100, averages={"ema": average})
    with watch:
        train(model, optimizer, 5)
        with around():
            assert_exact(watch.flush(), 5)
        train(model, optimizer, 9)
        assert_exact(watch.flush(), 9)


@pytest.mark.parametrize("around", AROUND)
def test_steps_taken_there_and_outside_are_measured_alike(around: Any) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with uw.watch(model, optimizer, window=6) as watch:
        for i, x in enumerate(batches(17)):
            model.zero_grad()
            backward(model, x)
            if i % 6 in (3, 4, 5):
                with around():
                    optimizer.step()
            else:
                optimizer.step()
        assert_exact(watch.flush(), 5)


# --- groups, states and settings ------------------------------------------------------------------------


def test_a_group_taken_away_is_still_reported_for_the_steps_it_was_in() -> None:
    model = Net()
    optimizer = adamw([{"params": list(model.enter.parameters())}, {"params": [model.leave.weight]}])
    with uw.watch(model, optimizer, window=100) as watch:
        train(model, optimizer, 10)
        optimizer.param_groups.pop()
        assert_exact(watch.flush(), 10, "enter.weight", "leave.weight")
        train(model, optimizer, 5)
        assert_exact(watch.flush(), 5, "enter.weight")


def test_a_window_closed_in_the_middle_of_a_step_costs_that_step_alone() -> None:
    """Between our look before the rule and the one after it, positions change: the two do not belong together."""
    model = Net()
    optimizer = adamw(model.parameters())
    with uw.watch(model, optimizer, window=100) as watch:
        steps: list[int] = []

        def pre_hook(*_: Any) -> None:
            steps.append(1)
            if len(steps) in (1, 8):
                watch.flush()

        handle = optimizer.register_step_pre_hook(pre_hook)
        train(model, optimizer, 20)
        assert_exact(watch.flush(), 13)
        handle.remove()


def test_a_scaler_in_some_steps_leaves_those_that_wait_as_they_were() -> None:
    model = Net()
    optimizer = adamw(model.parameters(), fused=True)
    with uw.watch(model, optimizer, window=100) as watch:
        for i, x in enumerate(batches(23)):
            model.zero_grad()
            backward(model, x)
            if i % 4 in (1, 2):
                for p in model.parameters():
                    p.grad.mul_(1024.0)  # type: ignore[union-attr]  # there is one
                optimizer.grad_scale = torch.tensor(1024.0)  # type: ignore[attr-defined]  # as GradScaler does
                optimizer.found_inf = torch.tensor(float(i % 8 == 5))  # type: ignore[attr-defined]
                optimizer.step()
                del optimizer.grad_scale, optimizer.found_inf
            else:
                optimizer.step()
        assert_exact(watch.flush(), 23)


def test_states_that_training_lets_go_are_not_held() -> None:
    model = Net()
    optimizer = adamw(model.parameters())
    with uw.watch(model, optimizer, window=100):
        train(model, optimizer, 8)
        held = weakref.ref(optimizer.state[model.enter.weight]["exp_avg"])
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert held() is None


def test_any_number_of_parameters_may_be_given_by_name() -> None:
    """torch keeps their names in the group, which are no setting to be copied."""
    weights = {f"w{i}": torch.nn.Parameter(torch.randn(4)) for i in range(1100)}
    optimizer = torch.optim.SGD(weights.items(), lr=0.1)
    with uw.watch(weights.items(), optimizer, window=100) as watch:
        for _ in range(64):  # each has had its turns
            for weight in weights.values():
                weight.grad = torch.ones(4)
            optimizer.step()
        assert_exact(watch.flush(), 64)


# --- other tensors in the same parameters ------------------------------------------------------------------


def test_a_parameter_given_another_shape_is_planned_anew() -> None:
    weight, other = torch.nn.Parameter(torch.randn(64, 64)), torch.nn.Parameter(torch.randn(64, 64))
    optimizer = torch.optim.SGD([weight, other], lr=0.1)

    def steps(count: int) -> None:
        for _ in range(count):
            weight.grad, other.grad = torch.randn_like(weight), torch.randn_like(other)
            optimizer.step()

    with uw.watch({"weight": weight, "other": other}.items(), optimizer, window=100) as watch:
        steps(8)
        assert_exact(watch.flush(), 8)
        weight.data = weight.data[:20].clone()  # the samples planned for lie beyond it
        steps(8)
        assert_exact(watch.flush(), 8)
        weight.data = torch.randn(99, 64)
        steps(2)
        kept, weight.data = weight.data, torch.empty(0)
        assert_exact(watch.flush(), 2)
        weight.data = kept
        steps(8)
        report = watch.flush()
        assert_exact(report, 8)
    assert report is not None and [t.shape for t in report.tensors] == [(99, 64), (64, 64)]


def test_a_model_converted_in_mid_run_is_measured_in_its_new_format() -> None:
    model = Net()
    optimizer = adamw(model.parameters(), foreach=False)
    with uw.watch(model, optimizer, window=100) as watch:
        train(model, optimizer, 8)
        assert_exact(watch.flush(), 8)
        train(model, optimizer, 4)
        model.to(torch.bfloat16)
        optimizer.state.clear()
        report = watch.flush()
        assert_exact(report, 4)
        assert report is not None and {t.dtype for t in report.tensors} == {"float32"}  # what was measured
        train(model, optimizer, 16)
        report = watch.flush()
    assert report is not None and {t.dtype for t in report.tensors} == {"bfloat16"}
    norm = next(t for t in report.tensors if t.name == "norm.weight")
    assert norm.cause is Cause.weight_rounding and norm.critical_lr is not None and norm.critical_lr > 1e-3


# --- other hooks --------------------------------------------------------------------------------------------


def test_a_pre_hook_added_later_that_clips_is_seen_at_work() -> None:
    model = Net()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1.0
    )  # clipped gradients are tiny; FP32 itself would round smaller updates

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    def again(*_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.9

    with uw.watch(model, optimizer, window=100) as watch, uw.watch(model, optimizer, window=100) as second:
        optimizer.register_step_pre_hook(clip)
        train(model, optimizer, 12)
        optimizer.register_step_pre_hook(again)
        train(model, optimizer, 12)
        for one in (watch, second):
            assert_exact(one.flush(), 22)  # two steps were missed
    assert len(optimizer._optimizer_step_pre_hooks) == 2


def test_a_pre_hook_that_steps_the_same_optimizer_is_not_disturbed() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    depth: list[int] = []

    def step_twice(*_: Any) -> None:
        if not depth:
            depth.append(1)
            optimizer.step()
            depth.clear()

    optimizer.register_step_pre_hook(step_twice)
    with uw.watch(model, optimizer, window=100) as watch:
        optimizer.register_step_pre_hook(lambda *_: None)
        train(model, optimizer, 8)
        assert_exact(watch.flush(), 14)


@pytest.mark.parametrize("where", ["pre", "post"])
def test_a_hook_may_close_the_watch(where: str) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    watch = uw.watch(model, optimizer, window=100)
    steps: list[int] = []

    def close(*_: Any) -> None:
        steps.append(1)
        if len(steps) == 3:
            watch.close()

    (optimizer.register_step_pre_hook if where == "pre" else optimizer.register_step_post_hook)(close)
    optimizer.register_step_pre_hook(lambda *_: None)
    optimizer.register_step_post_hook(lambda *_: None)
    train(model, optimizer, 6)
    assert watch.last is not None and len(steps) == 6
