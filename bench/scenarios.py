"""Every cause planted in real training, and the healthy twins that must stay silent: the confusion table.

    python bench/scenarios.py [--seeds N] [--samples K ...] [--only NAME]

Small models, real optimizer steps, `uw.watch` at its defaults but for a window of 32 steps. A planted fault counts as found
when, in one of the two windows after its onset, the tensor (or its accumulator) carries the right cause and health. A false
alarm is a WARN or ERROR alert, or a tensor called stalled, stalling or broken, where nothing was planted. Exit status 1 if a
verdict was wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import update_watch as uw
from update_watch.report import Cause, Health, Level, Report

WINDOW = 32
BF16 = torch.bfloat16
# what is idle, frozen or unknown wakes nobody, even where it was planted
QUIET = {Cause.requires_grad_off, Cause.zero_learning_rate, Cause.not_replayable}
BAD = {Health.stalled, Health.stalling, Health.broken}


@dataclasses.dataclass
class Run:
    """What a scenario trains. `step(t)` takes the optimizer step number t."""

    model: Any  # for `uw.watch`
    optimizer: Any
    step: Callable[[int], None]
    windows: int = 4
    planted: dict[str, Cause] = dataclasses.field(default_factory=dict)  # "tensor" or "tensor/accumulator"
    onset: int = 1  # window in which the planted fault begins
    ends: int = 0  # window from which on all is well again; 0: it does not end
    averages: dict[str, Any] = dataclasses.field(default_factory=dict)
    may_alert: bool = False  # a planted fault of which nobody need be woken
    unknown: tuple[str, ...] = ()  # tensors of a healthy twin of which nothing can be said (yet)


SCENARIOS: dict[str, Callable[[], Run]] = {}


def scenario(build: Callable[[], Run]) -> Callable[[], Run]:
    SCENARIOS[build.__name__.replace("_", " ")] = build
    return build


class Net(nn.Module):
    """Two matrices whose weights are near 0.01, so that updates of 1e-3 are kept, and a norm at 1."""

    def __init__(self, scale: float = 0.01, norm: bool = True) -> None:
        super().__init__()
        self.enter = nn.Linear(40, 48, bias=False)
        self.norm = nn.RMSNorm(48) if norm else nn.Identity()
        self.leave = nn.Linear(48, 40, bias=False)
        for layer in (self.enter, self.leave):
            nn.init.normal_(layer.weight, std=scale)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.enter.weight.to(x.dtype))
        x = F.rms_norm(x, (48,), self.norm.weight.to(x.dtype)) if isinstance(self.norm, nn.RMSNorm) else x.tanh()
        return F.linear(x, self.leave.weight.to(x.dtype))


def trainer(model: nn.Module, optimizer: Any, before: Callable[[int], None] | None = None) -> Callable[[int], None]:
    def step(t: int) -> None:
        if before is not None:
            before(t)
        x = torch.randn(16, 40)
        model.zero_grad()
        (model(x) - x.roll(1, -1)).pow(2).mean().backward()
        optimizer.step()

    return step


def set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def adamw(params: Any, lr: float = 1e-3, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0, betas=(0.9, 0.95), **options)


# --- planted ------------------------------------------------------------------------------------------


@scenario
def norms_at_one_in_bf16() -> Run:
    model = Net().to(BF16)
    optimizer = adamw(model.parameters())
    return Run(model, optimizer, trainer(model, optimizer), planted={"norm.weight": Cause.weight_rounding})


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
    return Run(list(tensors.items()), optimizer, step, windows=4, planted={"t57": Cause.weight_rounding})


@scenario
def stall_late_in_a_decaying_schedule() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = adamw(model.parameters(), lr=1e-3)
    step = trainer(model, optimizer, lambda t: set_lr(optimizer, 1e-3 if t < 3 * WINDOW else 3e-6))
    names = [name for name, _ in model.named_parameters()]
    planted = dict.fromkeys(names, Cause.weight_rounding)
    return Run(model, optimizer, step, windows=6, planted=planted, onset=4)


@scenario
def recovery_after_the_rate_is_raised() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = adamw(model.parameters(), lr=1e-6)
    step = trainer(model, optimizer, lambda t: set_lr(optimizer, 1e-6 if t < 2 * WINDOW else 1e-3))
    names = [name for name, _ in model.named_parameters()]
    planted = dict.fromkeys(names, Cause.weight_rounding)
    return Run(model, optimizer, step, windows=7, planted=planted, ends=5)


@scenario
def second_moment_that_cannot_decay() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.999))
    planted = {f"{name}/exp_avg_sq": Cause.state_rounding for name, _ in model.named_parameters()}
    return Run(model, optimizer, trainer(model, optimizer), windows=6, planted=planted)


@scenario
def decay_that_never_happens() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.3, betas=(0.9, 0.95), foreach=True)
    planted = {f"{name}/weight_decay": Cause.decay_rounding for name, _ in model.named_parameters()}
    return Run(model, optimizer, trainer(model, optimizer), windows=6, planted=planted)


@scenario
def average_kept_in_bf16() -> Run:
    model = Net(norm=False)
    average = Net(norm=False)
    average.load_state_dict(model.state_dict())
    average.to(BF16)
    optimizer = adamw(model.parameters())
    inner = trainer(model, optimizer)

    def step(t: int) -> None:
        inner(t)
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p.to(BF16), 1e-3)

    planted = {f"{name}/average:ema": Cause.average_rounding for name, _ in model.named_parameters()}
    return Run(model, optimizer, step, windows=6, planted=planted, averages={"ema": (average, 0.999)})


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
    optimizer = adamw([model.norm.weight, model.leave.weight])
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
    model.enter.weight.register_hook(lambda g: g * 0)
    optimizer = adamw(model.parameters())
    planted = {"enter.weight": Cause.zero_gradient}
    return Run(model, optimizer, trainer(model, optimizer), planted=planted, may_alert=True)


@scenario
def learning_rate_zero() -> Run:
    model = Net().to(BF16)
    optimizer = adamw(model.parameters(), lr=0.0)
    planted = dict.fromkeys([name for name, _ in model.named_parameters()], Cause.zero_learning_rate)
    return Run(model, optimizer, trainer(model, optimizer), planted=planted)


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

    names = [name for name, _ in model.named_parameters()]
    return Run(model, optimizer, step, planted=dict.fromkeys(names, Cause.non_finite), onset=3)


class Forgetful(torch.optim.SGD):
    """Forgets to write one of its parameters: an optimizer bug."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        held = self.param_groups[0]["params"][0]
        kept = held.clone() if held.dtype is BF16 else None
        result = super().step(closure)
        if kept is not None:
            held.copy_(kept)
        return result


@scenario
def an_optimizer_that_does_not_write() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = Forgetful(model.parameters(), lr=1.0)
    return Run(model, optimizer, trainer(model, optimizer), planted={"enter.weight": Cause.not_written})


class Noisy(torch.optim.SGD):
    """Draws random numbers in its rule: cannot be replayed."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn_like(p), alpha=1e-4)
        return super().step(closure)


@scenario
def a_rule_that_cannot_be_replayed() -> Run:
    model = Net()
    optimizer = Noisy(model.parameters(), lr=1e-2)
    planted = dict.fromkeys([name for name, _ in model.named_parameters()], Cause.not_replayable)
    return Run(model, optimizer, trainer(model, optimizer), planted=planted, may_alert=True)


# --- healthy twins ------------------------------------------------------------------------------------


@scenario
def healthy_fp32() -> Run:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return Run(model, optimizer, trainer(model, optimizer))


@scenario
def healthy_autocast() -> Run:
    model = Net()
    optimizer = adamw(model.parameters(), lr=1e-4)

    def step(_: int) -> None:
        x = torch.randn(16, 40)
        model.zero_grad()
        with torch.autocast("cpu", BF16):
            loss = (model(x) - x.roll(1, -1)).pow(2).mean()
        loss.backward()
        optimizer.step()

    return Run(model, optimizer, step)


@scenario
def healthy_fp32_masters_in_the_optimizer() -> Run:
    model = Net().to(BF16)
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    optimizer = adamw(masters, lr=1e-4)

    def step(_: int) -> None:
        x = torch.randn(16, 40)
        model.zero_grad()
        (model(x) - x.roll(1, -1)).pow(2).mean().backward()
        for master, p in zip(masters, model.parameters(), strict=True):
            master.grad = p.grad.float() if p.grad is not None else None
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, model.parameters(), strict=True):
                p.copy_(master)

    return Run(model, optimizer, step)


@scenario
def healthy_kahan_summation() -> Run:
    from optimi import AdamW

    model = Net().to(BF16)
    optimizer = AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, kahan_sum=True)
    return Run(model, optimizer, trainer(model, optimizer), windows=6)


class StochasticSGD(torch.optim.Optimizer):
    """Plain SGD in FP32, rounded to BF16 at random."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                exact = p.float() - group["lr"] * p.grad.float()
                if p.dtype is not BF16:
                    p.copy_(exact)
                    continue
                bits = exact.view(torch.int32)
                bits = bits + torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32)
                p.copy_((bits & ~0xFFFF).view(torch.float32))


@scenario
def healthy_stochastic_rounding() -> Run:
    model = Net().to(BF16)
    optimizer = StochasticSGD(model.parameters(), lr=0.05)
    return Run(model, optimizer, trainer(model, optimizer), windows=6)


@scenario
def healthy_stochastic_rounding_of_torchao() -> Run:
    from torchao.optim import _AdamW

    model = Net().to(BF16)
    optimizer = _AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, betas=(0.9, 0.95), bf16_stochastic_round=True)
    # 48 elements, 32 steps: too few changes are to be expected
    return Run(model, optimizer, trainer(model, optimizer), windows=6, unknown=("norm.weight",))


class SplitSGD(torch.optim.Optimizer):
    """SGD on weights split in two: the parameter holds the upper 16 bits of the FP32 value, a buffer the lower ones."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.dtype is not BF16:
                    p.sub_(p.grad.float(), alpha=group["lr"])
                    continue
                state = self.state[p]
                if "mantissa" not in state:
                    state["mantissa"] = torch.zeros_like(p, dtype=torch.uint16)
                upper = p.view(torch.int16).to(torch.int32) << 16
                whole = (upper | state["mantissa"].to(torch.int32)).view(torch.float32) - group["lr"] * p.grad.float()
                bits = whole.view(torch.int32)
                state["mantissa"].copy_((bits & 0xFFFF).to(torch.uint16))
                p.copy_((bits & ~0xFFFF).view(torch.float32))


@scenario
def healthy_split_weights() -> Run:
    model = Net().to(BF16)
    optimizer = SplitSGD(model.parameters(), lr=0.02)
    # its buffer does not exist before the first step, nor in FP32: how it would go on in FP32 cannot be replayed
    names = tuple(name for name, _ in model.named_parameters())
    return Run(model, optimizer, trainer(model, optimizer), windows=8, unknown=names)


@scenario
def norms_at_one_in_fp16() -> Run:
    model = Net().to(torch.float16)
    optimizer = adamw(model.parameters(), lr=1e-4, eps=1e-4)

    def step(_: int) -> None:
        x = torch.randn(16, 40)
        model.zero_grad()
        (model(x) - x.roll(1, -1)).pow(2).mean().mul(1024).backward()  # the loss is scaled; Adam does not mind
        optimizer.step()

    return Run(model, optimizer, step, planted={"norm.weight": Cause.weight_rounding})


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
def healthy_schedule_that_ends_at_zero() -> Run:
    model = Net(norm=False).to(BF16)
    optimizer = adamw(model.parameters())
    step = trainer(model, optimizer, lambda t: set_lr(optimizer, 2e-3 if t < 3 * WINDOW else 0.0))
    planted = dict.fromkeys([name for name, _ in model.named_parameters()], Cause.zero_learning_rate)
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
            tokens = torch.randint(0, 50, (16,))  # most rows never
            return F.linear(F.embedding(tokens, self.words.weight.float()), self.out.weight.float())

    model = Words().to(BF16)
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    return Run(model, optimizer, trainer(model, optimizer))


@scenario
def healthy_after_unfreezing() -> Run:
    model = Net()
    model.enter.weight.requires_grad_(False)
    optimizer = adamw([model.norm.weight, model.leave.weight], lr=1e-4)

    def unfreeze(t: int) -> None:
        if t == 2 * WINDOW:
            model.enter.weight.requires_grad_(True)
            optimizer.add_param_group({"params": [model.enter.weight]})

    planted = {"enter.weight": Cause.requires_grad_off}
    return Run(model, optimizer, trainer(model, optimizer, unfreeze), windows=6, planted=planted, ends=4)


@scenario
def healthy_gradients_that_are_zero_now_and_then() -> Run:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(t: int) -> None:
        x = torch.randn(16, 40)
        model.zero_grad()
        (model(x) - x.roll(1, -1)).pow(2).mean().mul(float(t % 4 != 0)).backward()
        optimizer.step()

    return Run(model, optimizer, step)


@scenario
def healthy_scaler_that_skips_now_and_then() -> Run:
    model = Net()
    optimizer = adamw(model.parameters(), lr=1e-4, fused=True)

    def step(t: int) -> None:
        x = torch.randn(16, 40)
        model.zero_grad()
        (model(x) - x.roll(1, -1)).pow(2).mean().backward()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(float(t % 16 == 0))
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf

    return Run(model, optimizer, step)


@scenario
def a_scaler_that_skips_every_step() -> Run:
    model = Net()
    optimizer = adamw(model.parameters(), lr=1e-4, fused=True)

    def step(_: int) -> None:
        x = torch.randn(16, 40)
        model.zero_grad()
        (model(x) - x.roll(1, -1)).pow(2).mean().backward()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf

    planted = dict.fromkeys([name for name, _ in model.named_parameters()], Cause.skipped_steps)
    # skips are normal for a while: three windows in a row are not, and that is the onset
    return Run(model, optimizer, step, windows=5, planted=planted, onset=3, may_alert=True)


# --- judging --------------------------------------------------------------------------------------------


def play(build: Callable[[], Run], samples: int, seed: int) -> tuple[Run, list[Report]]:
    torch.manual_seed(seed)
    run = build()
    reports: list[Report] = []
    with uw.watch(
        run.model,
        run.optimizer,
        window=WINDOW,
        samples=samples,
        seed=seed,
        averages=run.averages,
        sinks=[reports.append],
    ) as watch:
        for t in range(run.windows * WINDOW):
            run.step(t)
        watch.flush()
    return run, reports


def verdicts(report: Report) -> dict[str, tuple[Health, Cause | None]]:
    found = {}
    for t in report.tensors:
        found[t.name] = t.health, t.cause
        for name, a in t.accumulators.items():
            found[f"{t.name}/{name}"] = a.health, a.cause
    return found


def mistakes(run: Run, reports: list[Report]) -> list[str]:
    """What is wrong with the verdicts, in words; none is as it should be."""
    wrong = []
    windows = [verdicts(report) for report in reports]
    if len(windows) < run.windows:
        return [f"{len(windows)} reports of {run.windows} windows"]
    for name, cause in run.planted.items():
        seen = [window[name] for window in windows[run.onset - 1 : run.onset + 1] if name in window]
        if not any(found is cause and health is not Health.healthy for health, found in seen):
            wrong.append(f"missed {cause} of {name}: {[(str(h), str(c)) for h, c in seen]}")
    for i, window in enumerate(windows, 1):
        is_on = run.onset <= i and not (run.ends and i >= run.ends)
        for name, (health, cause) in window.items():
            if health in BAD and not (is_on and cause is run.planted.get(name)):
                is_fading = run.ends and i >= run.ends - 1 and name in run.planted and i < run.ends
                if not is_fading and not (run.onset <= i < run.ends and name in run.planted):
                    wrong.append(f"window {i}: {name} called {health} ({cause})")
    if all(cause in QUIET for cause in run.planted.values()):
        for name, (health, cause) in windows[-1].items():
            if health is Health.unknown and cause is None and "/" not in name and name not in run.unknown:
                wrong.append(f"last window: {name} is unknown")
    warned = {Level.warn, Level.error}
    for i, report in enumerate(reports, 1):
        for alert in report.alerts:
            if alert.level in warned and not run.may_alert:
                is_planted = any(alert.cause is c and c not in QUIET for c in run.planted.values())
                if not is_planted or i < run.onset:
                    wrong.append(f"window {i}: false alarm {alert.title!r}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, nargs="+", default=[256])
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    table: dict[str, Counter[str]] = {}
    wrong = total = runs = 0
    started = time.monotonic()
    for samples in given.samples:
        for seed in range(given.seeds):
            for name, build in SCENARIOS.items():
                if given.only not in name:
                    continue
                run, reports = play(build, samples, seed)
                found = mistakes(run, reports)
                runs += 1
                total += sum(len(verdicts(report)) for report in reports)
                wrong += len(found)
                row = table.setdefault(name, Counter())
                row["wrong" if found else "right"] += 1
                for line in found[:5]:
                    print(f"{name} (samples {samples}, seed {seed}): {line}", flush=True)
    print(f"{'scenario':48} {'right':>6} {'wrong':>6}")
    for name, row in table.items():
        print(f"{name:48} {row['right']:6} {row['wrong']:6}")
    print(f"{runs} runs, {total} verdicts, {wrong} wrong; {time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
