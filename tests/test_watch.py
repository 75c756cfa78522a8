"""The watch on real training steps: its numbers against a full comparison, its names for what is wrong, its manners."""

from __future__ import annotations

import importlib
import io
import threading
import time
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import update_watch as uw
from tests.support.watch_nets import RULES, Full, Make, Net, Rule, backward, batches, train
from update_watch.measure.watched_optimizer import Watched
from update_watch.report import Cause, Health, Report, TensorReport

BF16, FP16 = torch.bfloat16, torch.float16


def tensors(report: Report | None) -> dict[str, TensorReport]:
    assert report is not None
    return {t.name: t for t in report.tensors}


def adamw(params: Any, lr: float = 1e-3, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=lr, **options)


# --- truth -------------------------------------------------------------------------------------------


# learning rates at which part of the updates is lost, and nearly all
RATES = {"sgd-momentum": {BF16: (3e-3, 1e-4), FP16: (3e-4, 1e-5)}}
USUAL = {BF16: (3e-4, 1e-5), FP16: (3e-5, 1e-6)}


@pytest.mark.parametrize(
    "which", [pytest.param(0, id="partly"), pytest.param(1, id="nearly-all", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_efficiency_and_lost_fraction_are_those_of_all_elements(name: str, dtype: torch.dtype, which: int) -> None:
    make, rule = RULES[name]
    model = Net(dtype)
    optimizer = make(model.parameters(), RATES.get(name, USUAL)[dtype][which])
    train(model, optimizer, 5, seed=1)  # past the first steps, which are all alike
    full = Full(model, optimizer, rule)
    with uw.watch(model, optimizer, window=10_000) as watch:
        for x in batches(96, dtype):
            model.zero_grad()
            backward(model, x)
            full.step()
        found = tensors(watch.flush())
    assert list(found) == [n for n, _ in model.named_parameters()]
    for t in found.values():
        assert t.efficiency == pytest.approx(full.efficiency(t.name), abs=0.03), t.name
        assert t.lost_fraction == pytest.approx(full.lost_fraction(t.name), abs=0.03), t.name
    lost = [full.lost_fraction(n) for n in ("enter.weight", "leave.weight")]
    assert any(0.1 < x < 0.95 for x in lost) if which == 0 else max(lost) > 0.6  # meta: what the names promise


@pytest.mark.parametrize(("make", "rule"), RULES.values(), ids=RULES.keys())
def test_fp32_training_is_healthy_and_its_efficiency_one(make: Make, rule: Rule) -> None:
    model = Net()
    optimizer = make(model.parameters(), 1e-4)
    with uw.watch(model, optimizer, window=10_000) as watch:
        train(model, optimizer, 30)
        report = watch.flush()
    assert report is not None and report.health is Health.healthy
    for t in report.tensors:
        assert t.health is Health.healthy and t.cause is None
        assert t.efficiency == pytest.approx(1, abs=0.005) and (t.lost_fraction or 0) < 0.01


def test_norms_at_one_are_stalled_by_the_rounding_of_the_weight() -> None:
    model = Net(BF16)
    optimizer = adamw(model.parameters(), 1e-4)
    with uw.watch(model, optimizer, window=32) as watch:
        train(model, optimizer, 32)
        norm = tensors(watch.flush())["norm.weight"]
    assert norm.health is Health.stalled and norm.cause is Cause.weight_rounding
    assert norm.efficiency == 0 and norm.lost_fraction == 1 and norm.applied_ratio == 0
    assert norm.critical_lr is not None and norm.critical_lr > 1e-3
    assert norm.dtype == "bfloat16" and norm.layer == "norm" and norm.numel == 64


# --- what is wrong, by name --------------------------------------------------------------------------


class Odd(Net):
    """A net with a parameter that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.ones(300))


def _off(model: Odd) -> Any:
    model.extra.requires_grad_(False)
    return adamw(model.parameters())


def _off_and_left_out(model: Odd) -> Any:
    model.extra.requires_grad_(False)
    return adamw([p for p in model.parameters() if p.requires_grad])


def _left_out(model: Odd) -> Any:
    return adamw([p for p in model.parameters() if p is not model.extra])


def _zero_rate(model: Odd) -> Any:
    rest = [p for p in model.parameters() if p is not model.extra]
    return adamw([{"params": rest}, {"params": [model.extra], "lr": 0.0}])


WRONG = [
    pytest.param(_off, None, Health.frozen, Cause.requires_grad_off, id="off"),
    pytest.param(_off_and_left_out, None, Health.frozen, Cause.requires_grad_off, id="off-and-left-out"),
    pytest.param(_left_out, 1.0, Health.idle, Cause.not_in_optimizer, id="left-out"),
    pytest.param(lambda m: adamw(m.parameters()), None, Health.idle, Cause.no_gradient, id="no-gradient"),
    pytest.param(lambda m: adamw(m.parameters()), 0.0, Health.idle, Cause.zero_gradient, id="zero-gradient"),
    pytest.param(_zero_rate, 1.0, Health.idle, Cause.zero_learning_rate, id="zero-rate"),
    pytest.param(lambda m: adamw(m.parameters()), float("nan"), Health.broken, Cause.non_finite, id="nan"),
    pytest.param(lambda m: adamw(m.parameters()), float("inf"), Health.broken, Cause.non_finite, id="inf"),
]


@pytest.mark.parametrize(("make", "grad", "health", "cause"), WRONG)
def test_what_is_wrong_with_one_tensor_is_named_and_the_others_stay_healthy(
    make: Any, grad: float | None, health: Health, cause: Cause
) -> None:
    model = Odd()
    optimizer = make(model)
    with uw.watch(model, optimizer, window=16) as watch:
        for x in batches(16):
            model.zero_grad()
            backward(model, x)
            if grad is not None:
                model.extra.grad = torch.full_like(model.extra, grad)
            optimizer.step()
        found = tensors(watch.flush())
    extra = found.pop("extra")
    assert (extra.health, extra.cause) == (health, cause)
    assert extra.advice
    assert {t.health for t in found.values()} == {Health.healthy}


def test_a_rule_that_cannot_be_replayed_is_unknown_with_its_reason() -> None:
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=2)
    with uw.watch(model, optimizer, window=8) as watch:
        for x in batches(8):

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                return backward(model, x)

            optimizer.step(closure)  # type: ignore[arg-type]  # torch wants a float
        found = tensors(watch.flush())
    for t in found.values():
        assert (t.health, t.cause) == (Health.unknown, Cause.not_replayable)
        assert len(t.advice) > 20 and t.efficiency is None


# --- optimizers as people use them; in FP32 a replay that mistakes a setting has an efficiency off 1 ----


def all_exact(report: Report | None, *names: str) -> None:
    found = tensors(report)
    for name in names or tuple(found):
        assert found[name].efficiency == pytest.approx(1, abs=0.005), (name, found[name].advice)


def test_several_optimizers_are_watched_in_one_report() -> None:
    model = Net()
    one = adamw(model.enter.parameters())
    two = torch.optim.SGD([*model.norm.parameters(), *model.leave.parameters()], lr=1e-2, momentum=0.9)
    with uw.watch(model, [one, two], window=16) as watch:
        train(model, [one, two], 16)
        report = watch.flush()
    all_exact(report)
    groups = {n: t.optimizer_group for n, t in tensors(report).items()}
    assert groups == {"enter.weight": "0/0", "enter.bias": "0/0", "norm.weight": "1/0", "leave.weight": "1/0"}
    assert [t.lr for t in tensors(report).values()] == [1e-3, 1e-3, 1e-2, 1e-2]


def test_groups_have_their_own_learning_rate() -> None:
    model = Net(BF16)
    slow, fast = [model.enter.weight], [model.leave.weight]
    optimizer = adamw([{"params": slow, "lr": 1e-7}, {"params": fast, "lr": 3e-2}])
    with uw.watch(model, optimizer, window=16) as watch:
        train(model, optimizer, 16)
        found = tensors(watch.flush())
    assert found["enter.weight"].health is Health.stalled and found["leave.weight"].health is Health.healthy
    assert (found["enter.weight"].lr, found["leave.weight"].lr) == (1e-7, 3e-2)
    assert found["leave.weight"].optimizer_group == "0/1"
    assert found["norm.weight"].cause is Cause.not_in_optimizer


def test_a_group_added_in_mid_run_is_measured_from_then_on() -> None:
    model = Net()
    optimizer = adamw(model.enter.parameters())
    with uw.watch(model, optimizer, window=16) as watch:
        train(model, optimizer, 10)
        optimizer.add_param_group({"params": [model.leave.weight], "lr": 1e-2, "weight_decay": 0.3})
        train(model, optimizer, 22)
        report = watch.flush()
    assert report is not None and report.step == 32
    all_exact(report, "enter.weight", "enter.bias", "leave.weight")
    assert tensors(report)["leave.weight"].lr == 1e-2
    assert tensors(report)["norm.weight"].cause is Cause.not_in_optimizer


def test_a_state_loaded_in_mid_run_is_the_one_replayed() -> None:
    model = Net()
    optimizer = adamw(model.parameters())
    other = Net(seed=1)
    old = adamw(other.parameters(), lr=3e-3, betas=(0.8, 0.9))
    train(other, old, 40, seed=2)
    with uw.watch(model, optimizer, window=10_000) as watch:
        train(model, optimizer, 5)
        optimizer.load_state_dict(old.state_dict())
        train(model, optimizer, 20)
        report = watch.flush()
    all_exact(report)
    assert {t.lr for t in tensors(report).values()} == {3e-3}


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_parameters_without_gradient_in_some_steps_are_replayed_at_their_own_step(implementation: str) -> None:
    model = Net()
    optimizer = adamw(model.parameters(), **{implementation: True})
    with uw.watch(model, optimizer, window=10_000) as watch:
        for i, x in enumerate(batches(24)):
            model.zero_grad()
            backward(model, x)
            if i % 3:
                model.enter.weight.grad = None
            if i < 4:
                model.leave.weight.grad = None
            optimizer.step()
        report = watch.flush()
    all_exact(report)
    assert {t.wanted_fraction for t in tensors(report).values()} == {1.0}  # of what was sampled


def test_a_tied_parameter_is_reported_once_under_all_its_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(48, 48), "b": nn.Linear(48, 48)})
    model["b"].weight = model["a"].weight
    optimizer = adamw(model.parameters())
    with uw.watch(model, optimizer, window=10_000) as watch:
        for x in batches(10):
            optimizer.zero_grad()
            model["b"](model["a"](x)).pow(2).sum().backward()
            optimizer.step()
        report = watch.flush()
    found = tensors(report)
    assert list(found) == ["a.weight", "a.bias", "b.bias"]
    assert found["a.weight"].names == ("a.weight", "b.weight")
    all_exact(report)


def test_a_schedule_is_followed_step_by_step() -> None:
    model = Net()
    optimizer = adamw(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=30)
    with uw.watch(model, optimizer, window=10_000) as watch:
        for x in batches(24):
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
            lr = optimizer.param_groups[0]["lr"]
            schedule.step()
        report = watch.flush()
    all_exact(report)
    assert tensors(report)["enter.weight"].lr == lr


def test_gradients_made_in_a_closure_are_those_replayed() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with uw.watch(model, optimizer, window=10_000) as watch:
        for x in batches(12):

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                return backward(model, x)

            optimizer.step(closure)  # type: ignore[arg-type]  # torch wants a float
        all_exact(watch.flush())


OPTIONS: list[dict[str, Any]] = [
    {"amsgrad": True},
    {"maximize": True},
    {"weight_decay": 0.5, "betas": (0.5, 0.6)},
    {"lr": torch.tensor(3e-3), "fused": True},
    {"lr": torch.tensor(3e-3), "foreach": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_options_of_the_rule_are_followed(options: dict[str, Any]) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 1e-3, **options})
    with uw.watch(model, optimizer, window=10_000) as watch:
        train(model, optimizer, 12)
        all_exact(watch.flush())


def test_name_and_tensor_pairs_do_for_a_model() -> None:
    model = Net()
    optimizer = adamw(model.parameters())
    pairs = ((f"my.{name}", p) for name, p in model.named_parameters())
    with uw.watch(pairs, optimizer, window=10_000) as watch:
        train(model, optimizer, 10)
        report = watch.flush()
    assert list(tensors(report)) == [f"my.{name}" for name, _ in model.named_parameters()]
    all_exact(report)


def test_an_optimizers_parameter_that_the_model_does_not_name_is_reported_by_its_place() -> None:
    model = Net()
    optimizer = adamw(model.parameters())
    with uw.watch(model.leave, optimizer, window=10_000) as watch:
        train(model, optimizer, 10)
        report = watch.flush()
    assert set(tensors(report)) == {"weight", "group0.param0", "group0.param1", "group0.param2"}
    all_exact(report)


# --- windows, life and death --------------------------------------------------------------------------


def test_a_report_comes_out_every_window_numbered_by_its_last_step() -> None:
    model, seen = Net(), []
    optimizer = adamw(model.parameters())
    with uw.watch(model, optimizer, window=8, sinks=[seen.append]) as watch:
        train(model, optimizer, 20)
        watch.flush()
    assert [(r.step, r.window) for r in seen] == [(8, 8), (16, 8), (20, 4)]
    assert watch.last is seen[-1]
    assert all(r.cost_ms is not None and r.cost_ms > 0 for r in seen)


def test_reports_are_numbered_by_the_trainers_step_where_it_is_given() -> None:
    model = Net()
    optimizer = adamw(model.parameters())
    with uw.watch(model, optimizer, window=8, step=lambda: 1234) as watch:
        train(model, optimizer, 8)
        report = watch.flush()
    assert report is not None and report.step == 1234


def test_flush_and_close_may_be_called_again() -> None:
    model, seen = Net(), []
    optimizer = adamw(model.parameters())
    watch = uw.watch(model, optimizer, window=100, sinks=[seen.append])
    train(model, optimizer, 8)
    report = watch.flush()
    assert watch.flush() is report and watch.last is report
    watch.close()
    watch.close()
    assert watch.flush() is report
    assert seen == [report]


def test_the_end_of_the_context_reports_what_is_open_and_leaves_nothing_behind() -> None:
    model, seen = Net(), []
    optimizer = adamw(model.parameters())
    threads = threading.active_count()
    with uw.watch(model, optimizer, window=100, sinks=[seen.append]) as watch:
        train(model, optimizer, 7)
    assert [r.window for r in seen] == [7]
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    train(model, optimizer, 3)
    assert watch.last is seen[-1] and len(seen) == 1
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads


def test_steps_pass_unseen_while_the_watch_is_not_enabled() -> None:
    model = Net()
    optimizer = adamw(model.parameters())
    with uw.watch(model, optimizer, window=100) as watch:
        train(model, optimizer, 4)
        watch.enabled = False
        train(model, optimizer, 10)
        watch.enabled = True
        train(model, optimizer, 4)
        report = watch.flush()
    assert report is not None and (report.step, report.window) == (8, 8)
    all_exact(report)


def test_detached_and_attached_again_it_goes_on() -> None:
    model = Net()
    optimizer = adamw(model.parameters())
    with uw.watch(model, optimizer, window=100) as watch:
        train(model, optimizer, 4)
        watch.detach()
        train(model, optimizer, 4)
        watch.attach(optimizer)
        watch.attach(optimizer)
        train(model, optimizer, 8)
        report = watch.flush()
    assert report is not None and report.window == 8
    all_exact(report)


# --- sinks and failures --------------------------------------------------------------------------------


def test_a_sink_that_raises_is_dropped_with_one_warning_and_the_others_go_on() -> None:
    model, seen, calls = Net(), [], []

    def failing(report: Report) -> None:
        calls.append(report)
        raise RuntimeError("disk full")

    optimizer = adamw(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with uw.watch(model, optimizer, window=4, sinks=[failing, seen.append]) as watch:
            train(model, optimizer, 16)
            watch.flush()
    assert len(seen) == 4 and len(calls) == 1
    told = [str(w.message) for w in caught]
    assert len(told) == 1 and "failing" in told[0] and "disk full" in told[0] and "dropped" in told[0]


def test_a_sink_that_sleeps_does_not_slow_training() -> None:
    model, seen = Net(), []
    optimizer = adamw(model.parameters())

    def sleeping(report: Report) -> None:
        time.sleep(0.3)
        seen.append(report.step)

    with uw.watch(model, optimizer, window=2, sinks=[sleeping]) as watch:
        train(model, optimizer, 4)
        started = time.monotonic()
        train(model, optimizer, 12)
        elapsed = time.monotonic() - started
        delivered = len(seen)
        watch.flush()
    assert elapsed < 6 * 0.3 * 0.7 and delivered < 6  # six windows, 0.3 s each
    assert seen == [2, 4, 6, 8, 10, 12, 14, 16]


def test_flush_gives_up_on_a_sink_at_its_timeout() -> None:
    model, go = Net(), threading.Event()
    optimizer = adamw(model.parameters())
    watch = uw.watch(model, optimizer, window=100, sinks=[lambda _: go.wait(20)])
    train(model, optimizer, 3)
    started = time.monotonic()
    report = watch.flush(timeout=0.3)
    assert time.monotonic() - started < 3 and report is not None and report.step == 3
    go.set()
    watch.close()


def test_an_error_of_ours_detaches_with_one_warning_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(watched: bool) -> list[torch.Tensor]:
        model = Net()
        optimizer = adamw(model.parameters())
        watch = uw.watch(model, optimizer, window=4) if watched else None
        train(model, optimizer, 12)
        if watch is not None:
            watch.close()
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
        return [p.detach() for p in model.parameters()]

    expected = trained(False)
    before, calls = Watched.before, []

    def failing(self: Watched, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a bug of ours")
        return before(self, *given)

    monkeypatch.setattr(Watched, "before", failing)
    with pytest.warns(UserWarning, match=r"stopped watching; training goes on unwatched.*a bug of ours") as caught:
        result = trained(True)
    assert len(caught) == 1 and len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


def test_an_error_of_ours_in_judging_does_not_reach_training_either(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(importlib.import_module("update_watch.watch"), "read", failing)
    model = Net()
    optimizer = adamw(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = uw.watch(model, optimizer, window=4)
        train(model, optimizer, 4)
        assert watch.flush(timeout=10) is None
        train(model, optimizer, 8)
        watch.close()
    assert len([w for w in caught if "a bug of ours" in str(w.message)]) == 1
    assert not optimizer._optimizer_step_pre_hooks


# --- state -----------------------------------------------------------------------------------------------


def test_the_state_survives_a_weights_only_checkpoint_and_the_memory_goes_on() -> None:
    def stalled(report: Report | None) -> TensorReport:
        norm = tensors(report)["norm.weight"]
        assert norm.health is Health.stalled
        return norm

    model = Net(BF16)
    optimizer = adamw(model.parameters(), 1e-4)
    with uw.watch(model, optimizer, window=16) as watch:
        train(model, optimizer, 32)
        first = watch.flush()
        file = io.BytesIO()
        torch.save(watch.state_dict(), file)
    assert stalled(first).since_step == 1
    assert first is not None and first.step == 32
    file.seek(0)
    with uw.watch(model, optimizer, window=16) as again:
        again.load_state_dict(torch.load(file, weights_only=True))
        train(model, optimizer, 16)
        report = again.flush()
    assert report is not None and report.step == 48
    assert stalled(report).since_step == 1  # not 33
    assert not [a for a in report.alerts if "norm.weight" in a.tensors]  # told before


@pytest.mark.parametrize("state", [{}, {"version": 99}, "text", None])
def test_a_state_of_another_version_is_refused_with_a_remedy(state: Any) -> None:
    with uw.watch(Net(), adamw(Net().parameters())) as watch, pytest.raises(ValueError, match="leave the state out"):
        watch.load_state_dict(state)


def test_sparse_gradients_are_unknown_with_the_reason_and_the_other_tensors_are_measured() -> None:
    net = torch.nn.Sequential(torch.nn.Embedding(32, 48, sparse=True), torch.nn.Linear(48, 64))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    with uw.watch(net, optimizer) as watch:
        for _ in range(8):
            optimizer.zero_grad()
            net(torch.tensor([1, 2, 3])).square().sum().backward()
            optimizer.step()
        report = watch.flush()
    assert report is not None and watch._tap.error is None
    embedding, *others = report.tensors
    assert (embedding.health, embedding.cause) == (Health.unknown, Cause.not_replayable)
    assert "its gradients are sparse (torch.sparse_coo)" in embedding.advice
    assert [str(t.health) for t in others] == ["healthy", "healthy"]


# --- arguments ---------------------------------------------------------------------------------------------


BAD = [
    ({"window": 0}, ValueError, r"window=0.*1 or more"),
    ({"window": 1.5}, ValueError, r"window=1\.5"),
    ({"window": True}, ValueError, "window=True"),
    ({"samples": 3}, ValueError, r"samples=3.*4 or more"),
    ({"samples": "many"}, ValueError, "samples='many'"),
    ({"sinks": [3]}, TypeError, r"sinks=\[3\].*takes a Report"),
    ({"thresholds": 0.1}, TypeError, r"thresholds=0\.1.*Thresholds"),
    ({"model": 7}, TypeError, r"model=7.*\(name, tensor\) pairs"),
    ({"model": [("a", 1)]}, TypeError, r"model=\[\('a', 1\)\]\): .*\(name, tensor\) pairs"),
    ({"optimizer": []}, ValueError, "at least one torch optimizer"),
    ({"optimizer": "adam"}, TypeError, "adam|str"),
    ({"windows": 3}, TypeError, "windows"),
]


@pytest.mark.parametrize(("arguments", "error", "match"), BAD)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    model = Net()
    good = {"model": model, "optimizer": adamw(model.parameters())}
    with pytest.raises(error, match=match):
        uw.watch(**{**good, **arguments})


@pytest.mark.parametrize(("layers", "samples"), [(8, 8 * 64), (9, 64)])
def test_a_model_of_few_tensors_is_looked_at_more_closely(layers: int, samples: int) -> None:
    model = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with uw.watch(model, optimizer, samples=64) as watch:
        (watched,) = watch._model.watched.values()
        sizes = {row.sampler.size for row in watched.rows if row.sampler is not None}
    assert sizes == {samples, 64}  # biases have no more than 64 elements


def test_elements_that_are_met_again_and_again_count_once_in_the_sums() -> None:
    """At the path's positions every update is lost, elsewhere it arrives: only the first step may count the path."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with uw.watch([("w", weight)], optimizer, window=10**6, samples=16) as watch:
        (cohort,) = next(iter(watch._model.watched.values())).cohorts
        (sampler,) = cohort.samplers
        for step in range(16):
            weight.data.fill_(1.0)
            weight.grad = torch.full_like(weight, -(2.0**-6))
            sampler.settle()
            sampler.view(weight.grad).fill_(-(2.0**-10))
            optimizer.step()
            del step
        report = watch.flush()
    assert report is not None
    (tensor,) = report.tensors
    # two of the sixteen steps are at the path: the first counts
    assert cohort.live_steps == [0] and tensor.lost_fraction == pytest.approx(1 / 15, abs=0.01)


def test_parameters_that_are_grouped_anew_are_replayed_with_the_settings_of_their_group() -> None:
    torch.manual_seed(0)
    model = Net(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with uw.watch(model, optimizer, window=10**6) as watch:
        train(model, optimizer, 10)
        (group,), parameters = optimizer.param_groups, list(model.parameters())
        halves = {**group, "params": parameters[:2], "lr": 1e-2}, {**group, "params": parameters[2:], "maximize": True}
        optimizer.param_groups = list(halves)
        train(model, optimizer, 10)
        report = watch.flush()
    assert report is not None
    assert [t.efficiency for t in report.tensors] == pytest.approx([1.0] * len(report.tensors), abs=1e-6)


def test_a_watch_that_is_detached_inside_a_step_says_nothing(recwarn: pytest.WarningsRecorder) -> None:
    model = Net(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = uw.watch(model, optimizer)

    def closure() -> float:
        backward(model, next(iter(batches(1))))
        watch.detach()
        return 0.0

    optimizer.step(closure)
    train(model, optimizer, 3)
    watch.close()
    assert [w for w in recwarn if "update-watch" in str(w.message)] == []


@pytest.mark.parametrize(("rate", "health"), [(1e-3, Health.healthy), (5e-8, Health.unknown), (1e-9, Health.unknown)])
def test_fp64_weights_are_not_accused_of_what_fp32_samples_cannot_show(rate: float, health: Health) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.rand(40, 40, dtype=torch.float64) + 1)
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
    with uw.watch([("w", weight)], optimizer, window=32) as watch:
        for _ in range(96):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
        report = watch.flush()
    assert report is not None
    (tensor,) = report.tensors
    assert tensor.health is health
    assert health is Health.healthy or "finer than FP32" in tensor.advice


def test_an_average_made_in_inference_mode_is_refused_by_name() -> None:
    model = Net(torch.float32)
    with torch.inference_mode():
        average = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"averages=\{'ema'.*inference_mode; make the average under torch.no_grad"):
        uw.watch(model, torch.optim.AdamW(model.parameters()), averages={"ema": average})
