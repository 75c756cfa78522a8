"""A KeyboardInterrupt at any line of ours leaves torch's modes and all random states as they were.

Ctrl-C comes between any two lines. Here it is raised at each line of this package in turn, once per run, while steps are
taken in different precision contexts; the user catches it, as a notebook does.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import update_watch as uw
from tests.support.watch_nets import Net
from update_watch.measure.hooks.interrupts import Waiting
from update_watch.measure.plain_torch import PlainTorch
from update_watch.measure.watched_model import WatchedModel
from update_watch.replay import side_effects

OURS = str(Path(uw.__file__).parent)


class Signed(torch.optim.Optimizer):
    """Not torch's own: it is replayed with its side effects kept away."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state.setdefault("m", torch.zeros_like(param)).lerp_(param.grad, 0.1)
                    param.sub_(group["lr"] * state["m"].sign())


Place = tuple[str, int]  # file, line


class InterruptAt:
    """Raises KeyboardInterrupt where a line of ours is run inside; None: counts them all."""

    def __init__(self, place: Place | None) -> None:
        self._place = place
        self.places: set[Place] = set()
        self.is_done = False

    def __enter__(self) -> InterruptAt:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        wanted = OURS if self._place is None else self._place[0]
        return self._line if frame.f_code.co_filename.startswith(wanted) else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        if event == "line":
            place = frame.f_code.co_filename, frame.f_lineno
            self.places.add(place)
            if place == self._place:
                sys.settrace(None)
                self.is_done = True
                raise KeyboardInterrupt
        return self._line


def modes() -> tuple[Any, ...]:
    from torch._dynamo import eval_frame

    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),
        id(torch_optimizer._global_optimizer_pre_hooks),
        id(torch_optimizer._global_optimizer_post_hooks),
        eval_frame._stance.stance,
    )


@contextmanager
def _low_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND: dict[str, list[Callable[[], Any]]] = {
    "plain": [],
    "low default": [_low_default, lambda: torch.autocast("cpu", torch.bfloat16)],
    "inference": [torch.inference_mode],
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "own": Signed,
}


class Run:
    """A watched model that is trained."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        self.model = Net(torch.bfloat16)
        self.optimizer = make(self.model.parameters())
        self.average = Net(torch.bfloat16)
        self.watch = uw.watch(self.model, self.optimizer, window=4, budget=None, averages={"ema": (self.average, 0.9)})
        for _ in range(3):
            self.step()

    def step(self) -> None:
        for param in self.model.parameters():
            param.grad = torch.full_like(param, 1e-3)
        self.optimizer.step()


def interrupt(around: list[Callable[[], Any]], place: Place | None, action: Callable[[], Any]) -> InterruptAt:
    """Do `action` in a context, interrupted at a line; the modes must be as before."""
    with ExitStack() as stack:
        for context in around:
            stack.enter_context(context())
        before = modes()
        trace = InterruptAt(place)
        try:
            with trace:
                action()
        except KeyboardInterrupt:
            pass
        after = modes()
    assert after == before, (place, [(str(a)[:40], str(b)[:40]) for a, b in zip(before, after, strict=True) if a != b])
    return trace


def sampled(places: set[Place], stride: int) -> list[Place]:
    return sorted(places)[::stride]


# every line: UPDATE_WATCH_STRIDE=1 python -m pytest -m slow --timeout=0 tests/sanctity/test_interrupts.py
STRIDE = int(os.environ.get("UPDATE_WATCH_STRIDE", "23"))
EVERY = [pytest.param(STRIDE, id="many", marks=pytest.mark.slow), pytest.param(151, id="some")]


@pytest.mark.parametrize("stride", EVERY)
@pytest.mark.parametrize("around", list(AROUND))
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_an_interrupt_at_any_line_of_a_step_leaves_every_mode_as_it_was(
    optimizer: str, around: str, stride: int
) -> None:
    run = Run(OPTIMIZERS[optimizer])

    def steps() -> None:  # every kind of step there is, and the end of a window
        for _ in range(4):
            run.step()

    places = set().union(*(interrupt(AROUND[around], None, steps).places for _ in range(3)))
    assert len(places) > 300
    chosen = sampled(places, stride)
    done = 0
    for place in chosen:
        done += any(interrupt(AROUND[around], place, steps).is_done for _ in range(3))
        assert not run.watch.is_measuring, place
        assert not side_effects._is_held(), place  # else other threads would wait for ever
    assert done >= 0.6 * len(chosen)  # some lines are run now and then only
    assert run.watch._tap.error is None
    for _ in range(8):
        run.step()
    report = run.watch.flush()
    run.watch.close()
    assert report is not None and all(t.health.value != "unknown" for t in report.tensors)


@pytest.mark.parametrize(
    "stride", [pytest.param(3 * STRIDE, id="many", marks=pytest.mark.slow), pytest.param(997, id="some")]
)
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_an_interrupt_while_a_watch_or_an_audit_is_made_leaves_every_mode_as_it_was(
    optimizer: str, stride: int
) -> None:
    model = Net(torch.bfloat16)
    made = OPTIMIZERS[optimizer](model.parameters())

    def attach() -> None:
        uw.audit(model, made)
        uw.watch(model, made, window=4).close()

    places = interrupt(AROUND["low default"], None, attach).places
    assert len(places) > 500
    for place in sampled(places, stride):
        interrupt(AROUND["low default"], place, attach)


def test_an_interrupt_at_any_line_of_taking_hooks_away_keeps_no_lock_and_no_hooks() -> None:
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    own = torch_optimizer._global_optimizer_pre_hooks
    file = side_effects.__file__

    def take_away(stop: int) -> bool:
        """Interrupted at the line of this number, if there are as many."""
        lines = itertools.count()

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            if frame.f_code.co_filename != file:
                return None
            if event == "line" and next(lines) == stop:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        without = side_effects.WithoutEffects(torch.device("cpu"))
        sys.settrace(trace)
        try:
            with without, without:
                pass
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    interrupted = 0
    try:
        while take_away(interrupted):
            assert not side_effects._is_held(), interrupted
            assert torch_optimizer._global_optimizer_pre_hooks is own, interrupted
            interrupted += 1
    finally:
        handle.remove()
    assert interrupted > 30


def test_a_change_that_is_entered_once_is_a_mistake() -> None:
    with pytest.raises(RuntimeError, match="PlainTorch has to be entered twice"), PlainTorch():
        assert torch.is_grad_enabled()
    plain = PlainTorch()
    with plain, plain:
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


class Watched:
    """A stalled tensor that is watched in windows of 8 steps, and trained."""

    def __init__(self) -> None:
        self.param = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        self.optimizer = torch.optim.SGD([self.param], lr=1e-5)
        self.watch = uw.watch([("param", self.param)], self.optimizer, window=8, budget=None)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.param.grad = torch.ones_like(self.param)
            self.optimizer.step()


def _signalled(monkeypatch: pytest.MonkeyPatch, hook: str, signals: int) -> list[int]:
    """From now on SIGINT comes in the middle of each `hook`; how far it got, each time."""
    measure, reached = getattr(WatchedModel, hook), []

    def interrupted(*arguments: Any) -> Any:
        for n in range(signals):
            reached.append(n)
            signal.raise_signal(signal.SIGINT)
        found = measure(*arguments)
        reached.append(signals)
        return found

    monkeypatch.setattr(WatchedModel, hook, interrupted)
    return reached


@pytest.mark.parametrize("hook", ["before", "after"])
def test_ctrl_c_waits_for_a_measurement_and_costs_nothing_of_the_window(
    hook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Watched()
    with run.watch as watch:
        run.train(14)
        handler = signal.getsignal(signal.SIGINT)
        with monkeypatch.context() as patch:
            reached = _signalled(patch, hook, 1)
            with pytest.raises(KeyboardInterrupt):
                run.train(1)
        assert reached == [0, 1] and signal.getsignal(signal.SIGINT) is handler
    assert watch.last is not None
    assert (watch.last.step, watch.last.window) == ((14, 6) if hook == "before" else (15, 7))
    assert [str(t.health) for t in watch.last.tensors] == ["stalled"]


def test_a_second_ctrl_c_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Watched()
    with run.watch as watch:
        run.train(14)
        handler = signal.getsignal(signal.SIGINT)
        with monkeypatch.context() as patch:
            reached = _signalled(patch, "after", 2)
            with pytest.raises(KeyboardInterrupt):
                run.train(1)
        assert reached == [0, 1] and signal.getsignal(signal.SIGINT) is handler
    assert watch.last is not None and (watch.last.step, watch.last.window) == (8, 8)


def test_a_handler_of_the_users_own_is_called_once_and_an_ignored_ctrl_c_stays_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        run = Watched()
        with run.watch, monkeypatch.context() as patch:
            reached = _signalled(patch, "after", 1)
            run.train(1)
            assert (caught, reached) == ([signal.SIGINT], [0, 1])
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        run = Watched()
        with run.watch, monkeypatch.context() as patch:
            reached = _signalled(patch, "after", 3)
            run.train(1)
            assert reached == [0, 1, 2, 3] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_waiting_leaves_nothing_to_the_garbage_collector() -> None:
    run = Watched()
    with run.watch:
        run.train(2)
        gc.collect()
        gc.disable()  # as some trainings do
        try:
            run.train(8)
            assert not [one for one in gc.get_objects() if isinstance(one, Waiting)]
        finally:
            gc.enable()


def test_an_interrupt_in_a_measurement_leaves_the_verdicts_of_the_windows_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    run = Watched()
    with run.watch as watch:
        run.train(10)
        with monkeypatch.context() as patch:
            patch.setattr(WatchedModel, "before", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run.train(1)
    assert watch.last is not None  # the two steps that were torn are no window
    assert (watch.last.step, watch.last.window) == (8, 8)
    assert [str(t.health) for t in watch.last.tensors] == ["stalled"]
