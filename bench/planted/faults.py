"""Every cause, planted in real training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench.planted.optimizers import Forgetful, Noisy
from bench.planted.run import (
    BF16,
    WINDOW,
    Net,
    Run,
    adamw,
    averaging,
    scaled_trainer,
    scenario,
    set_lr,
    trainer,
)
from update_watch.report import Cause

# --- weights ----------------------------------------------------------------------------------------------


@scenario
def norms_at_one_in_bf16() -> Run:
    model = Net().to(BF16)
    optimizer = adamw(model.parameters())
    return Run(model, optimizer, trainer(model, optimizer), planted={"norm.weight": Cause.weight_rounding})


@scenario
def norms_at_one_in_fp16() -> Run:
    model = Net().to(torch.float16)
    optimizer = adamw(model.parameters(), lr=1e-4, eps=1e-4)
    step = trainer(model, optimizer, scale=1024)  # Adam does not mind
    return Run(model, optimizer, step, planted={"norm.weight": Cause.weight_rounding})


@scenario
def all_tensors_stalled() -> Run:
    model = Net(scale=1.0).to(BF16)
    optimizer = adamw(model.parameters(), lr=1e-5)
    names = [name for name, _ in model.named_parameters()]
    return Run(model, optimizer, trainer(model, optimizer), planted=dict.fromkeys(names, Cause.weight_rounding))


@scenario
def one_of_a_hundred_tensors_stalled() -> Run:
    tensors = {f"t{i}": nn.Parameter((torch.randn(64) * 1e-3).to(BF16)) for i in range(100)}
    with torch.no_grad():
        tensors["t57"].copy_(torch.ones(64))
    optimizer = torch.optim.SGD(tensors.values(), lr=1.0)

    def step(_: int) -> None:
        for p in tensors.values():
            p.grad = (torch.randn(64) * 5e-4).to(BF16)
        optimizer.step()

    # a hundred tensors take turns: each is measured in every eighth step, and verdicts want six of them
    return Run(list(tensors.items()), optimizer, step, planted={"t57": Cause.weight_rounding}, rule="sgd")


def _all_stall_at(rate: Callable[[int], float], windows: int, **planned: Any) -> Run:
    """Two matrices that stall together where the learning rate, a function of the step, is low."""
    model = Net(norm=False).to(BF16)
    optimizer = adamw(model.parameters(), lr=rate(0))
    step = trainer(model, optimizer, lambda t: set_lr(optimizer, rate(t)))
    planted = {name: Cause.weight_rounding for name, _ in model.named_parameters()}
    return Run(model, optimizer, step, windows=windows, planted=planted, **planned)


@scenario
def stall_late_in_a_decaying_schedule() -> Run:
    return _all_stall_at(lambda t: 1e-3 if t < 3 * WINDOW else 3e-6, windows=6, onset=4)


@scenario
def stall_that_creeps_in_as_the_rate_decays() -> Run:
    # a thousand times less would be the end of the schedule, where nothing is to be said
    return _all_stall_at(lambda t: 1e-3 * 0.005 ** (t / (9 * WINDOW)), windows=9, onset=0)


@scenario
def recovery_after_the_rate_is_raised() -> Run:
    return _all_stall_at(lambda t: 1e-6 if t < 2 * WINDOW else 1e-3, windows=7, ends=4)


@scenario
def a_rule_of_whole_tensors_stalled() -> Run:
    model = Net().to(BF16)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=5e-4)  # of the weights' size; half a step is 2e-3 of that
    planted = {name: Cause.weight_rounding for name, _ in model.named_parameters()}
    return Run(model, optimizer, trainer(model, optimizer), planted=planted, rule="adafactor")


@scenario
def an_optimizer_that_does_not_write() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = Forgetful(model.parameters(), lr=1.0)
    return Run(model, optimizer, trainer(model, optimizer), planted={"enter.weight": Cause.not_written}, rule="sgd")


@scenario
def nan_in_one_tensor() -> Run:
    model = Net()
    optimizer = adamw(model.parameters())
    inner = trainer(model, optimizer)

    def step(t: int) -> None:
        inner(t)
        if t == 2 * WINDOW + 5:
            with torch.no_grad():
                model.leave.weight.fill_(float("nan"))

    planted = {name: Cause.non_finite for name, _ in model.named_parameters()}
    return Run(model, optimizer, step, planted=planted, onset=3)


@scenario
def a_rule_that_cannot_be_replayed() -> Run:
    model = Net()
    optimizer = Noisy(model.parameters(), lr=1e-2)
    planted = {name: Cause.not_replayable for name, _ in model.named_parameters()}
    return Run(model, optimizer, trainer(model, optimizer), planted=planted, may_alert=True, rule="sgd")


# --- no signal --------------------------------------------------------------------------------------------


@scenario
def frozen_on_purpose() -> Run:
    model = Net()
    model.enter.weight.requires_grad_(False)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    planted = {"enter.weight": Cause.requires_grad_off}
    return Run(model, optimizer, trainer(model, optimizer), planted=planted)


@scenario
def forgotten_by_the_optimizer() -> Run:
    model = Net()
    optimizer = adamw([p for name, p in model.named_parameters() if name != "enter.weight"])
    planted = {"enter.weight": Cause.not_in_optimizer}
    return Run(model, optimizer, trainer(model, optimizer), planted=planted, may_alert=True)


@scenario
def unused_in_forward() -> Run:
    model = Net()
    model.extra = nn.Linear(40, 40, bias=False)
    optimizer = adamw(model.parameters())
    planted = {"extra.weight": Cause.no_gradient}
    return Run(model, optimizer, trainer(model, optimizer), planted=planted, may_alert=True)


@scenario
def gradient_always_zero() -> Run:
    model = Net()
    model.enter.weight.register_hook(lambda g: g * 0)  # type: ignore[no-untyped-call]  # torch's
    optimizer = adamw(model.parameters())
    planted = {"enter.weight": Cause.zero_gradient}
    return Run(model, optimizer, trainer(model, optimizer), planted=planted, may_alert=True)


@scenario
def learning_rate_zero() -> Run:
    model = Net().to(BF16)
    optimizer = adamw(model.parameters(), lr=0.0)
    planted = {name: Cause.zero_learning_rate for name, _ in model.named_parameters()}
    return Run(model, optimizer, trainer(model, optimizer), planted=planted)


@scenario
def a_scaler_that_skips_every_step() -> Run:
    model = Net()
    optimizer = adamw(model.parameters(), lr=1e-4, fused=True)

    planted = {name: Cause.skipped_steps for name, _ in model.named_parameters()}
    # skips are normal for a while: three windows in a row are not, and that is the onset
    step = scaled_trainer(model, optimizer, lambda t: True)
    return Run(model, optimizer, step, windows=5, planted=planted, onset=3, may_alert=True, skips=lambda t: True)


# --- what accumulates beside the weights ------------------------------------------------------------------


@scenario
def second_moment_that_cannot_decay() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = adamw(model.parameters(), betas=(0.9, 0.999))
    planted = {f"{name}/exp_avg_sq": Cause.state_rounding for name, _ in model.named_parameters()}
    return Run(model, optimizer, trainer(model, optimizer), windows=6, planted=planted)


@scenario
def momentum_that_cannot_decay() -> Run:
    p = nn.Parameter((torch.randn(40, 40) * 1e-3).to(BF16))
    optimizer = torch.optim.SGD([p], lr=1e-3, momentum=0.999)

    def step(t: int) -> None:
        drift = 1e-2 if t < 2 * WINDOW else 0.0
        p.grad = (drift + torch.randn(40, 40) * 1e-5).to(BF16)
        optimizer.step()

    planted = {"w/momentum_buffer": Cause.state_rounding}
    # in a fifth window the weight itself rounds: 0.749 of its updates arrive, steps of 1.3 gaps
    return Run([("w", p)], optimizer, step, windows=4, planted=planted, onset=3, rule="sgd")


@scenario
def step_counter_that_stops_at_256() -> Run:
    model = Net(norm=False)
    optimizer = adamw(model.parameters())

    def shorten(t: int) -> None:
        if t == 0:  # as a checkpoint cast to BF16 would
            for state in optimizer.state.values():
                state["step"] = torch.tensor(246.0, dtype=BF16)

    planted = {f"{name}/step": Cause.state_rounding for name, _ in model.named_parameters()}
    return Run(model, optimizer, trainer(model, optimizer, after=shorten), planted=planted, onset=2)


@scenario
def decay_that_never_happens() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = adamw(model.parameters(), weight_decay=0.3, foreach=True)
    planted = {f"{name}/weight_decay": Cause.decay_rounding for name, _ in model.named_parameters()}
    return Run(model, optimizer, trainer(model, optimizer), windows=6, planted=planted)


@scenario
def average_kept_in_bf16() -> Run:
    model = Net(0.3, norm=False)
    average = Net(0.3, norm=False)
    average.load_state_dict(model.state_dict())
    average.to(BF16)
    optimizer = adamw(model.parameters(), lr=5e-3)
    step = averaging(model, average, optimizer, lambda a, p, t: a.lerp_(p.to(BF16), 1e-3))

    planted = {f"{name}/average:ema": Cause.average_rounding for name, _ in model.named_parameters()}
    return Run(model, optimizer, step, windows=6, planted=planted, averages={"ema": (average, 0.999)})


@scenario
def averaged_model_of_a_bf16_model() -> Run:
    model = Net(0.3, norm=False).to(BF16)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))  # type: ignore[no-untyped-call]  # torch's
    optimizer = adamw(model.parameters(), lr=5e-3)
    inner = trainer(model, optimizer)

    def step(t: int) -> None:
        inner(t)
        average.update_parameters(model)

    planted = {f"{name}/average:ema": Cause.average_rounding for name, _ in model.named_parameters()}
    return Run(model, optimizer, step, windows=6, planted=planted, averages={"ema": average})


@scenario
def average_swapped_through_bf16_weights() -> Run:
    model = Net(0.3, norm=False).to(BF16)
    average = Net(0.3, norm=False)
    average.load_state_dict(model.state_dict())
    optimizer = adamw(model.parameters(), lr=5e-3)

    def update(a: Tensor, p: Tensor, t: int) -> None:
        a.lerp_(p.float(), 1e-3)
        if t % 4 == 3:  # a validation with the averaged weights, swapped in and out in place
            a.copy_(a.to(BF16).float())

    step = averaging(model, average, optimizer, update)

    planted = {f"{name}/average:ema": Cause.average_rounding for name, _ in model.named_parameters()}
    return Run(model, optimizer, step, windows=6, planted=planted, averages={"ema": (average, 0.999)})


@scenario
def gradients_summed_in_bf16() -> Run:
    p = nn.Parameter((torch.randn(64) * 0.01).to(BF16))
    optimizer = adamw([p])
    # a large contribution and many small ones: of each, less than half a step of the sum
    first, more = torch.rand(64).add(1.0).to(BF16), torch.full((64,), 0.0019, dtype=BF16)

    def step(_: int) -> None:
        p.grad = None
        for i in range(400):
            torch.autograd.backward((p * (more if i else first)).sum())
        optimizer.step()

    planted = {"w/grad": Cause.accumulation_rounding}
    return Run([("w", p)], optimizer, step, windows=2, planted=planted, sums_gradients=True)
