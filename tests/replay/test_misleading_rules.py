"""What is found out of a rule is right also of rules made to mislead."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.replay.sketched_rules import Sketch, descend, parameter, probed
from update_watch.replay.rule import Kind, Rule
from update_watch.replay.rule_kind import find_rule
from update_watch.replay.twin import Twin


def test_a_projection_every_so_many_steps_is_found_through_its_setting() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            every = optimizer.count(param) % group["update_gap"] == 0
            descend(group, param, param.grad / (1e-12 + param.grad.norm()) if every else param.grad)

    assert probed(update, update_gap=384).kind is Kind.whole
    assert probed(update, update_gap=250).kind is Kind.whole
    assert probed(update, update_gap=10**9).kind is Kind.elementwise


def test_a_schedule_that_ends_does_not_make_a_rule_unknown() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            if optimizer.count(param) > group["total_steps"]:
                raise ValueError("the schedule has ended")
            descend(group, param, param.grad)

    assert probed(update, total_steps=300).kind is Kind.elementwise


def test_factors_of_large_matrices_are_found_on_the_real_size() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            state = optimizer.state[param]
            if min(param.shape) >= 128:
                row = state.setdefault("row", torch.zeros(param.shape[0], 1)).lerp_(
                    param.grad.square().mean(1, keepdim=True), 0.1
                )
                descend(group, param, param.grad / (row.sqrt() + 1e-8))
            else:
                full = state.setdefault("full", torch.zeros_like(param)).lerp_(param.grad.square(), 0.1)
                descend(group, param, param.grad / (full.sqrt() + 1e-8))

    rule = probed(update, (100, 300))
    assert rule.kind is Kind.elementwise
    assert probed(update, (200, 300)).kind is Kind.whole
    large = parameter(200, 300)
    assert rule.misfit(large, {}) == ""
    assert "state 'row' for it, which was not met" in rule.misfit(large, {"row": torch.zeros(200, 1)})
    assert rule.misfit(large, {"full": torch.zeros(200, 300)}) == ""
    assert "not one value per weight" in rule.misfit(large, {"full": torch.zeros(200, 1)})
    assert probed(update, (200, 300)).misfit(large, {"full": torch.zeros(200, 1)}) == ""


def test_what_large_tensors_do_together_is_found_on_the_real_size() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        large = [param for param in params if min(param.shape) >= 128]
        norm = math.sqrt(sum(float(param.grad.square().sum()) for param in large)) if large else 1.0
        for param in params:
            descend(group, param, param.grad / (1e-12 + norm))

    assert probed(update, (100, 300)).kind is Kind.elementwise
    assert probed(update, (200, 300)).kind is Kind.together


def test_clipping_by_the_norm_of_all_tensors_is_found_for_one_of_few_elements() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        norm = math.sqrt(sum(float(param.grad.square().sum()) for param in params))
        for param in params:
            descend(group, param, param.grad * min(1.0, 2000.0 / (1e-12 + norm)))

    for shape in ((2,), (2, 2)):
        assert probed(update, shape).kind is Kind.together


def test_clipping_and_trust_ratios_that_seldom_act_are_found() -> None:
    def clip(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            peak = optimizer.state[param].setdefault("peak", torch.zeros(()))
            norm = param.grad.norm()
            factor = torch.clamp(3 * peak / norm, max=1.0) if float(peak) and float(norm) else torch.ones(())
            peak.copy_(torch.maximum(peak, norm))
            descend(group, param, param.grad * factor)

    def project(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            cosine = torch.nn.functional.cosine_similarity(param.grad, param, dim=1)
            radial = (param * param.grad).sum(1, keepdim=True) / param.square().sum(1, keepdim=True) * param
            nearly_orthogonal = float(cosine.abs().max()) < 0.1 / math.sqrt(param.shape[1])
            descend(group, param, param.grad - radial if nearly_orthogonal else param.grad)

    assert probed(clip).kind is Kind.whole
    assert probed(project).kind is Kind.whole


def test_a_learning_rate_found_from_all_tensors_together_needs_all_of_them_even_if_it_grows_late() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            total = optimizer.state[param].setdefault("sum", torch.zeros_like(param))
            group["agreement"] = group.get("agreement", 0.0) + float((total * param.grad).sum())
            total.add_(param.grad)
        squares = sum(float(optimizer.state[param]["sum"].square().sum()) for param in params)
        group["d"] = max(group["d"], 1e-3 * group["agreement"] / (squares + 1e-12))
        for param in params:
            descend(group, param, param.grad * group["d"])

    for late in (1e-6, 1e-4):
        assert probed(update, d=late).kind is Kind.together


def test_an_average_over_all_tensors_that_shows_with_tiny_gradients_only_is_found() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        size = sum(param.numel() for param in params)
        mean = math.sqrt(sum(float(param.grad.square().sum()) for param in params) / size)
        for param in params:
            param.mul_(1 - 1e-9 / (mean + 1e-7))
            descend(group, param, param.grad)

    assert probed(update).kind is Kind.together


def test_a_mark_on_a_parameter_that_the_rule_reads_makes_it_unknown() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            descend(group, param, param.grad * getattr(param, "lr_scale", 1.0))

    plain, marked = parameter(300, 40), parameter(300, 40)
    assert find_rule(Sketch([plain], update), 0, 2).kind is Kind.elementwise
    marked.lr_scale = 0.1  # type: ignore[attr-defined]
    rule = find_rule(Sketch([plain, marked], update), 0, 2)
    assert rule.reason == "Sketch reads ['lr_scale'] from its parameters, which samples do not have"
    marked.unread = 1  # type: ignore[attr-defined]
    del marked.lr_scale
    assert find_rule(Sketch([plain, marked], update), 0, 2).kind is Kind.elementwise


def test_what_hides_in_attributes_by_parameter_is_not_known() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        buffers = vars(optimizer).setdefault("buffers", {})
        for param in params:
            buffer = buffers.setdefault(id(param), torch.zeros_like(param)).mul_(0.9).add_(param.grad)
            descend(group, param, buffer)

    assert probed(update).kind is Kind.unknown


def test_random_draws_closures_and_divergence_are_unknown_with_their_reason() -> None:
    def noisy(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            descend(group, param, param.grad + torch.randn_like(param))

    def diverging(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            param.mul_(1e30).mul_(1e30)

    class Closure(Sketch):
        def step(self, closure: Any) -> None:  # type: ignore[override]
            closure()

    assert probed(noisy).reason == "Sketch draws random numbers in its step, and a replay draws others"
    assert probed(diverging).reason == "Sketch makes a plain FP32 parameter infinite or NaN"
    reason = find_rule(Closure([parameter(8)], noisy), 0, 1).reason
    assert reason == "the step of Closure calls a closure that evaluates the model, and a replay has none"
    reason = find_rule(torch.optim.LBFGS([parameter(8)]), 0, 1).reason
    assert reason == "the step of LBFGS calls a closure that evaluates the model, and a replay has none"

    def failing(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        optimizer.seen = getattr(optimizer, "seen", 0) + 1
        if optimizer.seen % 3 == 0:
            raise RuntimeError("now and then")

    class Template(Sketch):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if closure is not None:
                closure()
            super().step()

    assert "now and then" in find_rule(Template([parameter(8)], failing), 0, 1).reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cut", [False, True], ids=["rounded", "cut off"])
def test_a_rule_that_rounds_the_weights_itself_is_not_replayed_on_fp32_copies(dtype: torch.dtype, cut: bool) -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            new = param.float() - group["lr"] * param.grad.float()  # type: ignore[union-attr]
            if cut:  # towards 0
                new = (new.view(torch.int32) & -(1 << (16 if dtype is torch.bfloat16 else 13))).view(torch.float32)
            param.copy_(new.to(dtype))

    found = probed(update)
    assert found.kind is Kind.unknown
    assert found.reason.startswith("Sketch rounds FP32 weights to ")
    if dtype is torch.bfloat16:
        weight = torch.nn.Parameter(torch.zeros(300, 40, dtype=dtype))
        found = find_rule(Sketch([weight], update), 0, 2, shape=(300, 40), dtype=dtype)
        assert found.kind is Kind.elementwise and found.scaled is not None


@pytest.mark.parametrize("step", [2.0**-6, 0.01])
@pytest.mark.parametrize("shape", [(48, 32), (300,)])
def test_a_rule_that_rounds_the_weights_to_a_grid_of_its_own_is_not_replayed(
    step: float, shape: tuple[int, ...]
) -> None:
    """Large updates leave it in bits that no format of 16 holds."""

    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            new = param.float() - group["lr"] * param.grad.float()  # type: ignore[union-attr]
            param.copy_((new / step).round() * step)

    rule = find_rule(Sketch([torch.nn.Parameter(torch.zeros(shape))], update), 0, len(shape), shape=shape)
    assert rule.kind is Kind.unknown and rule.reason.startswith("Sketch rounds FP32 weights to ")


@pytest.mark.parametrize("every", [1, 3, 10**9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_rule_that_steps_a_copy_in_its_state_and_never_the_weight_is_named(dtype: torch.dtype, every: int) -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            state = optimizer.state[param]
            if "master" not in state:
                state["momentum"] = torch.zeros_like(param, dtype=torch.float32)
                state["master"] = param.detach().float().clone()
            state["momentum"].mul_(0.9).add_(param.grad)
            state["master"].add_(state["momentum"], alpha=-float(group["lr"]))
            if optimizer.count(param) % every == 0:
                param.copy_(state["master"])

    weight = torch.nn.Parameter(torch.zeros(300, 40, dtype=dtype))
    found = find_rule(Sketch([weight], update), 0, 2, shape=(300, 40), dtype=dtype)
    if every == 10**9:
        assert found.kind is Kind.unknown
        assert (
            found.reason == "in its trial Sketch stepped a copy of the weight and never the weight (its state 'master')"
        )
    else:
        assert found.kind is Kind.elementwise


def test_a_rule_that_breaks_on_odd_gradients_is_known_for_ordinary_ones() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            before = optimizer.state[param].get("before")
            if before is not None and float((param.grad * before).sum()) > 0.5 * float(before.square().sum()):
                raise ArithmeticError("singular")
            optimizer.state[param]["before"] = param.grad.clone()
            descend(group, param, param.grad)

    assert probed(update).kind is not Kind.unknown


def test_a_state_that_is_none_at_first_is_a_state_per_element_later() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            state = optimizer.state[param]
            if state.setdefault("momentum") is None:
                state["momentum"] = param.grad.clone() if optimizer.count(param) == 3 else None
            else:
                state["momentum"].lerp_(param.grad, 0.1)
            descend(group, param, param.grad if state["momentum"] is None else state["momentum"])

    rule = probed(update)
    assert (rule.kind, rule.element_states) == (Kind.elementwise, {"momentum"})
    never = Rule(Kind.elementwise, forms={"momentum": "none"})
    assert never.misfit(parameter(2), {"momentum": None}) == ""
    assert "was None when the rule was probed" in never.misfit(parameter(2), {"momentum": torch.zeros(2)})


@pytest.mark.parametrize("lr", [0.0, 1e-12, 1e-7, torch.tensor(0.0)], ids=str)
def test_a_learning_rate_too_small_to_see_does_not_hide_a_trust_ratio(lr: Any) -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            descend(group, param, param.grad * (param.norm() / (1e-12 + param.grad.norm())))

    assert probed(update, lr=lr).kind is Kind.whole


def test_counters_of_a_group_in_mid_run_do_not_hide_the_rule() -> None:
    def update(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        group["step"] += 1
        if group["step"] == 1:  # only then is there a momentum
            for param in params:
                optimizer.state[param]["momentum"] = torch.zeros_like(param)
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in params)) if group["step"] == 2 else 1.0
        for param in params:
            momentum = optimizer.state[param]["momentum"].lerp_(param.grad, 0.1)
            descend(group, param, momentum / (norm + 1e-12) if group["together"] else momentum)

    assert probed(update, step=0, together=False).kind is Kind.elementwise
    for together, kind in ((False, Kind.elementwise), (True, Kind.together)):
        optimizer = Sketch([parameter(300, 40)], update, step=0, together=together)
        optimizer.param_groups[0]["step"] = 5000
        assert find_rule(optimizer, 0, 2).kind is kind


def test_low_precision_state_of_the_rules_own_choice_is_widened_where_the_rule_allows_it() -> None:
    def momentum(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            kept = optimizer.state[param].setdefault("momentum", torch.zeros_like(param, dtype=torch.bfloat16))
            descend(group, param, kept.mul_(0.9).add_(param.grad).float() / group["divisor"](param))

    def strict(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            kept = optimizer.state[param].setdefault("momentum", torch.zeros_like(param, dtype=torch.bfloat16))
            kept.lerp_(param.grad.bfloat16(), 0.1)  # raises for an FP32 momentum
            descend(group, param, kept.float() / (1e-12 + param.grad.norm()))

    rule = probed(momentum, divisor=_one)
    assert (rule.kind, rule.widens, rule.element_states) == (Kind.elementwise, True, {"momentum"})
    rule = probed(strict)
    assert (rule.kind, rule.widens) == (Kind.whole, False)


def _one(param: Tensor) -> float:
    return 1.0


def test_states_of_the_rules_own_format_stay_in_it_and_those_of_the_weights_format_are_widened() -> None:
    def momentum(optimizer: Sketch, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        for param in params:
            kept = optimizer.state[param].setdefault("momentum", torch.zeros_like(param, dtype=torch.bfloat16))
            square = optimizer.state[param].setdefault("square", torch.zeros_like(param))
            square.lerp_(param.grad.square(), 0.1)
            step = param.grad / (square.sqrt() + 1e-8) / (param.norm() + 1)
            descend(group, param, kept.lerp_(step.to(torch.bfloat16), 0.1).to(param.dtype))

    params = [torch.nn.Parameter(torch.randn(20).bfloat16()) for _ in range(2)]
    optimizer = Sketch(params, momentum)
    rule = find_rule(optimizer, 0, 1, shape=(20,), dtype=torch.bfloat16)
    assert (rule.kind, rule.widens, rule.low_kept) == (Kind.whole, False, {"momentum"}), rule.reason
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(20).bfloat16()
        done = Twin(optimizer).replay_whole(0, params[0], params[0].grad, optimizer.state[params[0]], **rule.formats)
        optimizer.step()
    assert {name: done.state[name].dtype for name in done.state} == {
        "momentum": torch.bfloat16,
        "square": torch.float32,
    }
    assert torch.allclose(done.param, params[0].float(), atol=0.02)
