"""Nothing of the real optimizer moves when its twin steps."""

from __future__ import annotations

import functools
import random
import threading
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.support.replay.twin_samples import Plain, parameter, replayed
from update_watch.replay.absent import ReplayError
from update_watch.replay.optimizer_copy import rule_of
from update_watch.replay.side_effects import WithoutEffects
from update_watch.replay.twin import Run, Twin


def test_a_rule_that_draws_random_numbers_is_refused_and_no_generator_moves() -> None:
    class Noisy(Plain):
        draw: Any

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.draw()

    param = parameter(8)
    for draw in (lambda: torch.rand(3), random.random, torch.random.seed):
        optimizer = Noisy([param], draw=draw)
        before = torch.get_rng_state(), random.getstate()
        with pytest.raises(ReplayError, match="Noisy draws random numbers in its step"):
            replayed(optimizer, param)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
    optimizer = Noisy([param], draw=lambda: np.random.standard_normal())
    expected = np.random.RandomState()
    expected.set_state(np.random.get_state())
    replayed(optimizer, param)
    assert np.random.standard_normal() == expected.standard_normal()


def test_attributes_containers_generators_and_state_are_not_written() -> None:
    class Writing(Plain):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            vars(self)["count"] += 1
            self.history.append(1.0)
            self.table["inner"].append(1.0)
            self.scale.add_(1.0)
            torch.rand(2, generator=self.generator)
            self.defaults["lr"] = 7.0
            for param in self.param_groups[0]["params"]:
                self.state[param]["queue"].append(param.grad.clone())
                self.state[param]["queue"][0].add_(1.0)
                param.grad.mul_(0.0)

    param = parameter(8)
    generator = torch.Generator().manual_seed(5)
    optimizer = Writing(
        [param], count=0, history=deque(), table={"inner": []}, scale=torch.ones(3), generator=generator
    )
    optimizer.state[param]["queue"] = [torch.zeros(8)]
    grad, random_state = param.grad, generator.get_state()
    assert grad is not None
    kept = grad.clone()
    Twin(optimizer).replay_whole(0, param, grad, optimizer.state[param])
    Twin(optimizer).replay([Run(0, param.detach().clone(), grad.clone(), optimizer.state[param])])
    assert vars(optimizer)["count"] == 0
    assert not optimizer.history
    assert optimizer.table == {"inner": []}
    assert torch.equal(optimizer.scale, torch.ones(3))
    assert torch.equal(generator.get_state(), random_state)
    assert optimizer.defaults["lr"] == 0.1
    assert len(optimizer.state[param]["queue"]) == 1
    assert torch.equal(optimizer.state[param]["queue"][0], torch.zeros(8))
    assert torch.equal(grad, kept)


def test_what_points_back_to_the_optimizer_points_to_the_twin() -> None:
    class Circular(Plain):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.count_up()
            self.groups[0]["seen"] = self.groups[0].get("seen", 0) + 1
            assert self.owner["optimizer"] is self
            super().step()

        def up(self) -> None:
            vars(self)["count"] += 1

    param = parameter(8)
    optimizer = Circular([param], count=0)
    vars(optimizer).update(count_up=optimizer.up, groups=optimizer.param_groups, owner={"optimizer": optimizer})
    replayed(optimizer, param)
    assert vars(optimizer)["count"] == 0
    assert "seen" not in optimizer.param_groups[0]


def test_a_compiled_method_kept_on_the_instance_gives_way_to_the_classs_own() -> None:
    class Compiling(Plain):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.update(self.param_groups[0])

        def update(self, group: dict[str, Any]) -> None:
            vars(self)["count"] += 1
            for param in group["params"]:
                param.add_(param.grad, alpha=-group["lr"])

    param = parameter(8)
    optimizer = Compiling([param], count=0)
    vars(optimizer)["update"] = functools.partial(Compiling.update, optimizer)
    torch.testing.assert_close(replayed(optimizer, param), param.detach() - 0.1 * param.grad)
    assert vars(optimizer)["count"] == 0


def test_slots_are_copied() -> None:
    class Slotted(Plain):
        __slots__ = ("factor",)

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.factor[0] *= 2.0
            for param in self.param_groups[0]["params"]:
                param.mul_(self.factor[0])

    param = parameter(8)
    optimizer = Slotted([param])
    optimizer.factor = [1.0]
    assert torch.equal(replayed(optimizer, param), param.detach() * 2.0)
    assert optimizer.factor == [1.0]


def test_no_hook_fires_for_the_twin() -> None:
    class Derived(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    param = parameter(8)
    torch.optim.SGD([param], lr=0.1)  # from now on torch calls hooks in SGD.step as well
    optimizer = Derived([param], lr=0.1)
    fired: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: fired.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: fired.append("global post")),
    ]
    try:
        replayed(optimizer, param)
        assert fired == []
        optimizer.step()
        assert fired.count("global pre") == fired.count("global post") == 2
    finally:
        for handle in handles:
            handle.remove()


def test_a_schedulers_wrapped_step_is_not_called() -> None:
    param = parameter(8)
    optimizer = torch.optim.SGD([param], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    result = replayed(optimizer, param)
    assert not getattr(optimizer, "_opt_called", False)
    torch.testing.assert_close(result, param.detach() - 0.1 * param.grad)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_decorator_of_the_users_belongs_to_the_rule() -> None:
    class Twice(torch.optim.SGD):
        @functools.wraps(torch.optim.SGD.step)  # carries over the marks of torch's own wrapper
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            return super().step(closure)

    param = parameter(8)
    optimizer = Twice([param], lr=0.1)
    result = replayed(optimizer, param)
    optimizer.step()
    assert torch.equal(result, param.detach())
    assert rule_of(torch.optim.SGD([param])) is not torch.optim.SGD.step


def test_a_compiled_rule_is_not_compiled_for_the_twin() -> None:
    compiled: list[Any] = []

    def backend(module: Any, _: Any) -> Any:
        compiled.append(module)
        return module

    @torch.compile(backend=backend)
    def update(param: Tensor, grad: Tensor) -> None:
        param.add_(grad, alpha=-0.1)

    class Compiled(Plain):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for param in self.param_groups[0]["params"]:
                update(param, param.grad)

    param = parameter(8)
    result = replayed(Compiled([param]), param)
    assert compiled == []
    torch.testing.assert_close(result, param.detach() - 0.1 * param.grad)


def test_two_threads_that_try_rules_leave_the_hooks_for_all_optimizers_where_they_were() -> None:
    hooks = torch_optimizer._global_optimizer_pre_hooks
    handle = torch_optimizer.register_optimizer_step_pre_hook(lambda *_: None)
    is_inside, may_end = threading.Event(), threading.Event()

    def outer() -> None:
        first = WithoutEffects(torch.device("cpu"))
        with first, first:
            is_inside.set()
            may_end.wait(0.2)

    def inner() -> None:
        second = WithoutEffects(torch.device("cpu"))
        with second, second:
            may_end.set()
            thread.join()  # the first is put back before

    thread, other = threading.Thread(target=outer), threading.Thread(target=inner)
    try:
        thread.start()
        is_inside.wait()
        other.start()
        other.join()
        assert torch_optimizer._global_optimizer_pre_hooks is hooks
    finally:
        torch_optimizer._global_optimizer_pre_hooks = hooks
        handle.remove()
