"""The twin's step is the optimizer's own step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from tests.support.replay.twin_samples import Plain, parameter, replayed, run_of
from update_watch.replay.twin import Twin

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
