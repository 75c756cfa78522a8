"""The twin's step is the optimizer's own step, and nothing of the real optimizer moves."""

from __future__ import annotations

import copy
import functools
import random
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from update_watch.replay.absent import Absent, AbsentError, ReplayError
from update_watch.replay.optimizer_copy import copy_of, rule_of
from update_watch.replay.twin import Run, Twin

ELEMENTWISE: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (torch.optim.Adadelta, {"weight_decay": 0.1}),
    (torch.optim.Adagrad, {"lr_decay": 0.1}),
    (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"maximize": True}),
    (torch.optim.Adamax, {}),
    (torch.optim.ASGD, {"weight_decay": 0.1}),
    (torch.optim.NAdam, {"weight_decay": 0.1}),
    (torch.optim.RAdam, {}),
    (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    (torch.optim.Rprop, {}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
]
WAYS = [{"foreach": False}, {"foreach": True}, {"fused": True}]
FUSED = (torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
CASES = [
    pytest.param(cls, {**options, **way}, id=f"{cls.__name__}-{next(iter(way))}-{next(iter(way.values()))}")
    for cls, options in ELEMENTWISE
    for way in WAYS
    if "fused" not in way or cls in FUSED
]


class Plain(Optimizer):
    """SGD with whatever attributes a test gives it."""

    def __init__(self, params: Any, lr: float = 0.1, **attributes: Any) -> None:
        super().__init__(params, {"lr": lr})
        vars(self).update(attributes)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(param.grad, alpha=-group["lr"])


def parameter(*shape: int, seed: int = 0) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 100))
    return param


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def run_of(optimizer: Optimizer, param: Tensor, at: Any = slice(None)) -> Run:
    """The parameter's elements `at`, and their state."""
    state = {
        name: value.reshape(-1)[at].clone()
        if isinstance(value, Tensor) and value.shape == param.shape
        else copied(value)
        for name, value in optimizer.state.get(param, {}).items()
    }
    assert param.grad is not None
    return Run(0, param.detach().reshape(-1)[at].clone(), param.grad.reshape(-1)[at].clone(), state)


def replayed(optimizer: Optimizer, param: Tensor) -> Tensor:
    return Twin(optimizer).replay([run_of(optimizer, param)])[0].param


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_replayed_samples_equal_the_full_step_bit_for_bit(cls: type[Optimizer], options: dict[str, Any]) -> None:
    param = parameter(64, 32)
    optimizer = cls([param], **options)  # type: ignore[call-arg]
    twin = Twin(optimizer)
    at = torch.randperm(param.numel(), generator=torch.Generator().manual_seed(3))[:256]
    for step in range(8):
        param.grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(step))
        result = twin.replay([run_of(optimizer, param, at)])[0]
        optimizer.step()
        assert torch.equal(result.param, param.detach().reshape(-1)[at])
        for name, value in optimizer.state[param].items():
            if isinstance(value, Tensor):
                stored = value.reshape(-1)[at] if value.shape == param.shape else value
                assert torch.equal(result.state[name], stored), name


def test_settings_are_those_of_this_step() -> None:
    param = parameter(8)
    optimizer = torch.optim.SGD([param], lr=0.1)
    twin = Twin(optimizer)
    before = param.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.5
    result = twin.replay([run_of(optimizer, param)])[0]
    torch.testing.assert_close(result.param, before - 0.5 * param.grad)


def test_a_learning_rate_tensor_is_not_shared() -> None:
    class Halving(Plain):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            for group in self.param_groups:
                group["lr"].mul_(0.5)

    param = parameter(8)
    optimizer = Halving([param], lr=torch.tensor(0.1))  # type: ignore[arg-type]
    replayed(optimizer, param)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)


def test_parameters_at_different_steps_are_replayed_apart() -> None:
    early, late = parameter(16, seed=1), parameter(16, seed=2)
    optimizer = torch.optim.Adam([early, late], lr=0.1)
    early.grad, kept = None, early.grad
    optimizer.step()
    early.grad = kept
    results = Twin(optimizer).replay([run_of(optimizer, early), run_of(optimizer, late)])
    optimizer.step()
    assert torch.equal(results[0].param, early.detach())
    assert torch.equal(results[1].param, late.detach())


def test_replay_is_exact_after_loading_state_and_for_a_group_added_later() -> None:
    param, other = parameter(16, seed=1), parameter(16, seed=2)
    trained = torch.optim.AdamW([param], lr=0.1)
    for _ in range(3):
        trained.step()
    optimizer = torch.optim.AdamW([param], lr=0.01)
    twin = Twin(optimizer)
    optimizer.load_state_dict(trained.state_dict())
    optimizer.add_param_group({"params": [other], "lr": 0.5})
    results = twin.replay([run_of(optimizer, param), run_of(optimizer, other)._replace(group=1)])
    optimizer.step()
    assert torch.equal(results[0].param, param.detach())
    assert torch.equal(results[1].param, other.detach())


def test_a_differentiable_optimizer_is_replayed_without_autograd() -> None:
    param = parameter(8)
    optimizer = torch.optim.Adam([param], lr=0.1, differentiable=True)
    plain = torch.optim.Adam([twin_param := parameter(8)], lr=0.1)
    result = replayed(optimizer, param)
    plain.step()
    assert torch.equal(result, twin_param.detach())
    assert not result.requires_grad


def test_state_that_the_rule_replaces_is_returned() -> None:
    class Replacing(Plain):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for param in self.param_groups[0]["params"]:
                self.state[param]["sum"] = self.state[param].get("sum", 0.0) + param.grad
                param.data = param.data - 0.1 * self.state[param]["sum"]

    param = parameter(8)
    optimizer = Replacing([param])
    optimizer.step()
    result = Twin(optimizer).replay([run_of(optimizer, param)])[0]
    optimizer.step()
    assert torch.equal(result.param, param.detach())
    assert torch.equal(result.state["sum"], optimizer.state[param]["sum"])


def test_state_of_all_parameters_together_is_known_to_the_twin_and_not_shared() -> None:
    class Counting(Plain):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            count = self.state.setdefault("k", torch.zeros(1))  # type: ignore[arg-type]
            count.add_(1)  # type: ignore[attr-defined]
            for param in self.param_groups[0]["params"]:
                param.add_(param.grad / float(count), alpha=-1.0)  # type: ignore[arg-type]

    param = parameter(8)
    optimizer = Counting([param])
    optimizer.step()
    result = replayed(optimizer, param)
    optimizer.step()
    assert torch.equal(result, param.detach())
    assert float(optimizer.state["k"]) == 2.0  # type: ignore[index, arg-type]


# --- nothing of the real optimizer moves --------------------------------------------------------------


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


# --- whole tensors -------------------------------------------------------------------------------------


def test_whole_replay_widens_low_precision_state_also_in_containers() -> None:
    class Nested(Plain):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for param in self.param_groups[0]["params"]:
                state = self.state[param]
                self.seen.append(state["pair"][0].dtype)
                self.seen.append(state["moment"].dtype)
                self.seen.append(state["codes"].dtype)
                param.add_(state["moment"] + state["pair"][0] + param.grad)

    param = parameter(8)
    optimizer = Nested([param], seen=[])
    state = {"pair": [torch.ones(8).bfloat16()], "moment": torch.ones(8).half(), "codes": torch.ones(8).byte()}
    weight = param.detach().bfloat16()
    assert param.grad is not None
    grad = param.grad.bfloat16()
    result = Twin(optimizer).replay_whole(0, weight, grad, state)
    assert result.param.dtype == torch.float32
    assert torch.equal(result.param, weight.float() + (torch.ones(8) + torch.ones(8) + grad.float()))
    assert [result.state["pair"][0].dtype, result.state["codes"].dtype] == [torch.float32, torch.uint8]
    assert state["pair"][0].dtype == torch.bfloat16
    kept = Twin(optimizer).replay_whole(0, weight, grad, state, widen=False)
    assert kept.state["pair"][0].dtype == torch.bfloat16


# --- what is refused -----------------------------------------------------------------------------------


def _not_to_be_copied(param: Tensor) -> dict[str, Any]:
    held = torch.ones(3)
    return {
        "one of its parameters outside param_groups": [param],
        "something per parameter outside optimizer.state": {param: 1},
        "too large to copy at every step": torch.ones(5000),
        "closes over a Tensor": lambda: held,
        "a list of 5000 items": list(range(5000)),
        "an iterator": (_ for _ in ()),
        "cannot be copied": threading.Lock(),
    }


USES: dict[str, Callable[[Any], Any]] = {
    "one of its parameters outside param_groups": lambda thing: thing[0] + 1,
    "something per parameter outside optimizer.state": lambda thing: thing.get(1),
    "too large to copy at every step": lambda thing: torch.sum(thing),
    "closes over a Tensor": lambda thing: thing(),
    "a list of 5000 items": lambda thing: [*thing],
    "an iterator": next,
    "cannot be copied": lambda thing: thing.acquire(),
}


@pytest.mark.parametrize("reason", USES)
def test_what_cannot_be_copied_at_every_step_is_refused_by_name_where_it_is_used(reason: str) -> None:
    class Using(Plain):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if self.uses:
                USES[reason](self.thing)
            super().step()

    param = parameter(8)
    thing = _not_to_be_copied(param)[reason]
    torch.testing.assert_close(
        replayed(Using([param], thing=thing, uses=False), param), param.detach() - 0.1 * param.grad
    )
    with pytest.raises(ReplayError, match=f"its step uses Using.thing, which .*{reason}"):
        replayed(Using([param], thing=thing, uses=True), param)


def test_a_stand_in_says_nothing_of_itself_and_only_compares() -> None:
    model = torch.nn.Linear(2, 3)
    absent = Absent(model)
    assert absent is not None and absent != model
    assert absent.weight.shape == (3, 2) and absent.weight.is_meta and isinstance(absent.weight, torch.nn.Parameter)
    uses: tuple[Callable[[Any], Any], ...] = (
        bool,
        len,
        list,
        lambda a: a.forward,
        lambda a: a[0],
        lambda a: torch.add(a, 1),
        lambda a: a + 1,
        lambda a: isinstance(a, torch.nn.Linear),
        torch.is_tensor,
    )
    for use in uses:
        with pytest.raises(AbsentError, match="its step uses a Linear"):
            use(absent)


def test_a_model_may_be_kept_but_not_used_in_the_step() -> None:
    class Using(Plain):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if self.uses:
                list(self.model.parameters())
            super().step()

    param = parameter(8)
    model = torch.nn.Linear(2, 2)
    torch.testing.assert_close(
        replayed(Using([param], model=model, uses=False), param), param.detach() - 0.1 * param.grad
    )
    with pytest.raises(ReplayError, match="its step uses a Linear \\('parameters'\\)"):
        replayed(Using([param], model=model, uses=True), param)


def test_a_rule_that_fails_is_named_with_its_error() -> None:
    class Failing(Plain):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise KeyError("buffer")

    param = parameter(8)
    with pytest.raises(ReplayError, match="Failing fails on FP32 copies: KeyError\\('buffer'\\)"):
        replayed(Failing([param]), param)


def test_a_wrapper_that_shares_its_groups_is_refused() -> None:
    class Wrapper(Optimizer):
        def __init__(self, inner: Optimizer) -> None:
            self.inner = inner
            self.defaults, self.state = inner.defaults, inner.state

        @property
        def param_groups(self) -> Any:  # type: ignore[override]
            return self.inner.param_groups

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.inner.step()

    with pytest.raises(ReplayError, match="Wrapper cannot be built from its attributes"):
        copy_of(Wrapper(torch.optim.SGD([parameter(8)], lr=0.1)))


def test_an_eps_that_asks_for_the_format_is_that_of_the_stored_weight() -> None:
    weight = torch.linspace(0.5, 1.0, 64).reshape(8, 8).bfloat16()
    grad = torch.linspace(1e-5, 2e-5, 64).reshape(8, 8).bfloat16()  # far below the eps of BF16, far above that of FP32

    def moved(eps: float | None) -> Tensor:
        optimizer = torch.optim.Adafactor([torch.nn.Parameter(weight.clone())], lr=0.1, eps=(eps, 1e-3))
        return Twin(optimizer).replay_whole(0, weight, grad, {}).param - weight.float()

    assert torch.equal(moved(None), moved(torch.finfo(torch.bfloat16).eps))
    assert moved(None).norm() < 0.1 * moved(torch.finfo(torch.float32).eps).norm()
