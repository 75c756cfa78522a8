"""Large models on a CPU, without a budget: after the first windows each is of a part of the model, and costs the same however large that is."""

from __future__ import annotations

import random
import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import update_watch as uw
from bench.overhead import Operators
from update_watch.measure.device.panels import FEW
from update_watch.measure.device_rows import DeviceRows
from update_watch.measure.step_order import Roster
from update_watch.report import Cause, Health, Report
from update_watch.watching import attention

WINDOW, SIDE = 32, 16


@pytest.fixture(autouse=True)
def short_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows of all of the model, which are more otherwise."""
    monkeypatch.setattr(attention, "FIRST_WINDOWS", 2)
    monkeypatch.setattr(attention, "FIRST_STEPS", 1)


class Training:
    """Many small BF16 tensors under SGD; a gradient of 1 moves a weight by some of its gaps."""

    def __init__(self, tensors: int, seed: int = 0) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self.params = [nn.Parameter(self._normal((SIDE, SIDE), 0.02)) for _ in range(tensors)]
        self.names = [f"layers.{i}.weight" for i in range(tensors)]
        self._gradients = torch.empty(tensors, SIDE, SIDE, dtype=torch.bfloat16)
        for p, of in zip(self.params, self._gradients, strict=True):
            p.grad = of
        self.sizes = torch.ones(tensors, 1, 1)
        self.optimizer = torch.optim.SGD(self.params, lr=1e-3)
        self.overwritten: dict[int, Tensor] = {}

    def _normal(self, shape: tuple[int, ...], size: float) -> Tensor:
        return (torch.randn(shape, generator=self._random) * size).bfloat16()

    def watch(self, budget: float | None = None, **options: Any) -> uw.Watch:
        named = list(zip(self.names, self.params, strict=True))
        return uw.watch(named, self.optimizer, window=WINDOW, budget=budget, **options)

    def overwrite(self, i: int) -> None:
        """From now on after each step."""
        self.overwritten[i] = self.params[i].detach().clone()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self._gradients.copy_(torch.randn(self._gradients.shape, generator=self._random) * self.sizes)
            self.optimizer.step()
            for i, values in self.overwritten.items():
                self.params[i].data.copy_(values)

    def windows(self, count: int, watch: uw.Watch) -> None:
        for _ in range(count):
            self.steps(WINDOW)
            watch._judge.wait()


def looked_at(report: Report) -> set[str]:
    return {t.name for t in report.tensors if t.efficiency is not None}


def test_each_panel_has_one_window_of_as_many_as_there_are_in_no_fixed_order() -> None:
    panels = [[f"{p}{k}" for k in range(2)] for p in range(5)]
    everybody = [[one for panel in panels for one in panel][k::4] for k in range(4)]
    roster: Roster[str] = Roster(everybody, 16, random.Random(0), panels, cycle=4)
    rounds: list[tuple[int | None, ...]] = []
    for _ in range(30):
        found: list[int | None] = []
        for _ in panels:
            roster.open_window(is_full=False)
            found.append(roster.panel)
            seen = Counter(one for _ in range(16) for one in roster.next(1)[0])
            assert seen == dict.fromkeys(panels[roster.panel or 0], 4)
        rounds.append(tuple(found))
    assert {frozenset(one) for one in rounds} == {frozenset(range(5))} and len(set(rounds)) > 20
    roster.open_window(is_full=True)
    assert Counter(one for _ in range(16) for one in roster.next(1)[0]) == dict.fromkeys(sum(panels, []), 4)


@pytest.mark.parametrize(
    ("tensors", "budget", "are_all"), [(FEW, None, True), (FEW + 1, None, False), (FEW + 1, 0.01, True)]
)
def test_only_models_of_more_tensors_than_fit_are_looked_at_in_parts_and_none_by_budget(
    tensors: int, budget: float | None, are_all: bool
) -> None:
    training, found = Training(tensors), []
    with training.watch(budget, sinks=[found.append]) as watch:
        (watched,) = watch._model.watched.values()
        assert (watched._plan_of.panels == 1) == are_all
        training.windows(4, watch)
        watch.flush()
    assert [len(looked_at(report)) == tensors for report in found] == [True, True, are_all, are_all]


def test_verdicts_are_right_and_what_changes_late_is_noticed() -> None:
    tensors, panels, change = FEW + 20, 11, 4
    training, found = Training(tensors), []
    small, late, gone, late_gone = range(0, 20), range(100, 140), range(200, 210), range(300, 310)
    training.sizes[list(small)] = 1e-3
    for i in gone:
        training.overwrite(i)
    with training.watch(sinks=[found.append]) as watch:
        training.windows(change, watch)
        training.sizes[list(late)] = 1e-3
        for i in late_gone:
            training.overwrite(i)
        training.windows(2 * panels, watch)
        watch.flush()
    kinds = {"stalled": {*small}, "gone": {*gone}, "late": {*late}, "late gone": {*late_gone}}
    well = {*range(tensors)}.difference(*kinds.values())
    for number, report in enumerate(found[2:], 3):
        is_accused = {i for i, t in enumerate(report.tensors) if t.health in (Health.stalled, Health.stalling)}
        assert kinds["stalled"] | kinds["gone"] <= is_accused, number
        assert not is_accused & well and all(report.tensors[i].health is Health.healthy for i in well), number
    causes = [t.cause for t in found[-1].tensors]
    assert {causes[i] for i in kinds["gone"] | kinds["late gone"]} == {Cause.overwritten}
    assert {causes[i] for i in kinds["stalled"] | kinds["late"]} == {Cause.weight_rounding}
    # each was looked at in one of as many windows as there are panels
    for first in (2, 2 + panels):
        seen = Counter(name for report in found[first : first + panels] for name in looked_at(report))
        assert seen == dict.fromkeys(training.names, 1)
    # and told at once then
    for i in kinds["late"] | kinds["late gone"]:
        turns = [n for n, r in enumerate(found) if n >= change and training.names[i] in looked_at(r)]
        told = next(n for n, r in enumerate(found) if n >= change and r.tensors[i].health is not Health.healthy)
        assert told == turns[0]


def test_it_is_the_same_to_the_bit_each_time() -> None:
    def run() -> list[list[tuple[Any, ...]]]:
        training, found = Training(FEW + 50), []
        with training.watch(sinks=[found.append]) as watch:
            training.windows(7, watch)
            watch.flush()
        return [[(t.name, t.health, t.efficiency, t.update_ratio) for t in r.tensors] for r in found]

    assert run() == run()


@pytest.mark.parametrize("what", ["rate", "group"])
def test_all_of_it_is_looked_at_in_the_window_after_a_change(what: str) -> None:
    training, found = Training(FEW + 20), []
    with training.watch(sinks=[found.append]) as watch:
        training.windows(3, watch)
        training.steps(5)
        if what == "rate":
            training.optimizer.param_groups[0]["lr"] *= 2
        else:
            more = nn.Parameter(torch.ones(4, 4))
            more.grad = torch.ones(4, 4)
            training.optimizer.add_param_group({"params": [more]})
        training.steps(WINDOW - 5)
        training.windows(2, watch)
        watch.flush()
    seen = [len(looked_at(report)) >= FEW + 20 for report in found]
    assert seen[:3] == [True, True, False] and seen[-2:] == [True, False]


@pytest.mark.parametrize("tensors", [400, pytest.param(3000, marks=pytest.mark.slow)])
def test_the_first_window_has_all_verdicts_and_numbers_as_a_full_comparison(tensors: int, rows_read: list[int]) -> None:
    training, window, found, read = Training(tensors), 128, [], []
    small = range(0, tensors, 20)
    training.sizes[list(small)] = 1e-3
    named = list(zip(training.names, training.params, strict=True))
    above, below = torch.zeros(2, tensors, dtype=torch.float64)
    with uw.watch(named, training.optimizer, window=window, budget=None, sinks=[found.append]) as watch:
        for _ in range(window):
            rows_read.clear()
            old = torch.stack([p.detach() for p in training.params]).double()
            training.steps(1)
            read.append(sum(rows_read))
            applied = torch.stack([p.detach() for p in training.params]).double() - old
            intended = -1e-3 * training._gradients.double()
            above += (applied * intended).sum((1, 2))
            below += intended.square().sum((1, 2))
        watch._judge.wait()
        watch.flush()
    assert sum(read) == 16 * tensors and max(read) <= 1.25 * tensors / 8  # a verdict needs six looks, a sure one more
    true, seen = above / below, found[0].tensors
    for i, tensor in enumerate(seen):
        is_accused = tensor.health in (Health.stalled, Health.stalling)
        assert is_accused if i in small else tensor.health is Health.healthy, (i, tensor.health)
        assert tensor.efficiency is not None and tensor.efficiency_error is not None
        assert abs(tensor.efficiency - float(true[i])) <= max(2 * tensor.efficiency_error, 0.02), i


class Calls:
    """Counts calls of Python functions."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Calls:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        self.count += event == "call"


def test_what_a_step_costs_does_not_grow_with_the_model() -> None:
    operators, calls = {}, {}
    for tensors in (400, 1000, 3000):
        training = Training(tensors)
        counter, called, alone, called_alone = Operators(), Calls(), Operators(), Calls()
        with training.watch() as watch:
            training.windows(3, watch)
            for _ in range(WINDOW):
                watch._judge.wait()
                with called, counter:
                    training.optimizer.step()
            watch.enabled = False
            with called_alone, alone:
                training.optimizer.step()
        operators[tensors] = counter.seen.total() - WINDOW * alone.seen.total()
        calls[tensors] = called.count - WINDOW * called_alone.count
    assert max(operators.values()) <= 1.05 * operators[400] and max(calls.values()) <= 1.05 * calls[400]


def test_the_panels_of_a_window_are_judged_as_one_block() -> None:
    calls = {}
    for tensors in (FEW + 1, 2 * FEW + 1):
        training, windows = Training(tensors), []
        with training.watch() as watch:
            judge, watch._judge._handle = watch._judge._handle, windows.append
            training.windows(2, watch)
            assert all(len({id(cohort.of_all) for cohort in window.cohorts}) == 1 for window in windows)
            judge(windows[0])
            counter = Calls()
            with counter:
                judge(windows[1])
            calls[tensors] = counter.count
            watch._judge._handle = judge
    panels = FEW // WINDOW
    assert calls[2 * FEW + 1] - calls[FEW + 1] <= 600 * panels  # as a block of its own each took 2,400


def test_in_each_step_about_as_much_is_added_as_is_measured_and_little_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    training, window, added, waiting = Training(1000), 128, [0], []
    add = DeviceRows.add

    def counted(block: DeviceRows) -> None:
        added[-1] += block.waiting
        add(block)

    monkeypatch.setattr(DeviceRows, "add", counted)
    named = list(zip(training.names, training.params, strict=True))
    with uw.watch(named, training.optimizer, window=window, budget=None) as watch:
        (watched,) = watch._model.watched.values()
        blocks, in_a_step = watched._plan_of.blocks, len(watched.cohorts) / 8
        for _ in range(window):
            training.steps(1)
            waiting.append(sum(block.waiting for block in blocks))
            added.append(0)
            watch._judge.wait()
    assert len(blocks) > 4 and sum(added) == window * in_a_step
    # each once four steps of it wait, which is for all panels at about the same time: four times as much in some steps
    assert max(added) <= 3 * in_a_step and max(waiting) <= 4 * in_a_step
    # at the window's end what its last step has measured, and hardly more
    assert added[window - 1] <= 2 * in_a_step and waiting[-1] == 0
