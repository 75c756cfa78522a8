"""What trials find out about an optimizer, against what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from update_watch.replay.absent import ReplayError
from update_watch.replay.rule_properties import find_properties
from update_watch.replay.state_forms import find_states, likeness

Make = Callable[[list[Tensor]], torch.optim.Optimizer]
optim = torch.optim


class Kahan(optim.Optimizer):
    """Steps of the size of the learning rate, with the remainder kept in a BF16 buffer of its own."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                rest = self.state[p].setdefault("rest", torch.zeros_like(p))
                rest.sub_(p.grad.sign().mul_(group["lr"]))
                before = p.clone()
                p.add_(rest)
                rest.add_(before.sub_(p))


class Stochastic(optim.Optimizer):
    """Steps of the size of the learning rate, rounded up or down by chance."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                exact = (p.float() - group["lr"] * p.grad.float().sign()).view(torch.int32)
                exact.add_(torch.randint_like(exact, 1 << 16)).bitwise_and_(-65536)
                p.copy_(exact.view(torch.float32))


class Tenfold(optim.Optimizer):
    """Steps of ten times the learning rate."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=10 * group["lr"])


class SignTimesNorm(Tenfold):
    """Steps of one size for all elements, which grows with the gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"] * float(p.grad.abs().max()))


def weights(dtype: torch.dtype = torch.bfloat16, *shape: int) -> list[Tensor]:
    return [torch.nn.Parameter(torch.full(shape or (32, 24), 0.02).to(dtype))]


@pytest.mark.parametrize(
    ("make", "step_size"),
    [
        pytest.param(lambda p: optim.AdamW(p, lr=3e-4), 1.0, id="AdamW"),
        pytest.param(lambda p: optim.AdamW(p, lr=torch.tensor(3e-4)), 1.0, id="AdamW-tensor-lr"),
        pytest.param(lambda p: optim.AdamW(p, lr=0.0), 1.0, id="AdamW-in-warm-up"),
        pytest.param(lambda p: optim.Adamax(p), 1.0, id="Adamax"),
        pytest.param(lambda p: optim.NAdam(p), 1.0, id="NAdam"),
        pytest.param(lambda p: optim.SGD(p, lr=0.1), None, id="SGD"),
        pytest.param(lambda p: optim.SGD(p, lr=0.1, momentum=0.9), None, id="SGD-momentum"),
        pytest.param(Tenfold, None, id="ten-times-as-large"),
        pytest.param(SignTimesNorm, None, id="grows-with-the-gradient"),
        pytest.param(lambda p: optim.Adagrad(p), None, id="Adagrad-which-shrinks"),
        pytest.param(lambda p: optim.Adafactor(p), None, id="Adafactor-relative-to-the-weights"),
        pytest.param(lambda p: optim.Muon(p), None, id="Muon-looks-at-the-matrix"),
    ],
)
def test_step_size_is_given_only_where_every_update_is_about_the_learning_rate(
    make: Make, step_size: float | None
) -> None:
    found = find_properties(make(weights()), 0, torch.bfloat16, 2).step_size
    assert found == (None if step_size is None else pytest.approx(step_size, rel=0.02))


@pytest.mark.parametrize(
    ("make", "keeps"),
    [
        pytest.param(lambda p: optim.AdamW(p), False, id="AdamW"),
        pytest.param(lambda p: optim.AdamW(p, fused=True), False, id="AdamW-fused"),
        pytest.param(Kahan, True, id="Kahan"),
        pytest.param(Stochastic, True, id="stochastic-rounding"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["BF16", "FP16"])
def test_optimizers_that_make_good_what_rounding_takes_are_recognised(
    make: Make, keeps: bool, dtype: torch.dtype
) -> None:
    if make is Stochastic and dtype is torch.float16:
        pytest.skip("it rounds to BF16")
    assert find_properties(make(weights(dtype)), 0, dtype, 2).keeps_remainder is keeps


@pytest.mark.parametrize(
    ("make", "decouples", "merges"),
    [
        pytest.param(lambda p: optim.AdamW(p, foreach=False), True, False, id="AdamW-loop"),
        pytest.param(lambda p: optim.AdamW(p, foreach=True), True, False, id="AdamW-foreach"),
        pytest.param(lambda p: optim.AdamW(p, fused=True), True, True, id="AdamW-fused"),
        pytest.param(lambda p: optim.Adam(p), False, False, id="Adam-decays-in-the-gradient"),
        pytest.param(lambda p: optim.SGD(p, lr=0.1), True, True, id="SGD"),
        pytest.param(lambda p: optim.RMSprop(p), False, False, id="RMSprop"),
    ],
)
@pytest.mark.parametrize("ndim", [1, 2])
def test_the_place_of_weight_decay_is_found(make: Make, decouples: bool, merges: bool, ndim: int) -> None:
    found = find_properties(make(weights()), 0, torch.bfloat16, ndim)
    assert (found.decouples_decay, found.merges_decay) == (decouples, merges)


def test_decay_of_a_state_is_its_beta() -> None:
    found = find_states(optimizer := optim.AdamW(weights(), betas=(0.8, 0.995), amsgrad=True), 0, _param(optimizer))
    assert found["exp_avg"].decay == pytest.approx(0.8, abs=1e-6)
    assert found["exp_avg_sq"].decay == pytest.approx(0.995, abs=1e-6)
    assert found["max_exp_avg_sq"].decay == 1.0
    assert not found["max_exp_avg_sq"].is_sum
    assert found["step"].is_counter
    assert {name: form.dtype for name, form in found.items()} == {
        "step": "float32",
        "exp_avg": "bfloat16",
        "exp_avg_sq": "bfloat16",
        "max_exp_avg_sq": "bfloat16",
    }


def test_a_sum_is_told_from_a_maximum() -> None:
    assert find_states(optimizer := optim.Adagrad(weights()), 0, _param(optimizer))["sum"].is_sum


def test_a_factor_that_changes_with_time_is_not_called_a_decay() -> None:
    class Debiased(Kahan):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    t = state["t"] = state.get("t", 0) + 1
                    beta = (0.99 - 0.99**t) / (1 - 0.99**t)
                    state.setdefault("mean", torch.zeros_like(p)).mul_(beta).add_(p.grad, alpha=1 - beta)
                    p.sub_(state["mean"], alpha=group["lr"])

    assert find_states(optimizer := Debiased(weights()), 0, _param(optimizer))["mean"].decay is None


@pytest.mark.parametrize("shape", [(8,), (7, 9), (300, 700), (5000,), (64, 32, 3, 3), (256, 128, 3, 3)], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p: optim.AdamW(p), id="AdamW"),
        pytest.param(lambda p: optim.Adafactor(p), id="Adafactor"),
        pytest.param(lambda p: optim.SGD(p, lr=0.1, momentum=0.9), id="SGD-momentum"),
        pytest.param(lambda p: optim.RMSprop(p, centered=True), id="RMSprop-centered"),
    ],
)
def test_bytes_of_the_states_are_those_a_real_step_makes(make: Make, shape: tuple[int, ...]) -> None:
    (param,) = weights(torch.bfloat16, *shape)
    optimizer = make([param])
    expected = {name: form.bytes_for(shape) for name, form in find_states(optimizer, 0, param).items()}
    param.grad = torch.ones_like(param)
    optimizer.step()
    made = {name: value.numel() * value.element_size() for name, value in optimizer.state[param].items()}
    assert expected == made


def test_a_list_of_tensors_is_counted_whole() -> None:
    class Factored(Kahan):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                self.state[p]["factors"] = [torch.zeros(n, n) for n in p.shape]

    (param,) = weights(torch.bfloat16, 300, 700)
    assert find_states(Factored([param]), 0, param)["factors"].bytes_for((300, 700)) == 4 * (300**2 + 700**2)


def test_the_real_optimizer_and_all_random_states_stay_untouched() -> None:
    (param,) = weights()
    optimizer = Stochastic([param])
    fired: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append(1))
    before, random_state = param.detach().clone(), torch.get_rng_state()
    find_properties(optimizer, 0, torch.bfloat16, 2)
    find_states(optimizer, 0, param)
    assert torch.equal(param, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not optimizer.state
    assert not fired


def test_a_rule_that_does_not_run_is_refused_with_its_own_error() -> None:
    class Broken(Kahan):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("needs a cluster")

    with pytest.raises(ReplayError, match=r"Broken fails on a synthetic parameter.*needs a cluster"):
        find_properties(Broken(weights()), 0, torch.bfloat16, 2)


def test_a_rule_that_asks_for_its_training_mode_gets_it() -> None:
    class Mode(Kahan):
        def train(self) -> None:
            self.param_groups[0]["is_training"] = True

        def step(self, closure: Any = None) -> None:
            if not self.param_groups[0].get("is_training"):
                raise RuntimeError("call train() first")
            super().step()

    optimizer = Mode(weights())
    assert find_properties(optimizer, 0, torch.bfloat16, 2).keeps_remainder
    assert "is_training" not in optimizer.param_groups[0]


def test_parameters_alike_share_a_trial_and_others_do_not() -> None:
    params = [*weights(torch.bfloat16, 512, 300), *weights(torch.bfloat16, 700, 200), *weights(torch.bfloat16, 4, 4)]
    optimizer = optim.AdamW(
        [{"params": params[:2], "lr": 0.1}, {"params": params[2:]}, {"params": weights(), "betas": (0.5, 0.9)}]
    )
    large, other, small = (likeness(optimizer, group, p) for group, p in zip((0, 0, 1), params, strict=True))
    assert large == other
    assert large != small
    assert likeness(optimizer, 2, params[0]) != large
    assert likeness(optimizer, 1, params[0]) == large  # the learning rate changes nothing that is tried


def _param(optimizer: torch.optim.Optimizer) -> Tensor:
    param: Tensor = optimizer.param_groups[0]["params"][0]
    return param
