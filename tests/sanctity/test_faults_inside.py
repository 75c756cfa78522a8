"""What goes wrong inside the process: disks, clocks, sinks, several watches, and what attaching leaves behind.

The table in docs/faults.md names these tests; faults that end a process are in test_faults.py.
"""

from __future__ import annotations

import dataclasses
import gc
import resource
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import update_watch as uw
from tests.support.watch_nets import Net, train
from update_watch import endings
from update_watch.dashboards.journal import Journal, read_journal
from update_watch.judge.alerts import Alerts
from update_watch.measure.watched_model import WatchedModel
from update_watch.report import Health, Report, TensorReport
from update_watch.worker import Worker


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def unwatched(steps: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    model = Net(dtype)
    train(model, adamw(model), steps)
    return weights(model)


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught]


# --- disks ---------------------------------------------------------------------------------------------


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Every byte beyond is refused, as by a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_is_warned_of_once_what_is_lost_is_counted_and_training_goes_on(tmp_path: Path) -> None:
    model, seen, path = Net(torch.bfloat16), [], tmp_path / "j.jsonl"
    optimizer = adamw(model)
    with warnings.catch_warnings(record=True) as caught, no_file_beyond(20_000):
        warnings.simplefilter("always")
        with uw.watch(model, optimizer, window=2, sinks=[Journal(path), seen.append]):
            train(model, optimizer, 40)
    assert [r.step for r in seen] == list(range(2, 42, 2))
    kept = [r.step for r in read_journal(path)]
    assert 2 <= len(kept) < 20 and kept == [r.step for r in seen][: len(kept)]
    assert path.read_bytes().endswith(b"\n") and path.stat().st_size <= 20_000
    first, last = told(caught)
    assert "sink Journal failed and is tried again with every window: OSError(27" in first
    assert f"{20 - len(kept)} windows could not be handed to Journal" in last and "the last one too" in last
    assert all(map(torch.equal, weights(model), unwatched(40)))


def test_an_output_folder_that_cannot_be_written_is_warned_of_once_and_training_goes_on(tmp_path: Path) -> None:
    model, seen = Net(torch.bfloat16), []
    optimizer = adamw(model)
    (tmp_path / "file").write_text("")  # root may write into folders that are read-only, but not into a file
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with uw.watch(model, optimizer, window=4, sinks=[Journal(tmp_path / "file" / "j.jsonl"), seen.append]):
            train(model, optimizer, 12)
    assert [r.step for r in seen] == [4, 8, 12]
    first, last = told(caught)
    assert "sink Journal failed and is tried again with every window: " in first and "file" in first
    assert "3 windows could not be handed to Journal" in last
    assert all(map(torch.equal, weights(model), unwatched(12)))


def test_a_slow_disk_keeps_training_waiting_for_nothing_and_every_window_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, write = Journal(tmp_path / "j.jsonl"), Journal._write

    def slowly(self: Journal, data: bytes) -> None:
        time.sleep(0.25)
        write(self, data)

    monkeypatch.setattr(Journal, "_write", slowly)
    model = Net(torch.bfloat16)
    optimizer = adamw(model)
    with uw.watch(model, optimizer, window=1, sinks=[journal]) as watch:
        train(model, optimizer, 2)
        started = time.monotonic()
        train(model, optimizer, 10)
        elapsed = time.monotonic() - started
        watch.flush()
    assert elapsed < 10 * 0.25 * 0.7
    assert [r.step for r in read_journal(tmp_path / "j.jsonl")] == list(range(1, 13))


# --- sinks ---------------------------------------------------------------------------------------------


def test_a_sink_that_ends_its_thread_is_dropped_like_one_that_fails(tmp_path: Path) -> None:
    def leaving(report: Report) -> None:
        raise SystemExit(1)

    model, seen = Net(), []
    optimizer = adamw(model)
    with pytest.warns(UserWarning, match=r"leaving failed and is dropped: SystemExit\(1\)") as caught:
        with uw.watch(model, optimizer, window=2, sinks=[leaving, seen.append]):
            train(model, optimizer, 6)
    assert [r.step for r in seen] == [2, 4, 6] and len(caught) == 1


def test_windows_behind_a_sink_that_hangs_are_bounded_counted_and_warned_of_once() -> None:
    go, seen = threading.Event(), []

    def hanging(item: int) -> None:
        go.wait(60)
        seen.append(item)

    worker = Worker("sink", hanging, capacity=8)
    with pytest.warns(UserWarning, match="sink thread is 8 windows behind; windows are dropped") as caught:
        accepted = [worker.put(n) for n in range(50)]
    assert accepted == [True] * 8 + [False] * 42 and worker.dropped == 42 and len(caught) == 1
    go.set()
    assert worker.wait(10) and seen == list(range(8))
    assert worker.put(50) and worker.wait(10) and seen[-1] == 50  # it has caught up
    worker.stop()
    go.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strict = Worker("sink", hanging, capacity=2)
        assert [strict.put(n) for n in range(4)] == [True, True, False, False]  # and nothing is raised
    go.set()
    strict.stop()


def test_where_warnings_are_errors_an_overflow_ends_neither_training_nor_the_thread() -> None:
    go, model, seen = threading.Event(), Net(), []
    optimizer = adamw(model)

    def hanging(report: Report) -> None:
        go.wait(60)
        seen.append(report.step)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch = uw.watch(model, optimizer, window=1, sinks=[hanging])
        train(model, optimizer, 90)
        while watch.last is None or watch.last.step < 90:
            time.sleep(0.01)
        go.set()
        watch.close(30)
    assert seen[:3] == [1, 2, 3] and 60 <= len(seen) < 90
    assert len(seen) + watch._post.dropped == 90


@pytest.mark.parametrize("kind", ["jump", "infinite state", "infinite update", "tiny", "complex", "empty window"])
def test_where_warnings_are_errors_no_number_ends_the_watch(kind: str) -> None:
    """NumPy warns of infinities and what is made of them, torch of casts; neither is an error of ours."""
    dtype = {"infinite state": torch.float16, "complex": torch.complex64}.get(kind, torch.float32)
    weight = torch.nn.Parameter(torch.randn(64, 8).to(dtype))
    other = torch.nn.Parameter(torch.randn(64, 8))
    optimizer = torch.optim.SGD([weight, other], lr=0.1, momentum=0.9 if kind == "infinite state" else 0.0)
    scales = {
        "jump": [1.0] * 8 + [1e9] * 8,
        "infinite state": [6e4] * 16,
        "infinite update": [1.0] * 12 + [3e38] * 4,
        "tiny": [1e-38, 1e-30, 1.0, 1e30] * 4,
        "complex": [1.0] * 16,
        "empty window": [0.0] * 16,
    }[kind]
    seen: list[Report] = []
    with warnings.catch_warnings(record=False):
        warnings.simplefilter("error")
        with uw.watch([("w", weight), ("o", other)], optimizer, window=16, sinks=[seen.append]) as watch:
            for _ in range(3):
                for scale in scales:
                    weight.grad = (torch.randn(64, 8) * scale).to(dtype)
                    other.grad = torch.randn(64, 8)
                    optimizer.step()
            watch.flush()
        assert watch._tap.error is None, repr(watch._tap.error)
    assert [report.step for report in seen] == [16, 32, 48]
    assert all({t.name: t for t in report.tensors}["o"].health is Health.healthy for report in seen)


# --- signals -------------------------------------------------------------------------------------------


def test_the_handler_of_sigterm_passes_for_the_default_and_goes_with_the_last_watch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endings, "_OPEN", weakref.WeakKeyDictionary())
    earlier = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    model = Net()
    optimizer = adamw(model)
    try:
        with uw.watch(model, optimizer), uw.watch(model, optimizer) as second:
            found = signal.getsignal(signal.SIGTERM)
            assert found is not signal.SIG_DFL
            assert found in (None, signal.SIG_DFL)  # how Lightning asks whether there is one
            second.close()
            assert signal.getsignal(signal.SIGTERM) is found
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        theirs = lambda *_: None  # noqa: E731
        signal.signal(signal.SIGTERM, theirs)
        with uw.watch(model, optimizer):
            assert signal.getsignal(signal.SIGTERM) is theirs
        assert signal.getsignal(signal.SIGTERM) is theirs
    finally:
        signal.signal(signal.SIGTERM, earlier)


# --- clocks --------------------------------------------------------------------------------------------


def test_a_clock_that_is_set_back_or_forth_changes_no_verdict_and_no_alert(tmp_path: Path) -> None:
    def run(name: str, hours: list[int]) -> list[Report]:
        model, offset = Net(torch.bfloat16), [0.0]
        optimizer = adamw(model)
        path = tmp_path / name
        with uw.watch(model, optimizer, window=8, sinks=[Journal(path)]) as watch:
            judge = watch._judge._handle
            watch._alerts._clock = lambda: time.time() + offset[0]
            watch._judge._handle = lambda w: judge(dataclasses.replace(w, time=w.time + offset[0]))
            for jump in hours:
                train(model, optimizer, 8)
                watch.flush()
                offset[0] += 3600.0 * jump
        return list(read_journal(path))

    steady, jumping = run("steady", [0] * 6), run("jumping", [-24, -24, 2, 87_600, -87_600, 1])
    times = [r.time for r in jumping]
    assert times[2] < times[1] - 86_000 and times[1] < times[0] - 86_000  # the journal keeps the clock as it was
    for a, b in zip(steady, jumping, strict=True):
        assert (a.step, a.window, a.health, a.headline) == (b.step, b.window, b.health, b.headline)
        assert [(x.level, x.title, x.tensors) for x in a.alerts] == [(x.level, x.title, x.tensors) for x in b.alerts]
    assert any(r.alerts for r in steady)


def test_alerts_of_a_time_that_is_still_to_come_hold_nothing_back() -> None:
    now = [2e9]
    alerts = Alerts(uw.Thresholds(alerts_per_hour=1), lambda: now[0])

    def told(*healths: Health) -> list[tuple[str, ...]]:
        cause = uw.Cause.weight_rounding
        tensors = (TensorReport(f"w{i}", h, None if h is Health.healthy else cause) for i, h in enumerate(healths))
        report = alerts.update(Report(1, 1, Health.stalled, "", tuple(tensors)))
        return [alert.tensors for alert in report.alerts]

    assert told(Health.stalled) == [("w0",)]
    now[0] = 1e9
    assert told(Health.healthy) == [()]  # over: the budget of this hour
    now[0] -= 1e6
    assert told(Health.stalled) == [("w0",)]  # and not cooling down


# --- a cell that is run again ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cell_that_is_run_twenty_times_is_told_once_how_to_close_and_one_call_closes_all() -> None:
    uw.close_all()
    model = Net(torch.bfloat16)
    optimizer = adamw(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(20):
            uw.watch(model, optimizer, window=4)
            train(model, optimizer, 1)
    assert len(caught) == 1, told(caught)
    assert "this AdamW is watched already" in told(caught)[0] and "update_watch.close_all()" in told(caught)[0]
    uw.close_all()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uw.watch(model, optimizer, window=4).close()
        with uw.watch(model, optimizer, window=4), uw.watch(Net(), adamw(Net())):  # another optimizer is another matter
            pass


def test_a_closed_watch_frees_the_descriptor_of_its_journal_at_once(tmp_path: Path) -> None:
    model = Net(torch.bfloat16)
    optimizer = adamw(model)
    journals = [Journal(tmp_path / f"{n}.jsonl") for n in range(4)]
    gc.disable()
    try:
        for journal in journals:
            with uw.watch(model, optimizer, window=2, sinks=[journal]):
                train(model, optimizer, 3)
        deadline = time.monotonic() + 5
        while any(journal._file is not None for journal in journals) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [journal._file for journal in journals] == [None] * 4
    finally:
        gc.enable()
    assert all([r.step for r in read_journal(journal.path)] == [2, 3] for journal in journals)


def test_closing_from_another_thread_in_mid_training_loses_no_window_and_says_nothing() -> None:
    expected = unwatched(60)
    for delay in (0.0, 0.003, 0.01, 0.02, 0.03):
        model, seen = Net(torch.bfloat16), []
        optimizer = adamw(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            watch = uw.watch(model, optimizer, window=8, budget=None, sinks=[seen.append])
            closing = threading.Thread(target=lambda w=watch, d=delay: (time.sleep(d), w.close()))
            closing.start()
            train(model, optimizer, 60)
            closing.join(20)
        assert watch._tap.error is None and not watch._has_failed
        assert all(map(torch.equal, weights(model), expected))
        assert [r.step for r in seen][:-1] == [8 * (n + 1) for n in range(len(seen) - 1)]
        assert sum(r.window for r in seen) == (seen[-1].step if seen else 0)


def test_closing_from_another_thread_waits_for_the_hook_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, is_inside, before = Net(torch.bfloat16), threading.Event(), WatchedModel.before

    def slow(self: WatchedModel, *args: Any) -> Any:
        for _ in self.watched.values():
            is_inside.set()
            time.sleep(0.2)
        return before(self, *args)

    monkeypatch.setattr(WatchedModel, "before", slow)
    optimizer = adamw(model)
    watch = uw.watch(model, optimizer, window=8, budget=None)
    # a window that is being closed waits as well
    monkeypatch.setattr(watch, "flush", lambda timeout: None)
    closing = threading.Thread(target=lambda: (is_inside.wait(10), watch.close()))
    closing.start()
    train(model, optimizer, 1)
    closing.join(20)
    assert watch._tap.error is None and not watch._model.watched


def test_of_two_errors_the_first_is_told_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(torch.bfloat16)
    optimizer = adamw(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = uw.watch(model, optimizer, window=2, budget=None)
        monkeypatch.setattr(watch._diagnosis, "judge", lambda *_: 1 / 0)
        train(model, optimizer, 40)
        watch.close()
    assert len(caught) == 1 and "ZeroDivisionError" in told(caught)[0], told(caught)
    assert all(map(torch.equal, weights(model), unwatched(40)))


# --- several watches, and what they leave behind -----------------------------------------------------------


def test_two_watches_on_one_optimizer_report_what_one_alone_reports() -> None:
    def numbers(report: Report | None) -> list[Any]:
        assert report is not None
        return [(t.name, t.health, t.efficiency, t.lost_fraction, t.update_ratio) for t in report.tensors]

    model = Net(torch.bfloat16)
    optimizer = adamw(model)
    with uw.watch(model, optimizer, window=1000) as alone:
        train(model, optimizer, 24)
        expected, trained = numbers(alone.flush()), weights(model)

    model = Net(torch.bfloat16)
    optimizer = adamw(model)
    first, second = (uw.watch(model, optimizer, window=n) for n in (1000, 12))
    train(model, optimizer, 24)
    assert numbers(first.flush()) == expected
    assert all(map(torch.equal, weights(model), trained))
    first.close()
    train(model, optimizer, 12, seed=1)
    report = second.flush()
    assert report is not None and (report.step, report.window) == (36, 12)
    second.close()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_two_watches_on_two_models_keep_apart() -> None:
    models = Net(torch.bfloat16), Net(torch.float32)
    optimizers = [adamw(model) for model in models]
    watches = [uw.watch(model, optimizer, window=16) for model, optimizer in zip(models, optimizers, strict=True)]
    for seed in range(16):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, 1, seed)
    rounded, whole = (watch.flush() for watch in watches)
    for watch in watches:
        watch.close()
    assert rounded is not None and whole is not None
    assert {t.health for t in whole.tensors} == {Health.healthy}
    assert Health.stalled in {t.health for t in rounded.tensors}


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.slow
def test_attaching_and_detaching_a_thousand_times_leaves_no_hook_thread_or_tensor() -> None:
    model = Net(torch.bfloat16)
    optimizer = adamw(model)
    train(model, optimizer, 1)

    def state() -> tuple[int, ...]:
        grads = sum(len(p._post_accumulate_grad_hooks or ()) + len(p._backward_hooks or ()) for p in model.parameters())
        hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
        loads = optimizer._optimizer_load_state_dict_post_hooks
        return (*map(len, hooks), len(loads), grads, threading.active_count(), _tensors())

    with uw.watch(model, optimizer, window=1000) as watch:
        watch.detach()
        before = state()
        for n in range(1000):
            watch.attach(optimizer)
            if n % 100 == 0:
                train(model, optimizer, 1)
            watch.detach()
        assert state() == before


@pytest.mark.slow
def test_watches_that_were_closed_leave_no_hook_thread_or_tensor() -> None:
    model = Net(torch.bfloat16)
    optimizer = adamw(model)

    def once() -> None:
        with uw.watch(model, optimizer, window=2):
            train(model, optimizer, 3)

    once()
    optimizer.zero_grad()
    threads, tensors = threading.active_count(), _tensors()
    for _ in range(20):
        once()
    optimizer.zero_grad()
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads
    assert _tensors() == tensors
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_a_watch_that_is_dropped_with_its_model_and_never_closed_keeps_neither_alive() -> None:
    threads = threading.active_count()

    def forgotten() -> tuple[Any, ...]:
        model = Net(torch.bfloat16)
        optimizer = adamw(model)
        watch = uw.watch(model, optimizer, window=2)
        train(model, optimizer, 5)
        watch.flush()
        return tuple(map(weakref.ref, (model, optimizer, watch)))

    references = forgotten()
    deadline = time.monotonic() + 5
    while any(r() is not None for r in references) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert [r() for r in references] == [None, None, None]
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads


# --- going on --------------------------------------------------------------------------------------------


def test_a_resumed_run_tells_no_alert_again_and_goes_on_in_the_same_journal(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"

    def run(state: dict[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
        model, seen = Net(torch.bfloat16), []
        optimizer = adamw(model)
        with uw.watch(model, optimizer, window=8, sinks=[Journal(path), seen.append]) as watch:
            if state is not None:
                torch.save(state, tmp_path / "state.pt")
                state = torch.load(tmp_path / "state.pt", weights_only=True)
                watch.load_state_dict(state["watch"])
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
            train(model, optimizer, 32)
            watch.flush()
            kept = {"watch": watch.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        return kept, [alert.title for report in seen for alert in report.alerts]

    state, first = run(None)
    _, anew = run(None)
    _, resumed = run(state)
    assert first and anew == first  # a run that remembers nothing tells all again
    assert resumed == []
    assert [r.step for r in read_journal(path)][-4:] == [40, 48, 56, 64]


def test_a_model_that_cannot_be_planned_for_is_trained_unwatched_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In torch's simulations (an estimate of memory) as well, in which values cannot be compared."""
    model = torch.nn.Linear(8, 8).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.warns(UserWarning, match="training goes on unwatched"):
        watch = uw.watch(model, optimizer, budget=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(torch.ones(2, 8, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
        assert watch.flush() is None
        watch.close()
    with pytest.raises(TypeError):
        uw.watch(model, object())
