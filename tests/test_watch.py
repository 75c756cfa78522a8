"""The manners of a watch: its windows, its end, its sinks, its state, its arguments."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import threading
import time
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import update_watch as uw
from tests.support.watch_nets import Net, all_exact, backward, batches, make_adamw, tensors, train
from update_watch import endings
from update_watch.measure.watched_optimizer import Watched
from update_watch.report import Health, Report, TensorReport
from update_watch.watching import attention

BF16, FP16 = torch.bfloat16, torch.float16


# --- windows, life and death --------------------------------------------------------------------------


def test_a_report_comes_out_every_window_numbered_by_its_last_step() -> None:
    model, seen = Net(), []
    optimizer = make_adamw(model.parameters())
    with uw.watch(model, optimizer, window=8, sinks=[seen.append]) as watch:
        train(model, optimizer, 20)
        watch.flush()
    assert [(r.step, r.window) for r in seen] == [(8, 8), (16, 8), (20, 4)]
    assert watch.last is seen[-1]
    assert all(r.cost_ms is not None and r.cost_ms > 0 for r in seen)


def test_reports_are_numbered_by_the_trainers_step_where_it_is_given() -> None:
    model = Net()
    optimizer = make_adamw(model.parameters())
    with uw.watch(model, optimizer, window=8, step=lambda: 1234) as watch:
        train(model, optimizer, 8)
        report = watch.flush()
    assert report is not None and report.step == 1234


def test_flush_and_close_may_be_called_again() -> None:
    model, seen = Net(), []
    optimizer = make_adamw(model.parameters())
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
    optimizer = make_adamw(model.parameters())
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
    optimizer = make_adamw(model.parameters())
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
    optimizer = make_adamw(model.parameters())
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


# --- sinks and failures --------------------------------------------------------------------------------


def test_a_sink_that_raises_is_dropped_with_one_warning_and_the_others_go_on() -> None:
    model, seen, calls = Net(), [], []

    def failing(report: Report) -> None:
        calls.append(report)
        raise RuntimeError("disk full")

    optimizer = make_adamw(model.parameters())
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
    optimizer = make_adamw(model.parameters())

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
    optimizer = make_adamw(model.parameters())
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
        optimizer = make_adamw(model.parameters())
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
    optimizer = make_adamw(model.parameters())
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
    optimizer = make_adamw(model.parameters(), 1e-4)
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
    with (
        uw.watch(Net(), make_adamw(Net().parameters())) as watch,
        pytest.raises(ValueError, match="leave the state out"),
    ):
        watch.load_state_dict(state)


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
    good = {"model": model, "optimizer": make_adamw(model.parameters())}
    with pytest.raises(error, match=match):
        uw.watch(**{**good, **arguments})


def test_an_average_made_in_inference_mode_is_read_by_its_values() -> None:
    """It does not count who writes to it."""
    model = Net(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.inference_mode():
        average = {name: p.clone() for name, p in model.named_parameters()}
    with uw.watch(model, optimizer, window=64, averages={"ema": (average, 0.9)}) as watch:
        for _ in range(64):
            train(model, optimizer, 1)
            with torch.inference_mode():
                for name, p in model.named_parameters():
                    average[name].lerp_(p, 0.1)
        report = watch.flush()
    assert report is not None
    found = [t.accumulators["average:ema"] for t in report.tensors]
    assert all(a.efficiency == pytest.approx(1.0, abs=0.05) for a in found)


@pytest.mark.parametrize("budget", [None, 1e-4], ids=["every step", "few steps"])
def test_a_step_that_raises_in_its_closure_is_no_step(budget: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "always", False)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    failing: list[int] = []

    def closure() -> Tensor:
        if failing:
            raise RuntimeError("out of memory")
        optimizer.zero_grad()
        loss = model(torch.ones(4, 8)).square().mean()
        loss.backward()
        return loss

    reports: list[Report] = []
    with uw.watch(model, optimizer, window=4, sinks=[reports.append], budget=budget) as watch:
        for n in range(30):
            failing[:] = [n] if n in (9, 25, 29) else []
            with contextlib.suppress(RuntimeError):
                optimizer.step(closure)
            if n == 12:
                watch.flush()  # every tensor has a verdict: from here on the budget holds
    assert sum(report.window for report in reports) == reports[-1].step == 27
    assert all((report.observed_steps or 0) <= report.window for report in reports)


# --- what a person is told --------------------------------------------------------------------------------


def stalled_net(kind: type[torch.nn.Sequential]) -> tuple[torch.nn.Sequential, torch.optim.Optimizer]:
    model = kind(torch.nn.Linear(24, 24), torch.nn.RMSNorm(24)).bfloat16()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5)


def steps(count: int, *pairs: tuple[torch.nn.Sequential, torch.optim.Optimizer]) -> None:
    for _ in range(count):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            model(torch.randn(4, 24, dtype=BF16)).float().square().sum().backward()
            optimizer.step()


class Critic(torch.nn.Sequential):
    """A second model."""


def test_alerts_name_the_model_where_the_process_watches_several(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "_OPEN", weakref.WeakKeyDictionary())  # other tests may have left theirs open
    torch.manual_seed(0)
    alone, critic, named = stalled_net(torch.nn.Sequential), stalled_net(Critic), stalled_net(Critic)
    with uw.watch(*alone, window=16, budget=None) as watch:
        steps(16, alone)
        report = watch.flush()
    assert report is not None and [a.model for a in report.alerts] == [""]
    with (
        uw.watch(*critic, window=16, budget=None) as first,
        uw.watch(*named, window=16, name="C2", budget=None) as second,
    ):
        steps(16, critic, named)
        told = [a.model for watch in (first, second) for a in watch.flush().alerts]  # type: ignore[union-attr]
    assert told == ["Critic", "C2"]
    texts = [record.getMessage() for record in caplog.records]
    assert [text.partition(": ")[0].partition(" of ")[2] for text in texts if "STALLED" in text] == ["", *told]


def test_a_cure_costs_the_same_in_a_window_in_which_nothing_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    net = stalled_net(Critic)
    with uw.watch(*net, window=16) as watch:
        steps(16, net)
        measured = watch.flush()
        monkeypatch.setattr(attention.Attention, "looks", lambda *_: False)
        steps(3, net)
        not_measured = watch.flush()
    assert measured is not None and not_measured is not None
    assert not_measured.step == 19 and not any(t.accumulators for t in not_measured.tensors)
    costs = [re.findall(r"\+[\d.]+ k?B", report.headline) for report in (measured, not_measured)]
    assert (
        costs[0] == costs[1] and costs[0][0] == "+4.99 kB"
    )  # 624 parameters: 4 bytes for weight and gradient, 4 for states
