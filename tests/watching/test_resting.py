"""Steps that pass unseen one after the other: what they run, and that nothing is forgotten over it."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import update_watch as uw
from update_watch.measure.hooks.process_place import PLACE
from update_watch.measure.hooks.tap import StepTap
from update_watch.measure.step_order import StepOrder
from update_watch.measure.sums.layout import GROUPS
from update_watch.measure.watched_optimizer import Watched
from update_watch.report import Health
from update_watch.watching import attention

PACKAGE = str(Path(uw.__file__).parent)
WINDOW = 8


@pytest.fixture(autouse=True)
def short_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first windows are soon over."""
    monkeypatch.setattr(attention, "FIRST_STEPS", 16)
    monkeypatch.setattr(attention, "FIRST_WINDOWS", 2)
    monkeypatch.setattr(attention, "always", False)


def resting(tensors: int = 6, groups: int = 1, **options: Any) -> tuple[uw.Watch, torch.optim.SGD]:
    """A watch that has seen its first windows and cannot pay for a look any more."""
    params = [nn.Parameter(torch.randn(4, 4)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.SGD([{"params": params[k::groups]} for k in range(groups)], lr=1e-3)
    named = [(f"w{i}", p) for i, p in enumerate(params)]
    watch = uw.watch(named, optimizer, window=WINDOW, budget=1e-9, **options)
    for _ in range(40):
        optimizer.step()
    watch._judge.wait(10)
    watch._post.wait(10)
    for _ in range(3):
        optimizer.step()
    return watch, optimizer


@contextlib.contextmanager
def counted(cls: type, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    calls: list[Any] = []
    original: Callable[..., Any] = getattr(cls, name)

    def note(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(cls, name, note)
    yield calls
    monkeypatch.setattr(cls, name, original)


@pytest.mark.parametrize("tensors", [6, 600])
def test_a_step_that_passes_unseen_runs_little_of_ours(tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, optimizer = resting(tensors)
    monkeypatch.setattr(PLACE, "_hooks", dict([*PLACE._hooks.items()][-1:]))  # not those that other tests have left
    ran: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            ran.append(frame.f_code.co_name)

    with watch:
        before = watch.step
        sys.setprofile(note)
        optimizer.step()
        sys.setprofile(None)
        assert watch.step == before + 1 and watch._attention.observed == 0
    assert 5 < len(ran) <= 25, ran


def test_steps_are_counted_by_number_and_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, optimizer = resting()
    with watch, counted(Watched, "rest", monkeypatch) as rested:
        [watched] = watch._model.watched.values()
        began, in_window = watch.step, watched.window_steps
        for _ in range(50):
            optimizer.step()
        assert len(rested) == 50 and watch.step == began + 50 and watched.window_steps == in_window + 50
        assert watch.flush() is not None
    report = watch.last
    assert report is not None and report.step == began + 50 and report.window == in_window + 50
    assert report.observed_steps == 0 and report.observed_at == 2 * WINDOW
    assert report.headline.startswith(f"Not looked at since the report of step {report.observed_at} (")
    assert {t.health for t in report.tensors} == {Health.healthy} and report.health is Health.healthy


@pytest.mark.parametrize("steps", [1, 3, 8, 1000])
def test_many_steps_pass_by_as_one_by_one(steps: int) -> None:
    class Rng:
        def sample(self, items: list[Any], count: int) -> list[Any]:
            return items[:count]

    orders = [StepOrder([1, 2], 24, Rng()) for _ in (0, 1)]  # type: ignore[arg-type]
    for order in orders:
        order.next()
    for _ in range(steps):
        orders[0].pass_by()
    orders[1].pass_by(steps)
    assert orders[0].group_steps == orders[1].group_steps and sum(orders[1].group_steps) == steps + 1
    assert len(orders[0].group_steps) == GROUPS and orders[0].next() == orders[1].next()


@pytest.mark.parametrize("change", ["rate", "second rate", "group"])
def test_what_changes_while_steps_pass_unseen_is_looked_at(change: str) -> None:
    watch, optimizer = resting(groups=2)
    watch._attention._account = 0.0  # as far as this is paid for
    with watch:
        watch._attention._burst_cost = 1e9  # may be owed
        watch._attention._account = -1.0
        optimizer.step()
        assert not watch._attention._full
        if change == "group":
            new = nn.Parameter(torch.randn(4, 4))
            new.grad = torch.randn_like(new)
            optimizer.add_param_group({"params": [new]})
        else:
            optimizer.param_groups[int(change == "second rate")]["lr"] = 1e-2
        optimizer.step()
        optimizer.step()
        assert watch._attention._full or watch._attention.observed


def test_a_step_that_raises_or_steps_inside_is_counted_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nested(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise RuntimeError("no step")
            return super().step(closure)

    weight = nn.Parameter(torch.randn(4, 4))
    weight.grad = torch.randn_like(weight)
    optimizer = Nested([weight], lr=1e-3)
    with uw.watch([("w", weight)], optimizer, window=WINDOW, budget=1e-9) as watch:
        for _ in range(40):
            optimizer.step()
        watch._judge.wait(10)
        optimizer.step()
        optimizer.step()
        assert watch.step == 42
        with counted(Watched, "rest", monkeypatch) as rested:
            optimizer.step()
            optimizer.fails = True
            with pytest.raises(RuntimeError, match="no step"):
                optimizer.step()
            optimizer.fails = False
            optimizer.step()
        assert len(rested) == 2 and watch.step == 44


def test_several_optimizers_and_steps_that_are_looked_at_go_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, optimizer = resting()
    other = nn.Parameter(torch.randn(4, 4))
    other.grad = torch.randn_like(other)
    second = torch.optim.SGD([other], lr=1e-3)
    with watch:
        watch.attach(second)
        with counted(Watched, "rest", monkeypatch) as rested, counted(StepTap, "_run_begin", monkeypatch) as begun:
            watch._tap._begin = watch._tap._run_begin
            for _ in range(4):
                optimizer.step()
                second.step()
        assert len(begun) == 8 and len(rested) <= 8
        assert watch.step == 43 + 4


def test_an_error_of_ours_in_such_a_step_ends_the_watch_and_not_training(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, optimizer = resting()

    def fails(*_: Any) -> bool:
        raise ValueError("ours")

    before = optimizer.param_groups[0]["params"][0].detach().clone()
    monkeypatch.setattr(Watched, "rest", fails)
    with pytest.warns(UserWarning, match="ours"):
        optimizer.step()
    assert watch._tap.error is not None and not before.equal(optimizer.param_groups[0]["params"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    watch.close()


@pytest.mark.slow
def test_a_compiled_step_does_not_trace_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import convert_frame

    traced: list[Any] = []
    original = convert_frame._compile

    def note(code: Any, *args: Any, **kwargs: Any) -> Any:
        traced.append(code)
        return original(code, *args, **kwargs)

    monkeypatch.setattr(convert_frame, "_compile", note)
    watch, optimizer = resting()
    with watch:
        began = watch.step

        @torch.compile(backend="eager")
        def train(x: torch.Tensor) -> torch.Tensor:
            x = x * 2
            optimizer.step()
            return x + 1

        for _ in range(6):
            train(torch.ones(3))
        assert watch.step == began + 6 and any(code.co_name == "train" for code in traced)
        assert not [code for code in traced if code.co_filename.startswith(PACKAGE)]
