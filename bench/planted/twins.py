"""Healthy trainings, whatever keeps them healthy: of none of them may anybody be woken."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench.planted.optimizers import HiddenKahanSGD, HiddenMasterSGD, KahanSGD, MasterAdam, SplitSGD, StochasticSGD
from bench.planted.run import (
    BF16,
    WINDOW,
    Net,
    Run,
    adamw,
    averaging,
    loss_of,
    scaled_trainer,
    scenario,
    set_lr,
    trainer,
)
from update_watch.report import Cause

# --- formats ----------------------------------------------------------------------------------------------


@scenario
def healthy_fp32() -> Run:
    model = Net()
    optimizer = adamw(model.parameters(), lr=1e-4, weight_decay=0.01, betas=(0.9, 0.999))
    return Run(model, optimizer, trainer(model, optimizer))


@scenario
def healthy_autocast() -> Run:
    model = Net()
    optimizer = adamw(model.parameters(), lr=1e-4)

    def step(_: int) -> None:
        model.zero_grad()
        with torch.autocast("cpu", BF16):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()

    return Run(model, optimizer, step)


@scenario
def healthy_bf16_with_updates_that_fit() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = adamw(model.parameters(), lr=2e-3)
    return Run(model, optimizer, trainer(model, optimizer))


@scenario
def healthy_fp32_norms_in_a_bf16_model() -> Run:
    model = Net().to(BF16)
    model.norm.float()
    optimizer = adamw(model.parameters())
    return Run(model, optimizer, trainer(model, optimizer))


@scenario
def healthy_fp32_under_a_rule_of_whole_tensors() -> Run:
    model = Net()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-3)
    return Run(model, optimizer, trainer(model, optimizer), windows=6, rule="adafactor")


@scenario
def healthy_bf16_under_a_rule_that_asks_for_the_format() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)  # its eps is that of BF16
    return Run(model, optimizer, trainer(model, optimizer), windows=6, rule="adafactor")


@scenario
def healthy_weights_normalised_after_every_step() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = adamw(model.parameters(), lr=2e-3)
    inner = trainer(model, optimizer)

    def step(t: int) -> None:
        inner(t)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(F.normalize(p.float()) * 0.06)

    return Run(model, optimizer, step, windows=8, rule="")  # what is undone afterwards had arrived


@scenario
def healthy_scaler_in_fp16_autocast() -> Run:
    model = Net()
    optimizer = adamw(model.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**32, growth_interval=24)  # overflows at first, and again later

    def step(_: int) -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return Run(model, optimizer, step, rule="")  # the steps of scaled loops are the scaler's to count


@scenario
def healthy_scaler_that_skips_now_and_then() -> Run:
    model = Net()
    optimizer = adamw(model.parameters(), lr=1e-4, fused=True)

    def skips(t: int) -> bool:
        return t % 16 == 0

    return Run(model, optimizer, scaled_trainer(model, optimizer, skips), skips=skips)


# --- something keeps what rounding takes --------------------------------------------------------------------


@scenario
def healthy_fp32_masters_stepped_by_the_optimizer() -> Run:
    model = Net().to(BF16)
    masters = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    optimizer = adamw(masters.values(), lr=1e-4)

    def step(_: int) -> None:
        model.zero_grad()
        loss_of(model).backward()
        for name, p in model.named_parameters():
            masters[name].grad = p.grad.float() if p.grad is not None else None
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])

    return Run(model, optimizer, step, masters=dict(masters), whole=lambda name, _: masters[name])


@scenario
def healthy_fp32_masters_in_the_optimizer_s_state() -> Run:
    model = Net().to(BF16)
    optimizer = MasterAdam(model.parameters(), lr=1e-4)
    params = dict(model.named_parameters())

    def whole(name: str, stored: Tensor) -> Tensor:
        master: Tensor = optimizer.state[params[name]].get("master_param", stored)
        return master

    return Run(model, optimizer, trainer(model, optimizer), windows=8, whole=whole)


@scenario
def healthy_fp32_masters_out_of_sight() -> Run:
    return _knows_the_whole(HiddenMasterSGD)


def _knows_the_whole(kind: type[HiddenMasterSGD | SplitSGD]) -> Run:
    model = Net().to(BF16)
    optimizer = kind(model.parameters(), lr=0.02)
    params = dict(model.named_parameters())

    def whole(name: str, _: Tensor) -> Tensor:
        return optimizer.whole(params[name])

    return Run(model, optimizer, trainer(model, optimizer), windows=8, whole=whole, rule="sgd")


@scenario
def healthy_kahan_summation_of_optimi() -> Run:
    from optimi import AdamW  # type: ignore[import-untyped]

    model = Net().to(BF16)
    optimizer = AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, kahan_sum=True)
    params = dict(model.named_parameters())

    def whole(name: str, stored: Tensor) -> Tensor:
        rest = optimizer.state[params[name]].get("kahan_comp")
        return stored if rest is None else stored.double() + rest.double()

    return Run(model, optimizer, trainer(model, optimizer), windows=6, whole=whole)


@scenario
def healthy_kahan_summation_with_an_own_buffer() -> Run:
    return _kahan(KahanSGD)


@scenario
def healthy_kahan_summation_with_a_hidden_buffer() -> Run:
    return _kahan(HiddenKahanSGD)


def _kahan(kind: type[KahanSGD]) -> Run:
    model = Net().to(BF16)
    optimizer = kind(model.parameters(), lr=0.02)
    params = dict(model.named_parameters())

    def whole(name: str, stored: Tensor) -> Tensor:
        return stored.double() + optimizer.rest(params[name]).double()

    return Run(model, optimizer, trainer(model, optimizer), windows=8, whole=whole, rule="sgd")


@scenario
def healthy_split_weights() -> Run:
    return _knows_the_whole(SplitSGD)


@scenario
def healthy_stochastic_rounding() -> Run:
    model = Net().to(BF16)
    optimizer = StochasticSGD(model.parameters(), lr=0.05)
    return Run(model, optimizer, trainer(model, optimizer), windows=6, rule="sgd", noisy=("norm.weight",))


@scenario
def healthy_stochastic_rounding_of_64_elements() -> Run:
    params = [nn.Parameter(torch.ones(64, dtype=BF16)) for _ in range(4)]
    optimizer = StochasticSGD(params, lr=1e-5)  # four changes in a window of 32 steps

    def step(_: int) -> None:
        for p in params:
            p.grad = torch.randn(64).add(1.0).to(BF16)
        optimizer.step()

    names = tuple(f"t{i}" for i in range(4))
    named = list(zip(names, params, strict=True))
    return Run(named, optimizer, step, windows=8, rule="sgd", noisy=names, unknown=names)


@scenario
def healthy_stochastic_rounding_of_torchao() -> Run:
    from torchao.optim import _AdamW  # type: ignore[import-untyped]

    model = Net().to(BF16)
    optimizer = _AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, betas=(0.9, 0.95), bf16_stochastic_round=True)
    # 48 elements, 32 steps: too few changes are to be expected
    small = ("norm.weight",)
    return Run(model, optimizer, trainer(model, optimizer), windows=6, unknown=small, noisy=small)


# --- what accumulates beside the weights --------------------------------------------------------------------


@scenario
def healthy_second_moment_in_fp32_beside_bf16_weights() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = MasterAdam(model.parameters(), lr=2e-3)
    return Run(model, optimizer, trainer(model, optimizer), rule="")


@scenario
def healthy_momentum_in_bf16_at_a_common_rate() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return Run(model, optimizer, trainer(model, optimizer), rule="sgd")


@scenario
def healthy_step_counter_past_256() -> Run:
    model = Net(norm=False)
    optimizer = adamw(model.parameters())

    def move(t: int) -> None:
        if t == 0:
            for state in optimizer.state.values():
                state["step"] = torch.tensor(246.0)

    return Run(model, optimizer, trainer(model, optimizer, after=move))


@scenario
def healthy_decay_in_fp32() -> Run:
    model = Net(norm=False)
    optimizer = adamw(model.parameters(), weight_decay=0.3, foreach=True)
    return Run(model, optimizer, trainer(model, optimizer), windows=6)


@scenario
def healthy_average_in_fp32() -> Run:
    model = Net(norm=False).to(BF16)
    average = Net(norm=False)
    average.load_state_dict(model.state_dict())
    optimizer = adamw(model.parameters())
    step = averaging(model, average, optimizer, lambda a, p, t: a.lerp_(p.float(), 1e-3))

    return Run(model, optimizer, step, windows=6, averages={"ema": (average, 0.999)})


@scenario
def healthy_average_swapped_in_and_out() -> Run:
    model, average = Net(0.3, norm=False), Net(0.3, norm=False)
    average.load_state_dict(model.state_dict())
    optimizer = adamw(model.parameters(), lr=5e-3)

    def update(a: Tensor, p: Tensor, t: int) -> None:
        a.lerp_(p, 1e-3)
        if t % 8 == 7:  # a validation with the averaged weights in FP32
            kept = p.clone()
            p.copy_(a)
            p.copy_(kept)

    step = averaging(model, average, optimizer, update)

    return Run(model, optimizer, step, windows=6, averages={"ema": (average, 0.999)})


def _averaged(model: Net, keeps: float) -> Run:
    """By torch's AveragedModel, in the format of the model."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(keeps))  # type: ignore[no-untyped-call]  # torch's
    optimizer = adamw(model.parameters())
    inner = trainer(model, optimizer)

    def step(t: int) -> None:
        inner(t)
        average.update_parameters(model)

    return Run(model, optimizer, step, windows=6, averages={"ema": average})


@scenario
def healthy_averaged_model_in_fp32() -> Run:
    return _averaged(Net(norm=False), 0.999)


@scenario
def healthy_average_in_bf16_that_is_quick() -> Run:
    return _averaged(Net(norm=False).to(BF16), 0.8)


@scenario
def healthy_gradients_summed_in_fp32() -> Run:
    p = nn.Parameter(torch.randn(64) * 0.01)
    optimizer = adamw([p])
    first, more = torch.rand(64).add(1.0), torch.full((64,), 0.0019)

    def step(_: int) -> None:
        p.grad = None
        for i in range(400):
            torch.autograd.backward((p * (more if i else first)).sum())
        optimizer.step()

    return Run([("w", p)], optimizer, step, windows=2, sums_gradients=True)


@scenario
def healthy_gradients_of_eight_batches_in_bf16() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = adamw(model.parameters())

    def step(_: int) -> None:
        model.zero_grad()
        for _ in range(8):
            loss_of(model, rows=4).backward()
        optimizer.step()

    return Run(model, optimizer, step, sums_gradients=True)


# --- signals that come and go -------------------------------------------------------------------------------


@scenario
def healthy_lora_b_from_zero() -> Run:
    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Parameter(torch.randn(40, 40) * 0.02, requires_grad=False)
            self.a = nn.Parameter(torch.randn(8, 40) * 0.01)
            self.b = nn.Parameter(torch.zeros(40, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.base.to(x.dtype)) + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))

    model = Lora().to(BF16)
    optimizer = adamw([model.a, model.b], lr=1e-3)
    return Run(model, optimizer, trainer(model, optimizer), planted={"base": Cause.requires_grad_off})


@scenario
def healthy_warm_up_from_zero() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = adamw(model.parameters(), lr=0.0)
    step = trainer(model, optimizer, lambda t: set_lr(optimizer, 2e-3 * min(t, 8) / 8))
    return Run(model, optimizer, step)


@scenario
def healthy_warm_up_over_three_windows() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = adamw(model.parameters(), lr=0.0)
    step = trainer(model, optimizer, lambda t: set_lr(optimizer, 2e-3 * min(t / (3 * WINDOW), 1.0)))
    return Run(model, optimizer, step, windows=6)


@scenario
def healthy_schedule_that_ends_at_zero() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = adamw(model.parameters())
    step = trainer(model, optimizer, lambda t: set_lr(optimizer, 2e-3 if t < 3 * WINDOW else 0.0))
    planted = {name: Cause.zero_learning_rate for name, _ in model.named_parameters()}
    return Run(model, optimizer, step, windows=5, planted=planted, onset=4)


@scenario
def healthy_rows_of_an_embedding_without_tokens() -> Run:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(500, 16)
            self.out = nn.Linear(16, 40, bias=False)
            nn.init.normal_(self.words.weight, std=0.01)
            nn.init.normal_(self.out.weight, std=0.01)

        def forward(self, x: Tensor) -> Tensor:
            tokens = torch.randint(0, 50, (len(x),))  # most rows never
            return F.linear(F.embedding(tokens, self.words.weight.float()), self.out.weight.float())

    model = Words().to(BF16)
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    # of so few rows that are touched 64 samples say too little in four windows
    return Run(model, optimizer, trainer(model, optimizer), rule="sgd", unknown=("words.weight",))


@scenario
def healthy_after_unfreezing() -> Run:
    model = Net()
    model.enter.weight.requires_grad_(False)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def unfreeze(t: int) -> None:
        if t == 2 * WINDOW:
            model.enter.weight.requires_grad_(True)
            optimizer.add_param_group({"params": [model.enter.weight]})

    planted = {"enter.weight": Cause.requires_grad_off}
    return Run(model, optimizer, trainer(model, optimizer, unfreeze), windows=6, planted=planted, ends=3)


@scenario
def healthy_layer_used_in_every_other_step() -> Run:
    model = Net()
    model.extra = extra = nn.Linear(40, 40, bias=False)
    optimizer = adamw(model.parameters(), lr=1e-4)

    def step(t: int) -> None:
        model.zero_grad()
        (loss_of(model) + (extra(torch.randn(16, 40)).pow(2).mean() if t % 2 else 0.0)).backward()
        optimizer.step()

    return Run(model, optimizer, step)


@scenario
def healthy_gradients_that_are_zero_now_and_then() -> Run:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(t: int) -> None:
        model.zero_grad()
        loss_of(model).mul(float(t % 4 != 0)).backward()
        optimizer.step()

    return Run(model, optimizer, step, rule="sgd")
