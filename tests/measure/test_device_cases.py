"""Cases of an accelerator, shown without one: long runs, captures, other streams and devices, states elsewhere."""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import update_watch as uw
from tests.support.fake_window import Crossings
from update_watch.measure import transfer
from update_watch.measure.device import streams
from update_watch.replay.side_effects import RandomStates

SCRIPT = Path(__file__).parents[1] / "support" / "fake_cases.py"


def run(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# --- long runs ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_grows_with_the_step_on_a_device() -> None:
    steps = 512
    found = run("soak", str(steps))
    assert found["error"] == "" and found["reasons"] == []
    assert found["seen"] == steps
    # a thing kept per step would be 128 more blocks of memory in a quarter; before, there are first times of this and that
    assert found["blocks"][2] - found["blocks"][1] < 64
    assert found["objects"][2] - found["objects"][1] < 30


@pytest.mark.parametrize("steps", [1_024, pytest.param(20_480, marks=pytest.mark.slow)])
def test_nothing_grows_in_thousands_of_steps(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with counters that may not be read, as on a device: what a step leaves there is known by its history."""
    params = [nn.Parameter(torch.randn(4, 8, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = torch.optim.AdamW(params, fused=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    blocks = []
    with uw.watch([(f"p{i}", p) for i, p in enumerate(params)], optimizer, window=64) as watch:
        for watched in watch._model.watched.values():
            watched._counts_lives = True
            watched.read_counters()
        for i in range(steps):
            if i % 3:
                params[2].grad = None if params[2].grad is not None else torch.ones_like(params[2])
            optimizer.step()
            if i + 1 in (steps // 2, steps):
                watch._judge.wait()
                gc.collect()
                blocks.append(sys.getallocatedblocks())
        assert watch._tap.error is None
        assert watch.step == steps
        assert watch.flush().tensors[0].efficiency is not None  # type: ignore[union-attr]
    # one thing kept per step and tensor would be 1.5 `steps`; the judge's histories of windows fill up, whatever the steps
    histories = 256
    assert blocks[1] - blocks[0] < steps // 2 + histories


# --- graphs ---------------------------------------------------------------------------------------------


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Stands for the state of a capture: `[True]` while the current stream is captured."""
    state = [False]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])
    return state


def training(count: int = 6) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(24, 24, dtype=torch.bfloat16) for _ in range(count)])
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


def new_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def test_nothing_of_ours_is_captured_and_that_is_said_once(capture: list[bool]) -> None:
    model, optimizer = training()
    new_gradients(model, 0)
    optimizer.step()
    with Crossings() as plain:
        optimizer.step()
    with uw.watch(model, optimizer, window=4) as watch:
        for _ in range(3):  # the next one would close the window
            optimizer.step()
        capture[0] = True
        with Crossings() as captured, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.step()
            optimizer.step()
            watch.flush()
        capture[0] = False
        assert captured.ops == plain.ops + plain.ops
        assert [str(w.message) for w in said if "watch.replayed()" in str(w.message)] != []
        assert len([w for w in said if "captured" in str(w.message)]) == 1
        assert watch._tap.captured == 2 and watch._tap.error is None
        assert watch.step == 3 and watch.last is None
        optimizer.step()
        assert watch.flush() is not None


def test_an_optimizer_that_is_first_met_in_a_capture_is_met_after_it(capture: list[bool]) -> None:
    model, optimizer = training()
    new_gradients(model, 0)
    optimizer.step()
    with Crossings() as plain:
        optimizer.step()
    with uw.watch(model, window=4) as watch:
        capture[0] = True
        with Crossings() as captured:
            optimizer.step()
        capture[0] = False
        assert captured.ops == plain.ops and watch.step == 0
        for _ in range(4):
            optimizer.step()
        assert watch.step == 4 and watch.flush() is not None


def test_replays_of_a_graph_are_measured_as_the_steps_in_it_would_be(capture: list[bool]) -> None:
    def numbers(is_replayed: bool) -> list[tuple[Any, ...]]:
        model, optimizer = training()
        new_gradients(model, 0)
        optimizer.step()
        with uw.watch(model, optimizer, window=64) as watch:
            for step in range(1, 33):
                if is_replayed:  # as a graph of backward pass and step would: new gradients, no hooks
                    with watch.replayed():
                        new_gradients(model, step)
                        type(optimizer).step.__wrapped__(optimizer)  # without hooks
                else:
                    new_gradients(model, step)
                    optimizer.step()
            report = watch.flush()
            assert watch._tap.error is None
        assert report is not None
        return [(t.name, t.efficiency, t.lost_fraction, t.update_ratio) for t in report.tensors]

    seen = numbers(is_replayed=True)
    assert seen == numbers(is_replayed=False)
    assert all(efficiency is not None for _, efficiency, *_ in seen)


# --- streams and devices ----------------------------------------------------------------------------------


class Landing:
    """Stands for pinned memory: values are there when the mark has been looked at a few times."""

    def __init__(self, numel: int) -> None:
        self.values, self._looks = torch.full((numel,), -1.0), 0
        self.current: list[Any] = []

    def receive(self, vector: Any, mark: Any) -> None:
        self.current.append(Current.device)

    def has_arrived(self) -> bool:
        self._looks += 1
        if self._looks == 4:
            self.values.fill_(7.0)
        return self._looks >= 4


class Current:
    """Stands for `torch.cuda.device`."""

    device: Any = torch.device("cuda:0")

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, Current.device

    def __enter__(self) -> None:
        Current.device = self._device

    def __exit__(self, *_: object) -> None:
        Current.device = self._before


class Vector:
    """Stands for sums on the second of two GPUs."""

    device = torch.device("cuda:1")

    def numel(self) -> int:
        return 5


def test_sums_are_sent_from_their_own_device_and_read_once_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    landings: list[Landing] = []

    def landing(numel: int) -> Landing:
        landings.append(Landing(numel))
        return landings[-1]

    monkeypatch.setattr(transfer, "_landing", landing)
    monkeypatch.setattr(transfer, "_give_back", lambda landing: None)
    monkeypatch.setitem(transfer._marks, Vector.device, torch.ones(1))
    monkeypatch.setattr(torch.cuda, "device", Current)
    sent = transfer.Transfer(Vector())  # type: ignore[arg-type]
    assert landings[0].current == [Vector.device] and Current.device == torch.device("cuda:0")
    assert np.array_equal(sent.wait(), np.full(5, 7.0))


def test_a_window_that_is_flushed_elsewhere_is_closed_on_the_stream_of_its_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[str] = []

    class Stream:
        def query(self) -> bool:
            return True

    @contextlib.contextmanager
    def stream(one: Any) -> Iterator[None]:
        used.append(one)
        yield
        used.append("left")

    step_streams = streams.StepStreams()
    mine = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mine)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    step_streams.note([torch.device("cuda:1"), torch.device("cpu")])
    with step_streams.resumed():
        assert used == [mine]
    assert used == [mine, "left"]
    assert step_streams.settle(1.0)
    mine.query = lambda: False  # type: ignore[method-assign]
    assert not step_streams.settle(0.01)


@pytest.mark.slow
def test_states_on_another_device_make_a_tensor_unknown_and_nothing_else() -> None:
    found = run("offloaded")
    assert found["error"] == ""
    assert found["steps"] == 20
    assert found["reasons"] == ["its state 'momentum' is on cpu, the weight on fakegpu:0: they cannot be read together"]
    assert found["crossed"] == 0  # nothing of ours goes from one to the other


def test_states_that_move_away_later_are_seen() -> None:
    class Moving(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1e-3})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                if not state["momentum"].is_meta:
                    state["momentum"].mul_(0.9).add_(p.grad)
                p.sub_(p.grad, alpha=1e-3)

    model = nn.Sequential(*[nn.Linear(24, 24) for _ in range(2)])
    optimizer = Moving(model.parameters())
    with uw.watch(model, optimizer, window=8) as watch:
        for step in range(12):
            new_gradients(model, step)
            optimizer.step()
        for p in model.parameters():
            optimizer.state[p]["momentum"] = optimizer.state[p]["momentum"].to("meta")
        for step in range(20):
            new_gradients(model, step)
            optimizer.step()
        report = watch.flush()
        assert watch._tap.error is None
    assert report is not None
    assert all(t.health.value == "unknown" and "'momentum' cannot be read" in str(t.advice) for t in report.tensors)


# --- compiled steps ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_counters_that_were_moved_to_the_device_are_not_read_by_the_replay() -> None:
    assert run("compiled") == {"foreach": [], "single": []}


# --- random states ----------------------------------------------------------------------------------------


def test_the_devices_random_state_is_written_only_if_it_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    state = [torch.zeros(16, dtype=torch.uint8)]
    written: list[Tensor] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state[0].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda new, device: written.append(new))
    kept = RandomStates(torch.device("cuda:0"))
    kept.restore()
    assert written == []
    state[0] = torch.ones(16, dtype=torch.uint8)
    kept.restore()
    assert len(written) == 1 and torch.equal(written[0], torch.zeros(16, dtype=torch.uint8))


class _Signs(torch.optim.Optimizer):
    """A rule that is not torch's: it is tried out and replayed under guards."""

    def __init__(self, params: Any, is_random: bool) -> None:
        super().__init__(params, {"lr": 1e-4, "is_random": is_random})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                noise = torch.rand_like(p) if group["is_random"] else 0.5
                p.sub_(p.grad.sign() * noise, alpha=group["lr"])


@pytest.mark.parametrize("is_random", [False, True])
def test_no_trial_of_a_rule_seeds_the_generators_of_devices(is_random: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` seeds those of all GPUs too, and dropout on them would drop other elements."""
    seeded: list[Any] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(5)
    assert seeded == [5]
    model = nn.Sequential(*[nn.Linear(24, 24, dtype=torch.bfloat16) for _ in range(2)])
    optimizer = _Signs(model.parameters(), is_random)
    with uw.watch(model, optimizer, window=4) as watch:
        for step in range(9):
            new_gradients(model, step)
            optimizer.step()
        watch.flush()
        assert watch._tap.error is None
    assert seeded == [5]
