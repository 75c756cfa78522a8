"""`watch(model)`: what steps the model is found, whatever object hides it, and nothing else is."""

from __future__ import annotations

import copy
import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

import update_watch as uw
from tests.support.watch_nets import Net, backward, batches, train
from update_watch.measure.hooks.process_steps import ProcessSteps


def adamw(params: Any, lr: float = 1e-3) -> Optimizer:
    return torch.optim.AdamW(params, lr=lr)


class Container(Optimizer):
    """Holds all parameters and lets two others step."""

    def __init__(self, model: Net) -> None:
        self.optimizers = [adamw(model.enter.parameters()), adamw([model.norm.weight, model.leave.weight])]
        super().__init__(model.parameters(), {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self.optimizers:
            one.step()


class SlowWeights(Optimizer):
    """An outer rule around an inner one, as Lookahead: every fifth step goes back half of the way."""

    def __init__(self, model: Net) -> None:
        self.base_optimizer = adamw(model.parameters())
        super().__init__(model.parameters(), {})
        self.slow = [p.detach().clone() for p in model.parameters()]
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base_optimizer.step()
        self.count += 1
        if self.count % 5 == 0:
            for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)


class Hidden:
    """No optimizer by its type, as wrappers of trainers are."""

    def __init__(self, model: Net) -> None:
        self._rules = {"all": adamw(model.parameters())}

    def step(self) -> None:
        self._rules["all"].step()


class OnePerParameter:
    def __init__(self, model: Net) -> None:
        self.all = [adamw([p]) for p in model.parameters()]

    def step(self) -> None:
        for one in self.all:
            one.step()


class Masters(Optimizer):
    """Fills the gradients of FP32 masters in its own step and lets another one step them."""

    def __init__(self, model: Net) -> None:
        self.model = model
        self.masters = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
        self.inner = adamw(self.masters)
        super().__init__(model.parameters(), {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for master, p in zip(self.masters, self.model.parameters(), strict=True):
            master.grad = None if p.grad is None else p.grad.float()
        self.inner.step()
        for master, p in zip(self.masters, self.model.parameters(), strict=True):
            p.copy_(master)


NAMES = ["enter.weight", "enter.bias", "norm.weight", "leave.weight"]
HIDING: list[Callable[[Net], Any]] = [
    lambda model: adamw(model.parameters()),
    Container,
    SlowWeights,
    Hidden,
    OnePerParameter,
]


@pytest.mark.parametrize("make", HIDING, ids=["plain", "container", "outer rule", "hidden", "one per parameter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_steps_the_model_is_found_and_measured(make: Callable[[Net], Any], dtype: torch.dtype) -> None:
    model = Net(dtype)
    with uw.watch(model, window=16) as watch:
        train(model, [make(model)], 32)  # made after the watch
        report = watch.flush()
    assert report is not None and report.step == 32
    assert [t.name for t in report.tensors] == NAMES
    stalled = {t.name for t in report.tensors if t.health is uw.Health.stalled}
    assert stalled == (set() if dtype is torch.float32 else {"norm.weight"})  # 1e-3 beside ones
    assert not [t for t in report.tensors if t.health is uw.Health.unknown]


@pytest.mark.parametrize("make", HIDING, ids=["plain", "container", "outer rule", "hidden", "one per parameter"])
def test_training_is_the_same_to_the_bit_when_it_is_found_by_its_steps(make: Callable[[Net], Any]) -> None:
    plain, watched = Net(torch.bfloat16), Net(torch.bfloat16)
    torch.manual_seed(3)
    train(plain, [make(plain)], 20)
    drawn = torch.rand(4)
    torch.manual_seed(3)
    with uw.watch(watched, window=8):
        train(watched, [make(watched)], 20)
        assert torch.equal(torch.rand(4), drawn)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


def test_masters_that_are_filled_inside_a_step_are_watched_by_the_inner_rule() -> None:
    model = Net(torch.bfloat16)
    with uw.watch(model, window=16) as watch:
        train(model, [Masters(model)], 32)
        report = watch.flush()
    assert report is not None
    assert {t.name: (t.dtype, str(t.health)) for t in report.tensors} == dict.fromkeys(NAMES, ("float32", "healthy"))


def test_the_verdicts_are_those_of_a_watch_that_was_given_the_optimizer() -> None:
    reports = []
    for is_given in (True, False):
        model = Net(torch.bfloat16)
        optimizer = adamw(model.parameters(), lr=1e-4)
        with uw.watch(model, optimizer if is_given else None, window=16) as watch:
            train(model, optimizer, 32)
            reports.append(watch.flush())
    given, found = reports
    assert given is not None and found is not None
    assert [(t.name, t.health, t.cause, t.efficiency) for t in given.tensors] == [
        (t.name, t.health, t.cause, t.efficiency) for t in found.tensors
    ]


def test_optimizers_of_other_models_are_let_be_even_where_all_values_are_the_same() -> None:
    mine, other = Net(), Net()  # one seed
    with uw.watch(mine, window=4) as watch:
        train(other, adamw(other.parameters()), 8)
        assert watch.flush() is None or watch.last is None or not watch._model.watched
        optimizer = adamw(mine.parameters())
        train(mine, optimizer, 8)
        assert [one.optimizer for one in watch._model.watched.values()] == [optimizer]


def test_two_watched_models_do_not_meet() -> None:
    one, two = Net(), Net(seed=1)
    with uw.watch(one, window=8) as first, uw.watch(two, window=8) as second:
        a, b = adamw(one.parameters()), adamw(two.parameters())
        train(one, a, 8)
        train(two, b, 8)
        assert [w.optimizer for w in first._model.watched.values()] == [a]
        assert [w.optimizer for w in second._model.watched.values()] == [b]


def test_a_copy_that_gets_the_models_gradients_is_its_master_though_a_module_holds_it() -> None:
    model = Net(torch.bfloat16)
    masters = copy.deepcopy(model).float()
    optimizer = adamw(masters.parameters())
    with uw.watch(model, window=8) as watch:
        for x in batches(16, torch.bfloat16):
            model.zero_grad()
            backward(model, x)
            for master, p in zip(masters.parameters(), model.parameters(), strict=True):
                master.grad = None if p.grad is None else 0.5 * p.grad.float()  # clipped
            optimizer.step()
            with torch.no_grad():
                for master, p in zip(masters.parameters(), model.parameters(), strict=True):
                    p.copy_(master)
        report = watch.flush()
    assert report is not None
    assert {t.name: str(t.health) for t in report.tensors} == dict.fromkeys(NAMES, "healthy")


def test_the_hooks_of_the_process_are_gone_when_the_watch_is_closed() -> None:
    before = len(torch_optimizer._global_optimizer_pre_hooks)
    model = Net()
    with uw.watch(model):
        assert 1 <= len(torch_optimizer._global_optimizer_pre_hooks) <= before + 1
        train(model, adamw(model.parameters()), 2)
    assert len(torch_optimizer._global_optimizer_pre_hooks) <= before
    assert not torch_optimizer._global_optimizer_post_hooks


def test_a_watch_may_be_closed_within_a_step() -> None:
    model = Net()
    optimizer = adamw(model.parameters())
    watch = uw.watch(model)
    seen = torch_optimizer.register_optimizer_step_pre_hook(lambda *_: watch.close())
    try:
        train(model, optimizer, 3)  # torch goes through the hooks while ours is taken away
    finally:
        seen.remove()


def test_watches_come_and_go_while_another_thread_steps() -> None:
    """torch goes through its hooks there: one more, or one less, would raise in the training loop."""
    model, other = Net(), Net()
    optimizer = adamw(model.parameters())

    def come_and_go(stepped: Optimizer, *_: Any) -> None:
        if stepped is not optimizer:
            return

        def watch() -> None:
            with uw.watch(other):
                train(other, adamw(other.parameters()), 1)

        thread = threading.Thread(target=watch)
        thread.start()
        thread.join()

    with uw.watch(model) as first:
        seen = torch_optimizer.register_optimizer_step_pre_hook(come_and_go)
        behind = torch_optimizer.register_optimizer_step_pre_hook(lambda *_: None)
        try:
            model.zero_grad()
            backward(model, batches(1)[0])
            optimizer.step()
        finally:
            seen.remove()
            behind.remove()
        report = first.flush()
    assert report is not None and report.step == 1


def test_a_step_that_is_compiled_is_found_and_stays_the_same() -> None:
    def run(is_watched: bool) -> list[Tensor]:
        model = Net()
        optimizer = adamw(model.parameters())
        watch = uw.watch(model, window=4) if is_watched else None
        step = torch.compile(optimizer.step, backend="eager")
        for x in batches(8):
            model.zero_grad()
            backward(model, x)
            step()
        if watch is not None:
            report = watch.flush()
            watch.close()
            assert report is not None and report.step == 8
            assert {str(t.health) for t in report.tensors} == {"healthy"}
        return [p.detach() for p in model.parameters()]

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


def test_an_optimizer_that_is_asked_about_is_not_kept_alive() -> None:
    met: list[int] = []

    class Asker:
        def meet(self, optimizer: Optimizer) -> bool:
            met.append(len(optimizer.param_groups[0]["params"]))
            return False

    asker = Asker()
    steps = ProcessSteps(asker.meet)
    steps.start()
    try:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
        optimizer.step()
        optimizer.step()
        assert met == [1]
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
        optimizer.step()
        assert met == [1, 1]  # asked again
        gone = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert gone() is None
    finally:
        steps.stop()
    torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1).step()
    assert met == [1, 1]


def test_an_optimizer_made_anew_for_every_step_is_said_once_and_neither_heaped_up_nor_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing may grow: of those that step the same tensors the latest eight are kept, and one trial serves all."""
    reports: list[uw.Report] = []
    model = Net()
    made: list[weakref.ref[Optimizer]] = []
    with uw.watch(model, window=16, budget=None, sinks=[reports.append]) as watch:
        for x in batches(128):
            optimizer = adamw(model.parameters())
            made.append(weakref.ref(optimizer))
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
            assert len(watch._model.watched) <= 8
        trials = [key for key in watch._model.found if key[0] == "rule"]
        del optimizer
        until = time.monotonic() + 10.0
        while sum(one() is not None for one in made) > 8 and time.monotonic() < until:
            time.sleep(1e-3)  # windows that are still to be judged hold theirs
            gc.collect()
        assert sum(one() is not None for one in made) <= 8
    assert len(trials) == 3  # of two shapes of matrices, of vectors
    assert reports[-1].step == 128
    # one step of a window is known
    doubtful = [t for t in reports[-1].tensors if t.health is not uw.Health.healthy]
    assert len(doubtful) < len(reports[-1].tensors) and all("a standard error of" in t.advice for t in doubtful)
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(told) == 1 and "a new AdamW is made for the same tensors again and again" in told[0]


def test_two_optimizers_that_step_the_same_tensors_in_turn_stay_watched(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    pair = [torch.optim.SGD(model.parameters(), lr=0.05), adamw(model.parameters())]
    with uw.watch(model, window=16, budget=None) as watch:
        for i, x in enumerate(batches(64)):
            backward(model, x)
            pair[i % 2].step()
            pair[i % 2].zero_grad()
        report = watch.flush()
        assert len(watch._model.watched) == 2
    assert report is not None and {t.health for t in report.tensors} == {uw.Health.healthy}
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
