"""How many steps are looked at: the account of time, on a clock of its own; and `watch(budget=...)` on real training."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import update_watch as uw
from update_watch.report import Health, Report
from update_watch.watching import attention
from update_watch.watching.attention import FIRST_STEPS, FIRST_WINDOWS, Attention

WINDOW = 128


class Simulated:
    """Steps of `step` s with a watch whose looks, window ends and judging take so long."""

    def __init__(
        self, step: float, budget: float | None = 0.01, window: int = WINDOW, unseen: float = 5e-6, **options: Any
    ) -> None:
        self.now, self.unseen = 100.0, unseen
        self.attention = Attention(budget, window, clock=lambda: self.now, **options)
        self.step, self.window_steps, self.windows = step, 0, 0
        self.spent: list[float] = []  # per step
        self.looked: list[bool] = []
        self.shares: list[float | None] = []
        self.observed: list[int] = []
        self.is_known = True

    def take(self, count: int, optimizers: int = 1) -> None:
        for _ in range(count):
            spent = 0.0
            rests = optimizers == 1 and self.attention.rests()  # then nothing else is asked
            looks = {False} if rests else {self.attention.looks(key, self.window_steps) for key in range(optimizers)}
            assert len(looks) == 1
            look = looks.pop()
            spent += self._spend(1e-3 if look else self.unseen)
            for _ in range(optimizers if look else 0):
                self.attention.saw()
            self.window_steps += 1
            if look and self.attention.may_close(self.window_steps):
                spent += self._spend(4e-3)
                _, observed, share, _ = self.attention.close_window()
                self.observed.append(observed)
                self.shares.append(share)
                self.window_steps, self.windows = 0, self.windows + 1
                self.attention.judged(report(self.is_known))
            self.now += self.step
            self.spent.append(spent)
            self.looked.append(look)

    def _spend(self, seconds: float) -> float:
        self.now += seconds
        self.attention.spend(seconds)
        return seconds

    def share(self, since: int) -> float:
        spent = sum(self.spent[since:])
        return spent / (spent + self.step * len(self.spent[since:]))


def report(is_known: bool, health: str = "healthy", net: float = 1.0) -> Report:
    health = health if is_known else "unknown"
    tensor = SimpleNamespace(name="w", health=Health(health), cause=None, net_efficiency=net)
    return SimpleNamespace(tensors=(tensor,))  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def _a_budget_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "always", False)


@pytest.mark.parametrize("step", [0.005, 0.013, 0.05, 0.3])
def test_the_budget_is_held_within_a_fifth(step: float) -> None:
    run = Simulated(step)
    run.take(3000)
    if step < 0.1:
        assert run.share(1000) == pytest.approx(0.01, rel=0.2)
    else:  # all that there is to be seen costs less
        assert all(run.looked) and run.share(1000) < 0.01


@pytest.mark.parametrize("budget", [0.003, 0.05, 0.2])
def test_any_budget_is_held(budget: float) -> None:
    run = Simulated(0.004, budget)
    run.take(6000)
    assert run.share(1000) == pytest.approx(min(budget, run.share(0)), rel=0.2)


@pytest.mark.parametrize("window", [8, WINDOW])
def test_all_of_the_first_steps_are_seen_though_every_tensor_has_a_verdict(window: int) -> None:
    run = Simulated(0.005, window=window)
    run.take(FIRST_STEPS)
    assert all(run.looked) and run.windows == FIRST_STEPS // window
    run.take(1000)
    assert sum(run.looked[FIRST_STEPS:]) < 200


def test_what_did_not_stay_in_one_window_wakes_for_another() -> None:
    run = Simulated(0.02)
    run.take(8000)
    assert sum(run.looked[-40:]) < 40
    run.attention.judged(report(True, net=0.1))
    run.take(200)
    # once the burst before is paid for, and to the end of the window
    assert "x" * (3 * WINDOW // 4) in "".join("x" if look else "." for look in run.looked[-200:])


def test_all_steps_are_seen_for_four_windows_where_a_tensor_stays_unknown() -> None:
    run = Simulated(0.005)
    run.is_known = False
    run.take(2000)
    seen = FIRST_WINDOWS * WINDOW
    assert all(run.looked[:seen]) and sum(run.looked[seen:]) < 300


def test_without_a_budget_every_step_is_seen_and_windows_end_on_time() -> None:
    run = Simulated(0.0003, None)
    run.take(10 * WINDOW)
    assert all(run.looked) and run.windows == 10 and set(run.observed) == {WINDOW}


def test_steps_are_seen_in_bursts_and_windows_wait_for_a_fourth_of_theirs() -> None:
    run = Simulated(0.005)
    run.take(8000)
    text = "".join("x" if look else "." for look in run.looked[WINDOW + 8 :])
    assert {len(part) for part in text.strip("x").split(".") if part} <= {8, 16}
    assert all(WINDOW // 4 <= observed for observed in run.observed[1:])
    assert run.shares[-1] is not None and run.shares[-1] == pytest.approx(0.01, rel=0.5)


def test_a_changed_verdict_wakes_for_a_window_and_not_again_before_it_is_paid_for() -> None:
    run = Simulated(0.02)
    run.take(8000)
    run.attention.judged(report(True, "stalled"))
    run.take(200)
    assert all(run.looked[-190:-80])
    run.attention.judged(report(True))
    run.take(100)
    assert sum(run.looked[-90:]) == 0


def test_steps_that_pass_unseen_leave_something_for_looks() -> None:
    """Where they cost more than the budget of a step they would take all of it, and nothing were seen again."""
    run = Simulated(0.005, unseen=80e-6)
    run.take(12000)
    looked = [1e-3 * look for look in run.looked[1000:]]
    assert sum(looked) == pytest.approx(0.5 * 0.01 * 0.005 * len(looked), rel=0.3) and run.windows > 4


def test_a_window_that_has_been_open_for_long_is_not_the_one_seen_in_full() -> None:
    """It ends with the first step that is looked at."""
    run = Simulated(0.02)
    run.take(8000)
    for _ in range(2000):
        if run.window_steps > WINDOW and run.attention.wake():
            break
        run.take(1)
    else:
        pytest.fail("no window was open for long")
    run.take(200)
    assert "x" * (WINDOW // 2) in "".join("x" if look else "." for look in run.looked[-200:])
    assert sum(run.looked[-200:]) < WINDOW + 24
    run.take(200)
    assert sum(run.looked[-200:]) < 24


def test_a_window_of_which_nothing_was_seen_goes_on() -> None:
    """When it is woken for as well: it ended before the first look, and was reported as if the verdict had been seen anew."""
    run = Simulated(0.02)
    run.take(600)
    for _ in range(4000):
        if run.window_steps > WINDOW and not run.attention.observed:
            break
        run.attention._account = -1.0
        run.take(1)
    else:
        pytest.fail("no window was open for long without a look")
    run.attention._account = 0.0
    assert run.attention.wake() and not run.attention.may_close(run.window_steps)
    run.attention.saw()
    assert not run.attention.may_close(run.window_steps)
    run.take(WINDOW // 4)
    assert run.observed[-1] >= WINDOW // 4 and min(run.observed) > 0


def test_what_the_first_windows_owe_is_paid_before_a_window_is_seen_in_full() -> None:
    """With short steps a window in full takes the budget of thousands of them."""
    run = Simulated(0.005)
    run.take(400)
    owed = 1.9 * run.attention._burst_cost
    assert owed > 0
    assert run.attention._at is not None
    has = run.attention._account + 0.01 * (run.now - run.attention._at)
    run.attention._account -= owed + has  # judging the first windows took long
    run.attention.judged(report(True, "stalled"))
    run.take(60)
    assert sum(run.looked[-60:]) == 0
    run.take(2000)
    text = "".join("x" if look else "." for look in run.looked[-2000:])
    # what is told after a burst may wake again; a whole window would be a tenth of what the run takes
    assert "x" * 16 in text and "x" * 32 not in text


@pytest.mark.parametrize("step", [0.005, 0.013])
def test_a_window_that_cannot_be_looked_at_to_its_end_is_told_when_its_steps_are_over(step: float) -> None:
    """What it was woken for waited for the looks of thousands of steps more."""
    run = Simulated(step)
    run.take(4000)
    windows = run.windows
    for _ in range(4000):
        run.take(1)
        if run.windows > windows:
            break
    run.attention.judged(report(True, "stalled"))
    run.attention._account = 0.0  # the burst before is paid for
    run.take(WINDOW)
    assert run.windows == windows + 2 and WINDOW // 8 < run.observed[-1] < WINDOW - 16
    assert run.looked[-1] and sum(run.looked[-WINDOW:]) == run.observed[-1]
    before = len(run.looked)
    run.take(3000)
    assert run.share(before) < 0.0105  # that look and the window's end are paid for as well


@pytest.mark.parametrize("step", [0.005, 0.013, 0.05, 0.3])
def test_the_budget_is_held_where_verdicts_change_again_and_again(step: float) -> None:
    run = Simulated(step)
    for k in range(60):
        run.take(50)
        run.attention.judged(report(True, "stalled" if k % 2 else "healthy"))
    assert run.share(1000) < 0.012 and (run.share(1000) > 0.008 or all(run.looked[1000:]))
    assert "x" * 16 in "".join("x" if look else "." for look in run.looked[1000:])


def test_optimizers_that_step_in_turn_agree() -> None:
    run = Simulated(0.005)
    run.take(2000, optimizers=3)


def test_windows_of_several_processes_end_at_their_step() -> None:
    run = Simulated(0.001, is_exact=lambda: True)
    run.take(20 * WINDOW)
    assert run.windows == 20


def test_a_long_pause_does_not_pay_for_the_steps_after_it() -> None:
    run = Simulated(0.005)
    run.take(1100)
    run.now += 600  # a validation
    before = len(run.spent)
    run.take(1)
    run.take(400)
    # what those steps themselves allow, two bursts saved up and one that has begun
    assert sum(run.spent[before:]) < 0.01 * 401 * 0.006 + 3 * 0.0085 + 0.004


# --- in training ----------------------------------------------------------------------------------------


@pytest.fixture
def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        x = torch.randn(4, 16)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_a_watched_run_counts_all_steps_and_says_how_many_it_saw(
    training: tuple[nn.Module, torch.optim.Optimizer],
) -> None:
    model, optimizer = training
    with uw.watch(model, optimizer, window=16, budget=0.05) as watch:
        steps(model, optimizer, 256)  # all of them are looked at
        watch._judge.wait()
        time.sleep(0.01)
        steps(model, optimizer, 4000)
        last = watch.flush()
        assert watch.step == 4256 and watch._tap.error is None
    assert last is not None and last.observed_steps is not None and last.window is not None
    assert 0 < last.observed_steps < last.window / 2
    assert last.cost_share is not None and 0 < last.cost_share < 1  # of a window that may be one burst
    assert all(t.efficiency == pytest.approx(1, abs=0.01) for t in last.tensors)


def test_a_jump_of_the_learning_rate_and_a_new_group_wake(
    training: tuple[nn.Module, torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = training
    with uw.watch(model, optimizer, window=16, budget=0.01) as watch:
        steps(model, optimizer, 400)
        woken: list[int] = []
        monkeypatch.setattr(watch._attention, "wake", lambda: woken.append(watch.step))
        monkeypatch.setattr(watch._attention, "looks", lambda *_: False)
        steps(model, optimizer, 5)
        assert woken == []
        optimizer.param_groups[0]["lr"] *= 2
        steps(model, optimizer, 5)
        assert len(woken) == 1
        optimizer.param_groups[0]["lr"] *= 1.1
        steps(model, optimizer, 5)
        assert len(woken) == 1
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
        steps(model, optimizer, 1)
        assert len(woken) == 2
        # one that is made anew for the same tensors, as stages of a training do; its rate may be any
        steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
        assert len(woken) == 3
        assert watch._tap.error is None


@pytest.mark.parametrize("budget", [0, -0.1, 1.5, True, "1%", float("nan")])
def test_a_budget_that_is_no_share_is_refused(budget: Any, training: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    with pytest.raises(ValueError, match=r"watch\(budget=.*None looks at every step"):
        uw.watch(*training, budget=budget)


def test_an_average_is_not_judged_over_steps_that_passed_unseen(
    training: tuple[nn.Module, torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = training
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    with uw.watch(model, optimizer, window=10_000, averages={"ema": (average, 0.9)}) as watch:
        for i in range(200):
            # never two in a row, then some in a row: updates are only seen between neighbours
            monkeypatch.setattr(watch._attention, "looks", lambda *_, i=i: i % 2 == 0 if i < 100 else i % 10 < 8)
            steps(model, optimizer, 1)
            average.update_parameters(model)
        report = watch.flush()
    assert report is not None
    seen = [t.accumulators["average:ema"] for t in report.tensors]
    assert [a.efficiency for a in seen] == [pytest.approx(1, abs=1e-4)] * len(seen)
