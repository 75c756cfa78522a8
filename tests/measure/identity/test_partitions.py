"""Optimizers that are stepped in parts and hold flat partitions: stand-ins with the attributes the real wrappers have.

test_deepspeed.py and test_megatron.py beside it run the real ones, where they are installed.
"""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import update_watch as uw
from tests.support.watch_nets import Net, backward, batches
from update_watch.measure.identity.names import describe
from update_watch.measure.identity.partitions import Piece, sub_groups

STEPS = 24
LR = 2e-2  # a part of the updates of BF16 weights is lost


class Zero2:
    """DeepSpeedZeroOptimizer: a flat partition per group, of which this rank has the first `share`; stepped in turn."""

    def __init__(self, optimizer: torch.optim.Optimizer, dtype: torch.dtype, share: float = 1.0) -> None:
        self.optimizer = optimizer
        self.bit16_groups: list[list[Any]] = []
        self.single_partition_of_fp32_groups: list[Tensor] = []
        self.truth: dict[int, list[float]] = {}
        for group in optimizer.param_groups:
            params = group["params"]
            whole = torch.cat([p.detach().reshape(-1) for p in params])
            flat = whole[: int(share * whole.numel())].to(dtype).clone().requires_grad_()
            self.bit16_groups.append(params)
            self.single_partition_of_fp32_groups.append(flat)
            group["params"] = [flat]
            start = 0
            for p in params:
                held = min(p.numel(), flat.numel() - start)
                fragment = SimpleNamespace(hp_fragment=flat.detach().narrow(0, start, max(held, 0)))
                p._hp_mapping = fragment if held > 0 else None
                start = min(start + p.numel(), flat.numel())

    def give_gradient(self, i: int) -> None:
        flat = self.single_partition_of_fp32_groups[i]
        grads = torch.cat([p.grad.reshape(-1) for p in self.bit16_groups[i]])
        flat.grad = grads[: flat.numel()].to(flat.dtype)

    def step_part(self, i: int) -> None:
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [groups[i]]
        self.optimizer.step()
        self.optimizer.param_groups = groups

    @torch.no_grad()
    def step(self) -> None:
        for i, flat in enumerate(self.single_partition_of_fp32_groups):
            self.give_gradient(i)
            before, intended = flat.detach().double().clone(), -LR * flat.grad.double()  # type: ignore[union-attr]
            self.step_part(i)
            flat.grad = None
            self._count(i, flat.detach().double() - before, intended)
            self._copy_back(i)

    def _copy_back(self, i: int) -> None:
        """What other ranks hold stays as it is."""
        flat, start = self.single_partition_of_fp32_groups[i], 0
        for p in self.bit16_groups[i]:
            held = max(min(p.numel(), flat.numel() - start), 0)
            p.reshape(-1)[:held].copy_(flat[start : start + held])
            start += held

    def _count(self, i: int, stored: Tensor, intended: Tensor) -> None:
        start = 0
        for p in self.bit16_groups[i]:
            piece = slice(start, start + p.numel())
            sums = self.truth.setdefault(id(p), [0.0, 0.0])
            sums[0] += float((stored[piece] * intended[piece]).sum())
            sums[1] += float((intended[piece] * intended[piece]).sum())
            start += p.numel()


class Zero3(Zero2):
    """DeepSpeedZeroOptimizer_Stage3: a flat tensor per sub-group, in no group but while it is stepped."""

    def __init__(self, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> None:
        super().__init__(optimizer, dtype)
        self.fp32_partitioned_groups_flat = self.single_partition_of_fp32_groups
        self.fp16_groups = self.bit16_groups
        for group, params, flat in zip(
            optimizer.param_groups, self.fp16_groups, self.fp32_partitioned_groups_flat, strict=True
        ):
            assert group["params"] == [flat]
            group["params"] = []
            for p in params:
                del p._hp_mapping
                p.ds_tensor = SimpleNamespace(ds_numel=p.numel())
                p.ds_shape, p.ds_numel, p.ds_zero_partition_rank = p.shape, p.numel(), 0

    def step_part(self, i: int) -> None:
        group = self.optimizer.param_groups[i]
        group["params"] = [self.fp32_partitioned_groups_flat[i]]
        self.optimizer.step()
        group["params"] = []


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": matrices}, {"params": [p for p in model.parameters() if p.dim() == 1]}]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(two_groups(model), lr=LR)


def run(model: nn.Module, wrapper: Any, watched: Any = None, **options: Any) -> list[uw.Report]:
    """`STEPS` steps; the reports, if `watched` is given."""
    reports: list[uw.Report] = []
    watch = None if watched is None else uw.watch(model, watched, sinks=[reports.append], **options)
    for x in batches(STEPS, torch.bfloat16):
        model.zero_grad()
        backward(model, x)
        wrapper.step()
    if watch is not None:
        watch.close()
    return reports


@pytest.mark.parametrize("stage", [Zero2, Zero3])
def test_every_parameter_in_a_partition_is_reported_by_itself(stage: Any) -> None:
    """BF16 partitions, in which updates are lost: each parameter's efficiency is that of all its elements."""
    model = Net(torch.bfloat16)
    wrapper = stage(sgd(model), torch.bfloat16)
    (report,) = run(model, wrapper, wrapper, window=STEPS)
    names = {name: p for name, p in model.named_parameters()}
    assert [t.name for t in report.tensors] == list(names)
    assert (report.step, report.window) == (STEPS, STEPS)
    for t in report.tensors:
        p = names[t.name]
        assert (t.shape, t.numel, t.dtype) == (tuple(p.shape), p.numel(), "bfloat16")
        assert t.optimizer_group == ("0/0" if p.dim() > 1 else "0/1")
        dot, want = wrapper.truth[id(p)]
        assert t.efficiency == pytest.approx(dot / want, abs=0.03), t.name
    assert min(t.efficiency or 0 for t in report.tensors) < 0.9  # there was something to see


@pytest.mark.parametrize("stage", [Zero2, Zero3])
def test_windows_count_all_parts_of_a_step_as_one(stage: Any) -> None:
    """And each part has the rule of its own group."""
    model = Net(torch.bfloat16)
    groups = two_groups(model)
    groups[1]["amsgrad"] = True
    wrapper = stage(torch.optim.AdamW(groups, lr=1e-4), torch.float32)
    reports = run(model, wrapper, wrapper, window=8)
    assert [(r.step, r.window) for r in reports] == [(8, 8), (16, 8), (24, 8)]
    for report in reports:
        assert {(t.name, str(t.health)) for t in report.tensors} == {
            (n, "healthy") for n, _ in model.named_parameters()
        }


@pytest.mark.parametrize("stage", [Zero2, Zero3])
def test_watching_parts_leaves_training_as_it_is(stage: Any) -> None:
    seen = []
    for is_watched in (False, True):
        model = Net(torch.bfloat16)
        wrapper = stage(sgd(model), torch.bfloat16)
        run(model, wrapper, wrapper if is_watched else None)
        seen.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *seen))


def test_what_lies_in_other_ranks_partitions_is_left_to_them() -> None:
    model = Net(torch.bfloat16)
    wrapper = Zero2(sgd(model), torch.float32, share=0.5)
    (report,) = run(model, wrapper, wrapper, window=STEPS)
    assert [t.name for t in report.tensors] == ["enter.weight", "enter.bias"]
    assert {str(t.health) for t in report.tensors} == {"healthy"}


def test_zero_3_without_its_wrapper_is_unknown_and_says_what_to_give() -> None:
    model = Net(torch.bfloat16)
    wrapper = Zero3(sgd(model), torch.float32)
    (report,) = run(model, wrapper, wrapper.optimizer, window=STEPS)
    found = {t.name: (str(t.health), t.advice) for t in report.tensors}
    assert [found.pop(name)[0] for name in ("group0.param0", "part1.group1.param0")] == ["healthy"] * 2
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert all(health == "unknown" and "engine.optimizer" in advice for health, advice in found.values())


def test_zero_3_is_found_at_its_first_step_by_what_its_parameters_know() -> None:
    model = Net(torch.bfloat16)
    wrapper = Zero3(sgd(model), torch.bfloat16)
    for p in model.parameters():
        p._z3_optimizer = wrapper  # type: ignore[attr-defined]
    reports: list[uw.Report] = []
    with uw.watch(model, sinks=[reports.append], window=STEPS):
        run(model, wrapper)
    (report,) = reports
    assert (report.step, len(report.tensors)) == (STEPS, len(list(model.parameters())))
    for t in report.tensors:
        dot, want = wrapper.truth[id(dict(model.named_parameters())[t.name])]
        assert t.efficiency == pytest.approx(dot / want, abs=0.03), t.name


def test_padding_behind_a_piece_is_nobodys() -> None:
    params = [nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(4))]
    for p in params:  # the second of two ranks
        half = (p.numel() + 1) // 2
        p.ds_tensor = SimpleNamespace(ds_numel=half)  # type: ignore[attr-defined]
        p.ds_shape, p.ds_numel, p.ds_zero_partition_rank = p.shape, p.numel(), 1  # type: ignore[attr-defined]
    wrapper = SimpleNamespace(fp32_partitioned_groups_flat=[torch.zeros(8)], fp16_groups=[params])
    pieces, absent = sub_groups(wrapper, {id(p): (name,) for p, name in zip(params, "abc", strict=True)})
    assert list(pieces.values()) == [[Piece(("a",), (3, 3), 0, 4), Piece(("c",), (4,), 6, 2)]]
    assert absent == {id(params[1])}


def test_a_parameter_that_zero_3_has_emptied_keeps_its_shape() -> None:
    param = nn.Parameter(torch.empty(0))
    param.ds_shape = torch.Size([5, 2])  # type: ignore[attr-defined]
    found = describe(param, ("a",))
    assert (found["shape"], found["numel"]) == ((5, 2), 10)


class Distributed:
    """Megatron's DistributedOptimizer: FP32 shards that say of no gradient, views of what is FP32 already."""

    def __init__(self, optimizer: torch.optim.Optimizer, absent: Tensor) -> None:
        self.optimizer = optimizer
        self.is_stub_optimizer = False
        self.shards: list[tuple[Any, Tensor]] = []
        places: dict[Tensor, tuple[int, int, int]] = {}
        self.buffers = [SimpleNamespace(param_index_map=places)]
        for group in optimizer.param_groups:
            shards = []
            for p in group["params"]:
                places[p] = (0, p.numel(), 0)
                if p.dtype == torch.bfloat16:
                    p.main_param, p.main_param_sharded = None, True
                if p is absent:
                    continue
                half = p.view(-1)[p.numel() // 2 :]
                if p.dtype == torch.bfloat16:
                    half = p.main_param = half.detach().clone().float()
                shards.append(half)
                self.shards.append((p, half))
            group["params"] = shards

    @torch.no_grad()
    def step(self) -> None:
        for p, half in self.shards:
            half.grad = p.grad.reshape(-1)[p.numel() // 2 :].float()
        self.optimizer.step()
        for p, half in self.shards:
            p.view(-1)[p.numel() // 2 :].copy_(half)


def test_megatrons_chained_and_distributed_optimizers_name_what_they_step() -> None:
    model = Net(torch.bfloat16)
    model.norm.float()
    model.norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    model.norm.register_forward_hook(lambda _, inputs, out: out.bfloat16())
    matrices = Distributed(torch.optim.AdamW([model.enter.weight, model.leave.weight], lr=1e-4), model.leave.weight)
    vectors = Distributed(torch.optim.AdamW([model.norm.weight, model.enter.bias], lr=1e-4), model.leave.weight)
    stub = SimpleNamespace(is_stub_optimizer=True, optimizer=None)
    chained = SimpleNamespace(
        chained_optimizers=[matrices, vectors, stub], step=lambda: (matrices.step(), vectors.step())
    )
    (report,) = run(model, chained, chained, window=STEPS)
    # of leave.weight another rank holds all that is stepped
    assert {t.name: (t.shape, str(t.health), t.optimizer_group) for t in report.tensors} == {
        "enter.weight": ((64, 48), "healthy", "0/0"),
        "enter.bias": ((64,), "healthy", "1/0"),
        "norm.weight": ((64,), "healthy", "1/0"),
    }
    assert {t.dtype for t in report.tensors} == {"float32"}


def test_whole_masters_that_require_no_gradient_are_not_frozen() -> None:
    """Megatron's Float16OptimizerWithFloat16Params makes them so."""
    model = Net(torch.bfloat16)
    masters = [p.detach().clone().float() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-4)
    with uw.watch(model, optimizer, window=8) as watch:
        for x in batches(8, torch.bfloat16):
            model.zero_grad()
            backward(model, x)
            for p, master in zip(model.parameters(), masters, strict=True):
                master.grad = p.grad.float()  # type: ignore[union-attr]
            optimizer.step()
            with torch.no_grad():
                for p, master in zip(model.parameters(), masters, strict=True):
                    p.copy_(master)
        report = watch.flush()
    assert report is not None
    assert {(t.name, str(t.health)) for t in report.tensors} == {(n, "healthy") for n, _ in model.named_parameters()}


def test_parts_that_are_stepped_no_more_are_forgotten() -> None:
    """Somebody replaces all parameters of an optimizer."""
    model = Net()
    optimizer = torch.optim.SGD([model.enter.weight], lr=0.1)
    reports: list[uw.Report] = []
    with uw.watch(model, optimizer, window=8, sinks=[reports.append]) as watch:
        for i, x in enumerate(batches(24)):
            if i == 8:
                optimizer.param_groups[0]["params"] = [model.leave.weight]
            model.zero_grad()
            backward(model, x)
            optimizer.step()
        watch.flush()
        assert len(watch._model.watched) == 1
    held = [[t.name for t in r.tensors if t.optimizer_group] for r in reports]
    assert held == [["enter.weight"], ["leave.weight"], ["leave.weight"]]


def test_an_optimizer_that_gains_a_group_stays_one_part() -> None:
    model = Net()
    optimizer = torch.optim.SGD([model.enter.weight], lr=0.1)
    with uw.watch(model, optimizer, window=8) as watch:
        for i, x in enumerate(batches(8)):
            if i == 4:
                optimizer.add_param_group({"params": [model.leave.weight]})
            model.zero_grad()
            backward(model, x)
            optimizer.step()
        assert len(watch._model.watched) == 1
        report = watch.flush()
    assert report is not None
    assert {t.name for t in report.tensors if t.optimizer_group} == {"enter.weight", "leave.weight"}


class Native(torch.optim.SGD):
    """Keeps something outside Python, freed with the optimizer, as DeepSpeedCPUAdam does."""

    ended: list[int] = []

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.number = 7

    def __del__(self) -> None:
        self.ended.append(self.number)


def test_an_optimizer_with_a_finalizer_is_never_copied() -> None:
    """The end of a copy would free what the real one steps with: DeepSpeedCPUAdam would crash."""
    model = Net()
    optimizer = Native(model.parameters(), lr=0.1)
    Native.ended.clear()
    with uw.watch(model, optimizer, window=4) as watch:
        for x in batches(4):
            model.zero_grad()
            backward(model, x)
            optimizer.step()
        report = watch.flush()
    gc.collect()
    assert Native.ended == []
    assert optimizer.number == 7
    assert report is not None
    assert {str(t.health) for t in report.tensors} == {"unknown"}
    assert all("finalizer" in t.advice for t in report.tensors)


def test_an_unknown_shard_that_requires_no_gradient_is_not_called_frozen() -> None:
    model = nn.Linear(6, 4, bias=False).bfloat16()
    model.weight.main_param = shard = torch.randn(12)  # type: ignore[attr-defined]
    optimizer = Native([shard], lr=0.1)
    with uw.watch(model, optimizer, window=2) as watch:
        for _ in range(2):
            shard.grad = torch.randn(12)
            optimizer.step()
        report = watch.flush()
    assert report is not None
    assert [(t.name, str(t.health)) for t in report.tensors] == [("weight", "unknown")]
