"""What is found out of a rule is right, and finding it out changes nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from tests.support.replay.sketched_rules import Sketch, descend, parameter, probed
from update_watch.replay.rule import Kind, Rule
from update_watch.replay.rule_kind import find_rule
from update_watch.replay.synthetic_training import mimic, small
from update_watch.replay.twin import Run, Twin

# --- kinds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "shape", "kind"),
    [
        (torch.optim.AdamW, (300, 40), Kind.elementwise),
        (torch.optim.AdamW, (), Kind.elementwise),
        (torch.optim.AdamW, (1,), Kind.elementwise),
        (torch.optim.Adafactor, (300, 40), Kind.whole),
        (torch.optim.Adafactor, (7,), Kind.whole),
        *([(torch.optim.Muon, (300, 40), Kind.whole)] if hasattr(torch.optim, "Muon") else []),  # since torch 2.9
        (torch.optim.LBFGS, (300, 40), Kind.unknown),
        (torch.optim.SparseAdam, (300, 40), Kind.unknown),
    ],
    ids=str,
)
def test_torchs_optimizers_are_known_for_what_they_are(
    cls: type[Optimizer], shape: tuple[int, ...], kind: Kind
) -> None:
    optimizer = cls([parameter(*shape)], lr=1e-3)  # type: ignore[call-arg]
    assert find_rule(optimizer, 0, len(shape), shape=shape).kind is kind


def test_a_rule_for_sparse_gradients_is_no_fault() -> None:
    assert find_rule(torch.optim.SparseAdam([parameter(30, 40)]), 0, 2).reason == (
        "SparseAdam takes sparse gradients, of which no step is replayed"
    )


def test_a_step_counter_shaped_like_the_parameter_is_no_state_per_element() -> None:
    rule = find_rule(torch.optim.AdamW([parameter()]), 0, 0, shape=())
    assert rule.element_states == rule.exact_states == {"exp_avg", "exp_avg_sq"}
    assert rule.forms["step"] == "scalar"


def test_a_rule_that_asks_for_matrices_gets_rows() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            descend(group, param, param.grad.sign() if param.dim() > 1 else param.grad)

    assert probed(update) == Rule(Kind.elementwise, rows=True)
    assert probed(update, (300,)) == Rule(Kind.elementwise)


def test_a_norm_over_the_tensor_needs_the_whole_and_one_over_all_tensors_all_of_them() -> None:
    def each(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            descend(group, param, param.grad / (1e-12 + param.grad.norm()))

    def together(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        norm = math.sqrt(sum(float(param.grad.square().sum()) for param in params))
        for param in params:
            descend(group, param, param.grad / (1e-12 + norm))

    assert probed(each).kind is Kind.whole
    assert probed(together).kind is Kind.together


def test_a_scalar_of_each_tensor_from_the_step_before_keeps_parameters_apart() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            state = optimizer.state[param]
            descend(group, param, param.grad * state.get("share", 1.0))
            state["share"] = 1.0 / (1.0 + float(param.grad.norm()))

    rule = probed(update)
    assert (rule.kind, rule.apart) == (Kind.elementwise, True)
    assert not find_rule(torch.optim.AdamW([parameter(300, 40)]), 0, 2).apart


def test_only_states_that_the_replay_gets_right_are_exact() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            state = optimizer.state[param]
            momentum = state.setdefault("momentum", torch.zeros_like(param))
            trend = state.setdefault("trend", torch.zeros_like(param))
            descend(group, param, momentum.lerp_(param.grad, 0.1) + 0.1 * trend)
            trend.copy_(param.grad / (1e-6 + param.grad.abs().max()))  # of the whole tensor, used in the next step

    rule = probed(update)
    assert rule.kind is Kind.elementwise
    assert rule.element_states == {"momentum", "trend"}
    assert rule.exact_states == {"momentum"}


def test_a_square_factor_of_a_square_parameter_is_no_state_per_element() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            left = optimizer.state[param].setdefault("left", torch.eye(param.shape[0]))
            left.add_(param.grad @ param.grad.T)
            descend(group, param, left @ param.grad / left.norm())

    rule = probed(update, (40, 40))
    assert rule.kind is Kind.whole
    assert rule.element_states == frozenset()


# --- the probe and the rest of the process ------------------------------------------------------------------


def test_probing_leaves_optimizer_state_and_random_numbers_bit_for_bit() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        vars(optimizer)["count"] = vars(optimizer).get("count", 0) + 1
        group["k"] = group.get("k", 0) + 1
        random.random(), np.random.rand(), torch.rand(1)
        for param in params:
            optimizer.state[param].setdefault("queue", []).append(param.grad)
            descend(group, param, param.grad.mul_(2.0))

    param = torch.nn.Parameter(torch.randn(30, 40))
    param.grad = torch.randn(30, 40)
    optimizer = Sketch([param], update)
    optimizer.step()
    kept = param.detach().clone(), param.grad.clone(), param.grad
    attributes, settings = dict(vars(optimizer)), dict(optimizer.param_groups[0])
    states = random.getstate(), repr(np.random.get_state()), torch.get_rng_state()
    find_rule(optimizer, 0, 2, shape=(30, 40))
    assert states[:2] == (random.getstate(), repr(np.random.get_state()))
    assert torch.equal(states[2], torch.get_rng_state())
    assert dict(vars(optimizer)) == attributes
    assert optimizer.param_groups[0] == settings
    assert (param.grad is kept[2], len(optimizer.state[param]["queue"])) == (True, 1)
    assert torch.equal(param.detach(), kept[0])
    assert torch.equal(param.grad, kept[1])


def test_default_dtype_and_device_of_the_user_do_not_matter() -> None:
    def fp32_only(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            assert param.dtype == param.grad.dtype == torch.float32
            assert param.device.type == "cpu"
            descend(group, param, param.grad)

    expected = find_rule(torch.optim.AdamW([parameter(30, 40)]), 0, 2)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert find_rule(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(30, 40))]), 0, 2) == expected
            assert probed(fp32_only).kind is Kind.elementwise
    finally:
        torch.set_default_dtype(torch.float32)


heard: list[Any] = []  # not in the function: what a rule closes over cannot be copied


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_rule_that_talks_to_other_processes_is_unknown_and_never_does_in_the_probe(tmp_path: Any) -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            torch.distributed.all_reduce(param.grad)
            heard.append(param)
            descend(group, param, param.grad)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert "its step talks to other processes" in probed(update).reason
        assert heard == []
        assert find_rule(torch.optim.AdamW([parameter(30, 40)]), 0, 2).kind is Kind.elementwise
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("shape", "bounded", "few"),
    [
        ((), ((1,), (2,)), ((1,), (2,))),
        ((50257, 768), ((128, 128), (160, 128)), ((32, 32), (40, 32))),
        ((3072,), ((3072,), (3840,)), ((256,), (320,))),
        ((64, 3, 7, 7), ((64, 3, 7, 7), (80, 3, 7, 7)), ((4, 3, 7, 7), (4, 3, 8, 7))),
    ],
    ids=str,
)
def test_synthetic_parameters_keep_sizes_up_to_a_limit(shape: Any, bounded: Any, few: Any) -> None:
    assert mimic(shape) == bounded
    assert small(shape) == few


# --- other packages -------------------------------------------------------------------------------------------


def test_quantised_state_of_large_tensors_is_replayed_whole_and_nothing_is_compiled() -> None:
    optim = pytest.importorskip("torchao.optim")
    large, tiny = torch.nn.Parameter(torch.randn(64, 128) * 0.1), torch.nn.Parameter(torch.randn(100) * 0.1)
    optimizer = optim.AdamW8bit([large, tiny], lr=1e-3)
    torch._dynamo.utils.counters.clear()
    rules = [find_rule(optimizer, 0, p.dim(), shape=tuple(p.shape)) for p in (large, tiny)]
    assert [rule.kind for rule in rules] == [Kind.whole, Kind.elementwise]
    twin = Twin(optimizer)
    large.grad, tiny.grad = torch.randn(64, 128), torch.randn(100)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
        whole = twin.replay_whole(0, large, large.grad, optimizer.state[large])
        state = {k: v.clone() for k, v in optimizer.state[tiny].items()}
        part = twin.replay([Run(0, tiny.detach().clone(), tiny.grad.clone(), state)])[0]
        optimizer.step()
    assert torch.equal(whole.param, large.detach())
    assert torch.equal(part.param, tiny.detach())
    assert rules[1].misfit(large, optimizer.state[large]).startswith("state 'exp_avg' is a OptimState8bit")
    assert not torch._dynamo.utils.counters["frames"]


# --- chance, and what is there before the first step ------------------------------------------------


class Chance(torch.optim.Optimizer):
    """Momentum with random numbers in three places: in the first state, where they cancel, in the update."""

    def __init__(self, params: Any, **chance: bool) -> None:
        super().__init__(params, {"lr": 0.1, "start": False, "cancels": False, "moves": False, **chance})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.randn_like(p) if group["start"] else torch.zeros_like(p)
                state["momentum"].mul_(0.9).add_(p.grad)
                p.add_(state["momentum"], alpha=-group["lr"])
                if group["cancels"]:
                    noise = torch.randn_like(p)
                    p.add_(noise / noise.norm() * 0.0)
                if group["moves"]:
                    p.add_(torch.randn_like(p), alpha=0.01)


@pytest.mark.parametrize("place", ["start", "cancels"])
def test_random_numbers_that_do_not_matter_are_no_obstacle(place: str) -> None:
    rule = find_rule(Chance([torch.nn.Parameter(torch.randn(64))], **{place: True}), 0, 1, shape=(64,))
    assert rule.kind is Kind.elementwise, rule.reason
    assert (rule.skips_first, rule.may_draw) == (place == "start", place == "cancels")


def test_random_numbers_in_the_update_are_named() -> None:
    rule = find_rule(Chance([torch.nn.Parameter(torch.randn(64))], moves=True), 0, 1, shape=(64,))
    assert rule.kind is Kind.unknown
    assert rule.reason == "Chance draws random numbers in its step, and a replay draws others"


def test_states_of_one_element_are_not_taken_for_settings() -> None:
    params = [torch.nn.Parameter(torch.randn(())), torch.nn.Parameter(torch.randn(64))]
    optimizer = torch.optim.AdamW(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert find_rule(optimizer, 0, 1, shape=(64,)).kind is Kind.elementwise


class Aggregated(torch.optim.Optimizer):
    """AggMo: momentum at several rates, in a container."""

    def __init__(self, params: Any, container: Callable[[list[Tensor]], Any]) -> None:
        super().__init__(params, {"lr": 0.01})
        self.container = container

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if not state:
                state["momenta"] = self.container([torch.zeros_like(param) for _ in range(2)])
            momenta = state["momenta"]
            for key, beta in ((0, 0.5), (1, 0.9)):
                momenta[key].mul_(beta).add_(param.grad)
                param.add_(momenta[key], alpha=-self.param_groups[0]["lr"])


@pytest.mark.parametrize("container", [list, lambda made: dict(enumerate(made))], ids=["list", "dict"])
def test_states_in_containers_are_no_settings_either(container: Any) -> None:
    params = [torch.nn.Parameter(torch.randn(7)), torch.nn.Parameter(torch.randn(64))]
    optimizer = Aggregated(params, container)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    rule = find_rule(optimizer, 0, 1, shape=(64,))
    assert rule.kind is not Kind.unknown, rule.reason


# --- states that the optimizer makes with itself ------------------------------------------------------------


class Premade(torch.optim.Optimizer):
    """Adagrad as it was before torch 2.7: all of its state is made in `__init__`."""

    def __init__(self, params: Any, lr: float = 0.01, initial: float = 0.0) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = {"step": torch.tensor(0.0), "sum": torch.full_like(param, initial)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state["step"] += 1
                    state["sum"].addcmul_(param.grad, param.grad)
                    param.addcdiv_(param.grad, state["sum"].sqrt().add_(1e-10), value=-group["lr"])


@pytest.mark.parametrize("steps", [0, 5])
def test_a_rule_that_needs_the_state_its_constructor_made_is_tried_with_one(steps: int) -> None:
    params = [torch.nn.Parameter(torch.randn(300, 40)), torch.nn.Parameter(torch.randn(40))]
    optimizer = Premade(params)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    kept = [optimizer.state[param]["sum"].clone() for param in params]
    rule = find_rule(optimizer, 0, 2, shape=(300, 40))
    assert rule.kind is Kind.elementwise and "sum" in rule.element_states, rule.reason
    assert all(torch.equal(optimizer.state[p]["sum"], k) for p, k in zip(params, kept, strict=True))
