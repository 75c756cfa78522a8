"""Sums of gradients against FP64 sums of the same contributions. Hooks: few, for few steps, and gone afterwards."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import update_watch as uw
from update_watch.measure.accumulators import gradient_accumulation as accumulation
from update_watch.measure.watched_optimizer import Watched
from update_watch.report import AccumulatorReport, Cause, Health, Report

Contribution = Callable[[int, tuple[int, ...]], Tensor]
RNG = torch.Generator()


def noise(i: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=RNG)


def drift(i: int, shape: tuple[int, ...]) -> Tensor:
    """All of one sign: the sum grows beyond what a contribution can move."""
    return 1 + 0.3 * torch.randn(shape, generator=RNG)


def falling(i: int, shape: tuple[int, ...]) -> Tensor:
    """The first is far larger than all that follow: nearly all of those are lost."""
    return (1.0 if i == 0 else 1 / 400) * (1 + torch.rand(shape, generator=RNG))


def parameters(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in sizes]


def hooks(params: Any) -> int:
    """Those on gradients, but for the few that only count backward passes (`hooks.backward_passes`)."""
    found = [
        hook
        for p in params
        for kind in (p._backward_hooks, p._post_accumulate_grad_hooks)
        for hook in (kind or {}).values()
    ]
    return sum("BackwardPasses" not in getattr(hook, "__qualname__", "") for hook in found)


class Truth:
    """What autograd does to the gradients of all elements, in FP64."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.sums = torch.zeros(len(params), 4, dtype=torch.float64)
        self.whole = [torch.zeros(p.shape, dtype=torch.float64) for p in params]

    def backward(self, contributions: list[Tensor]) -> None:
        before = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.params]
        backward(self.params, contributions)
        for i, (p, c, b) in enumerate(zip(self.params, contributions, before, strict=True)):
            assert p.grad is not None
            c64, applied = c.double(), p.grad.double() - b.double()
            lost = (c64 != 0) & (applied == 0)
            self.sums[i] += torch.stack([(applied * c64).sum(), (c64 * c64).sum(), (c64 != 0).sum(), lost.sum()])
            self.whole[i] += c64

    def numbers(self, i: int) -> list[float]:
        """Efficiency, that of the whole sum, lost fraction."""
        dot, want, wanted, lost = self.sums[i].tolist()
        grad, whole = self.params[i].grad, self.whole[i]
        assert grad is not None
        return [dot / want, float((grad.double() * whole).sum() / whole.square().sum()), lost / wanted]


def backward(params: list[nn.Parameter], contributions: list[Tensor]) -> None:
    """A backward pass that contributes these gradients."""
    torch.stack([(p * c).sum() for p, c in zip(params, contributions, strict=True)]).sum().backward()


def accumulate(
    params: list[nn.Parameter],
    k: int,
    contribution: Contribution = noise,
    steps: int = 3,
    each: Callable[[int, int], Any] = lambda step, i: None,
    before: Callable[[int], Any] = lambda step: None,
    truth: Truth | None = None,
    optimizer: Any = None,
    set_to_none: bool = True,
) -> Report:
    """Train with `k` micro-batches per step. The third step is the first that is looked at."""
    RNG.manual_seed(0)
    optimizer = torch.optim.SGD(params, lr=1e-3) if optimizer is None else optimizer
    with uw.watch([(f"p{i}", p) for i, p in enumerate(params)], optimizer, window=steps) as watch:
        for step in range(steps):
            optimizer.zero_grad(set_to_none=set_to_none)
            for i in range(k):
                each(step, i)
                given = [contribution(i, tuple(p.shape)).to(p.dtype) for p in params]
                if truth is not None and step == 2:
                    truth.backward(given)
                else:
                    backward(params, given)
            before(step)
            optimizer.step()
        report = watch.flush()
    assert report is not None
    assert hooks(params) == 0
    return report


def summed(report: Report, i: int = 0) -> AccumulatorReport:
    return report.tensors[i].accumulators["grad"]


def shown(found: AccumulatorReport) -> list[float | None]:
    return [found.efficiency, found.displacement_efficiency, found.lost_fraction]


# of every contribution few and many, of every number one; the others with the slow tests
COMMON = {
    *((k, one, torch.bfloat16) for k in (2, 16) for one in (noise, drift, falling)),
    *((16, one, torch.float16) for one in (noise, drift, falling)),
    *((3, noise, torch.float16), (64, drift, torch.bfloat16), (150, falling, torch.bfloat16)),
}


@pytest.mark.parametrize(
    ("k", "contribution", "dtype"),
    [
        pytest.param(*one, id=f"{one[0]}-{one[1].__name__}-{one[2]}", marks=[pytest.mark.slow] * (one not in COMMON))
        for one in itertools.product([2, 3, 16, 64, 150], [noise, drift, falling], [torch.bfloat16, torch.float16])
    ],
)
def test_the_numbers_are_those_of_all_contributions_in_fp64(
    k: int, contribution: Contribution, dtype: torch.dtype
) -> None:
    params = parameters(48, 4096, dtype=dtype)
    truth = Truth(params)
    report = accumulate(params, k, contribution, truth=truth)
    assert shown(summed(report)) == pytest.approx(truth.numbers(0), abs=1e-4)  # every element is looked at
    # 64 of 4,096 elements are looked at: the standard error of a share of 0.4 is 0.06
    assert shown(summed(report, 1))[:2] == pytest.approx(truth.numbers(1)[:2], abs=0.03)
    assert shown(summed(report, 1))[2] == pytest.approx(truth.numbers(1)[2], abs=0.06)
    assert summed(report).wanted_fraction == 1.0
    if contribution is falling and dtype is torch.bfloat16:
        assert truth.numbers(0)[2] > 0.3


@pytest.mark.slow
def test_lost_micro_batches_are_named_with_cause_and_cure() -> None:
    params = parameters(48, 4096)
    truth = Truth(params)
    report = accumulate(params, 700, drift, steps=8, truth=truth)
    found = summed(report)
    assert (found.health, found.cause) == (Health.stalling, Cause.accumulation_rounding)
    efficiency, lost = truth.numbers(0)[1:]
    assert efficiency < 0.8
    assert found.advice == (
        f"Gradients summed in BF16 lose micro-batches (efficiency {efficiency:.2f}, {100 * lost:.0f}% lost); accumulate"
        " gradients in FP32 (model.float() and torch.autocast), or use fewer and larger micro-batches; the"
        " summed gradient then grows."
    )
    assert [a.cause for a in report.alerts] == [Cause.accumulation_rounding]


@pytest.mark.parametrize("k", [2, 64, pytest.param(700, marks=pytest.mark.slow)])
def test_noise_is_never_called_lost(k: int) -> None:
    report = accumulate(parameters(48, 4096), k, noise, steps=8)
    assert [summed(report, i).health for i in (0, 1)] == [Health.healthy] * 2


def test_contributions_that_cancel_are_never_called_lost() -> None:
    """The last contribution takes back what the others gave: of the sum nothing is left but what rounding has done."""
    total: dict[tuple[int, ...], Tensor] = {}

    def cancelling(i: int, shape: tuple[int, ...]) -> Tensor:
        given = drift(i, shape).bfloat16() if i < 63 else 1e-2 - total[shape]
        total[shape] = given.float() + (total[shape] if i else 0)
        return given

    report = accumulate(parameters(48, 4096), 64, cancelling, steps=8)
    assert summed(report).displacement_efficiency is None
    assert [summed(report, i).health for i in (0, 1)] == [Health.healthy] * 2


def test_gradients_in_fp32_are_left_alone() -> None:
    params = parameters(48, 4096, dtype=torch.float32)
    counts: list[int] = []
    report = accumulate(params, 8, drift, steps=8, each=lambda step, i: counts.append(hooks(params)))
    assert set(counts) == {0}
    assert all("grad" not in t.accumulators for t in report.tensors)


def test_gradients_are_asked_for_their_format_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(accumulation, "_is_eligible", lambda row: asked.append(row))
    accumulate(parameters(48, 4096), 1, steps=300)
    assert len(asked) == 2 * 2  # two parameters, twice in 300 steps


def test_one_backward_pass_per_step_is_counted_once_and_then_costs_nothing() -> None:
    params = parameters(48, 4096)
    counts: list[int] = []
    report = accumulate(params, 1, steps=200, each=lambda step, i: counts.append(hooks(params)))
    assert counts == [0, 1, *[0] * 198]
    assert all("grad" not in t.accumulators for t in report.tensors)


def test_few_parameters_are_looked_at_in_few_steps() -> None:
    params = parameters(*[128] * 20)
    counts: list[int] = []
    report = accumulate(params, 2, steps=80, each=lambda step, i: counts.append(hooks(params)))
    looked = [step for step in range(80) if max(counts[2 * step : 2 * step + 2]) > 1]
    assert looked == [2, 34, 66]
    assert max(counts) == 17  # two each, and one that counts
    assert sum("grad" in t.accumulators for t in report.tensors) == 8


def test_a_trainer_that_begins_to_accumulate_later_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulation, "_RECOUNT", 10)
    params = parameters(48)
    optimizer = torch.optim.SGD(params, lr=1e-3)
    with uw.watch([("p", params[0])], optimizer, window=20) as watch:
        for step in range(20):
            optimizer.zero_grad()
            for i in range(1 if step < 8 else 4):
                backward(params, [noise(i, (48,)).bfloat16()])
            optimizer.step()
        report = watch.flush()
    assert report is not None
    assert summed(report).health is Health.healthy


@pytest.mark.parametrize("set_to_none", [True, False], ids=["None", "zeros"])
@pytest.mark.parametrize("contribution", [noise, drift, falling])
def test_gradients_may_be_set_to_zero_or_none(set_to_none: bool, contribution: Contribution) -> None:
    params = parameters(48)
    truth = Truth(params)
    report = accumulate(params, 16, contribution, truth=truth, set_to_none=set_to_none)
    assert shown(summed(report)) == pytest.approx(truth.numbers(0), abs=1e-4)


def test_clipping_and_unscaling_after_the_sum_is_no_loss() -> None:
    params = parameters(48, 4096)

    def finish(step: int) -> None:
        nn.utils.clip_grad_norm_(params, 1e-3)

    report = accumulate(params, 16, drift, before=finish)
    assert shown(summed(report))[:2] == pytest.approx([1, 1], abs=0.02)


@pytest.mark.parametrize("how", ["clipped", "zeroed", "none"])
def test_what_somebody_does_to_the_sum_in_between_is_no_loss(how: str) -> None:
    """Half way through, the gradient is written to by somebody else."""
    params = parameters(48)

    def interfere(step: int, i: int) -> None:
        grad = params[0].grad
        if i == 8 and grad is not None:
            if how == "none":
                params[0].grad = None
            else:
                grad.mul_(0.01 if how == "clipped" else 0.0)

    report = accumulate(params, 16, drift, each=interfere)
    assert shown(summed(report))[:2] == pytest.approx([1, 1], abs=0.02)


def test_parameters_without_gradients_and_frozen_ones_do_no_harm() -> None:
    params = parameters(48, 48, 48)
    params[1].requires_grad_(False)
    params[1].grad = torch.ones_like(params[1])  # from before it was frozen
    optimizer = torch.optim.SGD(params, lr=1e-3)
    with uw.watch([(f"p{i}", p) for i, p in enumerate(params)], optimizer, window=40) as watch:
        for step in range(40):
            params[0].grad = params[2].grad = None
            params[0].requires_grad_(step != 34)  # frozen after the hooks were put on
            for i in range(4):
                # the third is used by the first pass only
                used = [params[0], params[2]] if i == 0 else [params[0]]
                if step == 34:
                    used = [params[2]] if i == 0 else []
                if used:
                    backward(used, [drift(i, (48,)).bfloat16() for _ in used])
            optimizer.step()
        report = watch.flush()
    assert report is not None and watch._tap.error is None
    assert hooks(params) == 0
    assert ["grad" in t.accumulators for t in report.tensors] == [True, False, False]


def test_sparse_gradients_are_left_alone() -> None:
    embedding = nn.Embedding(32, 8, sparse=True).to(torch.bfloat16)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    watched = Watched(optimizer, 0, {}, 64, random.Random(0), {})
    for _ in range(4):
        optimizer.zero_grad()
        embedding(torch.tensor([1, 2, 3])).sum().backward()
        watched.accumulation.before(watched.rows)
        optimizer.step()
        watched.accumulation.after()
        assert hooks(embedding.parameters()) == 0


def test_a_scaler_s_overflow_in_one_step_leaves_the_other_steps_numbers() -> None:
    params = parameters(48, dtype=torch.float16)

    def overflowing(i: int, shape: tuple[int, ...]) -> Tensor:
        calls.append(i)
        given = drift(i, shape)
        if len(calls) == 2 * 4 + 2:  # in the first step that is looked at
            given[3] = float("inf")
        return given

    calls: list[int] = []
    report = accumulate(params, 4, overflowing, steps=40)
    assert shown(summed(report))[:2] == pytest.approx([1, 1], abs=0.01)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(24, 32), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.leave(torch.relu(self.enter(x)))
        return out


def train(net: nn.Module, watched: bool, steps: int = 40, k: int = 4, around: Any = contextlib.nullcontext) -> Any:
    """Every gradient of every step, bit by bit, and the weights."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    watch = uw.watch(net, optimizer, window=steps) if watched else None
    rng = torch.Generator().manual_seed(0)
    seen: list[Tensor] = []
    most = 0
    for _ in range(steps):
        optimizer.zero_grad()
        for i in range(k):
            with around() if i < k - 1 else contextlib.nullcontext():
                x = torch.randn(8, 24, generator=rng).bfloat16()
                (net(x) - x).square().mean().backward()
            most = max(most, hooks(net.parameters()))
        seen += [p.grad.clone() for p in net.parameters() if p.grad is not None]
        optimizer.step()
    report = None
    if watch is not None:
        report = watch.flush()
        watch.close()
    return [*seen, *(p.detach().clone() for p in net.parameters())], report, most


def test_gradients_and_weights_are_bit_identical_with_hooks() -> None:
    torch.manual_seed(0)
    net = Net().bfloat16()
    plain, _, none = train(copy.deepcopy(net), False)
    watched, report, most = train(copy.deepcopy(net), True)
    assert (none, most) == (0, 9)
    assert all(map(torch.equal, plain, watched))
    assert all(t.accumulators["grad"].health is Health.healthy for t in report.tensors)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("as_views", [True, False])
def test_ddp_accumulates_without_sync_and_averages_afterwards(process_group: None, as_views: bool) -> None:
    torch.manual_seed(0)
    net = nn.parallel.DistributedDataParallel(Net().bfloat16(), gradient_as_bucket_view=as_views)
    _, report, most = train(net, True, around=net.no_sync)
    assert most == 9
    for t in report.tensors:
        assert shown(t.accumulators["grad"])[:2] == pytest.approx([1, 1], abs=0.02)


def test_closing_takes_the_hooks_off_in_the_middle_of_a_look() -> None:
    params = parameters(48, 4096)
    optimizer = torch.optim.SGD(params, lr=1e-3)
    watch = uw.watch([("a", params[0]), ("b", params[1])], optimizer)
    for _ in range(2):
        for _ in range(3):
            backward(params, [noise(0, tuple(p.shape)).bfloat16() for p in params])
        optimizer.step()
    assert hooks(params) == 5
    watch.close()
    assert hooks(params) == 0


def test_models_are_copied_and_stored_while_hooks_are_on() -> None:
    net = Net().bfloat16()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    with uw.watch(net, optimizer):
        for _ in range(2):
            for _ in range(3):
                net(torch.randn(4, 24).bfloat16()).sum().backward()
            optimizer.step()
        assert hooks(net.parameters()) == 9
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert hooks(other.parameters()) == 0
            other(torch.randn(4, 24).bfloat16()).sum().backward()


@pytest.mark.parametrize("where", ["take", "keep"])
def test_an_error_of_ours_in_a_hook_does_not_reach_the_backward_pass(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, tensor: Tensor) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(accumulation._Look, where, fail)
    params = parameters(48, 4096)
    report = accumulate(params, 4, steps=8)
    assert all("grad" not in t.accumulators and t.efficiency is not None for t in report.tensors)


def test_a_second_order_gradient_passes_through_and_its_graph_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    right, held = accumulation._Look.keep, []

    def keep(self: accumulation._Look, param: Tensor) -> None:
        right(self, param)
        held.extend(self._held)

    monkeypatch.setattr(accumulation._Look, "keep", keep)
    params = parameters(48)
    optimizer = torch.optim.SGD(params, lr=1e-3)
    with uw.watch([("p", params[0])], optimizer, window=3) as watch:
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(3):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch warns of create_graph, once per process
                    params[0].square().sum().backward(create_graph=True)
            optimizer.step()
        report = watch.flush()
        assert watch._tap.error is None
    assert report is not None
    assert held and not any(tensor.requires_grad for tensor in held)
